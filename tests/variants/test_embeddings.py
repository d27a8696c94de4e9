"""What the encoder is told of position: one embedding, three scales with targets of their own, and a residual map."""

import math

import pytest
import torch
from temposae.engine.errors import UserError
from temposae.engine.parts import BatchView, RowLayout
from temposae.variants.embeddings import joined, widths, window_means

from ..stepping import advance

D, F, T = 8, 24, 12


def seen_of(sae, batch, **given) -> BatchView:
    return BatchView(sae, batch.x.to(sae.W_dec.dtype), batch.pos.long(), T, **given)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_the_encoder_sees_the_embedding_of_a_position(made, rows, assert_close):
    sae, plain, batch = made("position_embedding", scale=1.0), made("position_embedding", scale=0), rows()
    pos = batch.pos + 5  # some beyond T, as its last
    moved = batch.x + sae.parts[0].embedding.detach()[pos.clamp(max=T - 1).long()]
    assert_close(sae.encode(batch.x, pos), plain.encode(moved, pos), 1e-6)


def test_linear_weights_rise_over_positions(made, rows, objective, assert_close):
    batch, found = rows(), {}
    for first, last in ((1.0, 1.0), (1.0, 2.0)):
        found[last] = objective(made("linear_weights", first=first, last=last), batch)
    sums = found[1.0].sums
    weights = torch.tensor([1 + p / (T - 1) for p in range(T)])
    expected = ((weights * sums.squared_error).sum() + 0.04 * sums.l1.sum()) / len(batch.x)
    assert_close(found[2.0].loss, expected, 1e-6)
    assert found[2.0].loss > 1.2 * found[1.0].loss


# A9


def test_windows_of_the_three_scales():
    assert widths(128) == (1, 8, 32)
    assert widths(T) == (1, 2, 4)  # not below 2 and 4


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0, [1, 0, 0]), (0.25, [1, 0, 0]), (0.375, [1, 0.5, 0]), (0.5, [1, 1, 0]), (0.7, [1, 1, 0.8]), (1, [1, 1, 1])],
)
def test_scales_join_from_local_to_global(progress, expected):
    assert joined(progress) == pytest.approx(expected)


