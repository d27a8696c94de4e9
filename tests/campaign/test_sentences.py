"""Sentences are made from what was measured alone, whatever part of the evals that is."""

import itertools
import re

import pytest
from temposae.campaign import report_data
from temposae.campaign.questions import MEANINGS
from temposae.campaign.results import SCORES, _summary, against_random
from temposae.cli import output

from .test_report import Made, small

#: eval -> the words for what it measures
WORDS = {
    "core": ("explained variance", "ce recovered", "l0", "dead"),
    "sparse_probing": ("probing",),
    "positions": ("order probing", "specialization", "fidelity"),
    "scr": ("scr",),
    "tpp": ("tpp",),
}
OF = {name: score.eval for name, score in SCORES.items()} | {"probing": "sparse_probing"}
SUBSETS = [one for size in range(len(WORDS) + 1) for one in itertools.combinations(WORDS, size)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures: what is said is looked at."""
    monkeypatch.setattr(report_data, "draw_differences", small)


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


def sentences(markdown: str) -> list[str]:
    """What is said: no headings of logs, no questions, no lines that only name what was not measured."""
    lines = [
        line for line in markdown.splitlines() if not line.startswith(("#", "|", "!", "*Figure", "- Not measured"))
    ]
    said = [one.lower() for line in lines for one in re.split(r"(?<=[.:;]) ", line)]
    return [one for one in said if "not measured" not in one]


@pytest.mark.parametrize("ill", [False, True], ids=["well", "ill"])
@pytest.mark.parametrize("evals", SUBSETS, ids="+".join)
def test_a_campaign_says_nothing_of_what_was_not_measured(evals, ill, quick, tmp_path, capsys):
    made = made_of(evals, ill=ill)
    markdown, _ = made.write(tmp_path)
    output.campaign_table(made.found)
    printed = capsys.readouterr().out
    said = [*sentences(markdown), *(line.lower() for line in printed.splitlines() if ":" in line)]
    assert not [one for one in said if "does not beat" in one and "not measured" in one]
    for name, words in WORDS.items():
        if name in evals:
            continue
        for word in words:
            told = [one for one in said if re.search(rf"\b{word}\b", one)]
            told = [one for one in told if "what was" not in one and not (word in ("l0", "dead") and _of_settings(one))]
            assert told == [], f"{name} was not measured"
    for line in [*markdown.splitlines(), *printed.splitlines()]:
        assert not re.search(r"(does not beat|not above|\bbelow|worse|hurt).*was not measured", line), line
    beats = {"core", "sparse_probing"} & set(evals)
    assert ("does not beat its random control" in printed) == (ill and bool(beats))
    assert ("Not above their random control" in markdown) == (ill and bool(beats))


def _of_settings(sentence: str) -> bool:
    """L0 that was asked for, or held to in training, is a setting."""
    return any(word in sentence for word in ("matched", "coefficient", "at the same l0", "at different l0"))


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


def test_numbers_of_an_older_campaign_are_told_anew(quick, tmp_path, capsys):
    """They said that a run does not beat its control, for a score that was not measured."""
    made = made_of(("core",), ill=False)
    for run in (made.found["runs"] | made.found["baselines"]).values():
        run |= {"beats_random": False, "why_not": "sparse probing was not measured"}
    markdown, _ = made.write(tmp_path)
    output.campaign_table(made.found)
    assert "does not beat" not in capsys.readouterr().out
    assert "is above the control's, in explained variance. 4 of 4 dictionaries do." in markdown


def test_a_score_that_one_run_lacks_is_named_there(quick, tmp_path):
    made = made_of(("core", "sparse_probing"), ill=False)
    del made.found["runs"]["A2"]["scores"]["probing"]
    markdown, _ = made.write(tmp_path)
    assert "- **A2**: sparse probing was not measured." in markdown
    assert "4 of 4 dictionaries do." in markdown


def test_every_score_is_among_the_words():
    for name, score in SCORES.items():
        if score.eval in WORDS and name not in ("retention", "l0"):
            assert any(word in MEANINGS[name].name.lower() for word in WORDS[score.eval]), name
