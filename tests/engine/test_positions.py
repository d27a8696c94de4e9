"""Positions that are not allowed: refused at once on a CPU, and by the next report where checking would wait."""

import pytest
import torch
from temposae.engine.cohort import Cohort
from temposae.engine.config import MaskConfig, SAEConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.learner import Learner
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import Batch
from temposae.kernels import checks, encoder_inputs, loss

N, D, F, T = 16, 8, 32, 6
MESSAGE = r"pos: 2 positions since the last report are not allowed; they must lie in \[0, T\) = \[0, 6\)"


@pytest.fixture
def unchecked(monkeypatch):
    """As on a GPU, where ops do not look at the values of positions."""
    for module in (encoder_inputs, loss):
        monkeypatch.setattr(module, "check_positions", lambda pos, n, _=None: checks.check_positions(pos, n))


def learner(seed: int = 0, **changes) -> Learner:
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, k=4, **changes), seed=seed)
    settings = TrainConfig(tokens=N * 10, batch=N, lr=1e-3, dtype="float32", seed=seed)
    return Learner(sae, settings, torch.zeros(D), D**0.5, T)


def batch(*wrong: int) -> Batch:
    draw = torch.Generator().manual_seed(len(wrong))
    pos = torch.randint(0, T, (N,), generator=draw)
    pos[: len(wrong)] = torch.tensor(wrong, dtype=pos.dtype)
    return Batch.of(torch.randn(N, D, generator=draw), pos)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("wrong", [(T, T + 3), (-1, -1), (-1, T)], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_the_next_report_names_them(count, wrong, backend, monkeypatch, unchecked):
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("TEMPOSAE_BACKEND", backend)
    learners = [learner(seed) for seed in range(count)]
    cohorts = [Cohort(learners)] if backend == "triton" else [Cohort([each]) for each in learners]
    for given in (batch(), batch(*wrong), batch()):
        for cohort in cohorts:
            assert (cohort.fused is not None) == (backend == "triton")
            cohort.step(given)
    for cohort in cohorts:
        cohort.settle()
    message = MESSAGE if count == 1 or backend == "torch" else MESSAGE.replace("2", "[12]", 1)
    for each in learners:
        for refuses in (each.report, each.state):
            with pytest.raises(UserError, match=message):
                refuses()


def test_those_of_a_good_run_are_all_counted():
    one = learner()
    cohort = Cohort([one])
    for _ in range(5):
        cohort.step(batch())
    cohort.settle()
    assert one.counts.totals[0, 3] == 0
    assert one.state()["losses"].shape == (3,)  # as in checkpoints of before
    assert one.report()["loss"] > 0


def test_a_cpu_refuses_them_at_once():
    with pytest.raises(ValueError, match=r"pos must lie in \[0, T\) = \[0, 6\), got values from 0 to 6"):
        Cohort([learner()]).step(batch(0, T))


def test_positions_beyond_a_mask_are_named_by_the_report():
    one = learner(mask=MaskConfig(kind="ranges", positions=4, ranges=2, beyond="error"))
    one.counts.sums[0, 0, 4] = 1  # a token there, that a GPU let through
    with pytest.raises(UserError, match="sae.mask.positions: 4 is not allowed; it must be at least 5"):
        one.report()
    assert one.sae.mask.checked_later
    assert not learner().end().mask.checked_later
