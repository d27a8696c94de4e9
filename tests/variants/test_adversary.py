"""The adversary and its probe, attribution, and latents that go with an attribute; each against plain formulas."""

from dataclasses import replace

import pytest
import torch
from temposae.engine.errors import UserError
from temposae.engine.sae import BatchContext
from torch.nn.functional import normalize

from ..stepping import advance

D, F, T = 8, 24, 12


def doubled(batch):
    return batch.each(lambda value: value.double() if value.is_floating_point() else value)


def labelled(rows, seed: int):
    """A batch whose attribute moves x along the first axis, of which the second knows the sign."""
    batch = rows(seed).at("x")
    attribute = torch.rand(len(batch.pos), generator=torch.Generator().manual_seed(seed)) < 0.5
    x = batch.x.clone()
    x[:, 0] = 3.0 * (2 * attribute - 1)
    return replace(batch, acts={"x": x}, attribute=attribute.long())


def objective(sae, batch):
    return sae.objective(batch.x, batch.pos, T, batch_context=BatchContext(batch.row, batch.attribute))


def direction_of(sae):
    """A probe that knows something, in place of the one that has not begun."""
    probe = sae.parts[0]
    with torch.no_grad():
        probe.direction.copy_(torch.randn(F, generator=torch.Generator().manual_seed(1)))
        probe.bias.fill_(-0.3)
    return probe.direction.detach(), probe.bias.detach()


def gradients(sae, batch):
    sae.zero_grad()
    objective(sae, batch).loss.backward()
    return {name: value.grad.clone() for name, value in sae.named_parameters() if value.grad is not None}


# ---- adversary


@pytest.mark.parametrize("classes", ["both", "one"])
def test_the_adversary_is_that_of_the_formula(classes, made, rows):
    sae = made("adversary", strength=0.3, decay=0.9).double()
    w, b = direction_of(sae)
    sae.parts[0].accuracy.add(torch.tensor(0.8, dtype=torch.float64))
    batch = doubled(labelled(rows, 0))
    if classes == "one":
        batch = replace(batch, attribute=torch.ones_like(batch.attribute))
    objective(sae, batch)
    found = float(sae.parts[0].penalty(sae._last).detach())
    f = sae.encode(batch.x, batch.pos)
    entropy, right, cosine = {0: [], 1: []}, {0: [], 1: []}, []
    for row, y in zip(f, batch.attribute.tolist(), strict=True):
        p = torch.sigmoid(row @ w + b)
        entropy[y].append(-torch.log(p if y else 1 - p))
        right[y].append(float((p > 0.5) == bool(y)))
        cosine.append(abs(float(row @ w / (row.norm() * w.norm()))))
    expected = 0.3 * (0.8 - 0.5) * D * sum(cosine) / len(cosine)
    expected += sum(float(torch.stack(of).mean()) for of in entropy.values() if of) / 2
    assert found == pytest.approx(expected, rel=1e-9)
    sae.after()
    accuracy = 0.8
    if classes == "both":
        accuracy = 0.9 * 0.8 + 0.1 * sum(sum(of) / len(of) for of in right.values()) / 2
    report = sae.part_reports()["adversary"]
    assert report["accuracy"] == pytest.approx(accuracy, rel=1e-6)
    assert report["lambda"] == pytest.approx(0.3 * (accuracy - 0.5), rel=1e-6)
    assert report["cosine"] == pytest.approx(sum(cosine) / len(cosine), rel=1e-6)


def test_pressure_never_falls_below_a_tenth_of_its_strength(made):
    sae = made("adversary", strength=0.2)
    for accuracy, expected in ((None, 0.02), (0.3, 0.02), (0.55, 0.02), (0.9, 0.08)):
        if accuracy is not None:
            sae.parts[0].accuracy.value.fill_(accuracy)
        assert float(sae.parts[0].pressure) == pytest.approx(expected)


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_neither_gradient_reaches_the_other(activation, made, rows):
    batch, found = labelled(rows, 0), {}
    for strength in (0.0, 0.5):
        sae = made("adversary", strength=strength, sae={"activation": activation})
        direction_of(sae)
        found[strength] = gradients(sae, batch)
    plain = gradients(made(parts=[{"kind": "linear_weights", "last": 1.0}], sae={"activation": activation}), batch)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):  # without an adversary, the probe alone changes nothing
        torch.testing.assert_close(found[0.0][name], plain[name])
    assert not torch.allclose(found[0.5]["W_enc"], plain["W_enc"], rtol=1e-3)
    for name in ("parts.0.direction", "parts.0.bias"):
        assert torch.equal(found[0.0][name], found[0.5][name])
        assert (found[0.0][name] != 0).any()


