"""Penalties on how alike decoder rows are, against sums over pairs."""

from itertools import permutations

import pytest
import torch
from temposae.engine.errors import UserError
from torch.nn.functional import normalize

from ..stepping import advance

D, F = 8, 24


def pairs_of(rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([rows[i] @ rows[j] for i, j in permutations(range(len(rows)), 2)])


def penalty(sae, batch, objective) -> torch.Tensor:
    """What the dictionary's one part adds to the loss."""
    objective(sae, batch)
    seen = sae._last
    return sae.parts[0].penalty(seen)


def test_margin_and_penalty_are_those_of_the_formula(made, rows, objective):
    sae = made("dynamic_margin", coefficient=0.5, decay=0.8, deviations=1.5).double()
    batch = rows().each(lambda value: value.double() if value.is_floating_point() else value)
    mean = std = above = None
    for step in range(3):
        cosines = pairs_of(sae.W_dec.detach())
        now = cosines.mean(), cosines.std(correction=0)
        before = now if step == 0 else (mean, std)
        margin = before[0] + 1.5 * before[1]
        expected = 0.5 * D * (F - 1) * (cosines - margin).clamp_min(0).square().mean()
        assert float(penalty(sae, batch, objective)) == pytest.approx(float(expected), rel=1e-9)
        assert expected > 0
        sae.after()
        share = (cosines > margin).double().mean()
        if step == 0:
            mean, std, above = *now, share
        else:
            mean, std, above = (0.8 * a + 0.2 * b for a, b in zip((mean, std, above), (*now, share), strict=True))
        found = sae.part_reports()["dynamic_margin"]
        expected = {"margin": mean + 1.5 * std, "mean": mean, "std": std, "above": above}
        assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-9)
        with torch.no_grad():
            sae.W_dec += 0.2 * (1 + step)
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))


def test_only_pairs_above_the_margin_have_a_gradient(made, rows, objective):
    sae = made("dynamic_margin")
    penalty(sae, rows(), objective).backward()
    cosine = sae.W_dec.detach() @ sae.W_dec.detach().T - 2 * torch.eye(F)
    pairs = pairs_of(sae.W_dec.detach())
    alike = (cosine > pairs.mean() + 2 * pairs.std(correction=0)).any(1)
    assert 0 < int(alike.sum()) < F
    assert torch.equal((sae.W_dec.grad != 0).any(1), alike)


def test_a_sample_of_rows_stands_for_all(made, rows, objective):
    whole, part = (made("dynamic_margin", sample=sample) for sample in (F, 6))
    for sae in (whole, part):
        sae.parts[0].usual.add(torch.tensor([0.0, 0.1, 0.0]))
    objective(part, rows())
    seen, drawn = part._last, []
    for step in range(400):
        seen.step = step
        drawn.append(float(part.parts[0].penalty(seen)))
    assert min(drawn) < max(drawn)
    assert sum(drawn) / len(drawn) == pytest.approx(float(penalty(whole, rows(), objective)), rel=0.1)


def test_the_margin_moves_and_rows_that_are_alike_part(made, rows, learner):
    found = {}
    for coefficient in (0.0, 10.0):
        sae = made("dynamic_margin", coefficient=coefficient)
        with torch.no_grad():  # twins
            sae.W_dec[12:] = normalize(sae.W_dec[:12] + 0.1 * sae.W_dec[12:], dim=1)
        one, margins = learner(sae, steps=60), []
        for step in range(60):
            advance(one, rows(step % 10).at("x"))
            if step % 20 == 19:
                margins.append(one.report()["parts"]["dynamic_margin"]["margin"])
        assert len(set(margins)) == 3
        W = one.end().W_dec.detach()
        found[coefficient] = float((W[:12] * W[12:]).sum(1).mean())
    assert found[10.0] < found[0.0] - 0.2


def test_topk_stays_sparse(made):
    assert not made("dynamic_margin", sae={"activation": "topk"}).is_dense


def test_settings_that_are_not_allowed(made):
    for given, name in (({"decay": 1.0}, "decay"), ({"sample": 1}, "sample"), ({"coefficient": -1}, "coefficient")):
        with pytest.raises(UserError, match=f"sae.parts.dynamic_margin.{name}: .* is not allowed"):
            made("dynamic_margin", **given)
    with pytest.raises(UserError, match="d_sae: 1 is not allowed with dynamic_margin"):
        made("dynamic_margin", sae={"d_sae": 1})
