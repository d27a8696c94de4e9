"""Weights on the loss by how specialised the latents are that explain a position, and the running means under them."""

import math

import pytest
import torch
from temposae.engine.errors import UserError
from temposae.engine.parts import BatchView
from temposae.variants.loss_weights import specialization

from ..stepping import advance

F, T = 24, 12
MASKS = [
    {"kind": "soft", "start": "normal"}, {"kind": "random"}, {"kind": "ranges", "ranges": 4}, {"kind": "gaussian"},
]  # fmt: skip


def plainly(mask: list[list[float]]) -> list[float]:
    """s of each latent, from a mask as lists [T][F]."""
    found = []
    for column in zip(*mask, strict=True):
        total = sum(column)
        shares = [m / total for m in column if m > 0]
        found.append(1 + sum(p * math.log(p) for p in shares) / math.log(len(mask)) if shares else 0.0)
    return found


def table(sae) -> torch.Tensor:
    """The mask [T, F], as activations of ones show it."""
    weights = sae.mask.weights()
    if isinstance(weights, torch.Tensor):
        return weights.double()
    distance = torch.arange(T)[:, None] - weights.centre
    return torch.exp(-distance.double().square() / (2 * weights.sigma**2))


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask["kind"])
def test_specialization_is_one_minus_the_relative_entropy_of_the_mask(mask, made, assert_close):
    sae = made("specialised_weights", sae={"mask": mask})
    assert_close(specialization(sae), torch.tensor(plainly(table(sae).tolist())), 1e-5)


def test_specialization_goes_from_zero_everywhere_to_one_at_a_single_position(made):
    sae = made("specialised_weights", sae={"mask": {"kind": "random"}})
    sae.mask.fixed.fill_(True)
    sae.mask.fixed[:, 1] = torch.arange(T) == 7
    sae.mask.fixed[:, 2] = False
    found = specialization(sae)
    assert found[[0, 1, 2]].tolist() == pytest.approx([0, 1, 0], abs=1e-6)


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
def test_weights_follow_the_mean_share_of_specialised_latents(activation, made, rows, objective, assert_close):
    given = {"mask": {"kind": "soft", "start": "normal"}, "activation": activation}
    sae = made("specialised_weights", beta=0.7, decay=0.8, sae=given)
    s, ema = plainly(table(sae).tolist()), [None] * T
    for step in range(3):
        batch = rows(step)[: 30 - step]  # the first rows: not as many tokens at all positions
        objective(sae, batch)
        seen = sae._last
        f = (seen.code.to_dense() if seen.f is None else seen.f).detach().double()
        sae.after()
        for p in range(T):
            here = [row for row in f[batch.pos == p].tolist() if sum(row) > 0]
            shares = [sum(a * b for a, b in zip(row, s, strict=True)) / sum(row) for row in here]
            mean = sum(shares) / len(shares)
            ema[p] = mean if ema[p] is None else 0.8 * ema[p] + 0.2 * mean
    expected = [0.3 + 0.7 * e / (sum(ema) / T) for e in ema]
    seen = BatchView(sae, batch.x, batch.pos.long(), T + 3)
    weights, of_l1 = sae.parts[0].weigh(seen)
    assert of_l1 is None
    assert_close(weights, torch.tensor([*expected, *3 * expected[-1:]]), 1e-5)  # beyond T as at its end
    assert weights[:T].std() > 0.01
    found = objective(sae, batch)
    l1 = 0.04 * found.sums.l1.sum() if activation == "relu" else 0
    assert_close(found.loss, ((weights[:T] * found.sums.squared_error).sum() + l1) / len(batch.x), 1e-6)


def test_positions_of_specialised_latents_weigh_more(made, rows, learner):
    """Latents that are on at position 3 only, beside others that are on at all but it."""
    found = {}
    for beta in (0.0, 0.5):
        sae = made("specialised_weights", beta=beta, sae={"mask": {"kind": "random"}})
        sae.mask.fixed.copy_((torch.arange(T) == 3)[:, None] == (torch.arange(F) < 6))
        one = learner(sae, steps=5)
        for step in range(5):
            advance(one, rows(step))
        batch = rows(9)
        found[beta] = sae.parts[0].weigh(BatchView(sae, batch.x, batch.pos.long(), T))[0]
        assert one.report()["parts"]["specialised_weights"]["share"] > 0
    assert (found[0.5][3] > 3 * found[0.5][[p for p in range(T) if p != 3]]).all()
    assert found[0.5].mean() == pytest.approx(1, abs=1e-5)
    assert (found[0.0] == 1).all()


def test_positions_without_tokens_have_weight_one(made, rows, objective):
    sae = made("specialised_weights", sae={"mask": {"kind": "soft", "start": "normal"}})
    seen = BatchView(sae, torch.zeros(1, 8), torch.zeros(1).long(), T)
    assert (sae.parts[0].weigh(seen)[0] == 1).all()
    batch = rows()
    objective(sae, batch[batch.pos < 4])
    sae.after()
    weights = sae.parts[0].weigh(seen)[0]
    assert (weights[4:] == 1).all()
    assert (weights[:4] != 1).all()


def test_tokens_without_active_latents_say_nothing(made, rows, objective):
    sae = made("specialised_weights", sae={"mask": {"kind": "soft", "start": "normal"}})
    batch = rows()
    objective(sae, batch)
    sae._last.f = sae._last.f.detach().clone()
    sae._last.f[batch.pos == 5] = 0
    sae.after()
    assert not sae.parts[0].share.known[5]
    assert sae.parts[0].share.known.sum() == T - 1
    assert sae.parts[0].share.value.isfinite().all()


def test_dictionaries_without_a_mask_to_specialise_by_are_refused(made):
    with pytest.raises(UserError, match="sae.mask.kind: none is not allowed with specialised_weights"):
        made("specialised_weights")
    with pytest.raises(UserError, match="sae.mask.positions: 1 is not allowed with specialised_weights"):
        made("specialised_weights", sae={"mask": {"kind": "soft", "positions": 1}})
    with pytest.raises(UserError, match="sae.parts.specialised_weights.beta: 2 is not allowed"):
        made("specialised_weights", beta=2, sae={"mask": {"kind": "soft"}})
