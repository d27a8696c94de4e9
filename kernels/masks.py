"""Masks over positions: factors [T, F] on activations, by position and latent."""

from typing import NamedTuple

import torch
from torch import Tensor


class GaussianMask(NamedTuple):
    """weight[p, j] = exp(-(p - centre[j])^2 / (2 sigma^2)), computed where it is needed and never stored.

    centre  float32 [F], in positions
    sigma   > 0, in positions
    """

    centre: Tensor
    sigma: float

    @property
    def sharpness(self) -> float:
        return 1 / (2 * self.sigma**2)


Mask = Tensor | GaussianMask


def in_range(pos: Tensor, n_positions: int) -> Tensor:
    """Return positions that can index [T, ...]. On a CPU, ops have checked them. On a GPU, checking would wait for the
    device, so positions outside of [0, T) become the nearest one inside."""
    return pos if pos.device.type == "cpu" else pos.clamp(0, n_positions - 1)


def weights_at(mask: Mask, pos: Tensor) -> Tensor:
    """Weights of all latents at positions pos [N], as [N, F]."""
    if isinstance(mask, Tensor):
        return mask.index_select(0, in_range(pos, len(mask)))
    return _gaussian(pos[:, None] - mask.centre, mask)


def weights_of(mask: Mask, pos: Tensor, latents: Tensor) -> Tensor:
    """Weights of (position, latent) pairs. `pos` and `latents` have the same shape."""
    if isinstance(mask, Tensor):
        return mask.reshape(-1)[in_range(pos.long(), len(mask)) * mask.shape[1] + latents]
    return _gaussian(pos - mask.centre[latents.long()], mask)


def _gaussian(distance: Tensor, mask: GaussianMask) -> Tensor:
    return torch.exp(-mask.sharpness * distance.square())
