"""Several dictionaries on one stream: each as if it were alone, whatever becomes of the others, and resumed as one."""

import json
from pathlib import Path

import pytest
import torch
from temposae.engine.config import RunConfig, SAEConfig, StreamConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.storage import checkpoint
from temposae.engine.storage.run_folder import read_metrics
from temposae.engine.stream import ActivationStream
from temposae.engine.train import Run, train, train_together

from ..stepping import stopped_after

HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_mlp_out")
COMMON = dict(batch=256, log_every_steps=5, checkpoint_every_steps=8, dead_after_tokens=2000)


def settings(hook: str = HOOKS[0], tokens: int = 8000, control: bool = False, **sae) -> RunConfig:
    training = {key: sae.pop(key) for key in ("lr", "beta2", "clip_norm", "seed") if key in sae}
    return RunConfig(
        stream=StreamConfig(hook=hook),
        sae=SAEConfig(**({"d_in": 128, "d_sae": 96, "k": 4, "aux_k": 8} | sae)),
        train=TrainConfig(tokens=tokens, control=control, **training, **COMMON),
    )


SEVERAL = {
    "small": settings(seed=1),
    "wide": settings(d_sae=160, k=8, control=True),
    "deep": settings(HOOKS[1], activation="batchtopk"),
    "short": settings(tokens=3100, lr=1e-3),
}


@pytest.fixture(scope="module")
def stream(testbed):
    """stream(hooks): a small stream over them."""

    def make(hooks: tuple[str, ...] = HOOKS, **config) -> ActivationStream:
        config = {"buffer_tokens": 4096, "rows_per_forward": 16} | config
        return ActivationStream(StreamConfig(**config), model=testbed, hooks=hooks)

    yield make
    testbed.use(layers=[1])


@pytest.fixture(scope="module")
def together(stream, tmp_path_factory) -> tuple[dict[str, Run], Path]:
    """An uninterrupted run of all, and its folder."""
    folder = tmp_path_factory.mktemp("together") / "run"
    return train_together(stream(), SEVERAL, out=folder), folder


def same(one: Run, two: Run) -> bool:
    return all(torch.equal(value, two.sae.state_dict()[name]) for name, value in one.sae.state_dict().items())


@pytest.mark.parametrize("name", SEVERAL)
def test_each_trains_as_it_would_alone(together, stream, name):
    run = SEVERAL[name]
    alone = train(stream((str(run.stream.hook),)), run.sae, run.train)
    assert same(alone, together[0][name])
    assert alone.metrics[-1]["fvu"] == together[0][name].metrics[-1]["fvu"]
    assert alone.metrics[-1]["fvu"] < alone.metrics[0]["fvu"]
    assert (together[0][name].random is not None) == (name == "wide")


def test_each_has_a_folder_that_can_be_used_by_itself(together):
    runs, folder = together
    for name, run in runs.items():
        last = checkpoint.find(folder / name)
        assert last.step == SEVERAL[name].train.steps
        assert last.run is not None
        assert last.run.stream.hook == SEVERAL[name].stream.hook
        assert all(torch.equal(value, run.sae.state_dict()[key]) for key, value in last.tensors("sae").items())
        assert [line["step"] for line in read_metrics(folder / name)] == [line["step"] for line in run.metrics]
    assert list(checkpoint.find(folder).manifest["files"]) == ["stream.safetensors"]
    assert not (folder / "small" / "checkpoints" / "step_00000032" / "stream.safetensors").exists()
    with pytest.raises(UserError, match="has no 'sae'; it has the stream of small, wide, deep, short"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    "steps",
    [3, 13, 31, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (8, 12, 14))],
    ids="stopped_at_{}".format,
)
def test_all_go_on_from_a_stop(together, stream, tmp_path, steps):
    """Before the first checkpoint, at one, and on both sides of the end (at 13) of the shortest."""
    with stopped_after(steps, "batchtopk"):
        train_together(stream(), SEVERAL, out=tmp_path / "run")
    resumed = train_together(stream(), SEVERAL, out=tmp_path / "run", resume=True)
    for name, run in together[0].items():
        assert same(run, resumed[name]), name
        whole, again = (read_metrics(folder / name) for folder in (together[1], tmp_path / "run"))
        assert [line["fvu"] for line in whole] == [line["fvu"] for line in again]


