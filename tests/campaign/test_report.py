"""The report of a campaign, from made-up numbers of which it is known what its tables must hold."""

import base64
import copy
import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as students
from scipy.stats import ttest_rel
from temposae.campaign import report as report_module
from temposae.campaign import significance
from temposae.campaign.difference_figure import differences_figure
from temposae.campaign.documented import RUNS
from temposae.campaign.questions import QUESTIONS, pairs_by_question
from temposae.campaign.report import write
from temposae.campaign.results import SCORES, _summary
from temposae.campaign.significance import NO_DIFFERENCE, against_baselines, baseline_of, holm, repeated, student
from temposae.engine.errors import UserError

SEEDS = 4
PLAIN = {
    "loss": 20.0, "fvu_first": 1.0, "fvu_last": 0.1, "explained_variance": 0.9, "ce_recovered": 0.95, "l0": 32.0,
    "dead_fraction": 0.02, "probing_1": 0.85, "probing_5": 0.9, "probing": 0.87, "order_pooled": 0.6, "order_last": 0.7,
    "unlearning": 0.3, "scr": 0.1, "tpp": 0.2, "specialization": 0.1, "agreement": 0.8,
    "agreement_same_recipe": 0.85, "agreement_shuffled": 0.02, "fidelity": 0.95,
}  # fmt: skip
TITLES = {"A1": "hard masks", "A5": "position feature groups", "C2": "temperature annealing"}


class Made:
    """A campaign.json to plant numbers in: plain runs differ from the baseline by noise about 0 alone, of at most 0.004."""

    def __init__(self, *runs: str, seeds: int = SEEDS, conditions: tuple[str, ...] = ("",)):
        self.seeds, self.draw = seeds, np.random.default_rng(0)
        named = [(run, condition) for run in runs for condition in conditions]
        self.found: dict[str, Any] = {
            "format": "temposae-campaign/2", "model": "testbed", "hook": "blocks.1.hook_resid_post", "seeds": seeds,
            "conditions": list(conditions), "evals": ["core", "sparse_probing", "positions"], "share": 1,
            "runs": {self.label(run, condition): self.run(run, condition) for run, condition in named},
            "baselines": {self.label("relu", condition): self.run("relu", condition) for condition in conditions},
        }  # fmt: skip

    @staticmethod
    def label(run: str, condition: str) -> str:
        return f"{run}-{condition}" if condition else run

    def run(self, run: str, condition: str = "") -> dict[str, Any]:
        label = self.label(run, condition)
        folders = [f"runs/{label}-s{seed}" for seed in range(self.seeds)] if self.seeds > 1 else [f"runs/{label}"]
        made = {
            "run": run, "title": TITLES.get(run, f"title of {run}"), "log": run[0] if run != "relu" else None,
            "condition": condition, "trained_as": None, "folders": folders, "failed": None, "activation": "relu",
            "d_sae": 512, "k": 32, "l1_coefficient": 0.04, "lr": 3e-4, "clip_norm": None, "target_l0": 32.0,
            "mask": "none", "parts": [], "steps": 100, "tokens": 100_000, "beats_random": True, "why_not": None,
            "scores": {},
        }  # fmt: skip
        for score, value in PLAIN.items():
            noise = np.array([-0.004, 0.004, 0.002, -0.002])[self.draw.permutation(4)[: self.seeds]] * (run != "relu")
            self.set(made, score, list(value + noise), value - 0.2 if score != "fvu_last" else None)
        return made

    def set(self, run: dict[str, Any] | str, score: str, values: list[float | None], control: float | None) -> None:
        run = (self.found["runs"] | self.found["baselines"])[run] if isinstance(run, str) else run
        summary = _summary(values)
        run["scores"][score] = summary | {"random": _summary([control] * len(values))}
        run[score] = summary["mean"]

    def plant(self, run: str, score: str, *steps: float, control: float | None = 0.0) -> None:
        """Values of the seeds so far above the baseline's, which are all the same."""
        self.set(run, score, [PLAIN[score] + step for step in steps], control)

    def write(self, out: Path) -> tuple[str, "Page"]:
        out.mkdir(parents=True, exist_ok=True)
        (out / "campaign.json").write_text(json.dumps(self.found))
        assert write(out) == out / "report.md"
        return (out / "report.md").read_text(), Page((out / "report.html").read_text())


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether every tag that is opened is closed in its turn."""

    VOID = ("meta", "img", "br", "hr")

    def __init__(self, source: str):
        super().__init__()
        self.source, self.tags, self.text, self.open, self.rows = source, [], "", [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def small(path: Path, *given: Any) -> None:
    """A picture of one point."""
    point = b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(point))


@pytest.fixture
def quick(monkeypatch) -> None:
    """Small pictures in place of the differences' figures: what is written stays the same."""
    monkeypatch.setattr(report_module, "draw_differences", small)


def part(markdown: str, heading: str) -> str:
    """What stands below a heading, up to the next of its kind."""
    marks = heading.split(" ")[0]
    _, found, rest = f"\n{markdown}".partition(f"\n{heading}\n")
    assert found, heading
    return re.split(rf"\n#{{2,{len(marks)}}} ", rest)[0]


