"""The report of a run: what it marks, what it notes first, that nothing in it is lost, and that names stay text."""

import base64
import copy
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from temposae.engine.config import RunConfig, SAEConfig, StreamConfig, TrainConfig
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.storage import checkpoint
from temposae.engine.storage.checkpoint import find, place
from temposae.evals import (
    absorption,
    clusters,
    mdl,
    meta_structure,
    ravel,
    run_figures,
    sae_probes,
    sparse_probing,
    suite,
    unlearning,
)
from temposae.evals import ground_truth as truth
from temposae.evals.core import core
from temposae.evals.evaluation import Evaluation
from temposae.evals.fidelity import fidelity
from temposae.evals.intervals import Outcomes, interval
from temposae.evals.meta_recipes import RECIPES
from temposae.evals.multiple_choice import fact_questions
from temposae.evals.positions import positions
from temposae.evals.report import MARK, MORE, SUMMARY, compose, write_report
from temposae.evals.run_evals import VERSION, evaluate
from temposae.evals.scr_tpp import scr, tpp
from temposae.evals.suite import EVALS
from temposae.evals.word_order import order_probing
from temposae.reporting.markdown import html, number

from ..commandline import run as command
from .probe_data import by_length, write_set
from .test_saebench import RESULTS

FACTS = {"model": "testbed", "hook": "blocks.1.hook_resid_post", "activation": "topk", "F": "64"}
ROWS = 256
CFG = SAEConfig(d_in=128, d_sae=64, k=4)
RUN = RunConfig(stream=StreamConfig(hook="blocks.1.hook_resid_post"), sae=CFG, train=TrainConfig(tokens=1024))


