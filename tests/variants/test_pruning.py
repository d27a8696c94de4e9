"""Pruning with reactivation, and distillation, against plain formulas."""

import math

import pytest
import torch
from temposae.engine.errors import UserError
from temposae.engine.parts import BatchView

from ..stepping import advance
from .conftest import D, F, R, T

N = R * T


def seen_of(sae, x, **more):
    return BatchView(sae, x, torch.arange(len(x)) % T, T, training=True, target=x, **more)


@torch.no_grad()
def pruned_step(sae, f, kept=None, **more):
    """`latents` and `after` of activations f [N, F], of which `kept` are selected, if not all that are on."""
    part, seen = sae.parts[0], seen_of(sae, torch.zeros(len(f), D), **more)
    on = part.latents(f, seen)
    seen.f = on if kept is None else kept(on)
    part.after(seen)
    return on


def strengths(*order):
    """Activations of four tokens, the same for each: latent order[0] is strongest."""
    f = torch.full((F,), 0.1)
    f[list(order)] = torch.arange(len(order), 0, -1).float()
    return f.expand(4, F).clone()


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
def test_importance_is_what_a_latent_gives_or_would_give(activation, made, assert_close):
    sae = made("pruning", decay=0.8, every=1000, sae={"activation": activation, "k": 4}).double()
    part, generator = sae.parts[0], torch.Generator().manual_seed(0)
    sae.W_dec.data *= torch.rand(F, 1, generator=generator)
    part.alive[:10] = False
    expected = torch.zeros(F, dtype=torch.float64)
    for step in range(1, 4):
        f = torch.relu(torch.randn(N, F, generator=generator, dtype=torch.float64))
        on = f.clone()
        on[:, :10] = 0
        if activation == "topk":
            at = [sorted(row.tolist())[-4] for row in on]
        elif activation == "batchtopk":
            at = [sorted(on.flatten().tolist())[-4 * N]] * N
        else:
            at = [0.0] * N
        limits = torch.tensor(at, dtype=torch.float64)[:, None]
        pruned_step(sae, f, kept=lambda on, limits=limits: on * (on >= limits), step=step)
        would = torch.where(f >= limits, f, 0)
        expected = 0.8 * expected + 0.2 * would.sum(0) / N * sae.W_dec.norm(dim=1)
    assert_close(part.importance, expected, 1e-10)
    assert (part.importance[:10] > 0).any()


def test_more_and_more_of_the_least_important_are_off(made):
    sae = made("pruning", fraction=0.5, every=1)
    part, f = sae.parts[0], strengths(*range(F))  # the last latents are the weakest
    for progress, n in ((0.0, 0), (0.2, 3), (0.4, 6), (0.8, 12), (0.9, 12), (1.0, 12)):
        pruned_step(sae, f, step=1, progress=progress)
        assert part.alive.tolist() == [True] * (F - n) + [False] * n
        assert part.report()["pruned"] == pytest.approx(n / F)
    on = part.latents(f, seen_of(sae, torch.zeros(4, D)))
    assert torch.equal(on[:, :12], f[:, :12])
    assert (on[:, 12:] == 0).all()
    assert part.report()["threshold"] == pytest.approx(float(part.importance[11]), rel=1e-5)


def test_it_looks_every_so_many_steps(made):
    sae = made("pruning", fraction=0.5, every=5)
    for step in range(1, 6):
        pruned_step(sae, strengths(0, 1), step=step, progress=1.0)
        assert bool(sae.parts[0].alive.all()) == (step < 5)


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
def test_a_pruned_latent_that_would_be_active_comes_back_for_another(activation, made):
    sae = made("pruning", fraction=0.5, every=1, decay=0.5, sae={"activation": activation, "k": 4})
    part = sae.parts[0]

    def kept(on):
        return on if activation == "relu" else on * (on >= on.topk(4, 1).values[:, -1:])

    order = list(range(F))
    for step in range(3):
        pruned_step(sae, strengths(*order), kept, step=step, progress=1.0)
    off, returned = int((~part.alive).nonzero()[-1]), int(part.returned)
    order = [off, *[j for j in order if j != off]]
    for step in range(8):
        pruned_step(sae, strengths(*order), kept, step=step, progress=1.0)
    assert part.alive[off]
    assert int(part.returned) > returned
    assert int(part.alive.sum()) == F // 2
    assert part.report()["returned"] == int(part.returned)


def test_pruned_latents_are_off_and_get_no_gradient(made, rows, objective):
    sae, batch = made("pruning"), rows()
    sae.parts[0].alive[::3] = False
    assert (sae.encode(batch.x, batch.pos)[:, ::3] == 0).all()
    objective(sae, batch).loss.backward()
    assert (sae.W_dec.grad[::3] == 0).all()
    assert (sae.W_enc.grad[:, ::3] == 0).all()
    assert (sae.W_dec.grad[1::3] != 0).any()