def rows(markdown: str, heading: str, first: str = "") -> list[dict[str, str]]:
    """The lines of the first table below a heading (whose first column is named so), by column."""
    for block in part(markdown, heading).strip().split("\n\n"):
        lines = [[cell.strip() for cell in line.strip().split("|")[1:-1]] for line in unescaped(block).splitlines()]
        if block.startswith("|") and first in ("", lines[0][0]):
            return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    return []


def unescaped(block: str) -> str:
    """With a broken bar in place of a bar that is text."""
    return block.replace("\\|", "¦")


def row(markdown: str, heading: str, first: str) -> dict[str, str]:
    """The line of that table whose first cell is this, but for a run's title in italics. Of comparisons, that with the
    baseline: those between runs have in italics what the two differ in."""
    lines = [line for line in rows(markdown, heading) if "against" not in line or " *" not in line["run"]]
    (line,) = (line for line in lines if next(iter(line.values())).partition(" *")[0] == first)
    return line


def reason(markdown: str, score: str, name: str) -> tuple[str, str]:
    """Of a difference in a score that is not significant: why, and what it is."""
    pattern = rf"^- {NO_DIFFERENCE} \(([^)]+)\): (?:.*; )?{name} ([+−][^;\n]+)"
    ((why, change),) = re.findall(pattern, part(markdown, f"### {score}"), re.M)
    return why, change


def cells(markdown: str, run: str) -> dict[str, str]:
    """A run's line in the table of all scores."""
    return row(markdown, "## All runs, all scores", run)


def facts(markdown: str) -> dict[str, str]:
    return {line["campaign"]: line["value"] for line in rows(markdown, "## What to know first")}


def figures_of(markdown: str) -> str:
    """All tables and the lists of differences."""
    return "\n".join(line for line in markdown.splitlines() if line.startswith(("|", f"- {NO_DIFFERENCE}")))


POSITION = "position-aware structure"
SIGNIFICANT = re.compile(r"\*\*(better|worse|more|less)\*\*, significant \(p [=<] [\d.e-]+\)")


# Verdicts


def test_what_is_planted_to_help_is_better_there_with_its_numbers_and_its_figure(tmp_path):
    made = Made("A1", "A5", "B1")
    steps = (0.030, 0.032, 0.031, 0.033)
    made.plant("A5", "order_last", *steps)
    markdown, page = made.write(tmp_path)
    line = row(markdown, "### Order probing last token", "A5")
    half = students.ppf(0.975, 3) * np.std(steps, ddof=1) / 2
    assert line["against"] == "relu"
    assert line["difference"] == "+0.0315"
    assert line["95% interval"] == f"+{0.0315 - half:.4f} to +{0.0315 + half:.4f}"
    assert (line["seeds"], line["corrected for"], line["random control"]) == ("4", "3", "0.000")
    p = min(1, 3 * ttest_rel([0.7 + step for step in steps], [0.7] * 4).pvalue)
    assert line["verdict"] == f"**better**, significant ({f'p = {p:.2g}' if p >= 1e-4 else 'p < 0.0001'})"
    assert [line["run"] for line in rows(markdown, "### Order probing last token")] == ["A5"]
    for run in ("A1", "B1"):
        why, change = reason(markdown, "Order probing last token", run)
        assert why == "0 is in its interval"
        assert re.fullmatch(r"\+0\.000\d? ± 0\.00\d+", change)
    section = part(markdown, "### Order probing last token")
    assert "![Order probing last token](figures/differences/order_last.png)" in section
    assert (tmp_path / "figures" / "differences" / "order_last.png").stat().st_size > 5000
    assert "order-probing-last-token" in {attrs.get("id") for _, attrs in page.tags}
    assert len(SIGNIFICANT.findall(markdown)) == 1
    for about in (POSITION, "log A, structured positional masking"):
        line = row(markdown, "### By log", about)
        assert (line["runs better somewhere"], line["runs worse somewhere"]) == ("1", "0")
        assert (line["better"], line["worse"]) == ("1", "0")
        assert int(line["comparisons"]) == 1 + int(line[NO_DIFFERENCE])
    assert row(markdown, "### By log", POSITION)["runs compared"] == "3"
    assert row(markdown, "### By score", "Order probing last token")["better"] == "1"
    assert cells(markdown, "A5")["Order probing last token"] == "0.732 ± 0.001 **better** *(0.000)*"
    assert "**" not in cells(markdown, "A1")["Order probing last token"]