@pytest.mark.parametrize("progress", [0.0, 0.6, 1.0])
def test_embeddings_of_three_scales_are_mixed_by_attention_and_statistics(progress, made, rows, assert_close):
    sae, batch = made("multi_scale", scale=1.0).double(), rows()
    part = sae.parts[0]
    part.logits.data.copy_(drawn(T, 3))
    part.share.copy_(torch.tensor([0.6, 0.395, 0.005]))  # the last counts as 0.01
    expected = []
    for p in batch.pos.tolist():
        found = [math.exp(a) for a in part.logits[p].tolist()]
        found = [a * u * j for a, u, j in zip(found, (0.6, 0.395, 0.01), joined(progress), strict=True)]
        embedded = [E[p // w] for E, w in zip(part.embeddings, (1, 2, 4), strict=True)]
        expected.append(sum(a / sum(found) * e for a, e in zip(found, embedded, strict=True)))
    x = batch.x.double()
    given = part.input(x, seen_of(sae, batch, progress=progress))
    assert_close(given - x, torch.stack(expected), 1e-7)
    if progress == 0:
        assert_close(given - x, part.embeddings[0][batch.pos.long()], 1e-7)


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_mixing_follows_the_share_of_activation(activation, made, rows, objective, assert_close):
    sae = made("multi_scale", decay=0.8, sae={"activation": activation})
    sae.b_enc.data[:8] += 1
    expected = torch.full((3,), 1 / 3)
    for step in range(2):
        objective(sae, rows(step))
        f = sae._last.f.detach()
        parts = torch.stack([f[:, 8 * s : 8 * s + 8].sum() for s in range(3)])
        expected = 0.8 * expected + 0.2 * parts / parts.sum()
        sae.after()
    assert_close(sae.parts[0].share, expected, 1e-6)
    assert sae.parts[0].share[0] > 0.4
    mix = sae.parts[0].mix(1.0)
    assert (mix[:, 0] > mix[:, 1]).all()
    assert sae.parts[0].report()["share"] == pytest.approx(expected.tolist(), rel=1e-5)


def test_scales_without_latents_in_use_change_nothing(made, rows, objective):
    sae = made("multi_scale")
    objective(sae, rows())
    sae._last.f = torch.zeros_like(sae._last.f)
    sae.after()
    assert sae.parts[0].share.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("width", [1, 2, 4, 40])
def test_window_means_stay_in_the_row_and_leave_out_what_is_missing(width, assert_close):
    x = drawn(20, D)
    row = torch.tensor([7] * 9 + [2] * 3 + [3] * 8)
    pos = torch.tensor([0, 1, 2, 3, 5, 6, 9, 10, 11, 3, 4, 5, 4, 5, 6, 7, 8, 9, 10, 11])
    expected = [
        torch.stack([x[m] for m in range(20) if row[m] == row[n] and pos[m] // width == pos[n] // width]).mean(0)
        for n in range(20)
    ]
    number = torch.tensor([0] * 9 + [1] * 3 + [2] * 8)
    assert_close(window_means(x, RowLayout(number, pos), width), torch.stack(expected), 1e-7)


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_each_scale_is_to_give_its_window_means(activation, progress, made, rows, objective, assert_close):
    batch, losses = rows(), {}
    for coefficient in (0.0, 0.5):
        sae = made("scale_targets", coefficient=coefficient, sae={"activation": activation})
        sae.b_dec.data.copy_(drawn(D))
        sae.at(progress)
        losses[coefficient] = objective(sae, batch).loss
    f, expected = sae._last.f.detach(), 0.0
    for s, width in enumerate((1, 2, 4)):
        latents = range(8 * s, 8 * s + 8)
        for n in range(len(batch.x)):
            here = (batch.row == batch.row[n]) & (batch.pos // width == batch.pos[n] // width)
            given = sae.b_dec + sum(f[n, j] * sae.W_dec[j] for j in latents)
            expected += joined(progress)[s] * float((batch.x[here].mean(0) - given).detach().square().sum())
    assert (losses[0.5] - losses[0.0]).item() == pytest.approx(0.5 * expected / len(batch.x), rel=1e-4)


def test_latents_of_a_scale_come_to_give_their_windows(made, rows, learner):
    found = {}
    for coefficient in (0.0, 2.0):
        sae = made("scale_targets", coefficient=coefficient)
        one = learner(sae, steps=60)
        for step in range(60):
            advance(one, rows(step))
        batch, sae = rows(99), one.end()
        f = sae.encode(batch.x, batch.pos)[:, 16:]
        target = window_means(batch.x, RowLayout(batch.row, batch.pos.long()), 4)
        found[coefficient] = (target - sae.b_dec - f @ sae.W_dec[16:]).square().sum(1).mean().item()
    assert found[2.0] < 0.7 * found[0.0]


def test_targets_need_latents_for_every_scale(made):
    with pytest.raises(UserError, match="d_sae: 2 is not allowed with scale_targets; it must be at least 3"):
        made("scale_targets", sae={"d_sae": 2})


# A10


def residual(made, **settings):
    """A dictionary whose part has learned something, float64."""
    sae = made("residual_position", **settings).double()
    part = sae.parts[0]
    for nth, name in enumerate(("map", "log_gain", "slope", "offset")):
        parameter = getattr(part, name)
        parameter.data.copy_(0.5 * drawn(*parameter.shape, seed=nth))
    part.variance.add_mean((1 + drawn(T).square()) * 2, torch.tensor([2.0] * (T - 1) + [0.0]).double())
    return sae, part


def test_pre_activations_are_normalised_and_get_the_gated_map_of_their_position(made, rows, assert_close):
    sae, part = residual(made)
    batch, pre = rows(), drawn(len(rows().x), F, seed=9)
    variances = part.variance.value.tolist()[: T - 1]  # the last position was not met
    expected = []
    for n, p in enumerate(batch.pos.tolist()):
        c = math.exp(part.log_gain[p].item())
        c *= math.sqrt(sum(variances) / len(variances) / variances[p]) if p < T - 1 else 1
        size = math.sqrt(sum((c * value) ** 2 for value in pre[n].tolist()) / F)
        gate = 1 / (1 + torch.exp(-(part.slope * size + part.offset)))
        expected.append(c * pre[n] + gate * (part.embedding[p] @ part.map))
    assert_close(part.pre(pre, seen_of(sae, batch)), torch.stack(expected), 1e-7)


def test_a_map_of_zeros_changes_nothing(made, rows, assert_close):
    sae, plain, batch = made("residual_position"), made("position_embedding", scale=0), rows()
    assert_close(sae.encode(batch.x, batch.pos), plain.encode(batch.x, batch.pos), 1e-6)
    sae.parts[0].map.data.fill_(0.3)
    assert not torch.allclose(sae.encode(batch.x, batch.pos), plain.encode(batch.x, batch.pos), atol=1e-3)


def gradients_of(sae, batch, objective, *, own: bool):
    """Of all parameters, by name: of the pathway's own term, or of the loss without it; None where it doesn't reach."""
    part, found = sae.parts[0], []
    part.penalty = lambda seen: found.append(type(part).penalty(part, seen))
    loss = objective(sae, batch).loss
    named = dict(sae.named_parameters())
    grads = torch.autograd.grad(found[0] if own else loss, list(named.values()), allow_unused=True)
    return dict(zip(named, grads, strict=True))


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_the_pathway_is_isolated_from_the_loss_both_ways(activation, made, rows, objective):
    sae = made("residual_position", sae={"activation": activation})
    sae.parts[0].map.data.fill_(0.1)
    pathway = {"parts.0.embedding", "parts.0.map"}
    of_loss = gradients_of(sae, rows(), objective, own=False)
    of_own = gradients_of(sae, rows(), objective, own=True)
    for name in of_loss:
        assert (of_loss[name] is None) == (name in pathway), name
        assert (of_own[name] is None) == (name not in pathway), name
    for name in ("parts.0.slope", "parts.0.offset", "parts.0.log_gain", "W_enc"):
        assert (of_loss[name] != 0).any(), name


def test_the_pathway_learns_what_a_position_adds_to_pre_activations(made, rows, assert_close):
    """Its gradients are those of the squared error of every token."""
    sae, part = residual(made, regulariser=0.2)
    batch, pre = rows()[:40], drawn(40, F, seed=9).requires_grad_()  # more tokens at some positions than at others
    seen = seen_of(sae, batch, training=True)
    part.pre(pre, seen)
    term = part.penalty(seen)
    found = torch.autograd.grad(term, [part.embedding, part.map], retain_graph=True)
    assert torch.autograd.grad(term, pre, allow_unused=True) == (None,)
    pos = batch.pos.long()
    c = part.log_gain.exp() * part.variance.relative().rsqrt()
    normal = (pre * c[pos, None]).detach()
    r = part.embedding[pos] @ part.map
    plain = (r - (normal - normal.mean(0))).square().sum() + 0.2 * r.square().sum()
    expected = torch.autograd.grad(D / F * plain / 40, [part.embedding, part.map])
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-7)


def test_the_map_comes_to_predict_positions_and_the_regulariser_shrinks_it(made, rows, learner):
    size = {}
    for regulariser in (0.0, 3.0):
        sae = made("residual_position", regulariser=regulariser)
        one = learner(sae, steps=60)
        for step in range(60):
            advance(one, rows(step))
        batch, part = rows(99, n_rows=200), sae.parts[0]
        pre = (batch.x - sae.b_dec) @ sae.W_enc + sae.b_enc
        normal = pre * (part.log_gain.exp() * part.variance.relative().rsqrt())[batch.pos.long(), None]
        deviation = torch.stack([normal[batch.pos == p].mean(0) for p in range(T)]) - normal.mean(0)
        r = (part.embedding @ part.map).detach()
        size[regulariser] = r.norm()
        if regulariser == 0:
            assert (r - deviation).square().sum() < 0.4 * deviation.square().sum()
    assert size[3.0] < 0.5 * size[0.0]


def test_normalisation_gives_positions_equal_spread(made, rows, learner):
    sae = made("residual_position", decay=0.5)
    one = learner(sae, steps=30, lr=1e-6)
    one.mean = torch.zeros(D)
    factor = torch.linspace(0.5, 3, T)
    for step in range(30):
        batch = rows(step)
        batch.acts["x"] = batch.x * factor[batch.pos.long()][:, None]
        advance(one, batch)
    spread = sae.parts[0].variance.value.sqrt()
    assert spread[-1] / spread[0] > 4
    x = one.scale * batch.x
    normal = sae.parts[0].pre(x @ sae.W_enc, seen_of(sae, batch))
    of_position = torch.stack([normal[batch.pos == p].var(1).mean().sqrt() for p in range(T)])
    assert of_position.max() / of_position.min() < 1.6
    seen, found = seen_of(sae, batch, training=True), x @ sae.W_enc
    before = sae.parts[0].variance.value.clone()
    sae.parts[0].pre(found, seen)
    sae.parts[0].after(seen)
    now = torch.stack([found[batch.pos == p].var(1, correction=0).mean() for p in range(T)])
    torch.testing.assert_close(sae.parts[0].variance.value, (before + now) / 2)