@pytest.fixture(scope="module")
def measured(testbed, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Every eval's own result on few rows of a dictionary that isn't trained."""
    from temposae.engine.stream import ActivationStream

    def few(*given: Any) -> Any:
        asked = fact_questions(*given)
        return asked.only(torch.arange(0, len(asked.forget), 16))

    stream = ActivationStream(StreamConfig(buffer_tokens=4096, rows_per_forward=32), model=testbed)
    evaluation = Evaluation(stream, SparseAutoencoder(CFG), SparseAutoencoder(CFG))
    write_set(texts := tmp_path_factory.mktemp("texts"), "7_length", by_length(240))
    lengths = mdl.mdl(evaluation, rows=ROWS)
    evaluation.protocol = "saebench"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_probing, "ROWS", ROWS)
        patch.setattr(sparse_probing, "full_width", lambda split, draw: 0.5)  # the slow parts
        patch.setattr(truth, "MOST", 25)
        patch.setattr(absorption, "TIMES", 4)
        patch.setattr(clusters, "ROWS", ROWS)
        patch.setitem(RECIPES, "saebench", replace(RECIPES["saebench"], steps=8))
        patch.setattr(meta_structure, "ROWS", ROWS)
        patch.setattr(unlearning, "fact_questions", few)
        patch.setattr(ravel, "TRAIN", 8)
        patch.setattr(ravel, "TEST", 8)
        patch.setattr(ravel, "EPOCHS", 1)
        position = positions(evaluation, rows=ROWS, bins=4, shuffles=1)
        position["fidelity"] = fidelity(evaluation, rows=ROWS, bins=4, ce_rows=4, shift_rows=4)
        found = {
            "core": core(stream, evaluation.sae, {"random": SparseAutoencoder(CFG)}, rows=16, ce_rows=4),
            "sparse_probing": sparse_probing.sparse_probing(evaluation, ["topic", "tone"], ks=(1, 5)),
            "sae_probes": sae_probes.sae_probes(evaluation, [f"all?path={texts}"], ks=(1, 16), penalty="l2"),
            "positions": position | {"order_probing": order_probing(evaluation, pairs=16)},
            "ground_truth": truth.ground_truth(evaluation, rows=ROWS),
            "unlearning": unlearning.unlearning(
                evaluation, rows=ROWS, thresholds=(0.01, 1.0), latents=(2,), multipliers=(1, 25)
            ),
            "clusters": clusters.clusters(evaluation),
            "absorption": absorption.absorption(evaluation, rows=ROWS),
            "mdl": lengths,
            "meta_structure": meta_structure.meta_structure(evaluation),
            "ravel": ravel.ravel(evaluation),
            "tpp": tpp(evaluation, rows=ROWS, seeds=2),
            "scr": scr(evaluation, rows=ROWS, seeds=2),
        }  # fmt: skip
    assert list(found) == list(EVALS)
    return json.loads(json.dumps(found))


@pytest.fixture
def results(measured) -> dict[str, dict[str, Any]]:
    """The same, to be changed, as they are kept."""
    of = {"dictionary": "0" * 64, "seed": 0, "given": {}, "version": VERSION}
    return {name: copy.deepcopy(result) | {"seconds": 1.25, "of": of} for name, result in measured.items()}


@pytest.fixture(scope="module")
def report(measured, tmp_path_factory) -> Path:
    """A run folder that holds them, and their report."""
    run = tmp_path_factory.mktemp("report") / "run"
    checkpoint.write(place(run, 4), 4, {"sae": (CFG, SparseAutoencoder(CFG).state_dict())}, run=RUN)
    line = {"step": 4, "tokens": 1024, "loss": 1.0, "fvu": 0.5, "l0": 4.0, "dead_fraction": 0.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run / "evals").mkdir()
    for name, result in measured.items():
        keep(run, name, result | {"seconds": 1.25, "of": {"seed": 0, "given": {}, "version": VERSION}})
    write_report(run, find(run), VERSION)
    return run


@pytest.fixture
def folder(report, tmp_path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(report, tmp_path / "run")
    return tmp_path / "run"


def keep(run: Path, name: str, result: dict[str, Any]) -> None:
    digest = find(run).manifest["files"]["sae.safetensors"]["sha256"]
    (run / "evals" / f"{name}.json").write_text(json.dumps(result | {"of": {"dictionary": digest} | result["of"]}))


def only(run: Path, *names: str) -> None:
    for path in (run / "evals").iterdir():
        if path.stem not in names:
            path.unlink()


def kept(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "evals" / f"{name}.json").read_text())


def read(run: Path) -> tuple[str, "Page"]:
    return (run / "report.md").read_text(), Page((run / "report.html").read_text())


def written(run: Path) -> tuple[str, "Page"]:
    """The report, written anew, as Markdown and as a page."""
    assert write_report(run, find(run), VERSION) == run / "report.md"
    return read(run)


def noted(markdown: str) -> list[tuple[str, ...]]:
    """Eval, note and reason of each line of the table of what is to be known first."""
    return table_under(markdown, "What to know first")


def table_under(markdown: str, heading: str) -> list[tuple[str, ...]]:
    """The cells of the first table under a heading, without its own headings."""
    lines = re.split(rf"^##+ {re.escape(heading)}$", markdown, flags=re.M)[1].split("\n#")[0].strip().splitlines()
    lines = lines[next((i for i, line in enumerate(lines) if line.startswith("| ")), len(lines)) :]
    lines = lines[: next((i for i, line in enumerate(lines) if not line.startswith("| ")), len(lines))]
    return [tuple(cell.strip() for cell in line[1:-1].split(" | ")) for line in lines[2:]]


def glance(markdown: str) -> dict[str, list[str]]:
    """Rows of the scores at a glance, by "eval: score", without the mark of those of which more is better."""
    rows, name = {}, ""
    for first, label, *cells in table_under(markdown, "Scores at a glance"):
        name = first[1:].partition("]")[0] if first else name
        rows[f"{name}: {label.removesuffix(f' {MORE}')}"] = cells
    return rows


class Page(HTMLParser):
    """Tags with their attributes, the cells of each table's rows, and all text."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.tags, self.tables, self.text = source, [], [], ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data


def test_a_score_that_a_control_reaches_is_marked_with_the_control(results):
    results["scr"] |= {"score": 0.5, "reached_by": []}
    results["tpp"] |= {"score": 0.1, "reached_by": ["lm_neurons"]}
    results["tpp"]["controls"]["lm_neurons"]["score"] = 0.25
    results["sparse_probing"] |= {"top_1": 0.9, "reached_by": ["random"]}  # within its standard error
    results["sparse_probing"]["controls"]["random"]["top_1"] = 0.89
    known = results["ground_truth"] | {"recovered": 0.5, "mean_f1": 0.5}
    for control in known["controls"].values():
        control |= {"recovered": 0.4, "mean_f1": 0.4}
    known["controls"]["random"]["mean_f1"] = 0.5  # as good
    _, markdown = compose(FACTS, results | {"ground_truth": known}, {}, {})
    rows = glance(markdown)
    assert rows["tpp: score"][0] == f"{MARK} 0.1000"
    assert (rows["tpp: score"][2], rows["tpp: score"][-1]) == ("0.2500", "lm_neurons")
    assert (rows["scr: score"][0], rows["scr: score"][-1]) == ("0.5000", "")
    assert rows["ground_truth: mean F1"][:2] == [f"{MARK} 0.5000", "0.5000"]
    assert rows["ground_truth: mean F1"][-1] == "random"
    recovered = rows["ground_truth: recovered by 5 latents"]
    assert (*recovered[:2], recovered[-1]) == ("0.5000", "0.4000", "")
    assert rows["sparse_probing: top 1"][:2] == [f"{MARK} 0.9000", "0.8900"]
    assert rows["sparse_probing: top 1"][-1] == "random"
    assert markdown.index(SUMMARY) < markdown.index("## Scores at a glance") < markdown.index("## core")


def test_the_difference_from_random_is_bold_only_if_its_interval_excludes_zero(results):
    above = {"difference": 0.3, "low": 0.1, "high": 0.5, "least": 0.28}
    edges = {"low": 0.4, "high": 0.6, "items": 60, "controls": {}}
    results["tpp"]["intervals"] = {"score": edges | {"above_random": above}}
    results["scr"]["intervals"] = {"score": edges | {"above_random": above | {"difference": 0.01, "low": -0.2}}}
    results["unlearning"]["intervals"] = {"score": edges | {"above_random": above | {"low": -0.5, "high": -0.1}}}
    results["positions"]["order_probing"]["intervals"] = {"last_token": edges | {"above_random": None}}
    results["sparse_probing"].pop("intervals", None)
    _, markdown = compose(FACTS, results, {}, {})
    cells = {name: row[-3:-1] for name, row in glance(markdown).items()}
    assert cells["tpp: score"] == ["0.400 to 0.600", "**+0.300** (+0.100 to +0.500)"]
    assert cells["scr: score"][1] == "+0.010 (-0.200 to +0.500): too few items to show less than 0.280"
    assert cells["unlearning: score"][1] == "**+0.300** (-0.500 to -0.100)"
    assert cells["positions: order probing: last token"] == ["0.400 to 0.600", "–"]
    assert cells["sparse_probing: top 1"] == ["–", "–"]


@pytest.mark.parametrize(("items", "bounded"), [(2, False), (5, False), (5, True)])
def test_few_items_that_agree_are_not_bold_and_say_so(results, items, bounded):
    """All resamples of a few items that favour the dictionary are above zero, which five of them are by chance in 6%."""
    draw = np.random.default_rng(0)
    gained = np.ones(items) if bounded else draw.uniform(0.5, 1, items)
    parts = {"sae": Outcomes.of(gained, bounded=bounded), "random": Outcomes.of(np.zeros(items), bounded=bounded)}
    found = interval(parts, draw)
    assert found is not None
    assert found["above_random"]["low"] > 0
    results["core"]["intervals"] = {"explained_variance": found}
    cell = glance(compose(FACTS, results, {}, {})[1])["core: explained variance"][-2]
    assert "**" not in cell
    assert cell.endswith(f": {items} items are too few for any conclusion")


def test_items_without_spread_are_not_bold_and_say_so(results):
    """Rows of one text give one difference, and an interval of no width."""
    same = {name: Outcomes.of(np.full(40, value), bounded=False) for name, value in (("sae", 0.75), ("random", 0.5))}
    results["core"]["intervals"] = {"explained_variance": interval(same, np.random.default_rng(0))}
    row = glance(compose(FACTS, results, {}, {})[1])["core: explained variance"]
    assert row[-2] == "+0.250: all items agree, so there is no interval"


def test_scores_without_an_interval_are_never_bold(results):
    for name in ("positions", "clusters"):
        assert "specialization" not in results[name].get("intervals", {})
    rows = glance(compose(FACTS, results, {}, {})[1])
    without = [name for name, row in rows.items() if row[-3] == "–"]
    expected = ("specialization", "fidelity: SNR", "stability", "L0", "dead latents")
    assert all(any(part in name for name in without) for part in expected)
    assert not any("**" in cell for name in without for cell in rows[name])


def test_neither_more_nor_less_l0_dead_latents_and_absorption_is_better(results):
    results["core"] |= {"l0": 1.0, "dead_fraction": 0.125}
    results["core"]["controls"]["random"]["dead_fraction"] = 0.5
    results["absorption"]["controls"]["random"]["mean_absorption"] = results["absorption"]["mean_absorption"] = 0.2
    _, markdown = compose(FACTS, results, {}, {})
    rows = glance(markdown)
    assert rows["core: L0"][:2] == ["1.0000", number(results["core"]["controls"]["random"]["l0"])]
    assert rows["core: dead latents (share)"][:2] == ["0.1250", "0.5000"]
    assert rows["absorption: mean absorption"][:2] == ["0.2000", "0.2000"]
    unmarked = [label for _, label, *_ in table_under(markdown, "Scores at a glance") if MORE not in label]
    decoder_rows = "explained variance of decoder rows"
    ravel_parts = ["cause: answers that become the source's", "isolation: answers about others that stay"]
    always = ["L0", "dead latents (share)", "retained", "mean absorption", "bits per token", "FVU", decoder_rows]
    assert unmarked == [*always, *ravel_parts]


def test_each_of_several_sets_and_every_warning_is_told(results):
    probing = results["sparse_probing"]
    probing |= {"reached_by": [], "warnings": ["tone: random: no latent is active on any text"]}
    probing["sets"]["topic"]["reached_by"], probing["sets"]["tone"]["reached_by"] = [], ["random", "mean"]
    results["positions"]["order_probing"]["ailing"] = "no latent is active"
    results["unlearning"]["warnings"] = ["only 7 forget questions are known: one is 0.143"]
    _, markdown = compose(FACTS, results, {}, {})
    reached = {row[0]: row[-1] for row in table_under(markdown, "sparse_probing") if row[1] == "dictionary"}
    assert reached == {"mean over sets": "", "topic": "", "tone": "random, mean"}
    assert set(noted(markdown)) >= {
        ("sparse_probing", "warning", "tone: random: no latent is active on any text"),
        ("positions", "warning", "no latent is active"),
        ("unlearning", "warning", "only 7 forget questions are known: one is 0.143"),
    }


def test_an_eval_says_which_settings_it_used(results):
    """All that `test_saebench` takes for granted."""
    for name, example in RESULTS.items():
        assert results[name]["protocol"].keys() == example["protocol"].keys(), name


WORDS = {
    "core": ("dead", "KL recovered"), "unlearning": ("retained", "unlearning"),
    "absorption": ("absorption",), "sparse_probing": ("top 1", "sparse_probing"), "positions": ("specialization",),
    "sae_probes": ("sae_probes", "AUC"),
    "clusters": ("cluster",), "ground_truth": ("ground_truth",), "scr": ("scr",), "tpp": ("tpp",),
    "ravel": ("isolation", "ravel"), "mdl": ("bits", "mdl"), "meta_structure": ("meta_structure", "decoder rows"),
}  # fmt: skip


@pytest.mark.parametrize("measured_alone", [(), *((name,) for name in WORDS), ("core", "tpp"), ("unlearning", "scr")])
def test_nothing_is_said_of_what_was_not_measured(results, measured_alone):
    only = {name: results[name] for name in measured_alone}
    _, markdown = compose(FACTS, only, {}, {})
    said = [line for line in markdown.splitlines() if not line.startswith("Not measured: ")]
    for name in WORDS.keys() - set(measured_alone):
        for word in WORDS[name]:
            assert not [line for line in said if re.search(rf"\b{word}\b", line)], word
    if not only:
        assert "Nothing was measured." in markdown


def test_where_there_is_nothing_to_note_there_is_no_table(results):
    result = results["tpp"] | {"score": 0.5, "reached_by": [], "warnings": []}
    _, markdown = compose(FACTS, {"tpp": result}, {}, {})
    assert noted(markdown) == []
    assert markdown.split("## What to know first\n\n")[1].split("\n\n## ")[0] == SUMMARY
    result["controls"].pop("random")
    _, markdown = compose(FACTS, {"tpp": result | {"no_random_control": "train.control: false"}}, {}, {})
    assert noted(markdown) == [("tpp", "no random control", "train.control: false")]
    assert glance(markdown)["tpp: score"][1] == "–"


def test_every_eval_has_its_section_tables_and_figures(report, results):
    markdown, page = read(report)
    assert re.findall("^## (.+)$", markdown, re.M) == ["What to know first", "Scores at a glance", *EVALS, "Time"]
    parts = {part.partition("\n")[0]: part for part in markdown.split("\n## ")}
    figures = {
        "core": {"position_explained_variance", "firing_rates", "loss_curve"}, "positions": {"order_probing"},
        "absorption": set(), "mdl": set(), "meta_structure": set(), "ravel": set(),
    }  # fmt: skip
    for name in EVALS:
        shown = set(re.findall(r"\]\(figures/(\w+)\.png\)", parts[name]))
        assert shown == figures.get(name, {name}), name
        assert parts[name].count("\n| :--") + parts[name].count("\n| --:") >= 2 - (name in "core"), name
    expected = {
        "core": ("saebench.explained_variance",), "unlearning": ("activation_norm",), "positions": ("fidelity.snr.worst",)
    }  # fmt: skip
    for name, paths in expected.items():
        for path in paths:
            value: Any = results[name]
            for key in path.split("."):
                value = value[key]
            assert number(value) in parts[name], path
    for letter, of in results["absorption"]["letters"].items():
        assert f"| {letter} | {of['words']} | {number(of['probe_f1'])} |" in parts["absorption"]
    assert len(re.findall("^\\| (.+?) \\| \\d+ \\|", parts["ground_truth"], re.M)) == len(
        results["ground_truth"]["variables"]
    )
    assert parts["unlearning"].count(" | yes |") + parts["unlearning"].count(" | no |") == 4
    assert all(f"| {name} | {result['seconds']:.1f} | 0 |" in parts["Time"] for name, result in results.items())
    separators = [line for line in markdown.splitlines() if re.fullmatch(r"\|( :?--:? \|)+", line)]
    assert len(page.tables) == len(separators) > 20
    assert all(len({len(row) for row in rows}) == 1 and len(rows) > 1 for rows in page.tables)


def test_the_page_needs_nothing_but_itself(report):
    markdown, page = read(report)
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(tags)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == markdown.count("](figures/") == 11
    for attrs, file in zip(images, re.findall(r"\]\((figures/\w+\.png)\)", markdown), strict=True):
        assert base64.b64decode(attrs["src"].removeprefix("data:image/png;base64,")) == (report / file).read_bytes()
        assert len(attrs["alt"]) > 5
    assert all("style" not in attrs and not any(key.startswith("on") for key in attrs) for _, attrs in page.tags)
    assert all(attrs["href"].startswith("#") for tag, attrs in page.tags if tag == "a")
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"} <= ids
    (policy,) = (attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    style = page.source.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.split("; ")[:3] == ["default-src 'none'", "img-src data:", f"style-src 'sha256-{digest}'"]
    assert not re.search(r"(?:src|href|url)\W+(?:https?:)?//", page.source)


def test_it_opens_in_chromium(report):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    markdown, _ = read(report)
    argv = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", (report / "report.html").as_uri()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<table>") == len(re.findall(r"^\|(?: :?--:? \|)+$", markdown, re.M))
    assert "Content Security Policy" not in done.stderr


HOSTILE = (
    "<script>alert(1)</script>",
    "a|b",
    "`x` *y* _z_ [l](javascript:alert(1))",
    "![i](http://e/x.png)",
    "&lt;b&gt;\\",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_wherever_it_stands(results, tmp_path, name):
    probing = results["sparse_probing"]
    probing["sets"] = {name: probing["sets"]["topic"], "tone": probing["sets"]["tone"]}
    probing["sets"][name]["reached_by"] = ["random"]
    probing["sets"][name]["classes"] = {name: {"top_1": 0.5, "train_rows": 4, "test_rows": 4}}
    probing["warnings"] = [f"{name}: sae: dead"]
    skipped = {"skipped": f"data: {name} has no labels", "seconds": 0.0, "of": probing["of"]}
    title, markdown = compose(FACTS | {"model": name}, {"sparse_probing": probing, name: skipped}, {}, {})
    page = Page(html(markdown, tmp_path, title))
    for heading in (title, name):
        assert heading in page.text
    cells = [cell.strip() for rows in page.tables for row in rows for cell in row]
    assert cells.count(name) >= 9  # a fact, a row for each coder, two of the class, and time
    assert f"{name}: sae: dead" in page.text
    assert f"Skipped: data: {name} has no labels" in page.text
    assert not re.search(r"(?<!\\)[<`*]", markdown.replace("**", ""))  # nor where Markdown allows HTML
    assert not {"script", "img", "em", "b"} & {tag for tag, _ in page.tags}
    assert all(attrs["href"].startswith("#") for tag, attrs in page.tags if tag == "a")
    assert all(len({len(row) for row in rows}) == 1 for rows in page.tables)


def test_what_was_skipped_is_named_with_the_reason(folder):
    only(folder, "positions", "unlearning", "absorption")
    for name in ("unlearning", "absorption"):
        of = kept(folder, name)["of"]
        keep(folder, name, {"skipped": f"data: {name} needs labels", "seconds": 0.1, "of": of})
    keep(folder, "positions", kept(folder, "positions") | {"order_probing": {"skipped": "order: no tasks"}})
    markdown, page = written(folder)
    for name in ("unlearning", "absorption"):
        assert (name, "skipped", f"data: {name} needs labels") in noted(markdown)
        assert f"## {name}\n" in markdown
        assert not any(row.startswith(f"{name}:") for row in glance(markdown))
    assert ("positions", "order probing skipped", "order: no tasks") in noted(markdown)
    assert "Skipped: order: no tasks" in page.text
    assert "figures/order_probing.png" not in markdown
    assert glance(markdown)["positions: specialization"]


def test_results_of_something_else_are_left_out_and_named(folder):
    only(folder, "tpp", "scr", "clusters", "absorption")
    for name, change in (("tpp", {"dictionary": "f" * 64}), ("scr", {"version": VERSION - 1})):
        result = kept(folder, name)
        keep(folder, name, result | {"of": result["of"] | change})
    (folder / "evals" / "clusters.json").write_text("{")
    (folder / "evals" / ".writing-core.json").write_text("{")  # a kill left it behind
    markdown, _ = written(folder)
    for name in ("tpp", "scr", "clusters"):
        assert f"## {name}" not in markdown
        assert f"figures/{name}.png" not in markdown
    assert markdown.endswith(
        "\nNot measured: core, sparse_probing, sae_probes, positions, ground_truth, unlearning, clusters, "
        "mdl, meta_structure, ravel, tpp, scr.\n"
    )
    assert noted(markdown)[-3:] == [
        ("clusters", "left out", "its file is damaged"),
        ("scr", "left out", f"measured with version {VERSION - 1} of the evals, not {VERSION}"),
        ("tpp", "left out", "measured on another dictionary, ffffffffffff"),
    ]
    assert ".writing" not in markdown


def test_figures_that_there_are_not_are_dashes(folder, results):
    """Dead latents, no random control, no setting that counts, no clusters."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k != "random"}
        return [without(v) for v in value if v != "random"] if isinstance(value, list) else value

    found = without(results)
    nothing = lambda one: {k: nothing(v) if isinstance(v, dict) else None for k, v in one.items()}
    probing = found["sparse_probing"]
    for scores in (probing, *probing["sets"].values()):
        scores |= {k: None for k in scores if k.startswith("top_") or k == "test_accuracy"}
        scores |= {"llm": nothing(scores["llm"]), "controls": nothing(scores["controls"]), "reached_by": []}
    found["unlearning"] |= {"score": 0.0, "retained": None, "setting": None, "reason": "none", "loss_increase": None}
    empty = dict.fromkeys(("count", "silhouette", "clusters", "within", "between", "stability"))
    found["clusters"] |= empty
    found["clusters"]["controls"]["shuffled"] |= empty
    for scores in (found["scr"], *found["scr"]["controls"].values(), *found["scr"]["sets"].values()):
        scores |= {"scr_metric": nothing(scores["scr_metric"])}
    found["scr"] |= {"score": None, "reached_by": []}
    found["core"]["no_random_control"] = "train.control: false"
    for name, result in found.items():
        keep(folder, name, result | {"of": {"seed": 0, "given": {}, "version": VERSION}})
    markdown, _ = written(folder)
    rows = glance(markdown)
    stability = "clusters: stability (adjusted Rand index)"
    for row in ("sparse_probing: top 1", "scr: score", stability, "unlearning: retained"):
        assert rows[row][0] == "–", row
    assert {row[1] for row in rows.values()} == {"–"}
    assert ("core", "no random control", "train.control: false") in noted(markdown)
    for name in ("sparse_probing", "scr", "clusters"):
        assert f"figures/{name}.png" not in markdown
    assert table_under(markdown, "Best settings")[0] == ("dictionary", "0.0000", *7 * ["–"], "none")
    assert "None" not in markdown


def test_an_eval_that_is_not_known_here_has_its_plain_figures(tmp_path):
    of = {"dictionary": "0", "seed": 3, "given": {}, "version": VERSION}
    result = {
        "draw": 0.25,
        "rows": 7,
        "seconds": 1.0,
        "of": of,
        "reached_by": ["coin"],
        "controls": {"coin": {"draw": 1.5}},
    }
    _, markdown = compose(FACTS, {"other": result}, {}, {})
    assert glance(markdown)["other: draw"] == [f"{MARK} 0.2500", *4 * ["–"], "1.5000", *2 * ["–"], "coin"]
    assert "| draw | 0.2500 | 1.5000 |" in markdown


@pytest.mark.slow
def test_the_same_results_make_the_same_bytes(folder):
    def bytes_of() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".md", ".html", ".png")}

    first = bytes_of()
    assert len(first) == 13
    write_report(folder, find(folder), VERSION)
    assert bytes_of() == first


def test_figures_show_the_numbers_and_their_legends_cover_none(results):
    def points(axes: Any) -> dict[str, list[list[float]]]:
        return {line.get_label(): [list(map(float, values)) for values in line.get_data()] for line in axes.lines}

    probing = results["sparse_probing"]
    figure = run_figures._probing(probing)["sparse_probing"]
    shown = points(figure.axes[0])
    assert shown["dictionary"] == [[1, 5], [probing["top_1"], probing["top_5"]]]
    assert shown["LM activations"] == [[1, 5], [probing["llm"]["top_1"], probing["llm"]["top_5"]]]
    unlearned = run_figures._unlearning(results["unlearning"])["unlearning"]
    settings = [s for s in results["unlearning"]["settings"] if s["retain_threshold"] == 0.01]
    assert points(unlearned.axes[0])["2 latents, threshold 0.01"] == [
        [s[f"{side}_accuracy"] for s in settings] for side in ("retain", "forget")
    ]
    perturbed = run_figures._perturbed(results["tpp"])["tpp"]
    totals = [of["total_metric"] for of in results["tpp"]["tpp"].values()]
    assert points(perturbed.axes[0])["dictionary"][1] == totals
    known = run_figures._truth(results["ground_truth"])["ground_truth"]
    names = [text.get_text() for text in known.axes[0].get_yticklabels()]
    for label, key in (("F1 of the best latent", "f1"), ("share recovered by 5 latents", "recovered")):
        named = dict(zip(names, points(known.axes[0])[label][0], strict=True))
        assert named == {name: of[key] for name, of in results["ground_truth"]["variables"].items()}
    order = run_figures._order(results["positions"])["order_probing"]
    for drawn in (figure, unlearned, perturbed, known, order):
        drawn.savefig("/dev/null", format="png")
        (legend,) = drawn.legends
        assert not legend.get_window_extent().overlaps(drawn.axes[0].get_window_extent())
        assert drawn.axes[0].get_title()
        assert drawn.axes[0].get_xlabel()


def test_evaluating_a_run_writes_its_report_and_says_where(stream_of, folder, monkeypatch):
    for path in (*(folder / "evals").iterdir(), *folder.glob("report.*")):
        path.unlink()
    monkeypatch.setattr(suite, "EVALS", {"coin": ("suite", "coin")})
    monkeypatch.setattr(suite, "coin", lambda evaluation: {"draw": 0.75, "controls": {}}, raising=False)
    random = {"random": (CFG, SparseAutoencoder(CFG).state_dict())}
    checkpoint.write(place(folder, 8), 8, {"sae": (CFG, SparseAutoencoder(CFG).state_dict())} | random, run=RUN)
    evaluate(find(folder), stream_of(), None, ["coin"])
    assert not (folder / "report.md").exists()
    code, out, err = command("eval", "coin", "--sae", folder)
    assert code == 0, err
    assert f"report: {folder / 'report.html'}" in out
    markdown, page = read(folder)
    facts = markdown.split("\n\n")[1].splitlines()[-1]
    digest = find(folder).manifest["files"]["sae.safetensors"]["sha256"]
    cells = ("testbed", "blocks.1.hook_resid_post", "topk", "64", "4", "128", "1,024 tokens", digest[:12])
    assert facts == f"| {' | '.join(cells)} | version {VERSION}; seed 0 |"
    assert glance(markdown)["coin: draw"][0] == "0.7500"
    assert "0.7500" in page.text
    (folder / "report.md").unlink()
    assert "report:" not in command("eval", "coin", "--sae", folder, "--layer", "1").out  # a place of the user's own
    assert not (folder / "report.md").exists()
