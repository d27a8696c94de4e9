"""Runs that are killed at any moment, or told to stop: they go on to the very bits of a run that wasn't."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from temposae.cli import main
from temposae.engine.cohort import Cohort
from temposae.engine.config import RunConfig, SAEConfig, StreamConfig, TrainConfig
from temposae.engine.errors import Stopped, UserError
from temposae.engine.process.signals import stop_on_signals
from temposae.engine.storage import checkpoint
from temposae.engine.storage.files import LOCK, UNFINISHED
from temposae.engine.storage.run_folder import read_metrics
from temposae.engine.stream import ActivationStream
from temposae.engine.stream.cache_writer import write_cache
from temposae.engine.train import train, train_together
from temposae.kernels import certified_topk
from temposae.kernels.certified_topk import bfloat16_candidates

PROCESSES = multiprocessing.get_context("forkserver")  # with everything imported, so that a run begins at once
PROCESSES.set_forkserver_preload(["temposae.engine.train", "transformer_lens.model_bridge", "transformers"])
MODES = ("tokens", "grouped", "sequences")


def settings(mode: str, name: str = "") -> RunConfig:
    activation = {"": "batchtopk", "a": "topk", "b": "jumprelu", "bad": "relu"}[name]
    diverges = {"lr": 10.0, "beta2": 0.0, "clip_norm": None} if name == "bad" else {}
    return RunConfig(
        stream=StreamConfig(mode=mode, buffer_tokens=2048, rows_per_forward=8),
        sae=SAEConfig(d_in=128, d_sae=64, k=4, aux_k=8, activation=activation),
        train=TrainConfig(
            tokens=9000,
            batch=256,
            checkpoint_every_steps=3,
            log_every_steps=2,
            dead_after_tokens=1500,
            moments="bfloat16",
            **diverges,
        ),
    )


def job(mode: str, folder: Path, several: bool, cache: Path | None) -> None:
    """A run, or what is left of it."""
    torch.set_num_threads(1)
    run = settings(mode)
    stream = ActivationStream(run.stream.model_copy(update={"cache": cache and str(cache)}))
    if several:
        train_together(stream, {name: settings(mode, name) for name in ("a", "b", "bad")}, out=folder, resume=True)
    else:
        train(stream, run.sae, run.train, out=folder, resume=True)


def run(seconds: float | None, *args) -> int | None:
    """The exit code of a `job` that is killed after so many seconds, unless it has ended."""
    process = PROCESSES.Process(target=job, args=args)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()  # SIGKILL; nothing, should it have ended just now
        process.join()
    return process.exitcode


def same(one: Path, two: Path) -> None:
    """Everything saved, and everything reported but times."""
    for folder in (one, *(path.parent for path in one.glob("*/config.yaml"))):
        other = two / folder.relative_to(one)
        first, second = checkpoint.find(folder), checkpoint.find(other)
        assert first.manifest["files"] == second.manifest["files"]
        assert [p.name for p in checkpoint.all_in(folder)] == [p.name for p in checkpoint.all_in(other)]
        lines = [[{**line, "seconds": 0, "time": 0} for line in read_metrics(place)] for place in (folder, other)]
        assert lines[0] == lines[1]
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (one, two)]
    assert files[0] == files[1]
    assert not [name for name in files[1] if UNFINISHED in name or LOCK in name]
    assert (one / "config.yaml").read_bytes() == (two / "config.yaml").read_bytes()


def killed_and_resumed(mode: str, several: bool, kills: int, folder: Path, cache: Path | None = None) -> None:
    warm = PROCESSES.Process(target=torch.get_num_threads)  # the first process waits for all that is imported
    warm.start()
    warm.join()
    began = time.monotonic()
    assert run(None, mode, folder / "whole", several, cache) == 0
    takes, draw, killed, place = time.monotonic() - began, random.Random(kills), 0, folder / "killed"
    for nth in range(10 * kills):
        if killed == kills:
            break
        code = run(draw.uniform(0.1, 0.9) * takes, mode, place, several, cache)
        killed += code == -signal.SIGKILL
        if code == 0:  # it got to its end: once more from the beginning
            same(folder / "whole", place)
            place, takes = folder / f"killed{nth}", 0.9 * takes
        else:
            assert code == -signal.SIGKILL
    assert killed == kills
    assert run(None, mode, place, several, cache) == 0
    same(folder / "whole", place)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, mode):
    killed_and_resumed(mode, False, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("mode", MODES)
def test_a_run_killed_many_times_ends_with_the_same_bits(tmp_path, mode, several):
    killed_and_resumed(mode, several, 20, tmp_path)


@pytest.mark.parametrize(
    ("mode", "kills"), [("grouped", 1), *(pytest.param(mode, 20, marks=pytest.mark.slow) for mode in MODES)]
)
def test_a_killed_run_over_a_cache_ends_with_the_same_bits(tmp_path, mode, kills):
    write_cache(tmp_path / "cache", StreamConfig(rows_per_forward=8), 6000, shard_mb=0.5)  # one and a half epochs
    killed_and_resumed(mode, False, kills, tmp_path, tmp_path / "cache")


def train_by_bfloat16(folder: Path, killed_at: int | None) -> int:
    """Train with AuxK and candidates from bfloat16 products, and kill the process after a step. Returns how many times
    candidates were chosen so."""
    torch.set_num_threads(1)
    step, bounds, chosen = Cohort.step, certified_topk.upper_bounds, []

    def last_step(self: Cohort, batch) -> None:
        step(self, batch)
        if self.learners[0].steps_done == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sae = SAEConfig(d_in=16, d_sae=64, k=4, aux_k=8)
    config = TrainConfig(
        tokens=2048,
        batch=128,
        checkpoint_every_steps=3,
        log_every_steps=2,
        dead_after_tokens=256,
        control=False,
    )
    x = torch.randn(1024, 16, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch, bfloat16_candidates(True):
        patch.setattr(Cohort, "step", last_step)
        patch.setattr(certified_topk, "upper_bounds", lambda *args: chosen.append(1) or bounds(*args))
        train(x, sae, config, out=folder, resume=True)
    return len(chosen)


def test_a_killed_run_with_bfloat16_candidates_ends_with_the_same_bits(tmp_path):
    threads = torch.get_num_threads()
    assert train_by_bfloat16(tmp_path / "whole", None) >= 16
    killed = PROCESSES.Process(target=train_by_bfloat16, args=(tmp_path / "killed", 11))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert checkpoint.find(tmp_path / "killed").step == 9
    assert 7 <= train_by_bfloat16(tmp_path / "killed", None) < 16
    torch.set_num_threads(threads)
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture
def interruptible():
    """SIGINT as in a foreground process; where tests run in the background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_is_ignored_stays_so(stream_of, tmp_path, monkeypatch, interruptible):
    config, real = settings("tokens"), Cohort.step
    training = config.train.model_copy(update={"tokens": 512, "control": False})
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def step(self, batch):
        real(self, batch)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Cohort, "step", step)
    assert len(train(stream_of(), config.sae, training, out=tmp_path / "run").metrics) > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_run_goes_on(stream_of, tmp_path, monkeypatch, interruptible, number):
    config = settings("tokens")
    training = config.train.model_copy(update={"checkpoint_every_steps": None})
    whole = train(stream_of(), config.sae, training)
    real, before = Cohort.step, signal.getsignal(number)

    def step(self, batch):
        real(self, batch)
        if self.learners[0].steps_done == 10 and self.learners[0].sae.cfg.decoder == "learned":
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Cohort, "step", step)
    with pytest.raises(Stopped, match="stopped at step 10; --resume goes on") as stopped:
        train(stream_of(), config.sae, training, out=tmp_path / "run")
    assert stopped.value.signal == number
    assert signal.getsignal(number) == before
    assert checkpoint.find(tmp_path / "run").step == 10
    monkeypatch.setattr(Cohort, "step", real)
    again = train(stream_of(), config.sae, training, out=tmp_path / "run", resume=True)
    assert all(torch.equal(value, again.sae.state_dict()[name]) for name, value in whole.sae.state_dict().items())