def test_noise_is_not_significant_even_where_its_own_interval_leaves_0_out(tmp_path, quick):
    made = Made("A1", "A2", "A3", "B1", "C1")
    made.plant("A2", "scr", 0.09, -0.05, 0.07, -0.01)
    lucky = (0.01, 0.02, 0.03, 0.02)
    made.plant("A3", "scr", *lucky)
    p = ttest_rel([0.1 + step for step in lucky], [0.1] * 4).pvalue
    assert p < 0.05 < 5 * p  # it would count if nothing else had been looked at
    markdown, _ = made.write(tmp_path)
    assert not SIGNIFICANT.search(markdown)
    assert rows(markdown, "### SCR") == []
    (wide, change), (narrow, little) = (reason(markdown, "SCR", run) for run in ("A2", "A3"))
    assert (wide, narrow) == ("0 is in its interval", "not after correction")
    assert change.startswith("+0.025 ± 0.1")
    half = students.ppf(0.975, 3) * np.std(lucky, ddof=1) / 2
    assert little == f"+0.020 ± {half:.3f}"
    assert row(markdown, "### By log", POSITION)["runs better somewhere"] == "0"
    assert "**" not in cells(markdown, "A3")["SCR"]


def test_less_of_dead_latents_is_better_and_specialization_is_only_more(tmp_path, quick):
    made = Made("A1", "A5")
    made.plant("A1", "dead_fraction", -0.010, -0.011, -0.009, -0.010)
    made.plant("A5", "dead_fraction", 0.20, 0.21, 0.19, 0.20)
    made.plant("A5", "specialization", 0.40, 0.41, 0.39, 0.40)
    markdown, _ = made.write(tmp_path)
    for score, run, verdict, difference in (
        ("Dead latents", "A1", "better", "−0.0100"),
        ("Dead latents", "A5", "worse", "+0.200"),
        ("Specialization", "A5", "more", "+0.400"),
    ):
        line = row(markdown, f"### {score}", run)
        assert line["verdict"].startswith(f"**{verdict}**, significant (p ")
        assert line["difference"] == difference
    line = row(markdown, "### By log", POSITION)
    assert (line["better"], line["worse"], line["more"], line["less"]) == ("1", "1", "1", "0")
    assert (line["runs better somewhere"], line["runs worse somewhere"]) == ("1", "1")


def test_a_run_that_is_no_better_than_its_random_control_is_marked(tmp_path, quick):
    made = Made("A1", "A5")
    made.plant("A5", "unlearning", 0.10, 0.11, 0.09, 0.10, control=0.45)
    markdown, _ = made.write(tmp_path)
    line = row(markdown, "### Unlearning", "A5")
    assert (line["difference"], line["95% interval"]) == ("+0.100", "+0.087 to +0.113")
    assert line["verdict"] == "**better**, significant (p = 0.0003)"
    assert line["corrected for"] == "2"
    assert line["random control"] == "† 0.450"
    assert "† marks a score in which the random control is at least as good" in part(markdown, "## What to know first")
    assert cells(markdown, "A5")["Unlearning"].startswith("† 0.400")
    assert not cells(markdown, "A1")["Unlearning"].startswith("†")


def test_a_random_control_that_was_not_measured_is_a_dash(tmp_path, quick):
    made = Made("A1", "A5")
    made.plant("A5", "unlearning", 0.10, 0.11, 0.09, 0.10, control=None)
    assert row(made.write(tmp_path)[0], "### Unlearning", "A5")["random control"] == "–"


def test_with_one_seed_nothing_is_claimed(tmp_path, quick):
    made = Made("A1", "A5", seeds=1)
    made.plant("A5", "order_last", 0.3)
    markdown, page = made.write(tmp_path)
    assert not SIGNIFICANT.search(markdown)
    assert not re.search(r"\*\*(better|worse|more|less)|p [=<]|±|\bto\b [+−]\d", figures_of(markdown))
    assert facts(markdown)["seeds"] == "1"
    assert "A single seed detects nothing." in page.text
    assert rows(markdown, "### Order probing last token") == []
    assert reason(markdown, "Order probing last token", "A5") == ("one seed", "+0.300")
    assert reason(markdown, "Order probing last token", "A1")[0] == "one seed"
    line = row(markdown, "### By log", POSITION)
    assert line["comparisons"] == line[NO_DIFFERENCE] != "0"
    assert cells(markdown, "A5")["Order probing last token"].startswith("1.000")


def test_the_same_difference_with_every_seed_is_no_proof(tmp_path, quick):
    made = Made("A1", "A5")
    made.plant("A5", "unlearning", 0.05, 0.05, 0.05, 0.05)  # such as one question more
    made.plant("A1", "unlearning", 0.0, 0.0, 0.0, 0.0)
    markdown, _ = made.write(tmp_path)
    assert rows(markdown, "### Unlearning") == []
    assert reason(markdown, "Unlearning", "A5") == ("the same difference with every seed", "+0.050")
    assert reason(markdown, "Unlearning", "A1") == ("no difference with any seed", "+0.000")


