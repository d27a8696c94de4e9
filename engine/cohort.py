"""Training steps: how each is taken, and several dictionaries of one size in one step."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..kernels.backend import decided, dense_from
from .fused import FusedStep, Outcome, fits
from .learner import Counts, Learner
from .stream import Batch
from .training.autograd_step import autograd_step
from .training.stacked_weights import StackedWeights, side_by_side

ROOM = 1.5  # for entries, relative to the last code whose size was measured


def can_fuse(learner: Learner) -> bool:
    """Whether the kernels can take its steps. Several processes share a dictionary through the fused step alone."""
    return learner.ranks.size > 1 or (fits(learner.sae) and learner.config.accumulate == 1)


class Cohort:
    """One or several dictionaries that train on the same batches.

    Several have one size and one configuration; seeds and learning rates may differ. If the kernels can take their steps,
    each kernel is launched once for all: parameters, moments and counts become views of tensors that hold them all. `fused`
    says whether they do, in place of `can_fuse`.

    `step` never waits for what it has just launched. Call `settle` before a learner is reported, saved or changed.

        cohort = Cohort([learner])
        cohort.step(batch)
        cohort.settle()
        learner.report()["fvu"]
    """

    def __init__(self, learners: Sequence[Learner], *, fused: bool | None = None):
        self.learners, first = list(learners), learners[0]
        for learner in learners:
            learner.check_settled()  # another cohort would count its last step
        self.fused: FusedStep | None = None
        if can_fuse(first) if fused is None else fused:
            saes = [learner.sae for learner in learners]
            stacked = StackedWeights(
                saes, [learner.leaves for learner in learners], [learner.moments() for learner in learners],
                first.paces, first.config, first.dtype, first.ranks, [learner.start for learner in learners],
            )  # fmt: skip
            self.fused = FusedStep(saes, stacked)
            counts = zip(*(learner.counts for learner in learners), strict=True)
            self.counts = Counts(*map(side_by_side, counts))
        self.capacity: int | None = None  # of codes whose size isn't known beforehand; None: the next one is measured
        self._versions = self._weight_versions()
        self._pending: Callable[[], None] | None = None

    def step(self, batch: Batch) -> None:
        """One update of each dictionary on batch.x [N, D] at batch.pos [N], towards batch.target.

        Whether the code of a jumprelu or relu dictionary had room for all entries is looked up when the next step begins or
        in `settle`. If it had not, the step changed nothing and is done again.
        """
        self._finish()
        path = self._path()
        if self.fused is None or path == "autograd":
            for learner in self.learners:
                self._autograd_step(learner, batch)
        else:
            self.fused.dense = path == "dense"
            self._fused_step(self.fused, batch)
        for learner in self.learners:
            if learner.resamples_now:
                self._finish()
                learner.resample(batch)

    def settle(self) -> None:
        """Finish the last step, so that learners may be read. Room for codes is measured anew, since L0 changes slowly."""
        self._finish()
        self.capacity = None

    def _path(self) -> Literal["autograd", "dense", "sparse"]:
        """How the next step is taken; decided here alone.

        The fused step gathers from a code, or, where many latents are in use on a token, spreads the code out for dense
        products. A relu dictionary of that density is faster by autograd, because its code is not needed then.
        """
        if self.fused is None:
            return "autograd"
        learner = self.learners[0]
        active = learner.sae.k if learner.cfg.activation in ("topk", "batchtopk") else learner.l0
        share = dense_from(learner.mean.device)
        if active <= share * learner.cfg.d_sae or learner.cfg.prefixes is not None or learner.ranks.size > 1:
            return "sparse"
        return "autograd" if learner.cfg.activation == "relu" else "dense"

    def _weight_versions(self) -> list[int]:
        """Counts of changes of the weights, by the learners and by torch's in-place ops."""
        parameters = (parameter for learner in self.learners for parameter in learner.sae.parameters())
        return [learner.version for learner in self.learners] + [parameter._version for parameter in parameters]

    def _autograd_step(self, learner: Learner, batch: Batch) -> None:
        x = learner.scaled(batch.x)
        target = x if "second" in learner.reads else learner.scaled(batch.target)
        lr = learner.begin_step(x, batch.pos)
        outcome = autograd_step(learner, x, batch.pos, target, learner.batch_context(batch), lr)
        _count([learner], learner.counts, outcome, len(x), (target - learner.mean).square().sum())

    def _fused_step(self, fused: FusedStep, batch: Batch) -> None:
        first = self.learners[0]
        if self._weight_versions() != self._versions:
            fused.stacked.refresh()
        x = target = first.scaled(batch.x)
        if batch.target is not batch.x:
            target = first.scaled(batch.target)
        dead, any_dead = None, [learner.any_dead for learner in self.learners]
        if any(any_dead):
            dead = self.counts.idle_tokens >= first.dead_after
            if not all(any_dead):
                pinned = torch.tensor(any_dead, device="cpu", pin_memory=x.is_cuda)
                dead &= pinned[:, None].to(x.device, non_blocking=True)
        lrs = [learner.begin_step(x, batch.pos) for learner in self.learners]
        run = functools.partial(
            fused, x, batch.pos, first.n_positions, dead, first.expected,
            lrs=lrs, step=first.steps_done, target=target, mean=first.mean,
        )  # fmt: skip
        has_unknown_size = first.cfg.activation not in ("topk", "batchtopk") and first.ranks.size == 1
        capacity = self.capacity if has_unknown_size else None
        outcome = run(capacity=capacity)
        spread = (target - first.mean).square().sum() if outcome.spread is None else outcome.spread
        self._pending = functools.partial(self._complete, run, outcome, len(x), spread)
        self._versions = self._weight_versions()
        for learner in self.learners:
            learner.pending = True
        if capacity is None:
            self._finish()

    def _finish(self) -> None:
        """Count the last step, unless that is done."""
        complete, self._pending = self._pending, None
        for learner in self.learners:
            learner.pending = False
        if complete is not None:
            complete()

    def _complete(self, run: Callable[..., Outcome], outcome: Outcome, n: int, spread: Tensor) -> None:
        if outcome.overflow:
            outcome = run(capacity=None)
            self.capacity = None
            self._versions = self._weight_versions()
        if self.capacity is None and outcome.entries is not None and outcome.least_kept is None:
            self.capacity = math.ceil(ROOM * int(outcome.entries)) + n
        assert self.fused is not None
        with decided(self.fused.backend):
            _count(self.learners, self.counts, outcome, n, spread)


def _count(learners: Sequence[Learner], counts: Counts, outcome: Outcome, n: int, spread: Tensor) -> None:
    """Count a step of all these dictionaries on n tokens, and let what follows a step do so."""
    counts.add(n, spread, outcome)
    for i, learner in enumerate(learners):
        learner.match(outcome.sums)
        learner.sae.follow(None if outcome.least_kept is None else outcome.least_kept[i], learner.threshold_pace)


def group_into_cohorts(learners: Iterable[Learner]) -> list[Cohort]:
    """Put dictionaries that can share the fused step into one cohort, and each of the others into its own."""
    groups: dict[object, list[Learner]] = {}
    for learner in learners:
        cfg, config = learner.sae.cfg, learner.config.model_copy(update={"lr": None, "seed": 0})
        can_share = can_fuse(learner) and learner.ranks.size == 1 and not config.fp8 and config.target_l0 is None
        if can_share and cfg.activation != "relu" and cfg.prefixes is None and not cfg.mask.is_learned:
            key = repr((cfg, config, learner.scale, learner.steps_done, learner.dtype, learner.mean.device))
        else:
            key = learner
        groups.setdefault(key, []).append(learner)
    return [Cohort(group) for group in groups.values()]
