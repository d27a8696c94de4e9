"""The default learning rate, and what changes over a run: the learning rate and the number of latents kept."""

import math

from ..config import SAEConfig, TrainConfig


def default_lr(sae: SAEConfig, train: TrainConfig) -> float:
    """The peak learning rate where the settings give none:

        min(0.016, 0.65 (batch / F)^(1/6) / (D^(1/2) steps^(1/3)))

    A step of Adam moves a unit-norm row of W_dec by about lr sqrt(D), so wide activations take a smaller rate. A short run
    takes a larger one, because rows have fewer steps to reach their directions. docs/learning-rate.md has the grids that the
    rule was fitted to. A trained dictionary (`init`) has its directions already, and a short run's rate would destroy them:
    its rate is at most 2e-4 sqrt(2^14 / F), the power law of Gao et al. (arXiv 2406.04093, figure 3).
    """
    rate = 0.65 * (train.batch / sae.d_sae) ** (1 / 6) / (sae.d_in**0.5 * train.steps ** (1 / 3))
    max_rate = 0.016 if train.init is None else 2e-4 * math.sqrt(2**14 / sae.d_sae)
    return min(max_rate, rate)


def schedule(step: int, steps: int, warmup: float, decay: float) -> float:
    """Factor on the learning rate at `step` of `steps`: linear up over the first `warmup` of the run, linear down to zero
    over the last `decay`."""
    rising = (step + 1) / max(1.0, warmup * steps)
    falling = (steps - step) / max(1.0, decay * steps)
    return min(1.0, rising, falling)


def annealed(step: int, steps: int, share: float, start: int, end: int) -> int:
    """A number of latents that goes from `start` to `end` over the first `share` of the run, in 16 stages, because a kernel
    is compiled for each."""
    stages_done = min(16, int(16 * step / max(1e-9, share * steps)))
    return round(start + (end - start) * stages_done / 16)