def test_explained_variance_with_more_latents_active_is_not_better(tmp_path, quick):
    made = Made("A1", "A5", "B1", "B2")
    up, down = (0.050, 0.051, 0.049, 0.050), (-0.050, -0.051, -0.049, -0.050)
    for run, steps, l0 in (("A1", up, 60), ("A5", up, 20), ("B1", down, 20), ("B2", down, 60)):
        made.plant(run, "explained_variance", *steps)
        made.set(run, "l0", [l0 + seed for seed in range(4)], 32.0)
    markdown, _ = made.write(tmp_path)
    verdicts = {line["run"]: line["verdict"] for line in rows(markdown, "### Explained variance")}
    assert {run: SIGNIFICANT.match(verdict)[1] for run, verdict in verdicts.items()} == {"A5": "better", "B2": "worse"}
    assert reason(markdown, "Explained variance", "A1") == ("more latents are active", "+0.0500 ± 0.0013")
    assert reason(markdown, "Explained variance", "B1") == ("fewer latents are active", "−0.0500 ± 0.0013")
    settings = row(markdown, "## Log A: structured positional masking", "A1")
    assert (settings["L0"], settings["baseline's L0"]) == ("61.5", "32.0")


@pytest.mark.parametrize(
    ("activation", "aim", "target"), [("relu", 32.0, "32"), ("relu", None, "none"), ("topk", None, "K = 32")]
)
def test_the_l0_that_was_aimed_at_stands_first(tmp_path, quick, activation, aim, target):
    made = Made("A1")
    for run in (made.found["runs"] | made.found["baselines"]).values():
        run |= {"target_l0": aim, "activation": activation}
    markdown, _ = made.write(tmp_path)
    assert facts(markdown)["L0 target"] == target
    assert row(markdown, "## Log A: structured positional masking", "A1")["L0 target"] == target
    assert "Training losses of different objectives are not compared." in part(markdown, "## What to know first")


def test_pairs_are_made_by_seed_where_one_failed(tmp_path, quick):
    made = Made("A1", "A5")
    base, own = (0.70, 0.80, 0.60, 0.75), (0.73, 0.63, 0.783)  # of seeds 0, 2 and 3
    made.set("relu", "order_last", list(base), 0.5)
    made.set("A5", "order_last", list(own), 0.5)
    made.found["runs"]["A5"]["failed"] = {"A5-s1": "OutOfMemoryError: no memory"}
    for score in PLAIN.keys() - {"order_last"}:
        made.set("A5", score, [PLAIN[score]] * 3, 0.0)
    (one,) = (d for d in against_baselines(made.found)["order_last"] if d.run == "A5")
    assert one.values == pytest.approx((0.03, 0.03, 0.033))
    assert one.p == pytest.approx(ttest_rel(own, (0.70, 0.60, 0.75)).pvalue)
    markdown, _ = made.write(tmp_path)
    assert row(markdown, "### Order probing last token", "A5")["seeds"] == "3"
    assert rows(markdown, "### Failed dictionaries") == [
        {"dictionary": "A5-s1", "reason": "OutOfMemoryError: no memory"}
    ]


# Runs that are not well, or not runs of their own


def test_a_run_below_its_control_is_listed_first_and_marked(tmp_path, quick):
    made = Made("A1", "A5")
    made.set("A5", "probing", [0.8, 0.81, 0.8, 0.79], 0.83)
    made.found["runs"]["A5"] |= {
        "beats_random": False, "why_not": "sparse probing is 0.8000, the random control's 0.8300"
    }  # fmt: skip
    made.set("A5", "dead_fraction", [0.5, 0.5, 0.5, 0.5], 0.0)
    markdown, page = made.write(tmp_path)
    line, *others = rows(markdown, "### Random controls")
    assert (line["run"], line["above its control"]) == ("A5", "no †")
    assert (line["sparse probing"], line["control's sparse probing"]) == ("0.8000", "0.8300")
    assert float(line["explained variance"]) > float(line["control's explained variance"])
    assert {(other["run"], other["above its control"]) for other in others} == {("relu", "yes"), ("A1", "yes")}
    assert facts(markdown)["not above their random control"] == "1 of 3"
    assert cells(markdown, "A5")["Dead latents"].startswith("0.500")
    assert "0.8300" in page.text


def test_a_run_that_failed_is_listed_and_has_dashes(tmp_path, quick):
    made = Made("A1", "A5")
    run = made.found["runs"]["A5"]
    for key in (*PLAIN, "tokens"):
        run.pop(key, None)
    why = "FloatingPointError: loss is NaN at step 7 | of 100"
    run |= dict.fromkeys(("steps", "fvu_first", "fvu_last", *SCORES)) | {
        "scores": {}, "beats_random": None, "why_not": "no seed came through", "failed": {f"A5-s{s}": why for s in range(4)}
    }  # fmt: skip
    markdown, page = made.write(tmp_path)
    assert rows(markdown, "### Failed dictionaries") == [
        {"dictionary": f"A5-s{s}", "reason": why.replace("|", "¦")} for s in range(4)
    ]
    assert "loss is NaN at step 7 | of 100" in page.text
    line = cells(markdown, "A5")
    assert "failed: position feature groups" in line.pop("run")
    assert set(line.values()) == {"–"}
    assert "A5" not in part(markdown, "### Explained variance")
    assert facts(markdown)["failed dictionaries"] == "4"


