"""What looks along rows: attention before the encoder, and terms on how codes follow each other, with tokens missing."""

import math

import pytest
import torch
from temposae.engine.errors import UserError
from temposae.engine.parts import BatchView, RowLayout
from temposae.variants.dynamics import follows, packed

from ..stepping import advance
from .conftest import D, F, T


@pytest.fixture
def gappy(rows):
    """Rows without some of their tokens: a first one, a last one, two in a row, and whole rows beside them."""
    batch = rows()
    missing = torch.tensor([0, T + 4, T + 5, 2 * T - 1, 3 * T + 2])
    kept = torch.ones(len(batch.x), dtype=torch.bool)
    kept[missing] = False
    return batch[kept]


def seen_of(sae, batch, f=None):
    x = batch.x.double()
    return BatchView(sae, x, batch.pos.long(), T, training=True, row=batch.row, target=x, f=f)


def codes(n, seed=0):
    return torch.relu(torch.randn(n, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def pairs(batch):
    """Tokens whose neighbour is there."""
    at = list(zip(batch.row.tolist(), batch.pos.tolist(), strict=True))
    return [n for n in range(len(at) - 1) if at[n + 1] == (at[n][0], at[n][1] + 1)]


def test_rows_are_packed_and_neighbours_known(gappy):
    rows = RowLayout(gappy.row, gappy.pos.long())
    assert follows(rows).nonzero().flatten().tolist() == pairs(gappy)
    found = packed(rows)
    counted = {}
    for row, place in zip(gappy.row.tolist(), found.pos.tolist(), strict=True):
        assert place == counted.get(row, 0)
        counted[row] = place + 1
    assert found.shape == rows.shape
    values = torch.rand(len(gappy.x), 3)
    assert torch.equal(found.gather(found.spread(values)), values)
    other = RowLayout(
        torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 3])
    )  # a row that begins where the one before it ends
    assert follows(other).tolist() == [1, 0, 1]
    assert packed(other).pos.tolist() == [0, 1, 0, 1]


# self_attention


def strong(sae):
    """Attention whose output is not small, in float64."""
    sae.parts[0].W_o.data *= 100
    return sae.double()


def test_attention_is_over_the_rows_tokens_so_far(made, gappy, assert_close):
    sae = strong(made("self_attention", heads=2, width=6))
    part, x = sae.parts[0], gappy.x.double()
    found = part.input(x, seen_of(sae, gappy))
    for n in range(len(x)):
        past = [m for m in range(n + 1) if gappy.row[m] == gappy.row[n]]
        normed = [(x[m] - x[m].mean()) / (x[m].var(correction=0) + 1e-5).sqrt() for m in past]
        q, k, v = zip(*((one @ part.W_qkv).view(3, 2, 3) for one in normed), strict=True)
        heads = []
        for h in range(2):
            weights = torch.softmax(torch.stack([q[-1][h] @ key[h] / math.sqrt(3) for key in k]), 0)
            heads.append(sum(w * value[h] for w, value in zip(weights, v, strict=True)))
        assert_close(found[n], x[n] + torch.cat(heads) @ part.W_o, 1e-10)


def test_attention_is_strictly_causal_within_a_row(made, gappy):
    sae = strong(made("self_attention"))
    part, n = sae.parts[0], 20
    x = gappy.x.double()
    changed = x.clone()
    changed[n] = changed[n].roll(1)
    moved = (part.input(x, seen_of(sae, gappy)) != part.input(changed, seen_of(sae, gappy))).any(1)
    after = (gappy.row == gappy.row[n]) & (gappy.pos >= gappy.pos[n])
    assert torch.equal(moved, after)


def test_attention_changes_little_at_first_and_nothing_without_its_output(made, rows):
    sae, batch = made("self_attention"), rows()
    seen = BatchView(sae, batch.x, batch.pos.long(), T, row=batch.row)
    moved = sae.parts[0].input(batch.x, seen) - batch.x
    assert 0 < float(moved.detach().norm()) < 0.05 * float(batch.x.norm())
    sae.parts[0].W_o.data.zero_()
    assert torch.equal(sae.parts[0].input(batch.x, seen), batch.x)


@pytest.mark.parametrize("kind", ["self_attention", None])
def test_a_code_depends_on_earlier_tokens_through_attention_alone(kind, made, rows, learner):
    one = learner(made(kind, parts=None if kind else []), steps=10)
    for step in range(10):
        advance(one, rows(step))
    sae, batch = one.end(), rows(99)
    changed = batch.x.clone()
    changed[::T] *= -1  # the first token of every row
    later = batch.pos > 0
    same = torch.equal(sae.encode(batch.x, batch.pos)[later], sae.encode(changed, batch.pos)[later])
    assert same == (kind is None)


# terms on codes


