"""The inference threshold of batchtopk is that of the whole run's text, also after short runs."""

import pytest
import torch
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.run_sample import SIZE, RunSample
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.storage import checkpoint
from temposae.engine.stream import Batch
from temposae.engine.train import train


@pytest.mark.parametrize("steps", [1, 7, 98, SIZE, 3 * SIZE])
def test_a_sample_is_spread_evenly_over_the_run(steps):
    sample = RunSample(steps, ["x"])
    for step in range(steps):
        sample.add(step, Batch.of(torch.full((16, 2), float(step)), torch.arange(16)))
    held = sample.at("x")
    assert held is not None
    x, pos = held
    assert len(x) == len(pos) <= SIZE
    assert len(x) >= min(16 * steps, SIZE // 2)
    assert x[:, 0].mean() == pytest.approx((steps - 1) / 2, rel=0.01, abs=0.5)
    again = RunSample(steps, ["x"])
    again.load_state(sample.state(), torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(again.at("x") or (), held, strict=True))


def test_the_threshold_keeps_k_latents_of_a_sample():
    sae, draw = (
        SparseAutoencoder(SAEConfig(d_in=16, d_sae=64, k=5, activation="batchtopk")),
        torch.Generator().manual_seed(0),
    )
    x = (
        torch.randn(3000, 16, generator=draw) * torch.linspace(0.5, 2, 3000)[:, None]
    )  # of another kind from part to part
    sae.fit_threshold(x, torch.zeros(3000, dtype=torch.int32))
    assert float(sae.encode_sparse(x).l0().double().mean()) == pytest.approx(5, rel=0.01)
    before = sae.threshold.clone()
    sae.fit_threshold(x * torch.nan, torch.zeros(3000, dtype=torch.int32))
    assert torch.equal(sae.threshold, before)


def test_text_that_changes_along_the_run_leaves_the_threshold_that_of_all_of_it():
    """The last batches, of larger activations, would alone give a threshold far too high for the rest."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60_000, 32, generator=draw)
    x[-12_000:] *= 1.7
    chunks = list(x.split(1000))
    config = TrainConfig(tokens=60_000, batch=500, lr=2e-3, control=False, bias="zero")
    run = train(chunks, SAEConfig(d_in=32, d_sae=128, k=8, activation="batchtopk"), config)
    assert float(run.sae.encode_sparse(x).l0().double().mean()) == pytest.approx(8, rel=0.05)


def test_a_checkpoint_holds_the_fitted_threshold_and_the_sample(stream_of, tmp_path):
    sae = SAEConfig(d_in=128, d_sae=64, k=4, activation="batchtopk")
    run = train(stream_of(), sae, TrainConfig(tokens=4096, batch=256, control=False), out=tmp_path / "run")
    last = checkpoint.find(tmp_path / "run")
    assert torch.equal(last.dictionary().threshold, run.sae.threshold)
    assert len(last.tensors("stream")["sample.pos"]) == 4096


@pytest.mark.parametrize("steps", [20, 98])
def test_a_short_batchtopk_run_keeps_k_latents_when_it_is_evaluated(stream_of, steps):
    """The threshold is that of the run's end: a mean over a hundred batches would lag behind in so few."""
    sae, batch = SAEConfig(d_in=128, d_sae=512, k=16, activation="batchtopk"), 512
    config = TrainConfig(tokens=steps * batch, batch=batch, lr=2e-3, control=False)
    stream = stream_of(buffer_tokens=8192)
    run = train(stream, sae, config)
    x = torch.cat([batch.x for batch in stream.held_out_batches(64)])
    assert float(run.sae.encode_sparse(x).l0().double().mean()) == pytest.approx(sae.k, rel=0.05)