def test_scores_that_are_not_there_are_dashes_and_those_that_no_run_has_are_named(tmp_path, quick):
    made = Made("A1", "A5")
    made.set("A1", "unlearning", [None] * SEEDS, None)
    del made.found["runs"]["A5"]["scores"]["tpp"]
    for run in (made.found["runs"] | made.found["baselines"]).values():
        del run["scores"]["scr"]
    markdown, _ = made.write(tmp_path)
    assert cells(markdown, "A1")["Unlearning"] == "–"
    assert cells(markdown, "A5")["TPP"] == "–"
    assert cells(markdown, "A5")["Unlearning"] != "–"
    assert "SCR" not in cells(markdown, "A5")
    assert facts(markdown)["scores not measured"] == "SCR"
    assert not re.search(r"\bNone\b(?!\.)|\bnan\b", markdown)


def test_analyses_are_named_with_the_run_they_look_at_and_not_counted(tmp_path, quick):
    made = Made("C2", "C1")
    looks = copy.deepcopy(made.found["runs"]["C2"]) | {"run": "C3", "title": "position-wise loss", "trained_as": "C2"}
    looks["analysis"] = {"most": _summary([7.0, 9.0, 8.0, 8.0]), "most_at": _summary([3, 3, 3, 4])}
    looks["analysis"] |= {name: _summary([None] * 4) for name in ("mean", "least", "ratio", "least_at")}
    made.found["runs"] = {"C3": looks, **made.found["runs"]}
    made.plant("C2", "tpp", 0.10, 0.11, 0.09, 0.10)
    made.plant("C3", "tpp", 0.10, 0.11, 0.09, 0.10)
    markdown, _ = made.write(tmp_path)
    assert row(markdown, "### TPP", "C2")["corrected for"] == "2"
    assert "C3" not in part(markdown, "### TPP")
    assert facts(markdown)["runs with the numbers of another"] == "1"
    assert "weights of C2" in cells(markdown, "C3")["run"]
    settings = row(markdown, "## Log C: position-aware SAEs for sequences", "C3")
    assert (settings["what it is"], settings["weights of"]) == ("position-wise loss", "C2")
    lines = rows(markdown, "### Analyses")
    assert {(line["run"], line["looks at"]) for line in lines} == {("C3", "C2")}
    figures = {line["figure"]: line["value"] for line in lines}
    assert len(figures) == 6
    assert figures["squared error at the hardest position"] == "8.000 ± 0.816"
    assert figures["the hardest position"] == "3 or 4"
    assert figures["squared error at the easiest position"] == "–"
    assert {one.run for ones in against_baselines(made.found).values() for one in ones} == {"C1", "C2"}


def test_an_analysis_stands_for_weights_that_nobody_else_has(tmp_path, quick):
    made = Made("C7", "C8")
    for name in ("C7", "C8"):
        made.found["runs"][name] |= {"trained_as": "C6", "folders": [f"runs/C6-s{seed}" for seed in range(SEEDS)]}
        made.found["runs"][name]["analysis"] = {"why_not": "not planted"}
    assert repeated(made.found) == {"C8": "C7"}
    assert {one.run for ones in against_baselines(made.found).values() for one in ones} == {"C7"}
    assert rows(made.write(tmp_path)[0], "### Analyses") == [
        {"run": name, "looks at": "C6", "figure": "not measured", "value": "not planted"} for name in ("C7", "C8")
    ]


def test_runs_that_came_out_the_same_are_counted_once_and_named(tmp_path, quick):
    made = Made("A1", "A2", conditions=("", "hard"))
    made.found["runs"]["A2-hard"]["scores"] = copy.deepcopy(made.found["runs"]["A1-hard"]["scores"])
    assert repeated(made.found) == {"A2-hard": "A1-hard"}
    made.found["runs"]["A2-hard"]["scores"]["loss"]["values"][0] *= 1 + 1e-8  # but for rounding
    assert repeated(made.found) == {"A2-hard": "A1-hard"}
    markdown, _ = made.write(tmp_path)
    assert facts(markdown)["runs with the numbers of another"] == "1"
    assert row(markdown, "## Log A: structured positional masking", "A2-hard")["weights of"] == "A1-hard"
    assert not re.search(r"A2-hard [+−]", part(markdown, "### TPP"))


# What is compared with what


def test_a_run_has_the_baseline_of_its_activation_and_condition():
    made = Made("A1", conditions=("k16", "hard_k16"))
    found = made.found
    found["baselines"] = {
        name: made.run(name.split("-")[0], name.split("-")[1]) | {"activation": activation}
        for name, activation in {"relu-k16": "relu", "relu-k32": "relu", "topk-k16": "topk"}.items()
    }
    found["baselines"]["topk-k16"]["run"] = "topk"
    run = found["runs"]["A1-hard_k16"]
    assert baseline_of(run, found) == "relu-k16"
    assert baseline_of(run | {"activation": "topk"}, found) == "topk-k16"
    assert baseline_of(run | {"activation": "batchtopk"}, found) is None
    assert baseline_of(run | {"condition": "annealed_k64"}, found) is None


