"""Metrics go to TensorBoard and Weights & Biases as they go to metrics.jsonl. Neither is installed for the tests."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.train import train

SAE = SAEConfig(d_in=128, d_sae=64, k=4)
SETTINGS = dict(tokens=2048, batch=256, log_every_steps=4)


@pytest.fixture
def logged(monkeypatch) -> dict[str, list]:
    """What each of the two libraries was told."""
    told: dict[str, list] = {"tensorboard": [], "wandb": []}
    board = SimpleNamespace(
        add_scalar=lambda name, value, step: told["tensorboard"].append((name, value, step)),
        close=lambda: told["tensorboard"].append("closed"),
    )
    run = SimpleNamespace(
        log=lambda values, step: told["wandb"].extend((name, value, step) for name, value in values.items()),
        finish=lambda: told["wandb"].append("closed"),
    )
    for name in ("torch.utils.tensorboard", "wandb"):
        module = ModuleType(name)
        module.SummaryWriter = lambda folder: told["tensorboard"].append(folder) or board
        module.init = lambda **settings: told["wandb"].append(settings) or run
        monkeypatch.setitem(sys.modules, name, module)
    return told


def test_both_get_what_metrics_jsonl_gets(stream_of, tmp_path, logged):
    run = train(stream_of(), SAE, TrainConfig(**SETTINGS, log=("tensorboard", "wandb")), out=tmp_path / "run")
    assert logged["tensorboard"][0] == str(tmp_path / "run" / "tensorboard")
    assert logged["wandb"][0]["name"] == "run"
    assert logged["wandb"][0]["config"]["sae"]["d_sae"] == 64
    for told in logged.values():
        assert told[-1] == "closed"
        for line in run.metrics:
            assert ("fvu", line["fvu"], line["step"]) in told
            assert ("random/l0", line["random"]["l0"], line["step"]) in told
            assert ("time/sae", line["time"]["sae"], line["step"]) in told


def test_a_tracker_knows_a_run_by_an_id_of_its_own_that_stays(stream_of, tmp_path, logged):
    settings = TrainConfig(**SETTINGS, log=("wandb",))
    for folder in (tmp_path / "a" / "run", tmp_path / "b" / "run"):
        train(stream_of(), SAE, settings, out=folder)
        train(stream_of(), SAE, settings, out=folder, resume=True)
    first, again, other, _ = (told["id"] for told in logged["wandb"] if isinstance(told, dict))
    assert first == again != other


def test_a_tracker_that_cannot_start_is_named_and_leaves_no_folder(stream_of, tmp_path, logged, monkeypatch):
    def refuse(**settings):
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UserError, match=r"train.log: wandb is not allowed; it can't start \(no API key configured\)"):
        train(stream_of(), SAE, TrainConfig(**SETTINGS, log=("wandb",)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_named_before_any_work(stream_of, tmp_path, monkeypatch, name):
    for module in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"train.log: {name} is not allowed; it needs pip install {name}"):
        train(stream_of(), SAE, TrainConfig(**SETTINGS, log=(name,)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