def test_the_probe_learns_and_an_adversary_hides_the_attribute(made, rows, learner):
    reports = {}
    for strength in (0.0, 30.0):
        one = learner(made("adversary", strength=strength), steps=120)
        for step in range(120):
            batch = labelled(rows, step)  # noisy: at best about 3 of 4 tokens can be told
            batch.x[:, 0] = 0.7 * (2 * batch.attribute - 1) + torch.randn(
                len(batch), generator=torch.Generator().manual_seed(step)
            )
            advance(one, batch)
        reports[strength] = one.report()["parts"]["adversary"]
    assert reports[0.0]["accuracy"] > 0.7
    assert reports[30.0]["cosine"] < 0.3 * reports[0.0]["cosine"]
    assert reports[30.0]["accuracy"] < reports[0.0]["accuracy"] - 0.03


# ---- selective orthogonality


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
@pytest.mark.parametrize("dense", [False, True])
def test_attribution_is_activation_times_gradient(activation, dense, made, rows):
    parts = [{"kind": "selective_orthogonality", "decay": 0.5}]
    if dense:  # a part that looks at all activations
        parts.append({"kind": "adversary", "strength": 0.0})
    sae = made(parts=parts, sae={"activation": activation})
    assert sae.is_dense == dense
    expected = None
    for seed in (0, 1):
        batch = labelled(rows, seed)
        one = objective(sae, batch)
        f = sae._last.code.to_dense() if sae._last.code is not None else sae._last.f
        f = f.detach().requires_grad_()
        error = (batch.x - f @ sae.W_dec.detach() - sae.b_dec.detach()).square().sum()
        l1 = 0.04 * f.sum() if activation == "relu" else 0
        ((error + l1) / len(f)).backward()
        now = (f.detach() * f.grad).abs().sum(0)
        expected = now if expected is None else 0.5 * expected + 0.5 * now
        one.loss.backward()
        sae.after()
        torch.testing.assert_close(sae.parts[0].attribution.value, expected, rtol=1e-4, atol=1e-6)
    assert (expected > 0).any()


def test_orthogonality_is_of_latents_above_the_percentile_only(made, rows):
    sae = made("selective_orthogonality", coefficient=0.5, percentile=75)
    part, batch = sae.parts[0], rows()
    objective(sae, batch)
    assert float(part.penalty(sae._last).detach()) == 0  # nothing is known of attribution yet
    attribution = torch.linspace(0.1, 1, F)[torch.randperm(F, generator=torch.Generator().manual_seed(0))]
    part.attribution.add(attribution)
    objective(sae, batch)
    sae.zero_grad()
    found = part.penalty(sae._last)
    found.backward()
    above = attribution.argsort()[-6:]
    assert attribution[above].min() > attribution.quantile(0.75)
    W = sae.W_dec.detach()
    expected = sum(float(W[i] @ W[j]) ** 2 for i in above for j in above if i != j) / 6
    assert float(found.detach()) == pytest.approx(0.5 * D * expected, rel=1e-5)
    assert set((sae.W_dec.grad != 0).any(1).nonzero().flatten().tolist()) == set(above.tolist())
    part.attribution.value.zero_()[above[4:]] = 1.0  # two of the six have any, which others are above is no matter
    expected = 2 * float(W[above[4]] @ W[above[5]]) ** 2 / 6
    assert float(part.penalty(sae._last).detach()) == pytest.approx(0.5 * D * expected, rel=1e-5)