def test_questions_of_the_logs_are_answered_from_the_runs_that_differ_in_them(tmp_path, quick):
    assert {run for pairs in QUESTIONS.values() for pair in pairs for run in pair} <= set(RUNS)
    made = Made("A1", "A2", "B1", "B2", "E1", "E2")
    made.plant("A2", "tpp", 0.10, 0.11, 0.09, 0.10)
    made.plant("A1", "tpp", 0.0, 0.001, -0.001, 0.0)
    pairs = {about: pairs for about, pairs in pairs_by_question(made.found).items() if pairs}
    soft, adversary = "soft masks rather than hard", "an adversary on top of the dynamic margin"
    assert pairs == {soft: [("A2", "A1"), ("B2", "B1")], adversary: [("E2", "E1")]}
    markdown, _ = made.write(tmp_path)
    line = row(markdown, "### By question", soft)
    assert (line["runs compared"], line["comparisons"], line["better"], line[NO_DIFFERENCE]) == ("2", "24", "1", "23")
    line = row(markdown, "### By question", adversary)
    assert (line["comparisons"], line[NO_DIFFERENCE]) == ("12", "12")
    assert {line["what two runs differ in"] for line in rows(markdown, "### By question")} == {soft, adversary}
    assert facts(markdown)["questions without their runs"] == "14 of 16"
    assert reason(markdown, "TPP", "B2 minus B1")[0] == "0 is in its interval"
    (line,) = (line for line in rows(markdown, "### TPP") if (line["run"], line["against"]) == (f"A2 *{soft}*", "A1"))
    assert line["verdict"].startswith("**better**, significant (p ")
    assert (line["difference"], line["corrected for"]) == ("+0.100", "3")


def test_conditions_of_strictness_are_set_against_each_other_and_not_the_runs_that_differ_in_it(tmp_path, quick):
    made = Made("A1", "A2", conditions=("hard", "soft", "annealed"))
    made.found["baselines"] = {"relu": made.run("relu")}
    made.plant("A1-soft", "tpp", 0.10, 0.11, 0.10, 0.11)
    made.plant("A1-hard", "tpp", 0.0, 0.001, 0.0, 0.001)
    assert {about: pairs for about, pairs in pairs_by_question(made.found).items() if pairs} == {
        "soft masks rather than hard": [("A1-soft", "A1-hard"), ("A2-soft", "A2-hard")],
        "annealed masks rather than soft": [("A1-annealed", "A1-soft"), ("A2-annealed", "A2-soft")],
        "annealed masks rather than hard": [("A1-annealed", "A1-hard"), ("A2-annealed", "A2-hard")],
    }
    markdown, _ = made.write(tmp_path)
    line = row(markdown, "### By question", "soft masks rather than hard")
    assert (line["comparisons"], line["better"]) == ("24", "1")
    lines = {(line["run"].partition(" *")[0], line["against"]): line["verdict"] for line in rows(markdown, "### TPP")}
    assert lines["A1-soft", "A1-hard"].startswith("**better**, significant")
    assert lines["A1-soft", "relu"].startswith("**better**, significant")
    assert "A2-hard minus A1-hard" not in markdown
    for how in ("hard", "soft"):  # A2 has the same masks by then, and is no second answer
        made.found["runs"][f"A2-{how}"]["scores"] = copy.deepcopy(made.found["runs"][f"A1-{how}"]["scores"])
    assert pairs_by_question(made.found)["soft masks rather than hard"] == [("A1-soft", "A1-hard")]
    line = row(made.write(tmp_path)[0], "### By question", "soft masks rather than hard")
    assert (line["comparisons"], line["better"]) == ("12", "1")


def test_static_slicing_has_a_table_beside_the_masks_that_were_trained(tmp_path, quick):
    made = Made("A1", "A5", "C2")
    for run, step in (("A1", 0.5), ("A5", 0.1)):
        made.found["runs"][run]["mask"] = "random"
        made.plant(run, "specialization", *[step] * 4)
        made.plant(run, "explained_variance", *[-0.1] * 4)
    sliced = {
        name: {"specialization": s, "explained_variance": ev, "l0": 8.0}
        for name, (s, ev) in {"none": (0.1, 0.9), "ranges": (0.5, 0.4), "random": (0.2, None)}.items()
    }
    for seed in range(SEEDS):
        place = tmp_path / "runs" / f"relu-s{seed}" / "evals" / "positions.json"
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps({"slicing": sliced, "tokens": 4096, "bins": 16}))
    markdown, _ = made.write(tmp_path)
    assert rows(markdown, "### Static slicing") == [
        {"baseline": "relu", "slices": slices, "specialization": s, "explained variance": ev, "L0": "8.000"}
        for slices, s, ev in (("ranges", "+0.400", "−0.500"), ("random positions", "+0.100", "–"))
    ]
    assert reason(markdown, "Specialization", "A1") == ("the same difference with every seed", "+0.500")
    assert reason(markdown, "Explained variance", "A5") == ("the same difference with every seed", "−0.100")
    measured = rows(markdown, "## How it was measured", "eval or stage")
    assert measured == [{"eval or stage": "positions", "extent": "tokens: 4,096; bins: 16"}]


