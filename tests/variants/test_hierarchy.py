"""Levels, their routers and what holds them together, against plain formulas."""

import math

import pytest
import torch
from temposae.engine.errors import UserError
from temposae.engine.parts import BatchView
from temposae.variants.hierarchy import widths

from ..stepping import advance
from .conftest import D, F, R, T

N = R * T


def seen_of(sae, batch, f):
    """A batch in training whose codes are f, in float64."""
    x = batch.x.double()
    seen = BatchView(sae, x, batch.pos.long(), T, training=True, target=x, f=f)
    seen.residual = (x - (f @ sae.W_dec + sae.b_dec)).detach()
    return seen


def codes(seed=0):
    return torch.relu(torch.randn(N, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def disturbed(sae, seed=1):
    """A dictionary in float64 whose parts are anywhere but at their beginning."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in [*sae.parts.parameters(), sae.b_dec]:
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return sae.double()


def trained(sae, learner, rows, steps=40):
    one = learner(sae, steps=steps, lr=3e-2)
    for step in range(steps):
        advance(one, rows(step))
    one.report()
    return one.sae


def test_blocks_are_contiguous_and_as_equal_as_can_be():
    assert widths(10, 3) == [3, 3, 4]
    assert widths(24, 3) == [8, 8, 8]


def test_the_router_gates_levels(made, rows, assert_close):
    sae, batch, f = disturbed(made("causal_levels")), rows(), codes()
    part, seen = sae.parts[0], seen_of(sae, batch, f)
    found = part.latents(f, seen)
    for n in range(0, N, 7):
        scores = ((seen.x[n] - sae.b_dec) @ part.router + part.router_bias).tolist()
        routing = [math.exp(s) / sum(math.exp(t) for t in scores) for s in scores]
        expected = torch.cat([3 * routing[l] * f[n, 8 * l : 8 * l + 8] for l in range(3)])
        assert_close(found[n], expected, 1e-12)
    assert ((found == 0) == (f == 0)).all()
    part.report()


def test_a_new_router_leaves_all_as_it_is(made, rows):
    sae, plain = made("causal_levels"), made(parts=[])
    batch = rows()
    torch.testing.assert_close(sae.encode(batch.x, batch.pos), plain.encode(batch.x, batch.pos))


def penalty_of(made, rows, f, **weights):
    """The penalty with these weights alone, and the dictionary; `after` has been there once."""
    off = {"entropy": 0.0, "consistency": 0.0, "separation": 0.0}
    sae = disturbed(made("causal_levels", **off | weights))
    part, seen = sae.parts[0], seen_of(sae, rows(), f)
    part.latents(f, seen)
    part.after(seen)
    return part.penalty(seen), sae, seen


def test_the_entropy_is_that_of_the_mean_routing(made, rows, assert_close):
    found, sae, seen = penalty_of(made, rows, codes(), entropy=0.5)
    part = sae.parts[0]
    routing = torch.softmax((seen.x - sae.b_dec) @ part.router + part.router_bias, 1)
    mean = routing.mean(0)
    assert_close(found, 0.5 * D * (1 + (mean * mean.log()).sum() / math.log(3)), 1e-10)
    told = part.report()
    assert told["entropy"] == pytest.approx(float(-(routing * routing.log()).sum(1).mean()), rel=1e-5)
    assert told["entropy_of_mean"] == pytest.approx(float(-(mean * mean.log()).sum()), rel=1e-5)
    assert told["routing"] == pytest.approx(mean.tolist(), rel=1e-5)


def test_a_level_explains_what_those_before_it_left(made, rows, assert_close):
    f = codes().requires_grad_()
    found, sae, seen = penalty_of(made, rows, f, consistency=0.5)
    expected, slopes = 0.0, torch.zeros_like(f)
    left = (seen.x - sae.b_dec).detach()
    for l in range(3):
        at = slice(8 * l, 8 * l + 8)
        left = left - (f[:, at] @ sae.W_dec[at]).detach()
        expected += 0.5 / 3 * float(left.square().sum(1).mean())
        # the slope of |left|^2 with what earlier levels did held constant
        slopes[:, at] = -2 * 0.5 / 3 / N * (left @ sae.W_dec[at].T).detach()
    assert_close(found, torch.tensor(expected, dtype=torch.float64), 1e-10)
    assert_close(torch.autograd.grad(found, f)[0], slopes, 1e-10)


def test_causality_is_activation_times_gradient_over_steps(made, rows, assert_close):
    f = codes().requires_grad_()
    _, sae, seen = penalty_of(made, rows, f)
    error = (seen.x - (f @ sae.W_dec + sae.b_dec)).square().sum()
    once = (f * torch.autograd.grad(error, f)[0]).abs().mean(0)
    assert_close(sae.parts[0].causality, 0.05 * once, 1e-10)
    sae.parts[0].after(seen)
    assert_close(sae.parts[0].causality, (0.05 + 0.95 * 0.05) * once, 1e-10)


def test_separation_is_the_positive_cosine_between_the_halves(made, rows, assert_close):
    found, sae, _ = penalty_of(made, rows, codes(), separation=0.5)
    order = sorted(range(F), key=lambda j: -float(sae.parts[0].causality[j]))
    cosines = [
        max(0.0, float(torch.cosine_similarity(sae.W_dec[i], sae.W_dec[j], dim=0)))
        for i in order[: F // 2]
        for j in order[F // 2 :]
    ]
    assert float(found.detach()) == pytest.approx(0.5 * D * sum(cosines) / len(cosines), rel=1e-10)


def test_entropy_keeps_the_router_from_one_level(made, rows, learner):
    ends = {}
    for weight in (0.0, 1.0):
        sae = made("causal_levels", entropy=weight)
        sae.parts[0].router_bias.data[0] = 3.0
        ends[weight] = trained(sae, learner, rows).parts[0].report()["entropy_of_mean"]
    assert ends[1.0] > ends[0.0] + 0.1


def test_consistency_makes_the_first_level_explain_more(made, rows, learner):
    left = {}
    for weight in (0.0, 1.0):
        sae = trained(made("causal_levels", consistency=weight), learner, rows)
        batch = rows(99)
        f = sae.encode(batch.x, batch.pos)
        left[weight] = float((batch.x - sae.b_dec - f[:, :8] @ sae.W_dec[:8]).square().sum(1).mean())
    assert left[1.0] < 0.8 * left[0.0]


def test_separation_pushes_causal_latents_from_the_others(made, rows, learner):
    likeness = {}
    for weight in (0.0, 3.0):
        sae = trained(made("causal_levels", separation=weight), learner, rows)
        order = sae.parts[0].causality.argsort(descending=True)
        likeness[weight] = float(torch.relu(sae.W_dec[order[: F // 2]] @ sae.W_dec[order[F // 2 :]].T).mean())
    assert likeness[3.0] < 0.8 * likeness[0.0]


# level_attention


def plain_gates(sae, part, x, f, G, H, d):
    """[N, L, G], one token, level and head after the other."""
    L, size = 3, F // (3 * G)
    mask, A = torch.sigmoid(part.mask_logits), part.together
    found = torch.zeros(len(x), L, G, dtype=torch.float64)
    for n in range(len(x)):
        u = torch.stack([f[n, i * size : (i + 1) * size].mean() for i in range(L * G)])
        share = u / u.sum()
        expected = sum(share[i] * A[i] / A[i].sum() for i in range(L * G))
        bias = part.settings.adjacency * torch.log(L * G * expected + 0.01)
        q = ((x[n] - sae.b_dec) @ part.query).view(H, d)
        z = []
        for l in range(L):
            a = torch.zeros(G, dtype=torch.float64)
            for h in range(H):
                scores = torch.stack([q[h] @ part.keys[l, g, h] / math.sqrt(d) for g in range(G)])
                a += torch.softmax(scores + mask[l].log() + bias[l * G : (l + 1) * G], 0) / H
            gate = G * a
            z.append(torch.stack([gate[g] * u[l * G + g] * part.summary[l, g] for g in range(G)]))
            if l > 0:
                query, keys = z[l].sum(0) @ part.across_query, z[l - 1] @ part.across_key
                weights = torch.softmax(keys @ query / math.sqrt(H * d) + mask[l - 1].log(), 0)
                gate = gate * 2 * torch.sigmoid((weights @ z[l - 1]) @ part.across_gate[l - 1])
            found[n, l] = gate
    return found


SMALL = {"groups": 4, "heads": 2, "width": 3}


def test_attention_gates_groups_of_levels(made, rows, assert_close):
    sae, batch, f = disturbed(made("level_attention", **SMALL)), rows(), codes()
    part = sae.parts[0]
    part.together.copy_(torch.rand(12, 12, generator=torch.Generator().manual_seed(3)))
    found = part.latents(f, seen_of(sae, batch, f))
    gates = plain_gates(sae, part, batch.x.double()[:9], f, 4, 2, 3)
    assert_close(found[:9], f[:9] * gates.flatten(1).repeat_interleave(2, 1), 1e-10)
    assert ((found == 0) == (f == 0)).all()


def test_there_are_eight_heads_over_three_levels(made):
    part = made("level_attention", sae={"d_sae": 48}).parts[0]
    assert part.keys.shape[:3] == (3, 8, 8)
    assert part.level_sizes == [16, 16, 16]


def test_levels_are_held_to_x_one_after_the_other(made, rows, assert_close):
    sae, f = disturbed(made("level_attention", weight=0.5)), codes().requires_grad_()
    seen = seen_of(sae, rows(), f)
    found = sae.parts[0].penalty(seen)
    left = [seen.x - sae.b_dec.detach() - f[:, :end] @ sae.W_dec[:end] for end in (8, 16)]
    expected = 0.5 * sum(one.square().sum(1).mean() for one in left) / 2
    assert_close(found, expected, 1e-10)
    ours, plain = (torch.autograd.grad(one, f)[0] for one in (found, expected))
    assert_close(ours, plain, 1e-10)
    told = sae.parts[0].report()["squared_error_of_levels"]
    assert told == pytest.approx([float(one.square().sum(1).mean()) for one in left], rel=1e-4)


def test_adjacency_follows_what_is_active_together(made, rows, assert_close):
    sae, f = disturbed(made("level_attention", **SMALL)), codes()
    part, seen = sae.parts[0], seen_of(sae, rows(), f)
    before = part.together.clone()
    part.latents(f, seen)
    part.after(seen)
    u = f.view(N, 12, 2).mean(2)
    share = u / u.sum(1, keepdim=True)
    both = sum(torch.outer(one, one) for one in share) / N
    assert_close(part.together, 0.95 * before + 0.05 * both, 1e-10)


def test_groups_that_go_with_active_ones_are_favoured(made, rows):
    """Group 1 goes with group 4: where 4 is active alone, 1 gets most of its level, but not without the bias."""
    f = torch.zeros(N, F, dtype=torch.float64)
    f[:, 8:10] = 1.0
    for adjacency, is_favoured in ((0.0, False), (1.0, True)):
        part = made("level_attention", adjacency=adjacency, **SMALL).double().parts[0]
        part.together.fill_(1e-3)
        part.together[4, 1] = 1.0
        part.keys.data.zero_()
        shares = torch.zeros(N, 12, dtype=torch.float64)
        shares[:, 4] = 1
        gates = part._gates(rows().x.double(), f.view(N, 12, 2).mean(2), shares)
        others = gates[:, 0, [0, 2, 3]].max()
        assert bool(gates[:, 0, 1].min() > 2 * others) == is_favoured


def test_a_masked_group_is_neither_routed_to_nor_looked_at(made, rows):
    sae, f = disturbed(made("level_attention", adjacency=0.0, **SMALL)), codes()
    part, seen = sae.parts[0], seen_of(sae, rows(), f)
    part.mask_logits.data[0, 2] = -60.0
    assert (part.latents(f, seen)[:, 4:6] < 1e-20).all()
    changed = f.clone()
    changed[:, 4:6] += 5.0
    assert torch.equal(part.latents(changed, seen)[:, 8:], part.latents(f, seen)[:, 8:])
    part.mask_logits.data[0, 2] = 0.0
    assert not torch.equal(part.latents(changed, seen)[:, 8:], part.latents(f, seen)[:, 8:])


def test_a_level_looks_at_the_one_before_it(made, rows):
    """What the first level does changes the second one's gates, and nothing changes the first one's but its own."""
    sae, f = disturbed(made("level_attention", adjacency=0.0, **SMALL)), codes()
    part, seen = sae.parts[0], seen_of(sae, rows(), f)
    plain = part.latents(f, seen)
    first, second = f.clone(), f.clone()
    first[:, :8] *= torch.linspace(1, 3, 8)
    second[:, 8:16] *= torch.linspace(1, 3, 8)
    assert not torch.equal(part.latents(first, seen)[:, 8:16], plain[:, 8:16])
    assert torch.equal(part.latents(first, seen)[:, 16:], plain[:, 16:])
    assert torch.equal(part.latents(second, seen)[:, :8], plain[:, :8])
    part.across_gate.data.zero_()
    unmoved = part.latents(f, seen)
    assert torch.equal(part.latents(first, seen)[:, 8:16], unmoved[:, 8:16])


def test_level_losses_make_the_first_levels_explain_more(made, rows, learner):
    left = {}
    for weight in (0.0, 1.0):
        sae = trained(made("level_attention", weight=weight), learner, rows)
        batch = rows(99)
        f = sae.encode(batch.x, batch.pos)
        left[weight] = float((batch.x - sae.b_dec - f[:, :8] @ sae.W_dec[:8]).square().sum(1).mean())
    assert left[1.0] < 0.8 * left[0.0]


def test_more_levels_and_groups_than_latents_are_refused(made):
    with pytest.raises(UserError, match="levels: 25 is not allowed; it must be at most d_sae"):
        made("causal_levels", levels=25)
    with pytest.raises(UserError, match="groups: 9 is not allowed with 3 levels"):
        made("level_attention", groups=9)
    with pytest.raises(UserError, match="sae.parts.causal_levels.entropy: -1 is not allowed"):
        made("causal_levels", entropy=-1)
