"""Tables hold what was measured alone, whatever part of the evals that is, and sentences are the same in every report."""

import itertools
import re

import pytest
from temposae.campaign import report
from temposae.campaign.results import SCORES, _summary, against_random
from temposae.campaign.significance import COMPARED, NO_DIFFERENCE
from temposae.cli import output

from .test_report import Made, cells, facts, row, rows, small

EVALS = ("core", "sparse_probing", "positions", "scr", "tpp")
OF = {name: score.eval for name, score in SCORES.items()} | {"probing": "sparse_probing"}
SUBSETS = [one for size in range(len(EVALS) + 1) for one in itertools.combinations(EVALS, size)]
TEXTS = (report.RULES, report.SCORE_LEGEND, report.SLICING, report.METHOD, "None.")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures: what is written is looked at."""
    monkeypatch.setattr(report, "draw_differences", small)


def made_of(evals: tuple[str, ...], *, ill: bool) -> Made:
    """A campaign with these evals alone; `ill`: with runs below their controls, better and worse than the baseline."""
    made = Made("A1", "A2", "C2")
    made.found["evals"] = list(evals)
    if ill:
        for score in ("explained_variance", "probing", "scr", "specialization"):
            made.plant("A1", score, 0.05, 0.051, 0.049, 0.05, control=0.99)
            made.plant("A2", score, -0.2, -0.21, -0.19, -0.2, control=0.99)
        made.set("C2", "l0", [64.0] * 4, 64.0)
    for run in (made.found["runs"] | made.found["baselines"]).values():
        run["target_l0"] = 32.0 if ill else None
        for score in list(run["scores"]):
            if score in OF and OF[score] not in evals:
                del run["scores"][score]
    return made


@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
@pytest.mark.parametrize("evals", SUBSETS, ids="+".join)
def test_a_campaign_says_nothing_of_what_was_not_measured(evals, ill, quick, tmp_path, capsys):
    made = made_of(evals, ill=ill)
    markdown, _ = made.write(tmp_path)
    output.campaign_table(made.found)
    printed = capsys.readouterr().out
    known = {name: score.name for name, score in SCORES.items() if score.eval in evals}
    others = [score.name for score in SCORES.values() if score.eval not in evals]
    compared = [known[name] for name in COMPARED if name in known]
    assert list(cells(markdown, "A1")) == ["run", "Loss", "FVU", *known.values()]
    assert [line["score"] for line in rows(markdown, "### By score")] == compared
    assert [line["score"] for line in rows(markdown, "## How it was measured", "score")] == list(known.values())
    assert [name for name in re.findall(r"^### (.+)$", markdown, re.M) if name in OF or name in others] == []
    assert [name for name in re.findall(r"^### (.+)$", markdown, re.M) if name in known.values()] == compared
    assert facts(markdown)["scores not measured"].split(", ") == others
    judged = {"core": "explained variance", "sparse_probing": "sparse probing"}
    for line in rows(markdown, "### Random controls"):
        assert all((line[label] == "–") == (name not in evals) for name, label in judged.items())
        assert (line["above its control"] == "–") == (not judged.keys() & set(evals))
    is_below = ill and bool(judged.keys() & set(evals))
    below = [line["run"] for line in rows(markdown, "### Random controls") if line["above its control"] == "no †"]
    assert set(below) == ({"A1", "A2"} if is_below else set())
    assert ("does not beat its random control" in printed) == is_below
    assert not re.search(r"does not beat.*was not measured", printed)


@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
def test_sentences_are_the_same_in_every_report(ill, quick, tmp_path):
    markdown, _ = made_of(EVALS, ill=ill).write(tmp_path)
    texts = {line for text in TEXTS for line in text.splitlines()}
    marks = (
        "|",
        "#",
        "![",
        "*",
        "[What to know first]",
        f"- {NO_DIFFERENCE} (",
    )  # tables, figures, links and differences
    assert [line for line in markdown.splitlines() if line not in texts and not line.startswith(marks)] == []


def test_captions_of_differences_do_not_depend_on_numbers(quick, tmp_path):
    captions = [re.findall(r"^\*.*\*$", made_of(EVALS, ill=ill).write(tmp_path)[0], re.M) for ill in (False, True)]
    assert captions[0] == captions[1] != []


@pytest.mark.parametrize(
    ("scores", "beats", "below", "unknown"),
    [
        ({}, None, 0, 2),
        ({"explained_variance": (0.9, 0.5)}, True, 0, 1),
        ({"explained_variance": (0.4, 0.5)}, False, 1, 1),
        ({"explained_variance": (0.9, 0.5), "probing": (0.8, 0.9)}, False, 1, 0),
        ({"explained_variance": (0.9, 0.5), "probing": (0.9, 0.8)}, True, 0, 0),
        ({"probing": (0.9, 0.8)}, True, 0, 1),
        ({"explained_variance": (0.9, None)}, None, 0, 2),
        ({"explained_variance": (None, 0.5), "probing": (0.9, 0.9)}, False, 1, 1),
    ],
)
def test_a_run_is_beside_its_control_in_what_was_measured(scores, beats, below, unknown):
    held = {name: _summary([own]) | {"random": _summary([other])} for name, (own, other) in scores.items()}
    found = against_random(held)
    assert (found.beats, len(found.below), len(found.unknown)) == (beats, below, unknown)
    assert all("was not measured" in why for why in found.unknown)
    assert not any("measured" in why for why in found.below)
    if scores == {"explained_variance": (0.9, None)}:
        assert found.unknown[0] == "explained variance of its random control was not measured"


def test_numbers_of_an_older_campaign_are_judged_anew(quick, tmp_path, capsys):
    """They said that a run does not beat its control, for a score that was not measured."""
    made = made_of(("core",), ill=False)
    for run in (made.found["runs"] | made.found["baselines"]).values():
        run |= {"beats_random": False, "why_not": "sparse probing was not measured"}
    markdown, _ = made.write(tmp_path)
    output.campaign_table(made.found)
    assert "does not beat" not in capsys.readouterr().out
    assert {line["above its control"] for line in rows(markdown, "### Random controls")} == {"yes"}
    assert facts(markdown)["not above their random control"] == "0 of 4"


def test_a_score_that_one_run_lacks_is_a_dash_there(quick, tmp_path):
    made = made_of(("core", "sparse_probing"), ill=False)
    del made.found["runs"]["A2"]["scores"]["probing"]
    markdown, _ = made.write(tmp_path)
    line = row(markdown, "### Random controls", "A2")
    assert (line["above its control"], line["sparse probing"]) == ("yes", "–")
    assert facts(markdown)["not above their random control"] == "0 of 4"
