"""Runs that are a mask: what each is for happens, and doesn't where the mask is switched off."""

import pytest
import torch
from temposae.campaign.documented import BASELINES, RUNS, settings
from temposae.engine.composed import dictionary
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.sae import BatchContext, SparseAutoencoder
from temposae.engine.train import train
from temposae.kernels.masks import weights_at

F = 256
HARD = [
    name
    for name, run in (RUNS | BASELINES).items()
    if run.sae.get("mask", {}).get("kind") in ("random", "ranges", "windows") and not run.sae["mask"].get("blend")
]


def trained(run: str, stream_of, mask: dict | None = None, **changes) -> SparseAutoencoder:
    """A short training; `mask` replaces settings of the run's."""
    sae = {**settings(run)["sae"], "d_in": 128, "d_sae": F, "parts": []}
    sae["mask"] = {**sae.get("mask", {}), **(mask or {})}
    given = {"tokens": 20_480, "batch": 512, "lr": 5e-3, "control": False, "clip_norm": None} | changes
    return train(stream_of(), SAEConfig(**sae), TrainConfig(**given)).sae


def profile(sae: SparseAutoencoder, stream_of) -> torch.Tensor:
    """Mean activation of each latent at each position, [T, F]."""
    batch = stream_of(seed=3).next(2000)
    f = sae.encode(batch.x.float(), batch.pos)
    found = torch.zeros(128, F).index_add_(0, batch.pos.long(), f)
    return found / torch.bincount(batch.pos.long(), minlength=128).clamp_min(1)[:, None]


@pytest.mark.parametrize(
    ("run", "share"),
    [
        ("A1", 0.5),
        ("B7", 0.25),
        *(pytest.param(run, 0.25, marks=pytest.mark.slow) for run in ("slices", "random_slices")),
    ],
)
def test_hard_masks_leave_a_position_its_share_of_the_latents(run, share, stream_of):
    active = (profile(trained(run, stream_of), stream_of) > 0).float()[2:110].mean()
    free = (profile(trained(run, stream_of, {"kind": "none"}), stream_of) > 0).float()[2:110].mean()
    assert active < share < 0.8 * free


@pytest.mark.parametrize("run", ["B1", "B2"])
def test_latents_are_active_about_their_centre(run, stream_of):
    """Positions of a latent's activity are apart by less than they are without the mask."""

    def spread(sae: SparseAutoencoder) -> float:
        p = profile(sae, stream_of)[2:110]
        p = p / p.sum(0).clamp_min(1e-9)
        at = torch.arange(2.0, 110.0)[:, None]
        mean = (at * p).sum(0)
        return float(((at - mean).square() * p).sum(0).sqrt()[p.sum(0) > 0].mean())

    assert spread(trained(run, stream_of)) < 0.6 * spread(trained(run, stream_of, {"kind": "none"}))


@pytest.mark.parametrize("run", ["A2", "A3", "C1"])
def test_learned_masks_learn_and_frozen_ones_do_not(run, stream_of):
    sae = trained(run, stream_of)
    begun = SparseAutoencoder(sae.cfg)
    moved = (sae.mask.logits - begun.mask.logits).detach().abs()
    assert float(moved.mean()) > 0.01
    assert (moved > 0).float().mean() > 0.5


def test_c2_is_sharper_than_c1_because_of_its_temperature(stream_of):
    def sharpness(sae: SparseAutoencoder) -> float:
        return float((2 * sae.mask.weights().detach() - 1).abs().mean())

    annealed, plain, warm = (
        sharpness(trained(*of))
        for of in (("C2", stream_of), ("C1", stream_of), ("C2", stream_of, {"temperature_end": None}))
    )
    assert annealed > 0.8 > plain > warm


def test_b6_begins_as_a_plain_dictionary_and_ends_as_a_masked_one(stream_of):
    """Its latents could be anywhere in the first part of the run, and end about their centres."""
    sae = trained("B6", stream_of)
    whole = weights_at(
        SparseAutoencoder(SAEConfig(d_in=128, d_sae=F, mask={"kind": "gaussian"})).mask.weights(), torch.arange(128)
    )
    torch.testing.assert_close(sae.mask.weights().detach(), whole, atol=0.02, rtol=0)
    sae.at(0.0)
    assert sae.mask.weights().detach().min() > 0.98
    assert float(sae.mask.blend.detach().abs()) > 1e-3  # it is learned


@pytest.mark.parametrize("run", HARD)
def test_no_gradient_comes_from_where_a_run_s_hard_mask_is_off(run):
    """W_enc, b_enc and W_dec of a latent get none from tokens at positions where it is off, parts or no parts."""
    sae = dictionary(SAEConfig(**{**settings(run)["sae"], "d_in": 16, "d_sae": F}))
    assert sae.mask.fixed is not None
    pos = torch.arange(128)
    x = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))
    off = ~sae.mask.fixed
    latent = int(off.sum(0).argmax())
    at = off[:, latent]
    row = torch.zeros(128, dtype=torch.int64)
    (sae.objective(x[at], pos[at], 128, batch_context=BatchContext(row[at], row[at], x[at])).loss).backward()
    assert sae.b_enc.grad[latent] == 0
    assert (sae.W_enc.grad[:, latent] == 0).all()
    assert (sae.W_dec.grad[latent] == 0).all()
    sae.zero_grad()
    on = ~at
    sae.objective(x[on], pos[on], 128, batch_context=BatchContext(row[on], row[on], x[on])).loss.backward()
    assert sae.W_dec.grad[latent].abs().max() > 0
