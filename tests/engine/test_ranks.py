"""Training in several processes, through gloo on the CPU: what they do together is what one does."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import temposae.engine.cohort
import torch
import torch.distributed as dist
from temposae.engine.config import StreamConfig
from temposae.engine.ranks import ALONE, Ranks
from temposae.engine.storage import checkpoint
from temposae.engine.storage.run_folder import read_metrics
from temposae.engine.stream import ActivationStream, LanguageModel
from temposae.engine.stream.token_rows import TextRows
from temposae.engine.testbed.language import Language

from ..closeness import assert_close
from ..stepping import advance
from .test_fused import CASES, assert_trained_alike, batches, learner

PROCESSES = multiprocessing.get_context("forkserver")
F = 40  # latents; 2 and 4 divide it
SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]


def together(size: int, folder: Path, work, *args) -> None:
    """work(ranks, *args) in so many processes."""
    processes = [
        PROCESSES.Process(target=_begin, args=(rank, size, folder / "meeting", work, args)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * size


def _begin(rank: int, size: int, meeting: Path, work, args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    ranks = Ranks.here()
    work(ranks, *args)
    ranks.end()


def numbers(ranks: Ranks) -> None:
    assert ranks.is_first == (ranks.rank == 0)
    assert ranks.largest(10 * ranks.rank) == 10 * (ranks.size - 1)
    each = torch.arange(ranks.size)
    assert ranks.gather(torch.tensor(ranks.rank)).tolist() == each.tolist()
    rows = ranks.rows(torch.full((ranks.rank, 3), ranks.rank, dtype=torch.bfloat16), each.tolist())
    assert rows[:, 0].tolist() == each.repeat_interleave(each).tolist()
    x = torch.randn(3, 4 * ranks.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert ranks.own(x, 1).shape == (3, 4)
    assert torch.equal(ranks.whole(ranks.own(x, 1), 1), x)
    assert ranks.sum_(each.clone()).tolist() == (ranks.size * each).tolist()
    assert int(ranks.least_(torch.tensor(5 - ranks.rank))) == 6 - ranks.size


@pytest.mark.parametrize("size", SIZES)
def test_what_processes_tell_each_other(size, tmp_path):
    together(size, tmp_path, numbers)


def trained(ranks: Ranks, names: list[str]) -> None:
    temposae.engine.cohort.dense_from = lambda device: 1.0
    for name in names:
        changes = dict(CASES[name])
        if "prefixes" in changes:
            changes["prefixes"] = (*changes["prefixes"][:-1], F)
        alone, shared = (learner(changes, d_sae=F, ranks=each) for each in (ALONE, ranks))
        assert shared.sae.W_dec.shape[0] == F // ranks.size
        alone.counts.idle_tokens[0, 0] = 1  # dead to begin with is a latent of the first process alone
        shared.counts.idle_tokens[0, 0] = int(ranks.is_first)
        start, found = {key: value.clone() for key, value in alone.weights().items()}, []
        for one in (shared, alone):
            advance(one, *batches(one.sae.cfg.d_out))
            found.append((one.weights(), one.state()))
        assert_trained_alike(*found, start, assert_close, 1e-5)
        (weights, state), reports = found[0], [one.report() for one in (shared, alone)]
        assert reports[0] == pytest.approx(reports[1], rel=1e-5)

        # from what several saved, several go on, or one
        ended = []
        for each in (ranks, ALONE):
            made = learner(changes, d_sae=F, ranks=each)
            made.load_state(state, weights)
            advance(made, next(batches(made.sae.cfg.d_out)))
            ended.append((made.weights(), made.state()))
        assert_trained_alike(*ended, weights, assert_close, 1e-5)

        end = shared.end().state_dict()
        assert all(torch.equal(end[key], value) for key, value in weights.items())


@pytest.mark.parametrize("size", SIZES)
def test_dictionaries_train_as_in_one_process(size, tmp_path):
    """Of every kind: weights, moments, counts and reports, to 1e-5; and a checkpoint is for any number of processes."""
    together(size, tmp_path, trained, list(CASES))


def read(ranks: Ranks, mode: str, packing: bool, tokens: int) -> None:
    """Without packing the same bits. With it rows go through the model in other company, and sums are rounded otherwise."""
    model, language = LanguageModel("testbed"), Language()
    texts = [" ".join(language.document(i).text.split()[: 1 + 7 * i % 60]) for i in range(130)]
    config = StreamConfig(
        context=32,
        rows_per_forward=8,
        buffer_tokens=512,
        mode=mode,
        packing=packing,
        repeat=False,
        buffer_dtype="float32",
    )
    alone, shared = (
        ActivationStream(
            config,
            tokens=tokens,
            batch=200,
            model=model,
            rows=TextRows(texts, model.tokenizer, 32, repeat=False),
            ranks=each,
        )
        for each in (ALONE, ranks)
    )
    seen: list[int] = []

    def harvest(tokens, length=None):
        seen.append(len(tokens))
        return model.harvest(tokens, length)

    shared.source.model = SimpleNamespace(harvest=harvest)
    while len(batch := alone.next(200)):
        tensors = shared.next(200).tensors()
        for key, value in batch.tensors().items():
            if packing and value.is_floating_point():
                torch.testing.assert_close(value, tensors[key], rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(value, tensors[key])
    assert len(shared.next(200)) == 0
    assert shared.counts == alone.counts
    assert alone.counts["rows"] > 100
    assert sum(seen) <= alone.counts["rows"] / ranks.size + config.rows_per_forward


@pytest.mark.parametrize(
    ("mode", "packing", "tokens"),
    [
        ("tokens", False, 1_000_000),
        ("tokens", True, 1_000_000),
        ("sequences", False, 1_000_000),
        ("tokens", False, 1000),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_all_get_the_batches_that_one_gets(size, mode, packing, tokens, tmp_path):
    """To the text's end, or past the `tokens` that were to be asked for, though each runs the model on its share of the
    rows."""
    together(size, tmp_path, read, mode, packing, tokens)


CONFIG = """
stream: {context: 64, buffer_tokens: 4096}
train: {batch: 512, tokens: 30000, lr: 0.0008, log_every_steps: 10}  # at a higher rate rounding errors grow
sae: {d_sae: 256, k: 16, aux_coefficient: 0}
"""


def torchrun(*command: str | Path, wait: bool = True) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "temposae", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if wait:
        process.wait(300)
    return process


@pytest.mark.slow
def test_torchrun_stops_and_goes_on(tmp_path):
    """SIGTERM saves; what goes on has the bits of a run that wasn't stopped; and one process gets nearly there, too."""
    settings = tmp_path / "run.yaml"
    settings.write_text(CONFIG)
    assert torchrun("train", settings, "--out", tmp_path / "whole").returncode == 0
    stopped = torchrun("train", settings, "--out", tmp_path / "stopped", wait=False)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while not metrics.is_file() and stopped.poll() is None:
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    error = stopped.communicate(timeout=60)[1]
    assert error.count("--resume goes on from there") == 1
    at = checkpoint.find(tmp_path / "stopped").step
    assert 10 <= at < 59
    assert torchrun("train", "--out", tmp_path / "stopped", "--resume").returncode == 0
    found, expected = (checkpoint.find(tmp_path / name) for name in ("stopped", "whole"))
    assert found.step == expected.step == 59
    for file in ("sae", "random", "state", "stream"):
        tensors = found.tensors(file)
        assert all(torch.equal(tensors[key], value) for key, value in expected.tensors(file).items()), file
    subprocess.run([sys.executable, "-m", "temposae", "train", settings, "--out", tmp_path / "one"], check=True)
    one, two = (read_metrics(tmp_path / name) for name in ("one", "whole"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a["fvu"] == pytest.approx(b["fvu"], rel=1e-3)
    assert (tmp_path / "whole" / "evals" / "core.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("train", "--d-sae", "513"), "error: sae.d_sae: 513 is not allowed; 2 processes must divide it"),
        (("cache", "--tokens", "10"), "error: torchrun: temposae cache is not allowed; only temposae train runs in"),
    ],
)
def test_errors_are_told_once(command, message, tmp_path):
    process = torchrun(*command, "--out", tmp_path / "run")
    assert process.returncode == 1
    error = process.communicate()[1]
    assert error.count("error: ") == 1
    assert message in error
    assert not (tmp_path / "run").exists()
