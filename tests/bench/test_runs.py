"""The bench of documented runs: what its JSON holds, and that a slow step shows."""

import json
import time
from pathlib import Path

import pytest
from temposae.bench import runs as suite
from temposae.variants.weights import LinearWeights

from ..commandline import run


def test_json_and_table(tmp_path: Path) -> None:
    code, out, err = run(
        "bench", "runs", "--preset", "tiny", "--runs", "A1,C3", "--device", "cpu", "--json", tmp_path / "r.json"
    )
    assert code == 0, err
    found = json.loads((tmp_path / "r.json").read_text())
    steps, campaign = found["runs"]["steps"]["64"], found["runs"]["campaign"]
    assert list(steps) == ["topk", "A1", "C2"]  # C3 looks at C2
    assert steps["topk"]["times_topk"] == 1
    for name, of in steps.items():
        assert of["samples"] == 2
        assert of["ms_p20"] <= of["ms"] <= of["ms_p80"]
        assert of["cpu_ms"] > 0
        assert f"| {name} " in out
    assert campaign["ratio"] == pytest.approx(campaign["one_by_one_s"] / campaign["together_s"])
    assert campaign["runs"] == 3
    assert f"ratio {campaign['ratio']:.2f}" in out


def test_a_slow_part_shows_in_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    weigh = LinearWeights.weigh

    def slow(*args):
        time.sleep(0.05)
        return weigh(*args)

    monkeypatch.setattr(LinearWeights, "weigh", slow)
    steps = suite.measure(suite.PRESETS["tiny"], ["A1", "A5"], device="cpu")["runs"]["steps"]["64"]
    assert steps["A5"]["ms"] > 50
    assert steps["A5"]["times_topk"] > 3 * steps["A1"]["times_topk"]


def test_an_unknown_preset_is_named() -> None:
    code, _, err = run("bench", "runs", "--preset", "huge")
    assert code == 2
    assert "preset: 'huge' is not allowed; there are tiny, cpu, testbed, gpu" in err
