"""Encoders and adapters by range of positions."""

import pytest
import torch
from temposae.engine.errors import UserError
from temposae.engine.parts import BatchView

from ..stepping import advance
from .conftest import D, F, R, T

RANGES = {"mask": {"kind": "ranges", "ranges": 4}}


def test_each_range_has_its_own_input_bias_and_its_own_latents(made, rows, assert_close):
    sae, batch = made("range_encoders", sae=RANGES, scale=1.0), rows()
    (part,) = sae.parts
    expected = torch.zeros(len(batch.x), F, dtype=torch.float64)
    for n, p in enumerate(batch.pos.tolist()):
        r = p // 3  # T / 4
        own = slice(6 * r, 6 * r + 6)  # F / 4
        x = batch.x[n].double() - part.bias[r] - sae.b_dec
        expected[n, own] = torch.relu(x @ sae.W_enc[:, own].double() + sae.b_enc[own])
    assert_close(sae.encode(batch.x, batch.pos), expected)
    with torch.no_grad():
        part.bias.zero_()
    plain = made(parts=[], sae=RANGES)  # no biases, no difference
    assert torch.equal(sae.encode(batch.x, batch.pos), plain.encode(batch.x, batch.pos))


def test_a_range_learns_from_its_own_positions_only(made, rows):
    sae, batch = made("range_encoders", sae=RANGES), rows()
    second = batch.pos // 3 == 1
    sae.objective(batch.x[second], batch.pos[second], T).loss.backward()
    touched = (sae.parts[0].bias.grad != 0).any(1)
    assert touched.tolist() == [False, True, False, False]
    assert (sae.W_enc.grad != 0).any(0).nonzero().flatten().tolist() == list(range(6, 12))


def test_ranges_that_start_from_random_biases_differ(made):
    start = made("range_encoders", sae=RANGES, scale=0.5).parts[0].bias.detach()
    assert start.std() == pytest.approx(0.5, rel=0.3)
    assert (made("range_encoders", sae=RANGES).parts[0].bias == 0).all()


def test_positions_beyond_the_mask_are_in_the_last_range(made):
    sae, x = made("range_encoders", sae=RANGES, scale=1.0), torch.ones(2, D)
    found = sae.encode(x, torch.tensor([T - 1, 5 * T]))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("d_sae", [5, 8, 20])
def test_rows_of_each_block_are_orthonormal_at_the_start(d_sae, made, assert_close):
    sae = made("orthogonal_start", sae={"d_sae": d_sae})
    for first in range(0, d_sae, D):
        W = sae.W_dec[first : first + D].detach().double()
        assert_close(W @ W.T, torch.eye(len(W), dtype=torch.float64))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.W_enc.T.is_contiguous()
    plain = made(parts=[], sae={"d_sae": d_sae}).W_dec.detach()
    assert (plain @ plain.T - torch.eye(d_sae)).abs().max() > 0.1
    assert not torch.equal(made("orthogonal_start", seed=1, sae={"d_sae": d_sae}).W_dec, sae.W_dec)


def test_the_blocks_of_a_start_are_not_the_same(made):
    W = made("orthogonal_start").W_dec.detach()
    across = W[:D] @ W[D : 2 * D].T
    assert across.abs().max() < 0.99
    assert across.abs().max() > 0.01


def test_a_random_decoder_stays_what_it_is(made):
    control = made("orthogonal_start", sae={"decoder": "random"})
    assert torch.equal(control.W_dec, made(parts=[], sae={"decoder": "random"}).W_dec)
    assert torch.equal(control.W_enc, control.W_dec.T)


