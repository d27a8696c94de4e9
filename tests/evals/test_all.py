"""`temposae eval all` on the dictionary that `make demo` trains: what holds there, and that it holds again."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from temposae.engine.storage import checkpoint
from temposae.engine.stream import ActivationStream
from temposae.evals.labelled import EMBEDDED
from temposae.evals.run_evals import evaluate
from temposae.evals.suite import EVALS

from ..commandline import run

pytestmark = pytest.mark.slow
CONTROLS = {"random", "lm_neurons", "shuffled", "mean"}
MISSING = {"sparse_probing", "positions", "unlearning", "clusters"}
SKIPPED = {"sae_probes"}  # it reads English


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = re.search(r"temposae (train .*)\n", (Path(__file__).parents[2] / "Makefile").read_text())
    assert command is not None
    code, _, err = run(*command[1].replace("runs/demo", str(folder)).split())
    assert code == 0, err
    return folder


@pytest.fixture(scope="module")
def found(demo) -> dict[str, Any]:
    code, out, err = run("eval", "all", "--sae", demo, "--json", demo / "all.json")
    assert code == 0, err
    assert f"report: {demo / 'report.html'}" in out
    return json.loads((demo / "all.json").read_text())


def test_the_demo_dictionary_scores_above_its_controls(found):
    assert list(found) == list(EVALS)
    assert {name for name, result in found.items() if "skipped" in result} == SKIPPED
    assert all(result["seconds"] > 0 for name, result in found.items() if name not in SKIPPED)
    assert {"explained_variance", "ce_recovered", "l0", "controls"} <= set(found["core"])
    probing = found["sparse_probing"]
    assert set(probing["controls"]) == CONTROLS
    assert list(probing["sets"]) == list(EMBEDDED)
    topic, random = probing["sets"]["topic"], probing["controls"]["random"]["top_1"]
    assert topic["top_1"] >= 0.85
    assert topic["top_1"] > topic["controls"]["random"]["top_1"] + 2 * topic["top_1_error"]
    assert topic["reached_by"] == []
    # over all sets the random control is as good, which the figures have to say
    assert ("random" in probing["reached_by"]) == (random >= probing["top_1"] - probing["top_1_error"])
    above = probing["intervals"]["top_1"]["above_random"]
    assert above["difference"] == pytest.approx(probing["top_1"] - random)
    assert probing["top_100"] > probing["controls"]["lm_neurons"]["top_100"]
    assert probing["controls"]["mean"]["top_1"] == 0.5
    assert abs(probing["controls"]["shuffled"]["top_1"] - 0.5) < 0.06
    unlearning = found["unlearning"]
    assert unlearning["score"] > 0.3
    assert unlearning["retained"] >= 0.99
    assert all(control["score"] < 0.1 for control in unlearning["controls"].values())
    order = found["positions"]["order_probing"]
    assert order["last_token"] >= order["bow"] + 0.2
    assert {"mean_pooled", "last_token", "bow", "lm"} <= set(order)
    assert {"specialization", "order_probing", "fidelity"} <= set(found["positions"])
    truth = found["ground_truth"]
    assert all(truth["recovered"] >= control["recovered"] + 0.2 for control in truth["controls"].values())
    for name in ("scr", "tpp"):
        score = found[name]["score"]
        assert all(score > control["score"] + 0.02 for control in found[name]["controls"].values()), name
    assert found["clusters"]["count"] >= 2
    length = found["mdl"]
    assert length["fvu_rounded"] <= 1.1 * length["fvu"]
    assert all(length["fvu"] < control["fvu"] / 10 for control in length["controls"].values())


def test_a_second_call_finds_the_first_one_s_results(demo, found):
    began = time.monotonic()
    assert run("eval", "all", "--sae", demo, "--json", demo / "again.json").code == 0
    assert time.monotonic() - began < 60
    assert json.loads((demo / "again.json").read_text()) == found


def test_a_call_cut_short_goes_on(demo, found):
    files = {name: demo / "evals" / f"{name}.json" for name in EVALS}
    before = {name: file.stat().st_mtime_ns for name, file in files.items()}
    for name in MISSING:
        files[name].unlink()
    code, out, _ = run("eval", "all", "--sae", demo, "--json", demo / "again.json")
    not_measured = out.partition("not measured, and what supplies it:\n")[2]
    assert (code, re.findall(r"^  (\w+) ", not_measured, re.M)) == (0, [*SKIPPED])
    again = json.loads((demo / "again.json").read_text())
    unchanged = {name for name, file in files.items() if file.stat().st_mtime_ns == before[name]}
    assert unchanged == set(EVALS) - MISSING - SKIPPED
    assert figures(again) == pytest.approx(figures(found), rel=1e-12)


def test_results_do_not_depend_on_batch_size(demo, found):
    last = checkpoint.find(demo)
    assert last.run is not None
    config = last.run.stream.model_copy(update={"rows_per_forward": 20})
    stream = ActivationStream(config, tokens=100_000, seed=last.run.train.seed)
    stream.norms.load_report(last.massive)
    again = json.loads(json.dumps(evaluate(last, stream, None, list(EVALS))))
    assert figures(again) == pytest.approx(figures(found), rel=1e-9, abs=1e-9)


def figures(value: Any, place: str = "") -> dict[str, float]:
    """Every number of a result by its place, but times and the size of the batches, which a result says it was made with."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    else:
        number = isinstance(value, (int, float)) and not place.endswith(("/seconds", "/llm_batch_size"))
        return {place: value} if number else {}
    return {key: number for name, one in parts for key, number in figures(one, f"{place}/{name}").items()}
