"""`temposae synth positions`: trained position-aware dictionaries win where positions matter, and tie where they don't."""

import json
from pathlib import Path

import pytest
from temposae.bench import synthetic_positions as suite

from .commandline import run


@pytest.mark.slow
def test_a_trained_position_aware_dictionary_wins_where_positions_matter_and_ties_where_they_do_not():
    """Three seeds. A mask over ranges pays for the wrong assumption in the world without positions."""
    result = suite.measure(3, ("range_adapters", "one_adapter", "ranges", "random"))

    def difference(world: str, kind: str, score: str) -> tuple[float, float]:
        mean, half = suite.differences(result, world, kind)[score]
        assert half is not None
        return mean, half

    for kind in ("range_adapters", "ranges"):
        for score in ("recovered", "f1", "r2"):
            mean, half = difference("positional", kind, score)
            assert mean > max(half, 0.03), (kind, score)
    mean, half = difference("no positions", "range_adapters", "f1")
    assert abs(mean) < half + 0.02
    assert difference("positional", "range_adapters", "f1")[0] > 3 * mean
    assert difference("positional", "range_adapters", "f1")[0] > 2 * difference("positional", "one_adapter", "f1")[0]
    assert difference("no positions", "ranges", "f1")[0] < -0.02
    for world in suite.SHARES:
        assert difference(world, "random", "f1")[0] < -0.2


def test_the_command_writes_rows_goes_on_where_it_stopped_and_prints_both_worlds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("synth", "positions", "--tokens", "4096", "--kind", "ranges", "--json", "rows.json")
    code, out, err = run(*options, "--seeds", "1")
    assert code == 0, err
    rows = json.loads(Path("rows.json").read_text())["rows"]
    assert [(row["world"], row["kind"], row["seed"]) for row in rows] == [
        (world, kind, 0) for world in ("positional", "no positions") for kind in ("plain", "ranges")
    ]
    assert set(rows[0]["recovered"]) == {"plain", "positional"}
    assert set(rows[2]["recovered"]) == {"plain"}
    table = [line.replace("|", " ").split() for line in out.splitlines()]
    assert [line[0] for line in table if line and line[0] in suite.KINDS] == 2 * ["plain", "ranges"]
    code, out, err = run(*options, "--seeds", "2")
    assert code == 0, err
    again = json.loads(Path("rows.json").read_text())["rows"]
    assert (again[:4], len(again)) == (rows, 8)
    assert "seed 0" not in err


def test_differences_are_of_the_same_seed_with_their_interval():
    def row(kind, seed, f1):
        return {"world": "positional", "kind": kind, "seed": seed, "recovered": {"positional": 0.5}} | {
            "f1": f1, "mcc": 0.0, "r2": 0.0,
        }  # fmt: skip

    values = {"plain": (0.1, 0.2, 0.3), "soft": (0.2, 0.4, 0.6)}
    result = {"rows": [row(kind, seed, f1) for kind, f1s in values.items() for seed, f1 in enumerate(f1s)]}
    mean, half = suite.differences(result, "positional", "soft")["f1"]
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)  # t of two degrees of freedom
    assert suite.differences(result, "positional", "soft")["recovered"] == (0, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kind", "gated"), ("kind", "gated", "range_adapters")),
        (("--seeds", "0"), ("--seeds", "at least 1")),
        (("--json", "other.json"), ("other.json", "results of `temposae synth positions`")),
    ],
)
def test_mistakes_are_refused_in_one_line(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text("{}")
    code, out, err = run("synth", "positions", *options)
    assert code == 2, out
    assert len(err.splitlines()) == 1, err
    assert [word for word in words if word not in err] == [], err
