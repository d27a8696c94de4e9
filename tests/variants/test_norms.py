"""Normalisations of latents and of x."""

import pytest
import torch
from temposae.engine.errors import UserError
from temposae.engine.parts import BatchView
from torch import Tensor

from .conftest import D, F, T

RANGES = {"mask": {"kind": "ranges", "ranges": 4}}


def pre_of(sae, batch) -> Tensor:
    """(x - b_dec) W_enc + b_enc [N, F], in float64."""
    W_enc, b_enc, b_dec = (getattr(sae, name).detach().double() for name in ("W_enc", "b_enc", "b_dec"))
    return (batch.x.double() - b_dec) @ W_enc + b_enc


def shaken(sae, generator: torch.Generator):
    """The dictionary, with parameters that are nowhere what they started as."""
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter is not sae.W_dec:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return sae


def test_layer_norm_after_the_relu_is_that_of_all_latents_and_cut_at_zero(made, rows, assert_close):
    sae, batch = shaken(made("layer_norm"), torch.Generator().manual_seed(1)), rows()
    (part,) = sae.parts
    a = torch.relu(pre_of(sae, batch))
    expected = torch.zeros_like(a)
    for n in range(len(a)):
        mean = a[n].sum() / F
        spread = ((a[n] - mean) ** 2).sum() / F
        for j in range(F):
            if a[n, j] > 0:
                y = part.scale[j] * (a[n, j] - mean) / (spread + 1e-5) ** 0.5 + part.shift[j]
                expected[n, j] = float(y.detach().clamp_min(0))
    found = sae.encode(batch.x, batch.pos)
    assert_close(found, expected)
    assert (found[a == 0] == 0).all()
    assert ((found == 0) & (a > 0)).any()  # those below the mean


