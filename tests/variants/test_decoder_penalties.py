"""Penalties on decoder rows that overlap."""

import math

import pytest
import torch
from temposae.engine.errors import UserError
from temposae.engine.parts import BatchView

from ..stepping import advance
from .conftest import D, F, T

KINDS = ("decoder_separation", "decoder_orthogonality")


def penalty(sae, step: int = 0) -> torch.Tensor:
    empty = torch.zeros(1, D)
    return sae.parts[0].penalty(BatchView(sae, empty, torch.zeros(1, dtype=torch.long), T, training=True, step=step))


def by_pairs(W: torch.Tensor, kind: str) -> float:
    """D^2 times the mean over ordered pairs of rows of their squared cosine, if it is positive or in any case."""
    W = W.detach().double()
    found = []
    for i in range(len(W)):
        for j in range(len(W)):
            if i != j:
                c = float(W[i] @ W[j] / (W[i].norm() * W[j].norm()))
                found.append(c**2 if c > 0 or kind == "decoder_orthogonality" else 0.0)
    return D**2 * sum(found) / len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_mean_squared_cosine_of_pairs(kind, made):
    sae = made(kind, strength=0.3)
    assert penalty(sae).item() == pytest.approx(0.3 * by_pairs(sae.W_dec, kind), rel=1e-5)


def test_it_takes_other_rows_at_every_step_and_all_in_the_mean(made):
    kind = "decoder_orthogonality"
    sae = made(kind, rows=7, strength=1.0)
    found, chosen = [], []
    for step in range(300):
        sae.W_dec.grad = None
        value = penalty(sae, step)
        value.backward()
        rows = (sae.W_dec.grad != 0).any(1)
        assert int(rows.sum()) == 7
        if step < 4:  # pairs one by one take their time
            assert value.item() == pytest.approx(by_pairs(sae.W_dec[rows], kind), rel=1e-4)
        found.append(value.item())
        chosen.append(rows)
    assert torch.stack(chosen).any(0).all()
    assert penalty(sae, 5).item() == found[5]
    mean, error = sum(found) / 300, torch.tensor(found).std() / math.sqrt(300)
    assert mean == pytest.approx(by_pairs(sae.W_dec, kind), abs=4 * float(error))


def test_before_training_it_is_a_tenth_of_a_token_s_error_whatever_the_size(made):
    for d_sae in (24, 400):
        values = {kind: penalty(made(kind, sae={"d_sae": d_sae})).item() for kind in KINDS}
        assert values["decoder_orthogonality"] == pytest.approx(0.1 * D, rel=0.2)
        assert values["decoder_separation"] == pytest.approx(0.05 * D, rel=0.35)


def test_only_orthogonality_minds_opposite_directions(made):
    grads = {}
    for kind in KINDS:
        sae = made(kind, sae={"d_sae": 2})
        with torch.no_grad():
            sae.W_dec[1] = -sae.W_dec[0]
        value = penalty(sae)
        value.backward()
        grads[kind] = value.item()
    assert grads["decoder_separation"] == 0
    assert grads["decoder_orthogonality"] == pytest.approx(0.1 * D**2)


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_rows_overlap_less_with_it(kind, made, rows, learner):
    overlaps = {}
    for strength in (0.0, 5.0):
        one = learner(made(kind, strength=strength), steps=60)
        for step in range(60):
            advance(one, rows(step))
        overlaps[strength] = by_pairs(one.sae.W_dec, kind)
    least = D**2 * (F / D - 1) / (F - 1)  # Welch: that of F rows in D dimensions with every sign counted
    if kind == "decoder_orthogonality":
        assert least <= overlaps[5.0] < 1.02 * least < 1.05 * least < overlaps[0.0]
    else:
        assert overlaps[5.0] < 0.8 * overlaps[0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_decoder_has_no_penalty(kind, made):
    assert penalty(made(kind, sae={"decoder": "random"})) is None


def test_bad_settings_of_penalties_are_named(made):
    with pytest.raises(UserError, match="sae.parts.decoder_separation.rows: 1 is not allowed"):
        made("decoder_separation", rows=1)
    with pytest.raises(UserError, match="sae.parts.decoder_orthogonality.strength: -1 is not allowed"):
        made("decoder_orthogonality", strength=-1)