@pytest.mark.parametrize("fraction", [0.0, 0.75])
def test_a_run_ends_with_its_fraction_off(fraction, made, rows, learner):
    one = learner(made("pruning", fraction=fraction), steps=31)
    for step in range(31):
        advance(one, rows(step))
    sae, batch = one.end(), rows(99)
    f = sae.encode(batch.x, batch.pos)
    assert int((f == 0).all(0).sum()) == int(fraction * F)


def test_pruning_that_leaves_too_few_is_refused(made):
    with pytest.raises(UserError, match="fraction: 0.9 is not allowed with topk; it must leave at least k"):
        made("pruning", fraction=0.9, sae={"activation": "topk"})
    with pytest.raises(UserError, match="sae.parts.pruning.fraction: 1 is not allowed"):
        made("pruning", fraction=1)


# distillation


def taught(made, rows, **settings):
    """A dictionary in float64 whose teacher is somewhere else, and a batch."""
    sae, batch = made("distillation", **settings).double(), rows()
    part, generator = sae.parts[0], torch.Generator().manual_seed(1)
    part.W_teacher.copy_(torch.randn(F, D, generator=generator))
    part.b_teacher.copy_(torch.randn(F, generator=generator))
    sae.b_dec.data.copy_(torch.randn(D, generator=generator))
    part.steps.fill_(7)
    return sae, batch.x.double()


@torch.no_grad()
def test_the_student_is_held_to_the_teachers_soft_targets(made, rows):
    sae, x = taught(made, rows, weight=0.5)
    part, seen = sae.parts[0], seen_of(sae, x)
    assert part.input(x, seen) is x
    total = 0.0
    for n in range(N):
        teacher = [max(0.0, float((x[n] - sae.b_dec) @ part.W_teacher[j] + part.b_teacher[j])) for j in range(F)]
        student = [max(0.0, float((x[n] - sae.b_dec) @ sae.W_enc[:, j] + sae.b_enc[j])) for j in range(F)]
        p, q = ([math.exp(a / 2) / sum(math.exp(b / 2) for b in acts) for a in acts] for acts in (teacher, student))
        total += sum(one * math.log(one / other) for one, other in zip(p, q, strict=True)) / N
    assert float(part.penalty(seen).detach()) == pytest.approx(0.5 * D * 4 * total, rel=1e-8)


def test_targets_are_softer_at_a_higher_temperature(made, rows):
    """As they get softer, tau^2 KL goes to half the variance of the difference of activations over latents."""
    sae, x = taught(made, rows, weight=1.0, temperature=1e4)
    seen = seen_of(sae, x)
    sae.parts[0].input(x, seen)
    centred = x - sae.b_dec
    part = sae.parts[0]
    between = torch.relu(centred @ part.W_teacher.T + part.b_teacher) - torch.relu(centred @ sae.W_enc + sae.b_enc)
    limit = D * between.var(1, correction=0).mean() / 2
    assert float(part.penalty(seen).detach()) == pytest.approx(float(limit.detach()), rel=1e-3)


def test_it_works_on_a_sample_of_tokens_and_latents_that_follows_from_seed_and_step(made, rows):
    sae, x = taught(made, rows, tokens=5, latents=6)
    found = []
    for step in (3, 3, 4):
        seen = seen_of(sae, x, step=step)
        sae.parts[0].input(x, seen)
        loss = sae.parts[0].penalty(seen)
        sae.W_enc.grad = None
        loss.backward()
        assert 0 < int((sae.W_enc.grad != 0).any(0).sum()) <= 6
        found.append(float(loss.detach()))
    assert found[0] == found[1] != found[2]


def test_the_teacher_is_the_mean_of_encoders_and_first_unknown(made, rows, assert_close):
    sae, x = made("distillation", decay=0.7).double(), rows().x.double()
    part, seen = sae.parts[0], seen_of(sae, x)
    part.input(x, seen)
    assert float(part.penalty(seen).detach()) == 0.0
    W, b = torch.zeros(F, D, dtype=torch.float64), torch.zeros(F, dtype=torch.float64)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        sae.W_enc.data += torch.randn(D, F, generator=generator)
        sae.b_enc.data += torch.randn(F, generator=generator)
        with torch.no_grad():
            part.after(seen)
        pace = max(1 / (step + 1), 0.3)
        W, b = W + pace * (sae.W_enc.data.T - W), b + pace * (sae.b_enc.data - b)
    assert_close(part.W_teacher, W, 1e-12)
    assert_close(part.b_teacher, b, 1e-12)
    part.input(x, seen)
    assert float(part.penalty(seen).detach()) > 0


def test_distillation_keeps_the_encoder_near_its_past(made, rows, learner):
    far = {}
    for weight in (0.0, 10.0):
        one = learner(made("distillation", weight=weight), steps=40, lr=3e-2)
        for step in range(40):
            advance(one, rows(step))
        one.report()
        far[weight] = one.sae.parts[0].report()["divergence"]
    assert far[10.0] < 0.5 * far[0.0]


def test_distillation_settings_that_do_not_fit_are_refused(made):
    with pytest.raises(UserError, match="sae.parts.distillation.temperature: 0 is not allowed"):
        made("distillation", temperature=0)
