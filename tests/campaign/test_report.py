"""The report of a campaign, from made-up numbers of which it is known what is to be said."""

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
from temposae.campaign import report_data, significance
from temposae.campaign.difference_figure import differences_figure
from temposae.campaign.documented import RUNS
from temposae.campaign.questions import MEANINGS, QUESTIONS
from temposae.campaign.report import write
from temposae.campaign.results import SCORES, _summary
from temposae.campaign.significance import against_baselines, baseline_of, holm, repeated, student
from temposae.engine.errors import UserError

SEEDS = 4
PLAIN = {
    "loss": 20.0, "fvu_first": 1.0, "fvu_last": 0.1, "explained_variance": 0.9, "ce_recovered": 0.95, "l0": 32.0,
    "dead_fraction": 0.02, "probing_1": 0.85, "probing_5": 0.9, "probing": 0.87, "order_pooled": 0.6, "order_last": 0.7,
    "unlearning": 0.3, "scr": 0.1, "tpp": 0.2, "specialization": 0.1, "retention": 0.8, "fidelity": 0.95,
}  # fmt: skip
TITLES = {"A1": "hard masks", "A5": "position feature groups", "C2": "temperature annealing"}


class Made:
    """A campaign.json to plant numbers in: plain runs differ from the baseline by noise about 0 alone, of at most 0.004."""

    def __init__(self, *runs: str, seeds: int = SEEDS, conditions: tuple[str, ...] = ("",)):
        self.seeds, self.draw = seeds, np.random.default_rng(0)
        named = [(run, condition) for run in runs for condition in conditions]
        self.found: dict[str, Any] = {
            "format": "temposae-campaign/1", "model": "testbed", "hook": "blocks.1.hook_resid_post", "seeds": seeds,
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
    monkeypatch.setattr(report_data, "draw_differences", small)


def part(markdown: str, heading: str) -> str:
    """What stands below a heading, up to the next of its kind."""
    marks = heading.split(" ")[0]
    _, found, rest = f"\n{markdown}".partition(f"\n{heading}\n")
    assert found, heading
    return re.split(rf"\n#{{2,{len(marks)}}} ", rest)[0]


def cells(markdown: str, run: str, log: str) -> dict[str, str]:
    """A run's row in the table of its log, by column."""
    lines = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in part(markdown, f"### Table of log {log}").splitlines()
        if line.startswith("|")
    ]
    (row,) = (line for line in lines[2:] if re.match(rf"\[?{run}\b", line[0]))
    return dict(zip(lines[0], row, strict=True))


# What is told