def u_of(part, f):
    u = f @ part.projection
    return u / (u - u.mean(0)).square().sum(1).mean().sqrt()


def test_the_projection_keeps_norms_and_has_nothing_to_learn(made):
    part = made("temporal_consistency", sae={"d_sae": 2000}).parts[0]
    f = torch.relu(torch.randn(50, 2000, generator=torch.Generator().manual_seed(0)))
    assert float(((f @ part.projection).norm(dim=1) / f.norm(dim=1) - 1).abs().max()) < 0.5
    assert not list(part.parameters())


def test_consistency_is_the_step_over_the_spread(made, gappy, assert_close):
    sae, f = made("temporal_consistency", weight=0.5).double(), codes(len(gappy.x))
    u = u_of(sae.parts[0], f)
    steps = [float((u[n + 1] - u[n]).square().sum()) for n in pairs(gappy)]
    found = sae.parts[0].penalty(seen_of(sae, gappy, f))
    assert float(found) == pytest.approx(0.5 * D * sum(steps) / len(steps) / 2, rel=1e-10)
    assert sae.parts[0].report()["error"] == pytest.approx(sum(steps) / len(steps) / 2, abs=1e-5)


def test_velocity_is_what_a_two_layer_gru_over_the_row_says(made, gappy):
    sae, f = made("velocity_gru", weight=0.5, width=5).double(), codes(len(gappy.x))
    part, u = sae.parts[0], u_of(sae.parts[0], f)
    assert part.gru.num_layers == 2
    weights = dict(part.gru.named_parameters())

    def cell(layer, x, h):
        """torch's GRU, gate by gate."""
        of_x = weights[f"weight_ih_l{layer}"] @ x + weights[f"bias_ih_l{layer}"]
        of_h = weights[f"weight_hh_l{layer}"] @ h + weights[f"bias_hh_l{layer}"]
        (r_x, z_x, n_x), (r_h, z_h, n_h) = of_x.view(3, 5), of_h.view(3, 5)
        r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        return (1 - z) * torch.tanh(n_x + r * n_h) + z * h

    error = size = 0.0
    state = None
    for n in range(len(u)):
        if n == 0 or gappy.row[n] != gappy.row[n - 1]:
            state = [torch.zeros(5, dtype=torch.float64)] * 2
        first = cell(0, u[n], state[0])
        state = [first, cell(1, first, state[1])]
        if n in pairs(gappy):
            velocity = u[n + 1] - u[n]
            error += float((velocity - part.head(state[1])).detach().square().sum())
            size += float(velocity.square().sum())
    found = part.penalty(seen_of(sae, gappy, f))
    assert float(found.detach()) == pytest.approx(0.5 * D * error / size, rel=1e-10)


def test_the_next_step_is_what_the_mlp_says(made, gappy):
    sae, f = made("next_step", weight=0.5).double(), codes(len(gappy.x))
    part, u = sae.parts[0], u_of(sae.parts[0], f)
    errors = []
    for n in pairs(gappy):
        hidden = (part.hidden.weight @ u[n] + part.hidden.bias).clamp_min(0)
        errors.append(float((u[n + 1] - part.head.weight @ hidden - part.head.bias).detach().square().sum()))
    found = part.penalty(seen_of(sae, gappy, f))
    assert float(found.detach()) == pytest.approx(0.5 * D * sum(errors) / len(errors), rel=1e-10)


def test_contrast_tells_neighbours_from_tokens_of_other_rows(made, gappy):
    sae, f = made("temporal_contrast", weight=0.5, temperature=0.3, anchors=200).double(), codes(len(gappy.x))
    part = sae.parts[0]
    z = torch.nn.functional.normalize(f @ part.projection.detach(), dim=1)
    terms = []
    for a in pairs(gappy):
        positive = math.exp(float(z[a] @ z[a + 1]) / 0.3)
        others = [math.exp(float(z[a] @ z[b + 1]) / 0.3) for b in pairs(gappy) if gappy.row[b] != gappy.row[a]]
        terms.append(-math.log(positive / (positive + sum(others))))
    found = part.penalty(seen_of(sae, gappy, f))
    assert float(found.detach()) == pytest.approx(0.5 * D * sum(terms) / len(terms) / math.log(200), rel=1e-10)


def test_contrast_draws_anchors_from_seed_and_step(made, rows):
    sae = made("temporal_contrast", anchors=8).double()
    batch = rows()
    seen = [seen_of(sae, batch, codes(len(batch.x))) for _ in range(3)]
    seen[2].step = 1
    first, again, other = (float(sae.parts[0].penalty(one).detach()) for one in seen)
    assert first == again != other


