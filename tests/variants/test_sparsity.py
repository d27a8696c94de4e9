"""What L1 counts."""

import pytest
import torch
from temposae.engine.errors import UserError
from torch import Tensor

from ..stepping import advance
from .conftest import F, T

GAUSSIAN = {"mask": {"kind": "gaussian"}, "l1_coefficient": 0.5}


def activations(sae, batch) -> tuple[Tensor, Tensor]:
    """relu((x - b_dec) W_enc + b_enc) [N, F] and a Gaussian's weights, sigma T / 8, in float64."""
    W_enc, b_enc, b_dec = (getattr(sae, name).detach().double() for name in ("W_enc", "b_enc", "b_dec"))
    centre = torch.linspace(0, T - 1, F, dtype=torch.float64)
    weights = torch.exp(-(((batch.pos[:, None] - centre) / (T / 8)) ** 2) / 2)
    return torch.relu((batch.x.double() - b_dec) @ W_enc + b_enc), weights


def test_l1_counts_activations_before_the_mask(made, rows, objective, assert_close):
    sae, batch = made("l1_before_mask", sae=GAUSSIAN), rows()
    acts, weights = activations(sae, batch)
    f = acts * weights
    error = (batch.x - f @ sae.W_dec.double() - sae.b_dec).square().sum(1).mean()
    found = objective(sae, batch)
    assert_close(found.loss, error + 0.5 * acts.sum(1).mean())
    assert_close(found.sums.l1.sum(), f.sum())  # what is reported is f's


@pytest.mark.parametrize("before", [True, False])
def test_normalised_activations_count_if_layer_norm_comes_first(before, made, rows, objective, assert_close):
    kinds = ["layer_norm", "l1_before_mask"][:: 1 if before else -1]
    sae, batch = made(parts=[{"kind": kind} for kind in kinds], sae=GAUSSIAN), rows()
    acts, weights = activations(sae, batch)
    centred = acts - acts.mean(1, keepdim=True)
    normed = torch.relu(centred / (acts.var(1, correction=0, keepdim=True) + 1e-5).sqrt() / 3**0.5)  # D / F = 1 / 3
    error = (batch.x - (normed * weights) @ sae.W_dec.double() - sae.b_dec).square().sum(1).mean()
    assert_close(objective(sae, batch).loss, error + 0.5 * (normed if before else acts).sum(1).mean())


def test_latents_grow_quiet_where_their_mask_is_off(made, rows, learner):
    away = {}
    for parts in ([], [{"kind": "l1_before_mask"}]):
        one = learner(made(parts=parts, sae=GAUSSIAN), steps=60)
        for step in range(60):
            advance(one, rows(step))
        acts, weights = activations(one.sae, rows(99))
        away[len(parts)] = float(acts[weights < 0.01].mean() / acts[weights > 0.5].mean())
    assert away[1] < 0.7 * away[0]


def test_it_needs_a_mask(made):
    with pytest.raises(UserError, match="sae.mask.kind: none is not allowed with l1_before_mask"):
        made("l1_before_mask")
