"""Masks over positions, and what they do to gradients."""

import pytest
import torch
from temposae.engine.config import MaskConfig, SAEConfig
from temposae.engine.errors import UserError
from temposae.engine.masks import PositionMask
from temposae.engine.sae import SparseAutoencoder
from temposae.kernels.masks import weights_at

D, F, T, N = 12, 40, 16, 64


def mask_of(**settings) -> PositionMask:
    return PositionMask(MaskConfig(positions=T, **settings), F, torch.Generator().manual_seed(0))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, D, generator=generator), torch.randint(0, T, (N,), generator=generator, dtype=torch.int32)


def test_random_masks_are_on_as_often_as_told():
    assert mask_of(kind="none").weights() is None
    for fraction in (0.1, 0.5):
        assert mask_of(kind="random", fraction=fraction).weights().float().mean() == pytest.approx(fraction, abs=0.06)
    assert mask_of(kind="random", fraction=1.0).weights().all()
    assert torch.equal(mask_of(kind="random").weights(), mask_of(kind="random").weights())


def test_ranges_part_the_context():
    weights = mask_of(kind="ranges", ranges=4).weights()
    for latent in range(F):
        on = weights[:, latent].nonzero().flatten()
        assert len(on) == T // 4
        assert int(on[-1] - on[0]) == T // 4 - 1  # contiguous
    assert (weights.sum(1) == F // 4).all()


def test_gaussians_have_their_centre_and_width():
    everywhere = torch.arange(T)
    weights = weights_at(mask_of(kind="gaussian", sigma=3.0).weights(), everywhere)
    centre = torch.linspace(0, T - 1, F)
    for p, j in ((0, 0), (5, 20), (15, 39)):
        assert weights[p, j] == pytest.approx(float(torch.exp(-((p - centre[j]) ** 2) / 18)), rel=1e-5)
    narrow = weights_at(mask_of(kind="gaussian").weights(), everywhere)
    assert narrow[0, -1] == pytest.approx(float(torch.exp(torch.tensor(-(15.0**2) / 8))), rel=1e-4)


def test_soft_masks_sharpen_as_the_temperature_falls():
    mask = mask_of(kind="soft")
    weights = mask.weights().detach()
    assert 0.5 <= float(weights.min()) <= float(weights.max()) < 0.74  # sigmoid of U(0, 1)
    mask = mask_of(kind="soft", temperature=0.01)
    assert mask.weights().quantile(0.1) > 0.99


@pytest.mark.parametrize(("beyond", "expected"), [("clamp", [3, 15, 15]), ("wrap", [3, 0, 4])])
def test_positions_beyond_the_mask(beyond, expected):
    assert mask_of(kind="random", beyond=beyond).rows(torch.tensor([3, 16, 20])).tolist() == expected
    with pytest.raises(UserError, match="mask.positions: 16 is not allowed; it must be at least 21"):
        mask_of(kind="random", beyond="error").rows(torch.tensor([3, 20]))


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_no_gradient_comes_from_where_a_hard_mask_is_off(activation):
    """Gradients of a batch equal those of the batch without the tokens at which the latent is off."""
    x, pos = batch()
    mask = MaskConfig(kind="ranges", ranges=2, positions=T)
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, k=8, activation=activation, mask=mask))
    sae.objective(x, pos, T).loss.backward()
    early = pos < T // 2
    whole = {"W_enc": sae.W_enc.grad.T.clone(), "W_dec": sae.W_dec.grad.clone(), "b_enc": sae.b_enc.grad.clone()}
    sae.zero_grad()
    sae.objective(x[early], pos[early], T).loss.backward()
    first_half = slice(0, F // 2)  # on at early positions only
    for name, value in whole.items():
        part = getattr(sae, name).grad
        part = part.T if name == "W_enc" else part
        assert torch.allclose(value[first_half] * N, part[first_half] * int(early.sum()), rtol=1e-4, atol=1e-5), name
        assert (part[F // 2 :] == 0).all(), name
        assert value[F // 2 :].abs().max() > 0


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_a_mask_of_ones_is_the_plain_dictionary_bit_for_bit(activation):
    x, pos = batch()
    plain, masked = (
        SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, k=8, activation=activation, mask=mask))
        for mask in (MaskConfig(), MaskConfig(kind="random", fraction=1.0, positions=T))
    )
    for sae in (plain, masked):
        sae.objective(x, pos, T).loss.backward()
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(plain, name).grad, getattr(masked, name).grad), name
    assert torch.equal(plain(x, pos), masked(x, pos))


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_soft_masks_learn(activation):
    x, pos = batch()
    config = SAEConfig(d_in=D, d_sae=F, k=8, activation=activation, mask=MaskConfig(kind="soft", positions=T))
    sae = SparseAutoencoder(config)
    sae.objective(x, pos, T).loss.backward()
    seen = torch.bincount(pos, minlength=T) > 0
    assert (sae.mask.logits.grad[seen].abs().sum(1) > 0).all()
    assert (sae.mask.logits.grad[~seen] == 0).all()


def test_a_masked_dictionary_needs_positions():
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, k=8, mask=MaskConfig(kind="soft", positions=T)))
    with pytest.raises(UserError, match="pos: needed"):
        sae.encode(torch.randn(3, D))