def test_what_evals_were_measured_on_and_why_some_were_not_is_in_a_table(tmp_path, quick):
    made = Made("A1")
    made.found |= {"evals": ["core", "sparse_probing", "scr", "unlearning"], "seconds": {"training": 61.25}}
    classes = {"a": {"test_rows": 100}, "b": {"test_rows": 26}}
    results = {
        "core": {"tokens": 7532, "rows": 64, "ce_tokens": 2850},
        "sparse_probing": {"sets": {"topic": {"classes": classes}, "tone": {"classes": classes}}},
        "scr": {"skipped": "no labels | here"},
    }
    for name, result in results.items():
        place = tmp_path / "runs" / "A1-s0" / "evals" / f"{name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(result))
    markdown, _ = made.write(tmp_path)
    assert [tuple(line.values()) for line in rows(markdown, "## How it was measured", "eval or stage")] == [
        ("core", "tokens: 7,532; held-out rows: 64; tokens for CE: 2,850"),
        ("sparse_probing", "sets of texts: 2; test rows of all classes: 252"),
        ("scr", "skipped: no labels ¦ here"),
        ("training", "61.25 s"),
    ]


# The pages


def test_figures_that_are_there_are_shown_and_those_that_are_not_are_named_with_the_reason(tmp_path, quick):
    from matplotlib.figure import Figure

    folder = tmp_path / "figures" / "log_a"
    folder.mkdir(parents=True)
    for path in (folder / "unlearning_scores.png", folder / "loss_curves.png", tmp_path / "figures" / "overview.png"):
        Figure(figsize=(1, 1)).savefig(path)
    missing = {"log_c/position_weights.png": "C7 was not trained", "conditions.png": "there is one condition"}
    (tmp_path / "figures" / "missing.json").write_text(json.dumps(missing))
    made = Made("A1", "C2")
    made.plant("A1", "unlearning", 0.10, 0.11, 0.09, 0.10)
    markdown, page = made.write(tmp_path)
    log = part(markdown, "## Log A: structured positional masking")
    assert "](figures/log_a/unlearning_scores.png)" in log
    assert "](figures/log_a/loss_curves.png)" in log
    assert "](figures/overview.png)" in part(markdown, "## All runs, all scores")
    first = "figure missing or not whole"
    for heading, figure, reason in (
        ("## Log C: position-aware SAEs for sequences", "log_c/position_weights.png", "C7 was not trained"),
        ("## All runs, all scores", "conditions.png", "there is one condition"),
    ):
        (line,) = rows(markdown, heading, first)
        assert (line[first], line["reason"]) == (figure, reason)
    assert not rows(markdown, "## Log A: structured positional masking", first)
    shown = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    named = re.findall(r"\]\((figures/[\w/]+\.png)\)", markdown)
    assert len(named) == len(set(named)) == len(list((tmp_path / "figures").rglob("*.png")))
    for source, path in zip(shown, named, strict=True):
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == (tmp_path / path).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The report of all 42 runs, with conditions of strictness."""
    out = tmp_path_factory.mktemp("whole")
    made = Made(*RUNS)
    made.plant("A5", "order_last", 0.030, 0.032, 0.031, 0.033)
    made.plant("B2", "explained_variance", -0.50, -0.51, -0.49, -0.50)
    made.found["runs"]["A1"]["title"] = "<script>alert(1)</script> | ![i](http://e/x.png)"
    made.found["runs"]["A7"]["failed"] = {"A7-s1": "ValueError: <b>no</b>"}
    made.found["runs"]["A8"]["parts"] = ["<b>part</b> | **bold**"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "draw_differences", small)
        made.write(out)
    return out


def test_the_page_is_well_formed_and_needs_nothing_but_itself(whole):
    page = Page((whole / "report.html").read_text())
    assert not page.open  # every tag is closed, in its turn
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object", "base", "form", "b"} & set(tags)
    assert not re.search(r"(?:src|href|url)\W+(?:https?:)?//", page.source)
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in page.tags if tag == "img")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert "<script>alert(1)</script> | ![i](http" in page.text
    assert "<b>part</b> | **bold**" in page.text
    assert "ValueError: <b>no</b>" in page.text


def test_there_is_a_row_a_run_in_one_table_of_all_scores(whole):
    page, markdown = Page((whole / "report.html").read_text()), (whole / "report.md").read_text()
    heading = next(row for row in page.rows if row[:2] == ["run", "Loss"])
    assert heading == [
        "run", "Loss", "FVU", "Explained variance", "CE recovered", "L0", "Dead latents", "Sparse probing top 1",
        "Sparse probing top 5", "Order probing mean-pooled", "Order probing last token", "Unlearning", "SCR", "TPP",
        "Specialization", "Agreement", "Agreement (same recipe)",
        "Agreement (shuffled)", "Fidelity",
    ]  # fmt: skip
    assert sum(row == heading for row in page.rows) == 1
    by_run = {row[0].split(" ")[0]: row for row in page.rows if len(row) == len(heading)}
    assert set(RUNS) | {"relu"} <= set(by_run)
    assert page.rows.index(by_run["relu"]) < page.rows.index(by_run["A1"]) < page.rows.index(by_run["E9"])
    assert by_run["A5"][heading.index("Order probing last token")] == "0.732 ± 0.001 better (0.000)"
    assert cells(markdown, "A5")["Order probing last token"] == "0.732 ± 0.001 **better** *(0.000)*"
    assert cells(markdown, "relu")["Explained variance"] == "0.900 ± 0.000 *(0.700)*"


def test_it_opens_in_chromium(whole):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    place = (whole / "report.html").as_uri()
    argv = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", place]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Content Security Policy" not in done.stderr
    assert done.stdout.count("<img") == len(list((whole / "figures").rglob("*.png")))


def test_a_folder_without_numbers_is_refused_in_a_line(tmp_path, quick):
    with pytest.raises(UserError, match=r"has no campaign\.json"):
        write(tmp_path)


def test_without_scipy_a_line_says_what_to_install(tmp_path, quick, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UserError, match=r"temposae\[evals\]"):
        Made("A1").write(tmp_path)
    Made("A1", seeds=1).write(tmp_path)  # of which there are no intervals


@pytest.mark.parametrize("runs", [(), ("A1",)])
def test_a_campaign_of_a_baseline_or_of_one_run_has_a_report(tmp_path, quick, runs):
    markdown, page = Made(*runs, seeds=1).write(tmp_path)
    assert "| relu *title of relu* |" in markdown
    assert not page.open


def test_the_figure_of_a_score_has_a_line_a_difference_with_its_interval_and_its_seeds():
    made = Made("A1", "A2", "A5")
    made.plant("A5", "tpp", 0.030, 0.032, 0.031, 0.033)
    made.plant("A1", "tpp", -0.030, -0.032, -0.031, -0.033)
    ones, between = against_baselines(made.found)["tpp"], significance.compare(made.found, [("A2", "A1")])["tpp"]
    figure = differences_figure("TPP", ones, between)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A1", "A2", "A5", "A2 minus A1"]
    lines = [(line.get_color(), list(line.get_xdata()), set(line.get_ydata())) for line in axes.lines]
    for at, one in enumerate([*ones, *between]):
        colour = {"better": "#009E73", "worse": "#D55E00", NO_DIFFERENCE: "#999999"}[one.verdict]
        assert (colour, [one.mean - one.half, one.mean + one.half], {at}) in lines
        assert (colour, list(one.values), {at}) in lines
        assert (colour, [one.mean], {at}) in lines
    assert [one.verdict for one in [*ones, *between]] == ["worse", NO_DIFFERENCE, "better", "better"]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"worse", NO_DIFFERENCE, "better"}
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top


# The statistics


def test_intervals_and_p_are_students():
    values = np.array([0.02, 0.05, 0.01, 0.04])
    half, p = student(values.tolist())
    low, high = students.interval(0.95, 3, loc=values.mean(), scale=values.std(ddof=1) / 2)
    assert (values.mean() - half, values.mean() + half) == pytest.approx((low, high))
    assert p == pytest.approx(ttest_rel(values, np.zeros(4)).pvalue)


def test_holms_correction_is_the_least_level_at_which_all_smaller_ones_stand():
    """By the definition: at a level, p are rejected in order as long as p(i) <= level / (m - i + 1)."""

    def rejected(ps: list[float], level: float) -> set[int]:
        order = sorted(range(len(ps)), key=ps.__getitem__)
        stands = itertools.takewhile(lambda at: ps[order[at]] <= level / (len(ps) - at), range(len(ps)))
        return {order[at] for at in stands}

    draw = np.random.default_rng(0)
    for size in (1, 2, 7):
        ps = list(draw.uniform(0, 0.2, size))
        for level in (0.01, 0.05, 0.3):
            assert {i for i, p in enumerate(holm(ps)) if p <= level} == rejected(ps, level)


def test_of_campaigns_of_noise_one_in_twenty_makes_a_false_claim_at_most(monkeypatch):
    """12 runs that share a baseline, and differ from it by chance."""
    monkeypatch.setattr(significance, "COMPARED", ("tpp",))
    made, draw, wrong = Made(*list(RUNS)[:12]), np.random.default_rng(1), 0
    for _ in range(300):
        for run in (made.found["runs"] | made.found["baselines"]).values():
            run["scores"] = {"tpp": {"mean": 0.2, "values": list(draw.normal(0.2, 0.01, SEEDS))}}
        wrong += any(one.sign for one in against_baselines(made.found)["tpp"])
    assert wrong <= 15 + 3 * (300 * 0.05 * 0.95) ** 0.5
    assert wrong > 0  # it does make claims


def test_every_score_has_a_name_of_its_own_and_a_meaning():
    assert len({score.name for score in SCORES.values()}) == len(SCORES)
    assert all(score.meaning for score in SCORES.values())
