"""Routing of groups of latents by attention, and the gate between global and position latents."""

import math

import pytest
import torch
from temposae.engine.errors import UserError
from temposae.engine.parts import BatchView

from ..stepping import advance

D, F, T, G = 8, 24, 12, 8


def seen_of(sae, batch, **given) -> BatchView:
    return BatchView(sae, batch.x.to(sae.W_dec.dtype), batch.pos.long(), T, **given)


def test_routing_is_attention_with_what_is_known_of_gradients_and_position(made, rows, assert_close):
    sae = made("attention_router", width=5, guidance=0.7, prior=2.0, free=0.25).double()
    router, batch = sae.parts[0], rows()
    generator = torch.Generator().manual_seed(1)
    share = torch.rand(T, G, generator=generator).double()
    share[3, 2] = 0  # counts as 0.01 / G
    router.share.value.copy_(share / share.sum(1, keepdim=True))
    router.keys.data.mul_(10)
    x = batch.x.double()
    expected = torch.zeros(len(x), G).double()
    for n, p in enumerate(batch.pos.tolist()):
        q = x[n] @ router.W_q + router.embedding[p]
        for g in range(G):
            centre = (g - 2 + 0.5) / 6
            away = 0.0 if g < 2 else ((p + 0.5) / T - centre) ** 2 / (2 * 0.25**2)
            known = 0.7 * math.log(max(G * float(router.share.value[p, g]), 0.01)) - 2.0 * away
            expected[n, g] = math.exp(float((q @ router.keys[g]).detach()) / math.sqrt(5) + known)
    expected /= expected.sum(1, keepdim=True)
    assert_close(router.routes(x, batch.pos.long()), expected, 1e-7)
    acts = torch.rand(len(x), F, generator=generator).double() * (torch.rand(len(x), F, generator=generator) < 0.5)
    f = router.acts(acts, seen_of(sae, batch))
    assert_close(f, acts * G * expected.repeat_interleave(F // G, 1), 1e-7)
    assert ((f == 0) == (acts == 0)).all()


def test_uniform_routing_changes_nothing(made, rows, assert_close):
    sae, plain, batch = made("attention_router"), made("position_embedding", scale=0), rows()
    assert not torch.equal(sae.encode(batch.x, batch.pos), plain.encode(batch.x, batch.pos))
    sae.parts[0].keys.data.zero_()
    assert_close(sae.encode(batch.x, batch.pos), plain.encode(batch.x, batch.pos), 1e-6)


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_gradient_shares_are_those_of_the_groups_at_each_position(activation, made, rows, objective, assert_close):
    sae, batch = made("attention_router", sae={"activation": activation}), rows()
    sae.parts[0].keys.data.mul_(10)
    f = sae.encode(batch.x, batch.pos).requires_grad_()
    x_hat = f @ sae.W_dec + sae.b_dec
    loss = (batch.x - x_hat).square().sum() + (0.04 * f.sum() if activation == "relu" else 0)
    (gradient,) = torch.autograd.grad(loss, f)
    expected = torch.zeros(T, G)
    for n, p in enumerate(batch.pos.tolist()):
        for j in range(F):
            expected[p, j // (F // G)] += abs(f[n, j].item() * gradient[n, j].item())
    expected /= expected.sum(1, keepdim=True)
    objective(sae, batch).loss.backward()
    sae.after()
    assert_close(sae.parts[0].share.value, expected, 1e-5)


def test_routing_favours_the_group_with_the_larger_gradient_share(made, rows):
    batch, share = rows(), torch.tensor([4, 1, 1, 1, 1, 1, 1, 1]) / 11
    pos = batch.pos.long()
    found = {}
    for guidance in (0.0, 0.5):
        router = made("attention_router", guidance=guidance).parts[0]
        router.keys.data.zero_()
        router.share.value[3] = share
        found[guidance] = router.routes(batch.x, pos)
    r = found[0.5]
    torch.testing.assert_close(r[pos == 3][:, 0], 2 * r[pos == 3][:, 1])  # (4 / 1)^0.5
    torch.testing.assert_close(r[pos != 3], found[0.0][pos != 3])
    torch.testing.assert_close(found[0.0], torch.full_like(r, 1 / G))


def test_training_moves_gradient_shares_only_by_looking_at_gradients(made, rows, learner):
    sae = made("attention_router")
    one = learner(sae)
    advance(one, rows())
    share = sae.parts[0].share.value.clone()
    torch.testing.assert_close(share.sum(1), torch.ones(T))
    assert share.std() > 0.01
    sae.encode(rows(1).x, rows(1).pos)
    assert torch.equal(sae.parts[0].share.value, share)


def test_a_prior_favours_the_groups_of_a_position_but_for_the_free_ones(made, rows):
    batch, pos = rows(), rows().pos.long()
    router = made("attention_router", prior=1.0, free=0.5).parts[0]
    router.keys.data.zero_()
    r = router.routes(batch.x, pos)
    # 12 positions, 4 groups: three positions each
    assert torch.equal(r[:, 4:].argmax(1), pos // 3)
    assert (r[:, :4] == r[:, :1]).all()
    assert (r[:, 0] >= r[:, 4:].amax(1)).all()
    ratio = float((r[pos == 1][0, 4] / r[pos == 1][0, 7]).detach())  # 0 and 3/4 of the context away from the centres
    assert ratio == pytest.approx(math.exp((0.75 / 0.25) ** 2 / 2), rel=1e-4)
    router = made("attention_router").parts[0]
    router.keys.data.zero_()
    assert router.routes(batch.x, pos).std() < 1e-7


def test_entropy_is_that_of_the_routing(made, rows, learner):
    sae = made("attention_router", guidance=0)
    one = learner(sae)
    sae.parts[0].keys.data.zero_()
    advance(one, rows())
    assert one.report()["parts"]["attention_router"]["entropy"] == pytest.approx(math.log(G), abs=1e-5)
    sae.parts[0].keys.data.normal_(0, 3, generator=torch.Generator().manual_seed(0))
    r = sae.parts[0].routes(one.scale * rows(1).x, rows(1).pos.long())
    expected = -sum(p * math.log(p) for row in r.tolist() for p in row if p > 0) / len(r)
    advance(one, rows(1))
    assert one.report()["parts"]["attention_router"]["entropy"] == pytest.approx(expected, abs=1e-5)
    assert expected < 2


def test_routers_that_do_not_fit_are_refused(made):
    with pytest.raises(
        UserError, match=r"sae.parts.attention_router.groups: 7 is not allowed; it must divide d_sae \(24\)"
    ):
        made("attention_router", groups=7)
    with pytest.raises(UserError, match="sae.parts.attention_router.guidance: 1 is not allowed"):
        made("attention_router", guidance=1)


@pytest.mark.parametrize(("progress", "ramp"), [(0.0, 0.0), (0.2, 0.0), (0.3, 0.25), (0.6, 1.0), (1.0, 1.0)])
def test_global_and_position_latents_are_mixed_by_the_gate_of_their_position(progress, ramp, made, rows, assert_close):
    sae, batch = made("global_position", start=0.2, full=0.6).double(), rows()
    generator = torch.Generator().manual_seed(0)
    sae.parts[0].logits.data.normal_(generator=generator)
    acts = torch.rand(len(batch.x), F, generator=generator).double()
    f = sae.parts[0].acts(acts, seen_of(sae, batch, progress=progress))
    g = torch.tensor([1 / (1 + math.exp(-float(sae.parts[0].logits[p]))) for p in batch.pos.tolist()]).double()
    assert_close(f[:, :12], 2 * g[:, None] * acts[:, :12], 1e-7)
    assert (f[:, 12:] == 0).all() == (ramp == 0)
    if ramp:
        assert_close(f[:, 12:], 2 * ramp * (1 - g[:, None]) * acts[:, 12:], 1e-7)


def test_position_latents_learn_after_global_ones(made, rows, learner):
    sae = made("global_position")
    one, start = learner(sae, steps=20), sae.W_enc.detach().clone()
    for step in range(5):
        advance(one, rows(step))
    assert torch.equal(sae.W_enc[:, 12:], start[:, 12:])
    assert not torch.equal(sae.W_enc[:, :12], start[:, :12])
    for step in range(5, 20):
        advance(one, rows(step))
    assert not torch.equal(sae.W_enc[:, 12:], start[:, 12:])
    gate = torch.sigmoid(sae.parts[0].logits.detach()).mean()
    assert one.report()["parts"]["global_position"]["global"] == pytest.approx(float(gate), abs=1e-6)


def test_an_open_gate_between_equals_changes_nothing_at_the_end(made, rows):
    sae, plain, batch = made("global_position"), made("position_embedding", scale=0), rows()
    assert torch.equal(sae.encode(batch.x, batch.pos), plain.encode(batch.x, batch.pos))


def test_schedules_that_run_backwards_are_refused(made):
    with pytest.raises(UserError, match=r"sae.parts.global_position.full: 0.2 is not allowed; it must be above start"):
        made("global_position", full=0.2)
    with pytest.raises(UserError, match="d_sae: 1 is not allowed with global_position"):
        made("global_position", sae={"d_sae": 1})
