"""How many kernels a training step launches on a GPU: those of Triton, which the interpreter runs, and those of torch."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from temposae.engine.cohort import Cohort
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.learner import Learner
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import Batch
from torch.utils._python_dispatch import TorchDispatchMode

N, D, F, K, T = 8, 24, 64, 4, 8
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view")


class Launches(TorchDispatchMode):
    """Counts torch's operations that do work on a device, each as one launch, and kernels of Triton.

    Views and allocations launch nothing. On a GPU, an operation may be several kernels: a sort is about eight.
    """

    def __init__(self):
        super().__init__()
        self.counts, self._in_kernel = Counter[str](), False

    def __enter__(self):
        self.counts.clear()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        namespace, name = func._schema.name.split("::")
        if namespace == "aten" and name not in ALLOCATIONS and not is_view and not self._in_kernel:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def kernel(self, name: str) -> None:
        self.counts[name] += 1

    @property
    def total(self) -> int:
        return self.counts.total()


@pytest.fixture
def counting(monkeypatch) -> Iterator[Launches]:
    """Counts the launches within a `with` statement."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import GridExecutor

    launches, run = Launches(), GridExecutor.__call__

    def run_counted(self, *args, **kwargs):
        launches.kernel(self.fn.__name__)
        launches._in_kernel = True
        try:
            return run(self, *args, **kwargs)
        finally:
            launches._in_kernel = False

    monkeypatch.setattr(GridExecutor, "__call__", run_counted)
    monkeypatch.setenv("TEMPOSAE_BACKEND", "triton")
    monkeypatch.setattr("temposae.engine.cohort.dense_from", lambda device: 1.0)
    return launches


def cohort_of(count: int, clip_norm: float | None, **sae) -> Cohort:
    settings = TrainConfig(tokens=100 * N, batch=N, clip_norm=clip_norm)
    learners = [
        Learner(SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, k=K, **sae), seed=seed), settings, torch.zeros(D), 5.0, T)
        for seed in range(count)
    ]
    return Cohort(learners)


def test_views_and_allocations_launch_nothing(counting):
    x = torch.ones(4, 6)
    with counting:
        torch.empty(3).view(3, 1).expand(3, 2).T[0].detach()
        x.flatten().unbind()
    assert counting.total == 0
    with counting:
        torch.zeros(3).copy_(x[0, :3]).add_(1)
        x.T.flatten().sum()
    names = ("zeros.default", "copy_.default", "add_.Tensor", "clone.default", "sum.default")
    assert counting.counts == {f"aten.{name}": 1 for name in names}


@pytest.mark.parametrize(
    ("count", "clip_norm", "sae", "most"),
    [
        pytest.param(1, TrainConfig(tokens=N, batch=N).clip_norm, {}, 30, id="topk"),
        pytest.param(1, None, {}, 30, id="topk, unclipped"),
        pytest.param(2, 1.0, {}, 30, id="two dictionaries"),
        pytest.param(1, 1.0, dict(activation="batchtopk"), 180, id="batchtopk"),
    ],
)
def test_a_step_has_few_launches(count, clip_norm, sae, most, counting):
    """The whole step, with what is counted for reports."""
    cohort, generator = cohort_of(count, clip_norm, **sae), torch.Generator().manual_seed(0)
    assert cohort.fused is not None
    batches = [
        Batch.of(torch.randn(N, D, generator=generator), torch.randint(T, (N,), generator=generator)) for _ in range(2)
    ]
    cohort.step(batches[0])
    with counting:
        cohort.step(batches[1])
        cohort.settle()
    assert counting.counts["adam_rows_kernel"] == (2 if clip_norm is None else 4)
    assert counting.total <= most, counting.counts