def test_layer_norm_before_the_relu_comes_from_the_latents_that_the_mask_has_on(made, rows, assert_close):
    given = {"sae": RANGES, "place": "pre"}
    sae, batch = shaken(made("layer_norm", **given), torch.Generator().manual_seed(1)), rows()
    (part,) = sae.parts
    pre, expected = pre_of(sae, batch), torch.zeros(len(batch.x), F, dtype=torch.float64)
    for n, p in enumerate(batch.pos.tolist()):
        own = slice(p * 4 // T * F // 4, (p * 4 // T + 1) * F // 4)
        v = pre[n, own]
        y = part.scale[own] * (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt() + part.shift[own]
        expected[n, own] = torch.relu(y)
    assert_close(sae.encode(batch.x, batch.pos), expected)


@pytest.mark.parametrize("place", ["acts", "pre"])
def test_layer_norm_gives_latents_that_a_hard_mask_has_off_no_gradient(place, made, rows):
    sae, batch = made("layer_norm", sae=RANGES, place=place), rows()
    first = batch.pos < T // 4
    sae.objective(batch.x[first], batch.pos[first], T).loss.backward()
    assert (sae.W_enc.grad[:, F // 4 :] == 0).all()
    assert (sae.W_enc.grad[:, : F // 4] != 0).any()


@pytest.mark.parametrize("place", ["acts", "pre"])
def test_with_layer_norm_the_size_of_activations_does_not_matter(place, made, rows, assert_close):
    codes = {}
    for parts in ([], [{"kind": "layer_norm", "place": place}]):
        sae, batch = made(parts=parts), rows()
        before = sae.encode(batch.x, batch.pos)
        with torch.no_grad():
            sae.W_enc.mul_(10)
            sae.b_enc.mul_(10)
        codes[len(parts)] = before, sae.encode(batch.x, batch.pos)
    assert_close(codes[1][1], codes[1][0], 1e-3)  # but for the 1e-5 in its root
    assert_close(codes[0][1], 10 * codes[0][0])


def test_feature_norm_divides_by_the_root_mean_square_where_a_latent_is_active(made, rows, objective, assert_close):
    sae = shaken(made("feature_norm"), torch.Generator().manual_seed(1))
    (part,) = sae.parts
    batches = [rows(seed) for seed in range(3)]
    for batch in batches[:2]:
        objective(sae, batch)
    squares, active = torch.zeros(F, dtype=torch.float64), torch.zeros(F, dtype=torch.float64)
    for age, batch in ((1, batches[0]), (0, batches[1])):
        a = torch.relu(pre_of(sae, batch))
        squares += 0.99**age * (a**2).sum(0)
        active += 0.99**age * (a > 0).sum(0)
    a = torch.relu(pre_of(sae, batches[2]))
    r = ((1 + squares) / (1 + active)).sqrt()
    found = sae.encode(batches[2].x, batches[2].pos)
    assert_close(found, part.log_scale.double().exp() * a / r)
    assert torch.equal(found == 0, a == 0)
    assert torch.equal(sae.encode(batches[2].x, batches[2].pos), found)  # looking doesn't change it


def test_feature_norm_makes_latents_of_all_sizes_alike(made, rows, objective):
    spread = {}
    for parts in ([], [{"kind": "feature_norm"}]):
        sae = made(parts=parts)
        with torch.no_grad():
            sae.W_enc.mul_(torch.logspace(-1, 2, F))
        for seed in range(5):
            objective(sae, rows(seed))
        f = sae.encode(rows(99).x, rows(99).pos)
        size = (f.square().sum(0) / (f > 0).sum(0)).sqrt()
        spread[len(parts)] = float(size.max() / size.min())
    assert spread[0] > 300
    assert spread[1] < 3


def test_batch_norm_is_torchs_in_training_and_the_mean_of_what_it_saw_afterwards(made, rows, assert_close):
    sae = shaken(made("batch_norm"), torch.Generator().manual_seed(1))
    (part,) = sae.parts
    norm = torch.nn.BatchNorm1d(D, affine=False)
    means, variances = [], []
    for step in range(4):
        batch = rows(step)
        seen = BatchView(sae, batch.x, batch.pos.long(), T, training=True, step=step)
        assert_close(part.input(batch.x, seen) - sae.b_dec, norm(batch.x))
        means.append(batch.x.double().mean(0))
        variances.append(batch.x.double().var(0, correction=0))
    mean, variance = torch.stack(means).mean(0), torch.stack(variances).mean(0)  # each of the first 100 counts the same
    batch = rows(99)
    W_enc, b_enc = sae.W_enc.detach().double(), sae.b_enc.detach().double()
    expected = torch.relu((batch.x - mean) / (variance + 1e-5).sqrt() @ W_enc + b_enc)
    assert_close(sae.encode(batch.x, batch.pos), expected)
    assert_close(sae.encode(batch.x[:1], batch.pos[:1]), expected[:1])
    sae.scale_(0.25)  # in other units, so that b_dec is in those
    assert_close(sae.encode(batch.x / 4, batch.pos), expected / 4)


def test_after_many_batches_a_step_counts_a_hundredth(made, rows, assert_close):
    sae, batch = made("batch_norm"), rows()
    (part,) = sae.parts
    part.mean.fill_(5.0)
    part.input(batch.x, BatchView(sae, batch.x, batch.pos.long(), T, training=True, step=1000))
    assert_close(part.mean, 0.99 * 5 + 0.01 * batch.x.double().mean(0))


def test_batch_norm_keeps_one_large_dimension_from_deciding(made, rows, objective):
    share = {}
    for parts in ([], [{"kind": "batch_norm"}]):
        sae = made(parts=parts)
        batches = [rows(seed) for seed in range(4)]
        for batch in batches:
            batch.acts["x"][:, 0] = 100 * batch.acts["x"][:, 0] + 300
            objective(sae, batch)
        f = sae.encode(batches[3].x, batches[3].pos)
        share[len(parts)] = float((f > 0).float().mean(0).sub(0.5).abs().mean())
    assert share[0] > 0.4  # each latent is on everywhere or nowhere
    assert share[1] < 0.15


def test_bad_settings_of_norms_are_named(made):
    with pytest.raises(UserError, match="sae.parts.layer_norm.place: 'latents' is not allowed"):
        made("layer_norm", place="latents")
