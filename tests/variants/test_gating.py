"""Residual gates, against plain formulas."""

import math

import pytest
import torch
from temposae.engine.errors import UserError
from temposae.engine.parts import BatchView

from ..stepping import advance
from .conftest import D, F, R, T

N = R * T


def codes(seed=0):
    return torch.relu(torch.randn(N, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.3)


def gate_of(made, **settings):
    """The part of a dictionary in float64, and a batch in training."""
    sae = made("residual_gate", **settings).double()
    return sae.parts[0], BatchView(sae, torch.zeros(N, D, dtype=torch.float64), torch.arange(N) % T, T, training=True)


def test_normalised_activations_pass_their_gate_beside_the_skip(made):
    part, seen = gate_of(made)
    generator = torch.Generator().manual_seed(1)
    part.mean.copy_(torch.rand(F, generator=generator))
    part.variance.copy_(torch.rand(F, generator=generator))
    part.gate.data.copy_(torch.randn(F, generator=generator))
    acts, skip = codes(), math.exp(float(part.log_skip.detach()))
    found, missed = part.acts(acts, seen), 0
    for n in range(0, N, 5):
        for j in range(F):
            a, deviation = float(acts[n, j]), math.sqrt(float(part.variance[j]) + 0.01)
            is_open = a > max(0.0, float(part.mean[j]) - 0.5 * deviation)
            gate = 1 / (1 + math.exp(-float(part.gate.detach()[j])))
            missed += a > 0 and not is_open
            assert float(found[n, j].detach()) == pytest.approx(gate * is_open * a / deviation + skip * a, abs=1e-12)
    assert missed > 10
    assert ((found == 0) == (acts == 0)).all()


def test_it_begins_as_a_plain_dictionary_where_deviations_are_one(made, assert_close):
    part, seen = gate_of(made)
    part.variance.fill_(0.99)
    assert torch.equal(torch.sigmoid(part.gate), torch.full((F,), 0.5, dtype=torch.float64))
    assert_close(part.acts(codes(), seen), codes(), 1e-7)


def test_statistics_are_means_over_steps_of_each_latents_mean_and_variance(made, assert_close):
    part, seen = gate_of(made, decay=0.7)
    expected = [torch.zeros(F, dtype=torch.float64)] * 2
    for step in range(6):
        acts = codes(step)
        part.acts(acts, seen)
        part.after(seen)
        mean = acts.sum(0) / N
        variance = (acts - mean).square().sum(0) / N
        pace = max(1 / (step + 1), 0.3)  # the first ones count alike
        expected = [old + pace * (new - old) for old, new in zip(expected, (mean, variance), strict=True)]
    assert_close(part.mean, expected[0], 1e-12)
    assert_close(part.variance, expected[1], 1e-12)
    assert gate_of(made)[0].settings.decay == 0.99


def test_normalisation_makes_latents_of_any_scale_alike(made):
    """With the skip shut and gates open, what was 30 times as strong as another is as strong as it."""
    part, seen = gate_of(made, offset=-100)
    part.log_skip.data.fill_(-60.0)
    part.gate.data.fill_(60.0)
    acts = codes() * torch.logspace(0, 1.5, F, dtype=torch.float64)
    assert acts.std(0)[-1] > 20 * acts.std(0)[0]
    part.acts(acts, seen)
    part.after(seen)
    deviations = part.acts(acts, seen).detach().std(0, correction=0)
    assert ((deviations - 1).abs() < 0.05).all()


def test_shut_gates_leave_the_skip(made, assert_close):
    part, seen = gate_of(made)
    part.gate.data.fill_(-60.0)
    assert_close(part.acts(codes(), seen), 0.5 * codes(), 1e-7)


def test_rare_latents_have_threshold_zero_and_dead_ones_stay_bounded(made):
    part, seen = gate_of(made)
    acts = torch.zeros(N, F, dtype=torch.float64)
    acts[0, 0] = 5.0  # rare
    acts[:, 1] = torch.linspace(1, 3, N)  # always on
    for _ in range(3):
        part.acts(acts, seen)
        part.after(seen)
    deviation = (part.variance + 0.01).sqrt()
    threshold = (part.mean - 0.5 * deviation).clamp_min(0)
    assert threshold[0] == 0
    assert 1 < threshold[1] < 3
    again = torch.ones(1, F, dtype=torch.float64)
    assert (part.acts(again, seen) <= 0.5 * 10 + 0.5 + 1e-6).all()


def test_masked_latents_stay_off(made, rows, learner):
    one = learner(made("residual_gate", sae={"mask": {"kind": "random", "fraction": 0.5}}), steps=5)
    for step in range(5):
        advance(one, rows(step))
    sae, batch = one.end(), rows(9)
    f = sae.encode(batch.x, batch.pos)
    assert (f[~sae.mask.fixed[batch.pos.long()]] == 0).all()
    assert (f > 0).any()


def test_a_report_tells_what_passes(made):
    part, seen = gate_of(made)
    part.mean.fill_(1.0)
    acts = codes()
    part.acts(acts, seen)
    passing = (acts > 1 - 0.5 * math.sqrt(1.01)).sum() / (acts > 0).sum()
    assert part.report() == {"gate": 0.5, "skip": 0.5, "open": round(float(passing), 6)}


def test_settings_that_do_not_fit_are_refused(made):
    with pytest.raises(UserError, match="sae.parts.residual_gate.decay: 1 is not allowed"):
        made("residual_gate", decay=1)