def scrambled(sae, scale: float = 1.0):
    """The dictionary with adapters that are nowhere small."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in sae.parts.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return sae


def test_each_token_gets_the_adapter_of_its_range(made, rows, assert_close):
    sae, batch = scrambled(made("range_adapters", hidden=5)), rows()
    (part,) = sae.parts
    expected = torch.zeros(len(batch.x), F, dtype=torch.float64)
    for n, p in enumerate(batch.pos.tolist()):
        x, r = batch.x[n].double(), p // 3
        normed = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        u = normed @ part.W1[r].double() + part.b1[r]
        hidden = u * 0.5 * (1 + torch.erf(u / 2**0.5))
        gate = 1 / (1 + torch.exp(-part.gate[r].double()))
        base = (x - sae.b_dec) @ sae.W_enc.double() + sae.b_enc
        expected[n] = torch.relu(base + gate * (hidden @ part.W2[r].double() + part.b2[r]))
    assert_close(sae.encode(batch.x, batch.pos), expected)


def test_a_range_s_adapter_learns_from_its_own_positions_only(made, rows):
    sae, batch = made("range_adapters"), rows()
    third = batch.pos // 3 == 2
    sae.objective(batch.x[third], batch.pos[third], T).loss.backward()
    for name, parameter in sae.parts[0].named_parameters():
        assert (parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[:, None]).ne(0).any(
            1
        ).tolist() == [False, False, True, False], name


def test_the_same_activation_has_another_code_in_another_range_only_with_adapters(made):
    x = torch.randn(1, D, generator=torch.Generator().manual_seed(0)).expand(T, D)
    with_adapters = made("range_adapters").encode(x, torch.arange(T))
    for p in range(T):
        for q in range(T):
            assert torch.equal(with_adapters[p], with_adapters[q]) == (p // 3 == q // 3)
    codes = made("orthogonal_start").encode(x, torch.arange(T))
    assert (codes == codes[0]).all()


CURRICULUM = {"start": 0.25, "ramp": 0.5, "l1_from": 0.5}


def test_the_base_is_trained_alone_first(made, rows, learner):
    """Until `start`, adapters that are nowhere small change nothing, nor are they changed."""
    small, large = made("range_adapters", **CURRICULUM), scrambled(made("range_adapters", **CURRICULUM))
    before = {name: p.clone() for name, p in large.named_parameters() if name.startswith("parts.")}
    both = [learner(sae, steps=21) for sae in (small, large)]
    for step in range(6):  # progress 0, 0.05, ..., 0.25
        for one in both:
            advance(one, rows(step))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(small, name), getattr(large, name)), name
    for name, parameter in large.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name
    batch = rows(99)
    assert torch.equal(small.encode(batch.x, batch.pos), large.encode(batch.x, batch.pos))
    for one in both:
        advance(one, rows(6))
    assert not torch.equal(small.encode(batch.x, batch.pos), large.encode(batch.x, batch.pos))
    assert not torch.equal(large.W_enc, small.W_enc)
    assert all(not torch.equal(p, before[name]) for name, p in large.named_parameters() if name in before)


@pytest.mark.parametrize(
    ("progress", "share"), [(0.0, 0.0), (0.25, 0.0), (0.375, 0.25), (0.5, 0.5), (0.75, 1.0), (1.0, 1.0)]
)
def test_adapters_and_l1_come_in_together(progress, share, made, rows, objective, assert_close):
    sae, batch = scrambled(made("range_adapters", sae={"l1_coefficient": 0.7}, **CURRICULUM)), rows()
    (part,) = sae.parts
    seen = BatchView(sae, batch.x, batch.pos.long(), T, progress=progress)
    pre = torch.zeros(len(batch.x), F)
    whole = part.pre(pre, BatchView(sae, batch.x, batch.pos.long(), T, progress=1.0))
    assert_close(part.pre(pre, seen), share * whole)
    sae.at(progress)
    found = objective(sae, batch)
    l1 = 0.7 * (0.5 + 0.5 * share) * found.sums.l1.sum()
    assert_close(found.loss, (found.sums.squared_error.sum() + l1) / (R * T))


def test_without_a_curriculum_adapters_are_there_from_the_first_step_on(made, rows, assert_close):
    part, batch = made("range_adapters").parts[0], rows()
    assert part.share(0.0) == part.share(1.0) == 1
    assert part.weigh(BatchView(part, batch.x, batch.pos, T, progress=0.0)) == (None, None)


def test_adapters_learn_at_their_own_pace(made, rows, learner, assert_close):
    moved = {}
    for pace in (1.0, 0.25):
        sae = made("range_adapters", pace=pace)
        start = {name: p.detach().clone() for name, p in sae.named_parameters()}
        advance(learner(sae), rows())
        moved[pace] = {name: p.detach() - start[name] for name, p in sae.named_parameters()}
    for name, change in moved[1.0].items():
        assert_close(moved[0.25][name], (0.25 if name.startswith("parts.") else 1.0) * change, 1e-3, name)


def test_bad_settings_of_ranges_are_named(made):
    with pytest.raises(
        UserError, match="sae.mask.kind: gaussian is not allowed with range_encoders; it must be ranges"
    ):
        made("range_encoders", sae={"mask": {"kind": "gaussian"}})
    with pytest.raises(
        UserError, match="sae.parts.range_adapters.ranges: 13 is not allowed; .* at most mask.positions .12"
    ):
        made("range_adapters", ranges=13)
    with pytest.raises(UserError, match="sae.parts.range_adapters.ramp: 0.6 is not allowed; .* at most 1 - start .0.5"):
        made("range_adapters", start=0.5, ramp=0.6)
    assert made("range_adapters", start=0.7, ramp=0.3).parts[0].share(1.0) == 1