def test_what_is_planted_to_help_is_said_to_help_there_with_its_numbers_and_its_figure(tmp_path):
    made = Made("A1", "A5", "B1")
    steps = (0.030, 0.032, 0.031, 0.033)
    made.plant("A5", "order_last", *steps)
    markdown, page = made.write(tmp_path)
    section = part(markdown, "### By score: Order probing last token")
    (claim,) = (line for line in section.splitlines() if line.startswith("- Order probing"))
    half = students.ppf(0.975, 3) * np.std(steps, ddof=1) / 2
    assert f"**A5** helped, +0.0315 (95% {0.0315 - half:.4f} to {0.0315 + half:.4f}; p" in claim
    p = min(1, 3 * ttest_rel([0.7 + step for step in steps], [0.7] * 4).pvalue)
    assert (f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001") in claim
    assert " in 3; [figure" in claim
    ((number, link),) = re.findall(r"\[figure (\d+)\]\(#([\w-]+)\)", claim)
    assert f"![Order probing last token](figures/differences/order_last.png)\n\n*Figure {number}: " in section
    assert (tmp_path / "figures" / "differences" / "order_last.png").stat().st_size > 5000
    assert link in {attrs.get("id") for _, attrs in page.tags}
    assert markdown.count("**A5** helped") == 2  # by score and by log
    assert "**A5** helped" in part(markdown, "### What is told of log A")
    answer = part(markdown, "## The answer")
    assert (
        "  - **1 helped somewhere**: order probing last token (A5).\n  - None is told to have hurt anywhere." in answer
    )
    assert "  - Helped: order probing last token (A5)." in part(markdown, "### In each log")
    assert cells(markdown, "A5", "A")["order, last token"].startswith("**0.732**")
    assert "**" not in cells(markdown, "A1", "A")["order, last token"]


def test_noise_is_not_said_to_help_even_where_its_own_interval_leaves_0_out(tmp_path, quick):
    made = Made("A1", "A2", "A3", "B1", "C1")
    made.plant("A2", "scr", 0.09, -0.05, 0.07, -0.01)
    lucky = (0.01, 0.02, 0.03, 0.02)
    made.plant("A3", "scr", *lucky)
    p = ttest_rel([0.1 + step for step in lucky], [0.1] * 4).pvalue
    assert p < 0.05 < 5 * p  # it would count if nothing else had been looked at
    markdown, _ = made.write(tmp_path)
    section = part(markdown, "### By score: SCR")
    assert "helped" not in section
    assert re.search(r"- 0 is in its interval: [^\n]*A2 \+0\.025", section)
    assert "- not after correction for 5 comparisons: A3 +0.020" in section
    assert "None is told to have helped anywhere." in part(markdown, "## The answer")
    assert "**" not in cells(markdown, "A3", "A")["SCR"]


def test_less_of_dead_latents_is_help_and_specialization_only_rises(tmp_path, quick):
    made = Made("A1", "A5")
    made.plant("A1", "dead_fraction", -0.010, -0.011, -0.009, -0.010)
    made.plant("A5", "dead_fraction", 0.20, 0.21, 0.19, 0.20)
    made.plant("A5", "specialization", 0.40, 0.41, 0.39, 0.40)
    markdown, _ = made.write(tmp_path)
    assert "**A1** helped, −0.0100" in part(markdown, "### By score: Dead latents")
    assert "**A5** hurt, +0.200" in part(markdown, "### By score: Dead latents")
    assert "**A5** rose, +0.400" in part(markdown, "### By score: Specialization")
    assert "specialization" not in part(markdown, "## The answer").split("###")[0]


def test_a_run_that_helps_no_more_than_its_random_control_is_told_with_that(tmp_path, quick):
    made = Made("A1", "A5")
    made.plant("A5", "unlearning", 0.10, 0.11, 0.09, 0.10, control=0.45)
    markdown, _ = made.write(tmp_path)
    (claim,) = re.findall(r"^- Unlearning: .*$", part(markdown, "### By score: Unlearning"), re.M)
    assert "**A5** helped, +0.100 (95% 0.087 to 0.113; p = 0.0003 in 2; [figure " in claim
    assert claim.endswith("But its random control is as good, with 0.450.")
    answer = part(markdown, "## The answer")
    assert "**1 helped somewhere**: unlearning (A5†)." in answer
    assert "†: its random control is as good." in answer
    assert cells(markdown, "A5", "A")["unlearning"].startswith("† **0.400**")
    assert not cells(markdown, "A1", "A")["unlearning"].startswith("†")


def test_with_one_seed_nothing_is_claimed(tmp_path, quick):
    made = Made("A1", "A5", seeds=1)
    made.plant("A5", "order_last", 0.3)
    markdown, page = made.write(tmp_path)
    assert not re.search(r"\*\* (helped|hurt|rose|fell|is better|is worse)|95% \d|p [=<]|±", markdown)
    assert "**One seed**" in part(markdown, "## What to know first")
    assert "**It can't be told** whether anything helped: there is one seed." in part(markdown, "## The answer")
    assert "- one seed: A1 " in part(markdown, "### By score: Order probing last token")
    assert "A5 +0.300" in part(markdown, "### By score: Order probing last token")
    assert cells(markdown, "A5", "A")["order, last token"].startswith("1.000")
    assert "No difference from a baseline is told." in page.text


def test_the_same_difference_with_every_seed_is_no_proof(tmp_path, quick):
    made = Made("A1", "A5")
    made.plant("A5", "unlearning", 0.05, 0.05, 0.05, 0.05)  # such as one question more
    made.plant("A1", "unlearning", 0.0, 0.0, 0.0, 0.0)
    section = part(made.write(tmp_path)[0], "### By score: Unlearning")
    assert "- the same difference with every seed: A5 +0.050" in section
    assert "- no difference with any seed: A1 +0.000" in section


def test_explained_variance_with_more_latents_active_is_no_help(tmp_path, quick):
    made = Made("A1", "A5", "B1", "B2")
    up, down = (0.050, 0.051, 0.049, 0.050), (-0.050, -0.051, -0.049, -0.050)
    for run, steps, l0 in (("A1", up, 60), ("A5", up, 20), ("B1", down, 20), ("B2", down, 60)):
        made.plant(run, "explained_variance", *steps)
        made.set(run, "l0", [l0 + seed for seed in range(4)], 32.0)
    markdown, _ = made.write(tmp_path)
    section = part(markdown, "### By score: Explained variance")
    assert re.findall(r"\*\*(\w+)\*\* (helped|hurt)", section) == [("A5", "helped"), ("B2", "hurt")]
    assert "- more latents are active: A1 +0.050" in section
    assert "- fewer latents are active: B1 −0.050" in section
    assert "A1 61.5 beside 32.0" in part(markdown, "## What to know first")


@pytest.mark.parametrize(("aim", "said"), [(32.0, "- L0 was matched: "), (None, "- **L0 was not matched**")])
def test_whether_l0_was_matched_is_told_first(tmp_path, quick, aim, said):
    made = Made("A1")
    for run in (made.found["runs"] | made.found["baselines"]).values():
        run["target_l0"] = aim
    know = part(made.write(tmp_path)[0], "## What to know first")
    assert said in know
    assert know.count("was matched") + know.count("was not matched") == 1
    assert "Losses of different objectives are different quantities" in know


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
    assert "- **A5-s1**: OutOfMemoryError: no memory" in part(markdown, "### Runs that failed")


# Runs that are not well, or not runs of their own


def test_a_run_below_its_control_is_listed_with_the_reason(tmp_path, quick):
    made = Made("A1", "A5")
    made.set("A5", "probing", [0.8, 0.81, 0.8, 0.79], 0.83)
    made.found["runs"]["A5"] |= {
        "beats_random": False, "why_not": "sparse probing is 0.8000, the random control's 0.8300"
    }  # fmt: skip
    made.set("A5", "dead_fraction", [0.5, 0.5, 0.5, 0.5], 0.0)
    markdown, page = made.write(tmp_path)
    (line,) = re.findall(r"^- \*\*A\d\*\*: .*$", part(markdown, "### Runs that do not beat their random control"), re.M)
    assert line.startswith(
        "- **A5**: sparse probing is 0.8000, the random control's 0.8300. Beside that: FVU went from "
    )
    assert "50.0% of its latents are dead" in line
    assert "2 of 3 dictionaries do." in markdown
    assert "Not above their random control in explained variance or sparse probing: A5 (" in markdown
    assert "sparse probing is 0.8000" in page.text


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
    assert part(markdown, "### Runs that failed").count("FloatingPointError: loss is NaN at step 7 \\| of 100") == 4
    assert "loss is NaN at step 7 | of 100" in page.text
    row = cells(markdown, "A5", "A")
    assert "failed: position feature groups" in row.pop("run")
    assert set(row.values()) == {"–"}
    assert "A5" not in part(markdown, "### By score: Explained variance")
    assert "Failed, with one seed or more: A5" in part(markdown, "## What to know first")


def test_scores_that_are_not_there_are_dashes_and_those_that_no_run_has_are_named(tmp_path, quick):
    made = Made("A1", "A5")
    made.set("A1", "unlearning", [None] * SEEDS, None)
    del made.found["runs"]["A5"]["scores"]["tpp"]
    for run in (made.found["runs"] | made.found["baselines"]).values():
        del run["scores"]["scr"]
    markdown, _ = made.write(tmp_path)
    assert cells(markdown, "A1", "A")["unlearning"] == "–"
    assert cells(markdown, "A5", "A")["TPP"] == "–"
    assert cells(markdown, "A5", "A")["unlearning"] != "–"
    assert "SCR" not in cells(markdown, "A5", "A")
    assert "- Not measured: SCR." in part(markdown, "## What to know first")
    assert not re.search(r"\bNone\b(?! is told| of \d| in this campaign|\.)|\bnan\b", markdown)


def test_analyses_are_named_with_the_run_they_look_at_and_not_counted(tmp_path, quick):
    made = Made("C2", "C1")
    looks = copy.deepcopy(made.found["runs"]["C2"]) | {"run": "C3", "title": "position-wise loss", "trained_as": "C2"}
    looks["analysis"] = {"most": _summary([7.0, 9.0, 8.0, 8.0]), "most_at": _summary([3, 3, 3, 4])}
    looks["analysis"] |= {name: _summary([None] * 4) for name in ("mean", "least", "ratio", "least_at")}
    made.found["runs"] = {"C3": looks, **made.found["runs"]}
    made.plant("C2", "tpp", 0.10, 0.11, 0.09, 0.10)
    made.plant("C3", "tpp", 0.10, 0.11, 0.09, 0.10)
    markdown, _ = made.write(tmp_path)
    assert "- **C3**, position-wise loss: looks at the weights of C2" in markdown
    assert " in 2; [figure" in part(markdown, "### By score: TPP")
    assert "C3" not in part(markdown, "### By score: TPP")
    assert "weights of C2" in cells(markdown, "C3", "C")["run"]
    told = part(markdown, "### What the analyses of log C find")
    assert "**C3**, position-wise loss, in C2: in the last step" in told
    assert "8.000 ± 0.816 at the hardest" in told
    assert "hardest at position 3 or 4" in told
    assert {one.run for ones in against_baselines(made.found).values() for one in ones} == {"C1", "C2"}


def test_an_analysis_stands_for_weights_that_nobody_else_has(tmp_path, quick):
    made = Made("C7", "C8")
    for name in ("C7", "C8"):
        made.found["runs"][name] |= {"trained_as": "C6", "folders": [f"runs/C6-s{seed}" for seed in range(SEEDS)]}
        made.found["runs"][name]["analysis"] = {"why_not": "not planted"}
    assert repeated(made.found) == {"C8": "C7"}
    assert {one.run for ones in against_baselines(made.found).values() for one in ones} == {"C7"}
    assert "in C6: nothing: not planted." in made.write(tmp_path)[0]


def test_runs_that_came_out_the_same_are_counted_once_and_named(tmp_path, quick):
    made = Made("A1", "A2", conditions=("", "hard"))
    made.found["runs"]["A2-hard"]["scores"] = copy.deepcopy(made.found["runs"]["A1-hard"]["scores"])
    assert repeated(made.found) == {"A2-hard": "A1-hard"}
    made.found["runs"]["A2-hard"]["scores"]["loss"]["values"][0] *= 1 + 1e-8  # but for rounding
    assert repeated(made.found) == {"A2-hard": "A1-hard"}
    know = part(made.write(tmp_path)[0], "## What to know first")
    assert "the same to five digits, and are counted once: A2-hard that of A1-hard." in know


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
    assert {run for question in QUESTIONS for pair in question.pairs for run in pair} <= set(RUNS)
    made = Made("A1", "A2", "B1", "B2", "E1", "E2")
    made.plant("A2", "tpp", 0.10, 0.11, 0.09, 0.10)
    made.plant("A1", "tpp", 0.0, 0.001, -0.001, 0.0)
    asked = part(made.write(tmp_path)[0], "### What the logs asked")
    (soft,) = re.findall(r"^- \*\*Soft masks rather than hard\*\*.*\n  - .*$", asked, re.M)
    assert (
        "(A2 against A1, B2 against B1): 1 of 24 comparisons can be told.\n  - TPP: **A2** against **A1** is better, +0.100"
        in soft
    )
    assert " in 3; [figure" in soft
    assert re.search(r"\[figure \d+\]\(#by-score-tpp\)", soft)
    (adversary,) = re.findall(r"^- \*\*An adversary .*$", asked, re.M)
    assert "(E2 against E1): can't be told, in any of 12 comparisons." in adversary


def test_conditions_of_strictness_are_set_against_each_other_and_not_the_runs_that_differ_in_it(tmp_path, quick):
    made = Made("A1", "A2", conditions=("hard", "soft", "annealed"))
    made.found["baselines"] = {"relu": made.run("relu")}
    made.plant("A1-soft", "tpp", 0.10, 0.11, 0.10, 0.11)
    made.plant("A1-hard", "tpp", 0.0, 0.001, 0.0, 0.001)
    markdown, _ = made.write(tmp_path)
    asked = part(markdown, "### What the logs asked")
    who = "(A1-soft against A1-hard, A2-soft against A2-hard)"
    assert f"{who}: 1 of 24 comparisons can be told.\n  - TPP: **A1-soft** against **A1-hard** is better" in asked
    assert "**Annealed masks rather than soft** (A1-annealed against A1-soft, A2-annealed against A2-soft)" in asked
    assert "A2-hard against A1-hard" not in asked
    assert "**A1-soft** helped" in part(markdown, "### By score: TPP")
    for how in ("hard", "soft"):  # A2 has the same masks by then, and is no second answer
        made.found["runs"][f"A2-{how}"]["scores"] = copy.deepcopy(made.found["runs"][f"A1-{how}"]["scores"])
    asked = part(made.write(tmp_path)[0], "### What the logs asked")
    assert "(A1-soft against A1-hard): 1 of 12 comparisons can be told." in asked


def test_static_slicing_stands_beside_the_masks_that_were_trained(tmp_path, quick):
    made = Made("A1", "A5", "C2")
    for run, step in (("A1", 0.5), ("A5", 0.1)):
        made.found["runs"][run]["mask"] = "random"
        made.plant(run, "specialization", *[step] * 4)
        made.plant(run, "explained_variance", *[-0.1] * 4)
    sliced = {
        name: {"specialization": s, "explained_variance": ev, "l0": 8.0}
        for name, (s, ev) in {"none": (0.1, 0.9), "ranges": (0.5, 0.4), "random": (0.2, 0.5)}.items()
    }
    for seed in range(SEEDS):
        place = tmp_path / "runs" / f"relu-s{seed}" / "evals" / "positions.json"
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps({"slicing": sliced, "tokens": 4096, "bins": 16}))
    markdown, _ = made.write(tmp_path)
    section = part(markdown, "### Static slicing")
    assert "| relu, cut into ranges of positions | +0.400 | −0.500 | 8.000 |" in section
    assert "| A1 | +0.500 | −0.100 |" in section
    assert "C2" not in section
    assert "2 of 2 masked runs keep more explained variance than ranges; of these A1 have" in section
    assert "positions on 4,096 tokens in 16 bins" in part(markdown, "## What to know first")


