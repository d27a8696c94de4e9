"""Latents that are left out."""

import pytest
import torch
from temposae.engine.errors import UserError
from temposae.engine.parts import BatchView

from ..stepping import advance
from .conftest import D, F, R, T


def dropped(sae, f: torch.Tensor, step: int, seed: int = 0) -> torch.Tensor:
    seen = BatchView(
        sae, torch.zeros(len(f), D), torch.zeros(len(f), dtype=torch.long), T, training=True, step=step, seed=seed
    )
    return sae.parts[0].latents(f, seen)


def test_a_fifth_is_dropped_and_the_rest_grows_by_a_quarter(made):
    sae = made("feature_dropout")
    f = torch.rand(4000, F, generator=torch.Generator().manual_seed(0)) + 0.1
    found = dropped(sae, f, step=3)
    kept = found > 0
    torch.testing.assert_close(found[kept], f[kept] / 0.8)
    # standard deviations: of a latent's share over 4000 tokens 0.0063, of the whole 0.0013
    assert kept.float().mean() == pytest.approx(0.8, abs=0.007)
    assert (kept.float().mean(0) - 0.8).abs().max() < 0.035
    together = torch.corrcoef(kept.float().T) - torch.eye(F)  # latents are dropped independently of each other
    assert together.abs().max() < 0.09


def test_what_is_dropped_follows_from_seed_and_step(made):
    sae, f = made("feature_dropout"), torch.ones(50, F)
    assert torch.equal(dropped(sae, f, step=3), dropped(sae, f, step=3))
    assert not torch.equal(dropped(sae, f, step=3), dropped(sae, f, step=4))
    assert not torch.equal(dropped(sae, f, step=3), dropped(sae, f, step=3, seed=1))


def test_nothing_is_dropped_outside_of_training_nor_with_p_0(made, rows, objective, assert_close):
    batch, plain = rows(), made(parts=[])
    assert_close(made("feature_dropout").encode(batch.x, batch.pos), plain.encode(batch.x, batch.pos))
    expected = float(objective(plain, batch).loss.detach())
    assert float(objective(made("feature_dropout", p=0.0), batch).loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert (
        float(objective(made("feature_dropout"), batch).loss.detach()) > 1.05 * expected
    )  # what is dropped is missing


def test_topk_keeps_as_many_of_what_was_not_dropped(made, rows, objective):
    sae, batch = made("feature_dropout", sae={"activation": "topk", "k": 3}), rows()
    found = objective(sae, batch)
    assert float(found.sums.l0.sum()) == 3 * R * T
    seen = sae._last
    assert ((seen.f > 0) <= (dropped(sae, seen.acts, step=0) > 0)).all()


def test_dropout_makes_latents_less_dependent_on_each_other(made, rows, learner):
    """With it, a dictionary does without a third of its latents more easily."""
    harm = {}
    for parts in ([], [{"kind": "feature_dropout", "p": 1 / 3}]):
        one = learner(made(parts=parts, sae={"l1_coefficient": 0.0}), steps=150)
        for step in range(150):
            advance(one, rows(step))
        sae, batch = one.end(), rows(99)
        f = sae.encode(batch.x, batch.pos)
        spread = (batch.x - batch.x.mean(0)).square().sum()
        without = 1.5 * f * (torch.rand(f.shape, generator=torch.Generator().manual_seed(0)) > 1 / 3)
        harm[len(parts)] = float((batch.x - sae.decode(without)).square().sum() / spread)
    assert harm[1] < 0.8 * harm[0]


def test_importance_is_the_mean_of_what_a_latent_contributes(made, rows, objective, assert_close):
    sae = made("feature_dropout", p=0.0)
    (part,) = sae.parts
    means = []
    for step in range(3):
        batch = rows(step)
        means.append(torch.stack([f[:, None] * sae.W_dec for f in sae.encode(batch.x, batch.pos)]).norm(dim=2).mean(0))
        sae.at(0.5, step)
        objective(sae, batch)
        sae.after()
    assert_close(part.importance, torch.stack(means).mean(0))
    sae.at(0.5, 5000)
    objective(sae, rows(0))
    sae.after()
    assert_close(part.importance, 0.99 * torch.stack(means).mean(0) + 0.01 * means[0])


def test_reports_tell_importance_and_how_many_are_weak(made):
    sae = made("feature_dropout")
    (part,) = sae.parts
    part.importance.copy_(torch.tensor([0.01] * 6 + [0.0] * 6 + [0.1] * 2 + [1.0] * 9 + [3.0]))  # mean 0.51
    found = sae.part_reports()["feature_dropout"]
    assert found == pytest.approx(
        {"importance_10": 0.0, "importance_50": 0.055, "importance_90": 1.0, "importance_max": 3.0, "weak": 0.5}
    )


@pytest.mark.parametrize("group", [2, 5, 24])
def test_the_largest_of_each_group_is_left(group, made, rows, assert_close):
    sae, batch = made("winner_takes_all", group=group), rows()
    f = made(parts=[]).encode(batch.x, batch.pos)
    expected = torch.zeros_like(f)
    for n in range(len(f)):
        for first in range(0, F, group):
            best = max(range(first, min(F, first + group)), key=lambda j: float(f[n, j]))
            expected[n, best] = f[n, best]
    found = sae.encode(batch.x, batch.pos)
    assert_close(found, expected)
    assert torch.equal(found > 0, expected > 0)


def test_of_equals_one_wins(made):
    sae = made("winner_takes_all", group=3)
    seen = BatchView(sae, torch.zeros(1, D), torch.zeros(1, dtype=torch.long), T)
    assert int((sae.parts[0].latents(torch.ones(1, F), seen) > 0).sum()) == F // 3


def test_only_winners_learn(made):
    sae = made("winner_takes_all", group=3)
    f = torch.tensor([[1.0, 3.0, 2.0] * 8], requires_grad=True)
    sae.parts[0].latents(f, BatchView(sae, torch.zeros(1, D), torch.zeros(1, dtype=torch.long), T)).sum().backward()
    assert f.grad.tolist() == [[0.0, 1.0, 0.0] * 8]


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
def test_neighbours_are_never_active_together(activation, made, rows, learner):
    most = {}
    for parts in ([], [{"kind": "winner_takes_all"}]):
        one = learner(made(parts=parts, sae={"activation": activation, "k": 5}), steps=20)
        for step in range(20):
            advance(one, rows(step))
        batch = rows(99)
        most[len(parts)] = int((one.end().encode(batch.x, batch.pos) > 0).unflatten(1, (-1, 4)).sum(2).max())
    assert most[0] > 1
    assert most[1] == 1


def test_bad_settings_of_competition_are_named(made):
    with pytest.raises(UserError, match="sae.parts.feature_dropout.p: 1 is not allowed"):
        made("feature_dropout", p=1)
    with pytest.raises(UserError, match="sae.parts.winner_takes_all.group: 1 is not allowed"):
        made("winner_takes_all", group=1)
    with pytest.raises(
        UserError, match="sae.parts.winner_takes_all.group: 25 is not allowed; it must be at most d_sae .24"
    ):
        made("winner_takes_all", group=25)
