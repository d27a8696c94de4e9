"""InfoNCE over positions."""

import math

import pytest
import torch
from temposae.engine.errors import UserError
from temposae.variants.contrast import info_nce, pairs_by_position

from ..stepping import advance

D, F, T = 8, 24, 12


def plainly(f: list[list[float]], label: list[int], temperature: float) -> float:
    def alike(a: list[float], b: list[float]) -> float:
        sizes = math.hypot(*a) * math.hypot(*b)
        return math.exp((sum(x * y for x, y in zip(a, b, strict=True)) / sizes if sizes else 0) / temperature)

    terms = []
    for i, a in enumerate(f):
        others = [(alike(a, b), label[k] == label[i]) for k, b in enumerate(f) if k != i]
        near = sum(value for value, same in others if same)
        if near:
            terms.append(-math.log(near / sum(value for value, _ in others)))
    return sum(terms) / len(terms)


def test_info_nce_is_that_of_the_formula():
    f = torch.rand(9, 5, generator=torch.Generator().manual_seed(0)).double()
    f[4] = 0  # nothing active
    label = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 0])  # 2 is alone
    found = info_nce(f.requires_grad_(), label, 0.3)
    assert found.item() == pytest.approx(plainly(f.tolist(), label.tolist(), 0.3), rel=1e-10)
    found.backward()
    assert f.grad.isfinite().all()
    assert (f.grad[5] != 0).any()  # what is alone is still a negative of others


@pytest.mark.parametrize("label", [[0], [0, 1, 2]])
def test_without_positives_there_is_no_term(label):
    f = torch.rand(len(label), 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = info_nce(f, torch.tensor(label), 0.1)
    found.backward()
    assert found.item() == 0
    assert (f.grad == 0).all()


def test_same_positions_attract_and_others_repel():
    label = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    mixed = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    assert info_nce(apart, label, 0.1) < 1e-3 < 1 < info_nce(mixed, label, 0.1)
    f = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for _ in range(50):
        (gradient,) = torch.autograd.grad(info_nce(f, label, 0.5), f)
        f = (f - gradient).detach().requires_grad_()
    alike = torch.nn.functional.cosine_similarity(f[:, None], f, dim=2).tolist()
    assert min(alike[0][1], alike[2][3]) > 0.95
    assert max(alike[0][2:] + alike[1][2:]) < 0.1


def test_samples_hold_pairs_of_one_position():
    pos = torch.randint(T, (200,), generator=torch.Generator().manual_seed(3))
    pos[pos == 5] = 4
    pos[0] = 5  # occurs once

    def drawn(size: int, seed: int = 0) -> torch.Tensor:
        return pairs_by_position(pos, size, T, torch.Generator().manual_seed(seed))

    for size in (8, 16):
        found = drawn(size)
        assert len(found.unique()) == len(found) == size
        assert (pos[found].bincount()[pos[found].unique()] <= 2).all()
        assert len(pos[found].unique()) in (size // 2, size // 2 + 1)  # 5 may be among them, without another
    found = drawn(2 * 11 + 1 + 2 * 8)  # each position's first pair, the one that is alone, and 8 second pairs
    assert sorted(pos[found].bincount().tolist()) == [1, 2, 2, 2, 4, 4, 4, 4, 4, 4, 4, 4]
    assert sorted(drawn(500).tolist()) == list(range(200))
    assert set(drawn(16).tolist()) != set(drawn(16, 1).tolist())
    assert set(pos[drawn(8)].tolist()) != set(pos[drawn(8, 1)].tolist())


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
def test_the_loss_has_the_term_in_units_of_squared_error(activation, made, rows, objective, assert_close):
    batch = rows()
    given = {"temperature": 0.2, "sample": 30, "sae": {"activation": activation}}
    losses = [objective(made("position_contrast", coefficient=c, **given), batch).loss for c in (0.0, 0.3)]
    sae = made("position_contrast", coefficient=0.3, **given)
    objective(sae, batch)
    f = sae._last.f.detach()
    sae._last.drawn = 0
    chosen = pairs_by_position(batch.pos.long(), 30, T, sae._last.generator())
    expected = 0.3 * D * plainly(f[chosen].tolist(), batch.pos[chosen].tolist(), 0.2)
    assert (losses[1] - losses[0]).item() == pytest.approx(expected, rel=1e-4)
    assert sae.parts[0].report()["info_nce"] == pytest.approx(expected / 0.3 / D, rel=1e-4)


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
def test_codes_come_to_tell_positions_apart(activation, made, rows, learner):
    found = {}
    for coefficient in (0.0, 0.3):
        sae = made("position_contrast", coefficient=coefficient, sae={"activation": activation})
        one = learner(sae, steps=40)
        for step in range(40):
            advance(one, rows(step))
        batch = rows(99)
        found[coefficient] = float(info_nce(one.end().encode(batch.x, batch.pos), batch.pos, 0.1))
    assert found[0.3] < found[0.0] - 0.2


def test_settings_without_a_meaning_are_refused(made):
    with pytest.raises(UserError, match="sae.parts.position_contrast.temperature: 0 is not allowed"):
        made("position_contrast", temperature=0)
    with pytest.raises(UserError, match="sae.parts.position_contrast.sample: 2 is not allowed"):
        made("position_contrast", sample=2)
