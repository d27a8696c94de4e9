"""All 42 runs by command, small: `temposae campaign --quick`."""

import json
import math

import pytest
from temposae.campaign.documented import RUNS
from temposae.campaign.figures import missing
from temposae.campaign.results import read_results

from ..commandline import run


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("quick") / "out"
    code, printed, err = run("campaign", "--quick", "--tokens", "51200", "--out", out, "--json", out.parent / "c.json")
    assert code == 0, err
    return out, read_results(out), printed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_runs_train_to_the_end_and_stand_beside_their_controls(quick):
    out, found, printed = quick
    assert list(found["runs"]) == list(RUNS)
    assert found == json.loads((out.parent / "c.json").read_text())
    for name, one in found["runs"].items():
        assert one["failed"] is None, name
        assert one["steps"] == 100, name
        assert one["fvu_last"] < one["fvu_first"], name
        assert one["l0"] > 0, name
        assert 0 <= one["dead_fraction"] < 0.9, name
        assert one["explained_variance"] > one["scores"]["explained_variance"]["random"]["mean"], name
        assert one["beats_random"] or one["why_not"], name
        assert one["trained_as"] == RUNS[name].trained_as
        assert all(math.isfinite(one[key]) for key in ("fvu_first", "fvu_last", "l0", "dead_fraction"))
    beaten = [name for name, one in found["runs"].items() if not one["beats_random"]]
    assert len(beaten) < len(RUNS) / 2
    for name in beaten:
        if RUNS[name].trained_as is None:
            assert f"{name} does not beat its random control" in printed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_leaves_figures_and_a_report(quick):
    out, found, _ = quick
    absent = missing(out)
    for figure in (
        "log_a/loss_curves",
        "log_b/hyperparameters",
        "log_c/position_weights",
        "log_e/training_curves",
        "overview",
    ):
        assert (out / "figures" / f"{figure}.png").stat().st_size > 10_000, figure
    assert "unlearning" in absent["log_a/unlearning_scores.png"]
    text = (out / "report.md").read_text()
    for name, one in found["runs"].items():
        if not one["beats_random"]:
            assert name in text
    assert "What to know first" in text
    assert (out / "report.html").stat().st_size > 100_000