def test_claims_point_at_figures_of_logs_only_in_the_condition_that_those_show(tmp_path, quick):
    place = tmp_path / "figures" / "log_a" / "unlearning_scores.png"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"\x89PNG")
    made = Made("A1", conditions=("k16", "k32"))
    for name in ("A1-k16", "A1-k32"):
        made.plant(name, "unlearning", 0.10, 0.11, 0.09, 0.10)
    claims = re.findall(r"^- Unlearning: .*$", made.write(tmp_path)[0], re.M)
    assert {tuple(re.findall(r"A1-k\d\d|unlearning-scores|by-score-unlearning", claim)) for claim in claims} == {
        ("A1-k16", "by-score-unlearning", "unlearning-scores"), ("A1-k32", "by-score-unlearning")
    }  # fmt: skip
    assert "Claims that point here: unlearning of A1-k16." in (tmp_path / "report.md").read_text()


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
    assert "Claims that point here: unlearning of A1." in log
    assert "Claims that point here" not in part(markdown, "## Log C: position-aware SAEs for sequences")
    (claim,) = re.findall(r"^- Unlearning: \*\*A1\*\* helped.*$", log, re.M)
    assert len(re.findall(r"\[figure \d+\]", claim)) == 2
    assert re.search(r"\(#figure-\d+-unlearning-scores\)", claim)
    assert "](figures/overview.png)" in part(markdown, "## All runs, all scores")
    assert "`log_c/position_weights.png`: C7 was not trained" in part(
        markdown, "## Log C: position-aware SAEs for sequences"
    )
    assert "`conditions.png`: there is one condition" in part(markdown, "## Controls, failures and analyses")
    numbers = [int(n) for n in re.findall(r"^\*Figure (\d+): ", markdown, re.M)]
    assert numbers == list(range(1, len(numbers) + 1))
    shown = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    named = re.findall(r"\]\((figures/[\w/]+\.png)\)", markdown)
    assert len(named) == len(set(named)) == len(numbers)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_data, "draw_differences", small)
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
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert "<script>alert(1)</script> | ![i](http" in page.text


