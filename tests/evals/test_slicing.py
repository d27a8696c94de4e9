"""Slices of a dictionary: what is on where, and what position then tells."""

import math

import numpy as np
import pytest
import torch
from temposae.engine.config import SAEConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.evals.evaluation import Evaluation, TextActivations
from temposae.evals.positions import BinnedTokens, information
from temposae.evals.slicing import slicing, slicings

D, F, T = 128, 64, 128


@pytest.fixture
def sae() -> SparseAutoencoder:
    """All latents are always on, as far as a mask lets them."""
    found = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, activation="relu"))
    with torch.no_grad():
        found.b_enc.uniform_(100, 200, generator=torch.Generator().manual_seed(0))
    return found


def test_slices_are_the_dictionary_within_their_positions(sae):
    x, pos = torch.randn(T, D, generator=torch.Generator().manual_seed(1)), torch.arange(T)
    whole = sae.encode(x)
    found = slicings(sae, T, ranges=8, seed=3)
    assert list(found) == ["ranges", "random", "none"]
    for name, one in found.items():
        for parameter in ("W_enc", "W_dec", "b_enc", "b_dec"):
            assert torch.equal(getattr(one, parameter), getattr(sae, parameter))
        code = one.encode(x, pos)
        on = code > 0
        torch.testing.assert_close(code, whole * on)
        if name == "ranges":
            assert torch.equal(on, (torch.arange(T) * 8 // T)[:, None] == torch.arange(F) * 8 // F)
        elif name == "random":
            assert float(on.float().mean()) == pytest.approx(1 / 8, abs=0.015)
            assert on.any(0).all()
        else:
            assert on.all()
    again, other = (slicings(sae, T, ranges=8, seed=seed)["random"].mask.fixed for seed in (3, 4))
    assert torch.equal(again, found["random"].mask.fixed)
    assert not torch.equal(other, again)


def test_position_tells_all_of_ranges_and_nothing_of_the_others(stream_of, sae):
    """Over bins that are the ranges: I = H(active), and log R nats per firing."""
    kept = torch.ones(60, T, dtype=torch.bool)
    row, pos = kept.nonzero(as_tuple=True)
    x = torch.randn(len(pos), D, generator=torch.Generator().manual_seed(2))
    texts = TextActivations(torch.full((60, T), 9), kept, x, pos, row)
    draw = np.random.default_rng(0)
    drawn = BinnedTokens.of(Evaluation(stream_of(), sae, None), texts, 4, 0, draw)
    shuffled = [drawn.shuffled(draw) for _ in range(20)]
    found = {name: information(texts.code(one), drawn, shuffled) for name, one in slicings(sae, T, ranges=4).items()}
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    np.testing.assert_allclose(found["ranges"]["mutual_information"], entropy, atol=0.002)
    np.testing.assert_allclose(found["ranges"]["specialization"], 1, atol=0.002)
    np.testing.assert_allclose(found["ranges"]["nats_per_firing"], math.log(4), atol=0.005)
    assert found["random"]["specialization"].mean() < 0.1  # each latent is on at some 32 of 128 positions
    assert found["none"]["specialization"].tolist() == [0] * F


def test_what_is_refused(sae):
    with pytest.raises(UserError, match="ranges: 129 is not allowed; give 1 to 128"):
        slicings(sae, T, ranges=129)
    with pytest.raises(UserError, match=r"sae\.mask\.kind: ranges is not allowed"):
        slicings(slicings(sae, T)["ranges"], T)


def test_slices_of_a_dictionary_are_measured_beside_it(stream_of, sae):
    evaluation = Evaluation(stream_of(), sae, None)
    found = slicing(evaluation, rows=40)
    assert found is not None
    assert list(found) == ["ranges", "random", "none"]
    # always on but for the mask: position tells all of the ranges, and little of the others
    assert found["ranges"]["specialization"] > 0.7
    assert found["none"]["specialization"] == 0
    assert found["random"]["specialization"] < 0.3
    assert (found["none"]["l0"], found["ranges"]["l0"]) == (F, pytest.approx(F / 4, rel=0.01))
    collected = evaluation.labelled(40)
    error = (collected.x - sae(collected.x)).double().square().sum()
    spread = (collected.x.double() - collected.x.double().mean(0)).square().sum()
    assert found["none"]["explained_variance"] == pytest.approx(float(1 - error / spread), rel=1e-6)
    masked = slicings(sae, T)["ranges"]
    assert slicing(Evaluation(stream_of(), masked, None), rows=40) is None
