"""Adam's moments and rates, and gradients of biases: the arguments of `kernels.adam`."""

from typing import NamedTuple

import torch
from torch import Tensor

# Codes of 8-bit moments: the exponent that means zero, the largest code, and a lower bound for the maximum of a row.
MEAN_ZERO, MEAN_LARGEST = -15, 127
SQUARE_ZERO, SQUARE_LARGEST = -31, 255
LEAST = 1e-30
LATENTS = 8  # latents whose part of `BiasGradients.center` one program adds; results depend on it


class Moments(NamedTuple):
    """Adam's running means of the gradient and of its square, both of the parameter's shape, in one of three formats:

                exp_avg             exp_avg_sq          scales
    float32     float32             float32             None            or the parameter's dtype
    bfloat16    bfloat16            bfloat16            None            parameter [F, D]
    8bit        int8                uint8               float32 [F, 2]  parameter [F, D]

    bfloat16 and 8-bit moments are rounded stochastically to one of the two neighbours, with the exact value as the
    mean. beta2 = 0.999 moves exp_avg_sq by less than half a bfloat16 step, so rounding to nearest would freeze it.

    8-bit codes share one scale per row, as in the block-wise optimizers of Dettmers et al. (arXiv 2110.02861), but are
    small floating-point numbers, so that encoding needs integer operations only. The code c = 8 e + m >= 0 means

        scale * (2^(e - z) * (1 + m / 8) - 2^-z)

    and the largest value of a row has the largest code. exp_avg has z = 15, a sign and |c| <= 127. exp_avg_sq has z =
    31 and c <= 255, so its square root has the same range. Steps are 1/16 to 1/8 of the value, and uniform below scale
    * 2^-z. A positive exp_avg_sq is never rounded to zero, which would leave only eps in Adam's denominator, but to at
    least 2^-35 of the row's largest. A row with a zero gradient keeps its codes, and its scales decay.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    scales: Tensor | None = None

    @classmethod
    def zeros(cls, parameter: Tensor, kind: str = "float32") -> "Moments":
        """Return zero moments of `kind` ("float32", "bfloat16" or "8bit") for `parameter`."""
        if kind == "8bit":
            first, second = (torch.zeros_like(parameter, dtype=dtype) for dtype in (torch.int8, torch.uint8))
            return cls(first, second, torch.zeros(len(parameter), 2, device=parameter.device))
        return cls(*(torch.zeros_like(parameter, dtype=getattr(torch, kind)) for _ in range(2)))

    def widened(self) -> tuple[Tensor, Tensor]:
        """Return the decoded values: float32 for 8-bit moments, the tensors themselves otherwise."""
        if self.scales is None:
            return self.exp_avg, self.exp_avg_sq
        mean, square = self.exp_avg.int(), self.exp_avg_sq.int()
        mean_scale, square_scale = self.scales.split(1, dim=1)
        return mean.sign() * _size(mean.abs(), MEAN_ZERO) * mean_scale, _size(square, SQUARE_ZERO) * square_scale


class Rates(NamedTuple):
    """Adam's settings for one step. Those that change between steps are tensors on the device, so that a CUDA graph of
    the step can be replayed. With S dictionaries in one parameter, each may have its own: [S] for S equal runs of rows.

    step_size   scalar or [S]: lr / (1 - beta1^t)
    correction  scalar or [S]: sqrt(1 - beta2^t)
    factor      scalar or [S], multiplies the gradient (clipping)
    seed        int32 scalar or [S], for bfloat16 and 8-bit moments only. Must differ between steps and parameters.
                Random bits are a hash of seed + row within the run, and of the column. To update only rows from the
                r-th on with the same bits, pass seed + r.
    skip        bool scalar: if true, nothing changes. None for false
    """

    step_size: Tensor
    correction: Tensor
    factor: Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    seed: Tensor | None = None
    skip: Tensor | None = None


class BiasGradients(NamedTuple):
    """Receives what the pass over an encoder's gradient also gives: sums over latents and their entries.

    encoder  float32 [F]     sum of the values of each latent, the gradient of the encoder's bias
    center   float32 [S, D]  sum of encoder[j] * W[j], with W from before the step, over each of S equal runs of latents
                             that share a centre: minus the gradient of the centre
    """

    encoder: Tensor
    center: Tensor

    @classmethod
    def empty(cls, n_latents: int, center: Tensor) -> "BiasGradients":
        """Return room for the gradients of F latents and of `center` [D] or [S, D]."""
        encoder = torch.empty(n_latents, dtype=torch.float32, device=center.device)
        return cls(encoder, encoder.new_empty(center.numel() // center.shape[-1], center.shape[-1]))


def _size(code: Tensor, zero: int) -> Tensor:
    return (code + (127 + zero << 3) << 20).view(torch.float32) - 2.0**zero