@pytest.mark.parametrize("at", ["first", "later"])
def test_a_checkpoint_counts_once_the_streams_is_there(together, stream, tmp_path, monkeypatch, at):
    """Killed after the dictionaries were saved, before the stream was: they go back with it, or to the beginning."""
    real = checkpoint.write

    def broken(folder, step, dictionaries, *rest, **more):
        if (step == 16 or at == "first") and not dictionaries:
            raise KeyboardInterrupt
        real(folder, step, dictionaries, *rest, **more)

    monkeypatch.setattr(checkpoint, "write", broken)
    with pytest.raises(KeyboardInterrupt):
        train_together(stream(), SEVERAL, out=tmp_path / "run")
    if at == "first":
        assert checkpoint.all_in(tmp_path / "run" / "wide")
        assert not checkpoint.all_in(tmp_path / "run")
    else:
        assert checkpoint.find(tmp_path / "run" / "wide").step == 16
        assert checkpoint.find(tmp_path / "run").step < 16
    monkeypatch.setattr(checkpoint, "write", real)
    resumed = train_together(stream(), SEVERAL, out=tmp_path / "run", resume=True)
    assert all(same(run, resumed[name]) for name, run in together[0].items())


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_one_that_fails_is_stopped_and_named_and_the_others_go_on(together, stream, tmp_path, capsys, activation):
    bad = settings(lr=10, beta2=0.0, clip_norm=None, activation=activation)
    runs = train_together(stream(), {"bad": bad, **SEVERAL}, out=tmp_path / "run")
    assert all(same(run, runs[name]) for name, run in together[0].items())
    assert runs["bad"].failed is not None
    assert "train.lr: 10 made" in runs["bad"].failed
    assert "bad is stopped: train.lr: 10 made" in capsys.readouterr().err
    assert all(run.failed is None for name, run in runs.items() if name != "bad")
    last = (tmp_path / "run" / "bad" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["failed"] == runs["bad"].failed
    assert "NaN" not in last
    status = checkpoint.find(tmp_path / "run").manifest["status"]["bad"]
    assert status["failed"] == runs["bad"].failed
    for kept in checkpoint.all_in(tmp_path / "run" / "bad"):
        tensors = checkpoint.find(kept).tensors("sae")
        assert all(value.isfinite().all() for value in tensors.values())
    lines = (tmp_path / "run" / "bad" / "metrics.jsonl").read_text()
    again = train_together(stream(), {"bad": bad, **SEVERAL}, out=tmp_path / "run", resume=True)
    assert again["bad"].failed == runs["bad"].failed
    assert [line["step"] for line in again["bad"].metrics] == [line["step"] for line in runs["bad"].metrics]
    assert (tmp_path / "run" / "bad" / "metrics.jsonl").read_text() == lines


def test_when_all_fail_the_run_does(stream):
    bad = {name: settings(lr=10, beta2=0.0, clip_norm=None, seed=seed) for seed, name in enumerate("ab")}
    with pytest.raises(UserError, match=r"train.lr: 10 made"):
        train_together(stream(), bad)


def test_what_does_not_go_together_is_named(stream, tmp_path):
    odd = settings()
    odd = odd.model_copy(update={"train": odd.train.model_copy(update={"batch": 128})})
    for name, run, message in (
        ("odd", odd, "odd: train.batch: 128 is not allowed; it is 256 for all"),
        ("elsewhere", settings("blocks.0.hook_resid_post"), "elsewhere: stream.hook: blocks.0.hook_resid_post"),
        ("wrong", settings(d_in=64), "wrong: sae.d_in: 64 is not allowed.* width 128"),
    ):
        with pytest.raises(UserError, match=message):
            train_together(stream(), {**SEVERAL, name: run}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