def test_a_second_signal_stops_at_once(stream_of, tmp_path, monkeypatch, interruptible):
    config, real = settings("tokens"), Cohort.step

    def step(self, batch):
        real(self, batch)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Cohort, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train(stream_of(), config.sae, config.train, out=tmp_path / "run")
    assert checkpoint.all_in(tmp_path / "run") == []


def test_without_a_folder_a_signal_is_python_s_own(stream_of, monkeypatch, interruptible):
    config, real = settings("tokens"), Cohort.step

    def step(self, batch):
        real(self, batch)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Cohort, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train(stream_of(), config.sae, config.train)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_buffer_fills_leaves_a_run_to_resume(
    stream_of, tmp_path, monkeypatch, interruptible, number
):
    config, real = settings("tokens"), ActivationStream._fill
    whole = train(stream_of(), config.sae, config.train)

    def fill(self):
        os.kill(os.getpid(), number)
        return real(self)

    monkeypatch.setattr(ActivationStream, "_fill", fill)
    with (
        stop_on_signals(),
        pytest.raises(Stopped, match="stopped before the first step; --resume starts") as stopped,
    ):
        train(stream_of(), config.sae, config.train, out=tmp_path / "run")
    assert stopped.value.signal == number
    monkeypatch.undo()
    again = train(stream_of(), config.sae, config.train, out=tmp_path / "run", resume=True)
    assert all(torch.equal(value, again.sae.state_dict()[name]) for name, value in whole.sae.state_dict().items())


def test_a_run_that_is_refused_while_the_buffer_fills_leaves_nothing_behind(stream_of, tmp_path, monkeypatch):
    def refuse(self):
        raise UserError("data: no")

    monkeypatch.setattr(ActivationStream, "_fill", refuse)
    config = settings("tokens")
    with pytest.raises(UserError, match="data: no"):
        train(stream_of(), config.sae, config.train, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_measuring_says_that_the_run_is_trained(tmp_path, monkeypatch, capsys, interruptible, number):
    monkeypatch.setattr("temposae.evals.run_evals.evaluate_runs", lambda *_, **__: os.kill(os.getpid(), number))
    folder = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["temposae", "train", "--d-sae", "64", "--tokens", "2048", "--out", str(folder)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 128 + number
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"stopped while evaluating; {folder} is trained, and temposae eval core --sae {folder} evaluates it"
    assert checkpoint.find(folder).step == 2