def test_windows_are_contiguous_and_serve_every_position_alike():
    weights = mask_of(kind="windows", width=5).weights()
    for latent in range(F):
        on = weights[:, latent].nonzero().flatten()
        assert 1 <= len(on) <= 5
        assert int(on[-1] - on[0]) == len(on) - 1
    assert weights.sum(1).max() - weights.sum(1).min() <= 1
    assert mask_of(kind="windows").weights().sum(0).max() == T // 4


@pytest.mark.parametrize("start", ["random", "ranges", "windows"])
def test_learned_masks_start_as_hard_ones(start):
    learned, hard = mask_of(kind="soft", start=start).weights(), mask_of(kind=start).weights()
    assert torch.equal(learned > 0.5, hard)
    assert learned.detach().unique().tolist() == pytest.approx([0.1192, 0.8808], abs=1e-4)


def test_annealing_sharpens_a_mask():
    mask = mask_of(kind="soft", start="normal", temperature=5.0, temperature_end=0.1)
    sharpness = []
    for progress in (0.0, 0.5, 1.0):
        mask.at(progress)
        assert float(mask.temperature) == pytest.approx(5 * (0.1 / 5) ** progress)
        sharpness.append(float((2 * mask.weights().detach() - 1).abs().mean()))
    assert sharpness[0] < 0.15
    assert sharpness[0] < sharpness[1] < sharpness[2]
    assert sharpness[2] > 0.85
    plain = mask_of(kind="soft", start="normal", temperature=5.0)
    assert plain.progress is None  # nothing changes, whatever the run does
    plain.at(1.0)
    assert float((2 * plain.weights().detach() - 1).abs().mean()) == pytest.approx(sharpness[0])


@pytest.mark.parametrize("kind", ["gaussian", "windows", "soft"])
def test_a_mask_is_blended_in(kind):
    mask, whole = mask_of(kind=kind, blend=True), mask_of(kind=kind).weights()
    whole = weights_at(whole, torch.arange(T)).float()
    for progress, share in ((0.0, 0.00247), (0.5, 0.5), (1.0, 0.99753)):
        mask.at(progress)
        torch.testing.assert_close(mask.weights(), 1 - share + share * whole, atol=1e-4, rtol=0)


def test_the_blend_is_learned_and_training_moves_it():
    x, pos = batch()
    mask = MaskConfig(kind="windows", blend=True, positions=T)
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, activation="relu", l1_coefficient=0.0, mask=mask))
    sae.at(0.5)
    sae.objective(x, pos, T).loss.backward()
    step = 1e-3
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            sae.mask.blend.fill_(sign * step)
            losses.append(float(sae.double().objective(x.double(), pos, T).loss))
    assert float(sae.mask.blend.grad) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "windows", "width": 17}, "sae.mask.width: 17 is not allowed; it must be at most positions"),
        ({"kind": "ranges", "temperature_end": 0.1}, "sae.mask.temperature_end: not allowed with kind ranges"),
        ({"blend": True}, "sae.mask.blend: true is not allowed with kind none"),
        ({"kind": "soft", "start": "ranges", "ranges": 17}, "sae.mask.ranges: 17 is not allowed"),
    ],
)
def test_masks_that_can_t_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        MaskConfig(positions=T, **settings)
