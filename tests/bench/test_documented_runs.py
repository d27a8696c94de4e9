"""The bench of documented runs: what its JSON holds, and that a slow step shows."""

import json
import re
import time
from pathlib import Path

import pytest
from temposae.bench import documented_runs as suite
from temposae.bench.results import FOLDER
from temposae.campaign.documented import BASELINES, RUNS
from temposae.variants.loss_weights import LinearWeights

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


def test_every_run_is_listed_in_a_line_with_its_settings_and_an_expected_time() -> None:
    code, out, err = run("run", "--list")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    for name, documented in (BASELINES | RUNS).items():
        assert documented.title in lines[name]
        assert re.search(r" relu | topk 32 | batchtopk 32 ", lines[name]), name
        assert re.search(r" 2,304 +(500,000|1,000,000) +\d+ min ", lines[name]), name
    assert lines["A2"].endswith(" mask soft")
    assert lines["A7"].endswith("position_embedding, attention_router, global_position, linear_weights")
    assert lines["C7"].endswith("the weights of C6")
    out = run("run", "--list", "--activation", "topk", "--k", "64", "--tokens", "9000000", "--d-sae", "4608").out
    assert re.search(r"A1 .* topk 64 +4,608 +9,000,000 ", out)


def test_an_expected_time_is_that_of_the_measured_steps() -> None:
    found = json.loads(max(FOLDER.glob("documented/testbed-*.json")).read_text())["runs"]
    steps, sizes = found["steps"]["2304"], found["sizes"]
    assert set(steps) == set(suite.TRAINED)
    batch = sizes["rows"] * sizes["context"]
    seconds, where = suite.expected_seconds("C7", 4608, 10 * batch)
    assert seconds == pytest.approx(10 * 2 * 2 * (steps["C6"]["cpu_ms"] + steps["relu"]["cpu_ms"]) / 1e3)
    assert "torch 2." in where
    assert suite.expected_seconds("topk", 2304, batch)[0] == pytest.approx(2 * steps["topk"]["cpu_ms"] / 1e3)


def test_an_unknown_preset_is_named() -> None:
    code, _, err = run("bench", "runs", "--preset", "huge")
    assert code == 2
    assert "preset: 'huge' is not allowed; there are tiny, cpu, testbed, gpu" in err
