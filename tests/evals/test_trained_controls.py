"""Controls beside `random` in every eval: those of the run, and those trained when they are asked for."""

import json

import pytest
from temposae.cli import app
from temposae.engine.config import SAEConfig, StreamConfig, TrainConfig
from temposae.engine.config.controls import CONTROLS
from temposae.engine.errors import UserError
from temposae.engine.storage.checkpoint import find
from temposae.engine.stream import ActivationStream
from temposae.engine.train import train
from temposae.evals.report import write_report
from temposae.evals.run_evals import VERSION, evaluate, evaluate_runs
from typer.testing import CliRunner

SAE = SAEConfig(d_in=128, d_sae=64, k=4)
SETTINGS = TrainConfig(tokens=4096, batch=256)
OTHERS = ("soft_frozen", "frozen_encoder")


@pytest.fixture(scope="module")
def streams(testbed):
    testbed.use(layers=[1])
    return lambda: ActivationStream(StreamConfig(buffer_tokens=4096, rows_per_forward=16), model=testbed)


@pytest.fixture(scope="module")
def runs(streams, tmp_path_factory):
    """Folders of one run with all controls, and of the same with `random` alone."""
    folder = tmp_path_factory.mktemp("trained")
    found = {}
    for name, controls in (("all", OTHERS), ("plain", ())):
        run = train(streams(), SAE, SETTINGS.model_copy(update={"controls": controls}), out=folder / name)
        found[name] = evaluate_runs(folder / name, {"": run}, streams())
    return folder, found


def test_all_controls_of_a_run_are_measured_after_training(runs):
    folder, found = runs
    assert set(found["all"]["controls"]) == {*CONTROLS, "lm_neurons", "mean"}
    stored = json.loads((folder / "all" / "evals" / "core.json").read_text())
    assert list(stored["controls"])[:3] == list(CONTROLS)
    report = (folder / "all" / "report.md").read_text()
    assert "| dictionary | random | soft_frozen | frozen_encoder | lm_neurons | mean | shuffled |" in report.replace(
        "\\", ""
    )
    assert "soft" not in (folder / "plain" / "report.md").read_text()


def test_figures_of_the_others_do_not_depend_on_them(runs):
    _, found = runs
    assert found["all"]["explained_variance"] == found["plain"]["explained_variance"]
    for name in ("random", "lm_neurons", "mean"):
        assert found["all"]["controls"][name] == found["plain"]["controls"][name]


LATER = ("positions", "ground_truth", "unlearning", "scr", "tpp", "clusters", "absorption", "mdl", "meta_structure")


@pytest.mark.parametrize("name", ["sparse_probing", *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)])
def test_every_eval_has_them_beside_random(runs, streams, name):
    folder, _ = runs
    result = evaluate(find(folder / "all"), streams(), None, (name,), rows=32)[name]
    assert set(CONTROLS) <= set(result["controls"])


def test_controls_that_a_run_lacks_are_trained_on_request(runs, streams, capsys):
    """On the batches of the run, so that they equal those trained beside it; bare `control` trains only `random`."""
    folder, found = runs
    result = evaluate(find(folder / "plain"), streams(), None, controls=OTHERS)["core"]
    assert "training controls (soft_frozen, frozen_encoder) on 4,096 tokens" in capsys.readouterr().err
    for name in OTHERS:
        value = found["all"]["controls"][name]["explained_variance"]
        assert result["controls"][name]["explained_variance"] == pytest.approx(value, abs=1e-6)
    assert result["of"]["soft_frozen"] == result["of"]["frozen_encoder"] == "trained for evaluation"
    result = evaluate(find(folder / "plain"), streams(), None, controls=["random"])["core"]
    assert not set(OTHERS) & set(result["controls"])
    assert not {"control", *OTHERS} & set(result["of"])  # the run has `random` itself
    with pytest.raises(
        UserError, match="^controls: 'softly' is not allowed; there are random, soft_frozen, frozen_encoder"
    ):
        evaluate(find(folder / "plain"), streams(), None, controls=("softly",))


def test_the_command_shows_them(runs, monkeypatch):
    folder, _ = runs
    out = CliRunner().invoke(
        app, ["eval", "core", "--sae", str(folder / "plain"), "--controls", "soft_frozen", "--rows", "8"]
    )
    assert out.exit_code == 0, out.output
    assert "soft frozen control" in out.output
    assert "frozen encoder control" not in out.output
    write_report(folder / "plain", find(folder / "plain"), VERSION)
    assert "soft_frozen" in (folder / "plain" / "report.md").read_text().replace("\\", "")
