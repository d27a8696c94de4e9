"""Weights on the loss by position that follow it, against the same worked out with plain numbers."""

import pytest
import torch
from temposae.engine.errors import UserError

from ..stepping import advance

D, T, R = 8, 12, 6
HARD = 7


def planted(rows, seed: int):
    """Every position but `HARD` lies in a plane, and is easy."""
    batch = rows(seed).at("x")
    easy = batch.pos != HARD
    batch.x[easy] = batch.x[easy] * (torch.arange(D) < 2)
    return batch


def weigh(sae, batch, objective):
    """The weights on squared error and L1 of the next step, and that step's objective."""
    found = objective(sae, batch)
    return *sae.parts[0].weigh(sae._last), found


def test_weights_are_those_of_the_formula(made, rows, objective):
    sae = made("adaptive_weights", decay=0.9, floor=0.2, l1=True).double()
    average: dict[int, float] = {}
    for seed in range(4):
        batch = rows(seed)
        batch.acts["x"] = batch.x.double()
        kept = (batch.pos != 11) & ((batch.pos != 2) | (seed > 1)) & ((batch.pos != 4) | (batch.row < 2))
        batch = batch[kept]
        mean = sum(average.values()) / max(1, len(average))
        expected = [0.2 + 0.8 * average[p] / mean if p in average else 1.0 for p in range(T)]
        of_error, of_l1, found = weigh(sae, batch, objective)
        assert of_error.tolist() == pytest.approx(expected, rel=1e-9)
        if average:
            assert sum(expected[p] for p in average) / len(average) == pytest.approx(1)
            assert min(expected) >= 0.2
        assert float(of_l1[batch.pos].mean()) == pytest.approx(1, rel=1e-6)
        assert (of_l1 / of_error).tolist() == pytest.approx([float(of_l1[0] / of_error[0])] * T, rel=1e-6)
        f = sae.encode(batch.x, batch.pos)
        error = (batch.x - sae.decode(f)).square().sum(1)
        loss = sum(expected[p] * float(e) for p, e in zip(batch.pos.tolist(), error, strict=True))
        loss += 0.04 * sum(float(of_l1[p]) * float(row.sum()) for p, row in zip(batch.pos.tolist(), f, strict=True))
        assert float(found.loss) == pytest.approx(loss / len(batch.x), rel=1e-9)
        sae.after()
        for p in range(T):
            if (batch.pos == p).any():
                new = float(error[batch.pos == p].mean())
                average[p] = 0.9 * average[p] + 0.1 * new if p in average else new
    assert set(average) == set(range(11))
    assert of_error[11] == 1


def trained(made, rows, learner, **given):
    """A small dictionary, trained on a hard position among easy ones: it, the last weights, and L1 at the hard position and
    elsewhere."""
    parts = [{"kind": "adaptive_weights", "decay": 0.9, **given}, {"kind": "position_tracker"}]
    sae = made(parts=parts, sae={"d_sae": 12, "l1_coefficient": 0.3})
    one = learner(sae, steps=200)
    for step in range(200):
        advance(one, planted(rows, step % 20))
    weights = one.report()["parts"]["position_tracker"]["weights"]
    return one.end(), weights


def test_a_hard_position_gains_weight_and_is_reconstructed_better(made, rows, learner):
    error, batch = {}, planted(rows, 50)
    for floor in (1.0, 0.0):  # at 1 all weights are 1
        sae, weights = trained(made, rows, learner, floor=floor)
        assert weights == [1.0] * T if floor else weights.index(max(weights)) == HARD
        residual = batch.x - sae(batch.x, batch.pos)
        error[floor] = float(residual[batch.pos == HARD].square().sum(1).mean())
    assert error[0.0] < 0.9 * error[1.0]


def test_with_l1_a_hard_position_is_sparser_and_easy_ones_less_so(made, rows, learner):
    l1, batch = {}, planted(rows, 50)
    for with_l1 in (False, True):
        sae, _ = trained(made, rows, learner, l1=with_l1)
        of_token = sae.encode(batch.x, batch.pos).sum(1)
        l1[with_l1] = [float(of_token[where].mean()) for where in (batch.pos == HARD, batch.pos != HARD)]
    assert l1[True][0] < 0.9 * l1[False][0]
    assert l1[True][1] > 1.05 * l1[False][1]


def test_positions_beyond_the_mask_follow_it(made, rows):
    sae, batch = made("adaptive_weights", sae={"mask": {"positions": 4}}, l1=True), rows()
    for _ in range(2):
        sae.objective(batch.x, batch.pos, T)
        seen = sae._last
        sae.after()
    of_error, of_l1 = sae.parts[0].weigh(seen)
    assert of_error.shape == of_l1.shape == (T,)
    assert of_error.mean().item() == pytest.approx(1)
    assert len(of_error[:4].unique()) == 4
    assert (of_error[4:] == of_error[3]).all()


def test_settings_that_are_not_allowed(made):
    for given, message in (({"decay": 1.0}, "decay"), ({"floor": 1.5}, "floor"), ({"floor": -0.1}, "floor")):
        with pytest.raises(UserError, match=f"sae.parts.adaptive_weights.{message}: .* is not allowed"):
            made("adaptive_weights", **given)
