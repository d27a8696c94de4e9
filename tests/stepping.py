"""Training steps of a dictionary by itself, and training that is interrupted."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from temposae.engine.cohort import Cohort
from temposae.engine.learner import Learner
from temposae.engine.stream import Batch


def advance(learner: Learner, *batches: Batch, fused: bool | None = None) -> None:
    """Take a step on each batch, and leave the learner readable."""
    cohort = Cohort([learner], fused=fused)
    for batch in batches:
        cohort.step(batch)
    cohort.settle()


@contextmanager
def stopped_after(steps: int, activation: str | None = None) -> Iterator[None]:
    """Interrupt the training inside when a cohort (of dictionaries with this activation) has taken `steps` steps."""
    real = Cohort.step

    def stop(self: Cohort, batch: Batch) -> None:
        first = self.learners[0]
        if first.steps_done == steps and activation in (None, first.sae.cfg.activation):
            raise KeyboardInterrupt
        real(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cohort, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            yield