@pytest.mark.parametrize("kind", ["velocity_gru", "temporal_consistency", "next_step", "temporal_contrast"])
def test_codes_that_are_all_zero_or_rows_of_one_token_cost_nothing_infinite(kind, made, rows):
    sae, batch = made(kind), rows()
    ends = batch[batch.pos == 0]
    for one, f in ((batch, torch.zeros(len(batch.x), F)), (ends, torch.rand(len(ends.x), F))):
        f.requires_grad_()
        found = sae.parts[0].penalty(BatchView(sae, one.x, one.pos.long(), T, training=True, row=one.row, f=f))
        found.backward()
        assert found.isfinite()
        assert f.grad.isfinite().all()
        assert one is batch or found == 0


def trained(made, rows, learner, kind, weight):
    one = learner(made(kind, weight=weight), steps=40, lr=3e-2)
    for step in range(40):
        advance(one, rows(step))
    one.report()
    return one.sae


def turning(rows):
    """rows(seed) of x that goes on as it began: a direction of the row, and one that turns, beside noise."""

    def make(seed):
        batch = rows(seed)
        x = batch.x.view(-1, T, D)
        turn = torch.arange(T)[:, None] * 0.5 + torch.arange(len(x))[:, None, None]
        drift = torch.cat([torch.sin(turn), torch.cos(turn)], 2) @ torch.eye(2, D)
        batch.acts = {"x": (x[:, :1] + 2 * drift + 0.5 * x).reshape(-1, D)}
        return batch

    return make


def of_rows(rows):
    """rows(seed) of x with two dimensions that tell rows apart, beside noise in all."""

    def make(seed):
        batch = rows(seed)
        x = batch.x.view(-1, T, D)
        there = torch.tensor([2.0, 2.0] + [0.0] * (D - 2))
        batch.acts = {"x": (x[:, :1] * there + x).reshape(-1, D)}
        return batch

    return make


def test_consistency_slows_codes(made, rows, learner):
    """On rows that it wasn't trained on, as the same projection sees them."""
    rows, apart = turning(rows), {}
    for weight in (0.0, 10.0):
        sae, batch = trained(made, rows, learner, "temporal_consistency", weight), rows(99)
        u = u_of(sae.parts[0], sae.encode(batch.x, batch.pos)).view(-1, T, 64)
        apart[weight] = float((u[:, 1:] - u[:, :-1]).square().sum(2).mean())
    assert apart[10.0] < 0.9 * apart[0.0]


def test_contrast_makes_codes_tell_rows_apart(made, rows, learner):
    rows, near, told = of_rows(rows), {}, {}
    for weight in (0.0, 10.0):
        sae, batch = trained(made, rows, learner, "temporal_contrast", weight), rows(99)
        f = sae.encode(batch.x, batch.pos)
        alike = torch.nn.functional.cosine_similarity(f[:, None], f[None], dim=2)
        batch_context, elsewhere = batch.row.diff() == 0, batch.row[:, None] != batch.row
        told[weight] = float(alike.diagonal(1)[batch_context].mean() - alike[elsewhere].mean())
        near[weight] = float((f[1:] - f[:-1])[batch_context].square().sum(1).mean() / f.var(0).sum())
    assert told[10.0] > told[0.0] + 0.02
    assert near[10.0] < 0.95 * near[0.0]


@pytest.mark.parametrize("kind", ["velocity_gru", "next_step"])
def test_what_comes_next_is_learned_and_codes_become_predictable(kind, made, rows, learner):
    """A linear predictor is fitted to the codes of both dictionaries, so that these differ in their codes alone."""
    rows, error, fitted = turning(rows), {}, {}
    for weight in (0.0, 10.0):
        sae = trained(made, rows, learner, kind, weight)
        error[weight] = sae.parts[0].report()["error"]
        f = torch.stack([sae.encode(batch.x, batch.pos) for batch in map(rows, range(100, 140))])
        u = (f @ sae.parts[0].projection).unflatten(1, (-1, T)).double()
        before, ahead = u[:, :, :-1].flatten(0, 2), u[:, :, 1:].flatten(0, 2)
        wanted = ahead - before if kind == "velocity_gru" else ahead - ahead.mean(0)
        known = torch.cat([before, torch.ones(len(before), 1)], 1)
        left = wanted - known @ torch.linalg.lstsq(known, wanted, driver="gelsd").solution
        fitted[weight] = float(left.square().sum() / wanted.square().sum())
    assert error[10.0] < 0.5 * error[0.0]
    assert fitted[10.0] < 0.92 * fitted[0.0]


def test_settings_that_do_not_fit_are_refused(made):
    with pytest.raises(UserError, match="heads: 9 is not allowed; it must be at most width and d_in"):
        made("self_attention", heads=9)
    with pytest.raises(UserError, match="sae.parts.velocity_gru.weight: -1 is not allowed"):
        made("velocity_gru", weight=-1)
    with pytest.raises(UserError, match="sae.parts.temporal_contrast.temperature: 0 is not allowed"):
        made("temporal_contrast", temperature=0)