def test_latents_of_high_attribution_become_orthogonal(made, rows, learner):
    cosine = {}
    for coefficient in (0.0, 10.0):
        sae = made("selective_orthogonality", coefficient=coefficient, percentile=75, sae={"activation": "topk"})
        assert not sae.is_dense
        one = learner(sae, steps=100, lr=3e-3)
        for step in range(100):
            advance(one, rows(step % 10).at("x"))
            report = one.report()["parts"]["selective_orthogonality"] if step % 50 == 49 else None
        cosine[coefficient] = report["cosine"]
        assert 0.25 < report["share"] < 1
    assert cosine[10.0] < 0.5 * cosine[0.0]


# ---- spurious contrast


def test_scores_and_contrast_are_those_of_the_formula(made, rows):
    sae = made("spurious_contrast", coefficient=0.5, decay=0.6, share=0.2).double()
    part, mean, square, W = sae.parts[0], {}, {}, sae.W_dec.detach()
    spurious = int(0.2 * F)
    for seed in range(4):
        batch = doubled(labelled(rows, seed))
        if seed == 2:
            batch = batch[batch.attribute == 1]
        objective(sae, batch)
        found = float(part.penalty(sae._last).detach())
        if seed:
            variance = (square[0] + square[1]) / 2 - ((mean[0] + mean[1]) / 2).square()
            score = (mean[1] - mean[0]).abs() / variance.sqrt()
            torch.testing.assert_close(part.score, score)
            inside = score.argsort(descending=True)[:spurious].tolist()
            total = 0.0
            for i in inside:
                for j in set(range(F)) - set(inside):
                    total += max(0, abs(float(W[i] @ W[j])) - 2 / D**0.5) ** 2
            assert total > 0
            assert found == pytest.approx(0.5 * D * total / spurious, rel=1e-6)
        else:
            assert found == 0
        f = sae.encode(batch.x, batch.pos)
        for y in {0, 1} & set(batch.attribute.tolist()):
            of_class = f[batch.attribute == y]
            first, second = of_class.mean(0), of_class.square().mean(0)
            mean[y] = 0.6 * mean[y] + 0.4 * first if y in mean else first
            square[y] = 0.6 * square[y] + 0.4 * second if y in square else second
        sae.after()


def test_latents_that_go_with_the_attribute_are_found_and_pushed_away(made, rows, learner):
    alike = {}
    for coefficient in (0.0, 2.0):
        sae = made("spurious_contrast", coefficient=coefficient, share=0.1)
        with torch.no_grad():  # latents 0 and 1 lie along the axis of the attribute, and 2 to 7 lean to it
            sae.W_dec[2:8, 0] = 1.5
            sae.W_dec[:2] = 0.0
            sae.W_dec[0, 0], sae.W_dec[1, 0] = 1.0, -1.0
            sae.W_dec.copy_(normalize(sae.W_dec, dim=1))
            sae.W_enc.copy_(sae.W_dec.T)
        one = learner(sae, steps=40, lr=3e-3)
        for step in range(40):
            advance(one, labelled(rows, step))
        assert set(sae.parts[0].score.topk(2).indices.tolist()) == {0, 1}
        report = one.report()["parts"]["spurious_contrast"]
        assert report["score"] > 1
        W = one.end().W_dec.detach()
        alike[coefficient] = float((W[:2] @ W[2:].T).abs().sub(2 / D**0.5).clamp_min(0).square().mean())
    assert alike[2.0] < 0.5 * alike[0.0]


def test_settings_that_are_not_allowed(made):
    for kind, given, name in (
        ("adversary", {"strength": -1.0}, "strength"),
        ("adversary", {"pace": 0.0}, "pace"),
        ("selective_orthogonality", {"percentile": 100.0}, "percentile"),
        ("selective_orthogonality", {"sample": 1}, "sample"),
        ("spurious_contrast", {"share": 1.0}, "share"),
        ("spurious_contrast", {"decay": 1.0}, "decay"),
    ):
        with pytest.raises(UserError, match=f"sae.parts.{kind}.{name}: .* is not allowed"):
            made(kind, **given)
    with pytest.raises(UserError, match="percentile: 97 is not allowed; it must leave at least 2 of 24 latents"):
        made("selective_orthogonality", percentile=97)
    with pytest.raises(UserError, match="d_sae: 1 is not allowed with spurious_contrast"):
        made("spurious_contrast", sae={"d_sae": 1})
