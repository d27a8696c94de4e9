"""Adam's state and rates, as `kernels.adam` takes them."""

from typing import NamedTuple

import torch
from torch import Tensor

# The codes of 8-bit moments: exponents of the values that stand for zero, the largest code, and the least of a row's maxima.
MEAN_ZERO, MEAN_LARGEST = -15, 127
SQUARE_ZERO, SQUARE_LARGEST = -31, 255
LEAST = 1e-30


class Moments(NamedTuple):
    """Adam's running means of the gradient and of its square, each of the parameter's shape, in one of three kinds:

                exp_avg             exp_avg_sq          scales
    float32     float32             float32             None            or the parameter's dtype
    bfloat16    bfloat16            bfloat16            None            parameter [F, D]
    8bit        int8                uint8               float32 [F, 2]  parameter [F, D]

    bfloat16 and 8-bit moments are rounded stochastically, to one of the two neighbours and in expectation to the value
    itself: beta2 = 0.999 moves exp_avg_sq by less than half a step of bfloat16, so rounding to nearest would stop it.

    8-bit codes share a scale in each row, as in the block-wise optimizers of Dettmers et al. (arXiv 2110.02861), but are
    small floating-point numbers, so that encoding takes integer operations only. The code c = 8 e + m >= 0 stands for

        scale * (2^(e - z) * (1 + m / 8) - 2^-z)

    and the largest of a row has the largest code. exp_avg: z = 15 and a sign, |c| <= 127. exp_avg_sq: z = 31, c <= 255, so
    its square root has the same range. Steps are 1/16 to 1/8 of the value, and even below scale * 2^-z. An exp_avg_sq above
    zero never becomes zero, which would leave eps alone under exp_avg, but at least 2^-35 of the row's largest. A row whose
    gradient is zero keeps its codes and decays by its scales.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    scales: Tensor | None = None

    @classmethod
    def zeros(cls, parameter: Tensor, kind: str = "float32") -> "Moments":
        """Make moments of `kind` ("float32", "bfloat16", "8bit") before the first step on `parameter`."""
        if kind == "8bit":
            first, second = (torch.zeros_like(parameter, dtype=dtype) for dtype in (torch.int8, torch.uint8))
            return cls(first, second, torch.zeros(len(parameter), 2, device=parameter.device))
        return cls(*(torch.zeros_like(parameter, dtype=getattr(torch, kind)) for _ in range(2)))

    def widened(self) -> tuple[Tensor, Tensor]:
        """Return the values that the moments stand for; those of 8-bit ones in float32."""
        if self.scales is None:
            return self.exp_avg, self.exp_avg_sq
        mean, square = self.exp_avg.int(), self.exp_avg_sq.int()
        mean_scale, square_scale = self.scales.split(1, dim=1)
        return mean.sign() * _size(mean.abs(), MEAN_ZERO) * mean_scale, _size(square, SQUARE_ZERO) * square_scale


class Rates(NamedTuple):
    """Adam's settings for one step. Those that change from step to step lie on the device, so that a captured graph of the
    step can be replayed. Of S dictionaries one below the other, each has its own: [S] for S equal runs of rows.

    step_size   scalar tensor, or [S]: lr / (1 - beta1^t)
    correction  the same: sqrt(1 - beta2^t)
    factor      the same: what the gradient is multiplied by first, for clipping
    seed        the same, int32, for narrow moments only: another one in each step and for each parameter. An element's
                random bits follow from seed + row (of its run) and from its column; rows of a larger parameter from the
                r-th on are rounded as there with seed + r.
    skip        scalar tensor, bool: if true, nothing is changed; None for false
    """

    step_size: Tensor
    correction: Tensor
    factor: Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    seed: Tensor | None = None
    skip: Tensor | None = None


def _size(code: Tensor, zero: int) -> Tensor:
    return (code + (127 + zero << 3) << 20).view(torch.float32) - 2.0**zero
