"""Training steps of a dictionary by itself."""

from temposae.engine.cohort import Cohort
from temposae.engine.learner import Learner
from temposae.engine.stream import Batch


def advance(learner: Learner, *batches: Batch, fused: bool | None = None) -> None:
    """Take a step on each batch, and leave the learner readable."""
    cohort = Cohort([learner], fused=fused)
    for batch in batches:
        cohort.step(batch)
    cohort.settle()
