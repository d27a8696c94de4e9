"""Documented runs: they train to the end on the embedded model, and their masks act."""

import pytest
import torch
from temposae.campaign.documented import BASELINES, RUNS, settings
from temposae.engine.composed import dictionary
from temposae.engine.config import SAEConfig, StreamConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.learner import Learner
from temposae.engine.registry import reads
from temposae.engine.stream import ActivationStream, Batch, LanguageModel
from temposae.engine.train import train

from ..stepping import advance

TRAINED = [name for name, run in (RUNS | BASELINES).items() if run.trained_as is None]


def made(run: str, stream_of, **changes):
    """A short training of a documented run, with few latents."""
    given = settings(run)
    parts = {"log_every_steps": 5, "control": False, "batch": 512, "tokens": 12_800, "lr": 3e-3} | changes
    own = {key: value for key, value in given["stream"].items() if key != "context"}
    stream = stream_of(**own)
    if "second" in reads(given["sae"]):
        hooks = ("blocks.1.hook_resid_post", "blocks.0.hook_resid_post")
        config = StreamConfig(buffer_tokens=4096, hook=hooks[0], second=hooks[1], **own)
        stream = ActivationStream(config, model=LanguageModel("testbed", hooks=hooks, device="cpu"))
    sae = SAEConfig(**given["sae"] | {"d_in": 128, "d_sae": 256})
    return train(stream, sae, TrainConfig(**given["train"] | parts)), stream


@pytest.mark.parametrize("run", TRAINED)
def test_it_trains_to_the_end(run, stream_of):
    found, _ = made(run, stream_of)
    assert found.metrics[-1]["step"] == 25
    assert found.metrics[-1]["fvu"] < found.metrics[0]["fvu"]
    assert found.metrics[-1]["l0"] > 0
    assert 0 <= found.metrics[-1]["dead_fraction"] <= 1


@pytest.mark.parametrize("run", [name for name in TRAINED if "mask" in (RUNS | BASELINES)[name].sae])
def test_its_mask_acts(run, stream_of):
    found, _ = made(run, stream_of, tokens=5120)
    batch = stream_of(seed=3, mode="sequences").next(1500).flat()
    f, mask = found.sae.encode(batch.x.float(), batch.pos), found.sae.mask
    here = found.sae.encode(batch.x.float(), torch.full_like(batch.pos, 9))
    assert not torch.equal(f[batch.pos != 9], here[batch.pos != 9])
    if mask.fixed is not None and mask.blend is None:
        assert (f[~mask.fixed[batch.pos.long()]] == 0).all()


def test_a3_is_sparser_than_a2(stream_of):
    l1 = {run: made(run, stream_of)[0].metrics[-1]["l1"] for run in ("A2", "A3")}
    assert l1["A3"] < l1["A2"]


def test_unknown_runs_are_named():
    with pytest.raises(UserError, match="run: 'A11' is not allowed; did you mean A1"):
        settings("A11")


def test_analyses_are_trained_as_their_parent():
    assert settings("C3") == settings("C2")


def test_settings_are_whole():
    for run in RUNS:
        given = settings(run)
        StreamConfig(**given["stream"])
        TrainConfig(**given["train"])
        SAEConfig(**given["sae"], d_in=64)


@pytest.mark.slow
@pytest.mark.parametrize("F", [2304, 16384, 65536])
@pytest.mark.parametrize("run", TRAINED)
def test_a_step_fits_at_every_size(run, F):
    """Memory above the parameters, gradients and moments stays within a few times N x F and T x F: nothing is as large as
    N x F x D, T x F x D or F x F, which would be 1 GB and more here."""
    D, N, T = 32, 128, 128
    sae = dictionary(SAEConfig(**settings(run)["sae"] | {"d_in": D, "d_sae": F}))
    config = TrainConfig(**settings(run)["train"] | {"tokens": 10 * N, "batch": N, "control": False})
    learner = Learner(sae, config, torch.zeros(D), D**0.5, T)
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    pos, zeros = torch.arange(N), torch.zeros(N, dtype=torch.int64)
    batch = Batch({"x": x, "second": 0.9 * x} if "second" in reads(sae.cfg) else {"x": x}, pos, pos, zeros, zeros)
    batch.attribute = (pos >= 64).long()
    before = [p.detach().clone() for p in sae.parameters()]
    largest = 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        advance(learner, batch)
    for event in profile.events():
        largest = max(largest, event.cpu_memory_usage)
    assert largest <= 8 * 4 * max(N, T) * F
    assert any(not torch.equal(p, b) for p, b in zip(sae.parameters(), before, strict=True))
    assert learner.report()["loss"] > 0