def test_there_is_a_row_a_run_in_one_table_of_the_page_and_a_table_a_log_in_markdown(whole):
    page, markdown = Page((whole / "report.html").read_text()), (whole / "report.md").read_text()
    heading = next(row for row in page.rows if row[:2] == ["run", "loss"])
    assert heading == [
        "run", "loss", "FVU", "L0", "EV", "CE recovered", "dead", "probing, top 1", "probing, top 5", "order, pooled",
        "order, last token", "unlearning", "SCR", "TPP", "specialization", "retention", "fidelity",
    ]  # fmt: skip
    assert sum(row == heading for row in page.rows) == 1
    rows = {row[0].split(" ")[0]: row for row in page.rows if len(row) == len(heading)}
    assert set(RUNS) | {"relu"} <= set(rows)
    assert page.rows.index(rows["relu"]) < page.rows.index(rows["A1"]) < page.rows.index(rows["E9"])
    assert rows["A5"][heading.index("order, last token")] == "0.732 ± 0.001 (0.000)"
    assert cells(markdown, "A5", "A")["order, last token"] == "**0.732** ± 0.001 *(0.000)*"
    assert all(cells(markdown, "relu", log)["EV"] == "0.900 ± 0.000 *(0.700)*" for log in "ABCDE")
    assert markdown.count("\n### Table of log ") == 5


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
    with pytest.raises(UserError, match=r"holds no campaign\.json"):
        write(tmp_path)


def test_without_scipy_a_line_says_what_to_install(tmp_path, quick, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
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
    (axes,) = differences_figure("TPP", ones, between).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A1", "A2", "A5", "A2 less A1"]
    lines = [(line.get_color(), list(line.get_xdata()), set(line.get_ydata())) for line in axes.lines]
    for at, one in enumerate([*ones, *between]):
        colour = {"helped": "#009E73", "hurt": "#D55E00", "open": "#999999"}[one.verdict]
        assert (colour, [one.mean - one.half, one.mean + one.half], {at}) in lines
        assert (colour, list(one.values), {at}) in lines
        assert (colour, [one.mean], {at}) in lines
    assert [one.verdict for one in [*ones, *between]] == ["hurt", "open", "helped", "helped"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top


# The statistics


def test_intervals_and_p_are_students():
    values = np.array([0.02, 0.05, 0.01, 0.04])
    half, p = student(values.mean(), values.std(ddof=1), 4)
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


def test_every_score_has_a_name_and_a_meaning():
    assert set(MEANINGS) == {"loss", "fvu_last", *SCORES}
