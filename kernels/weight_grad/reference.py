"""weight_grad in plain torch."""

import torch
from torch import Tensor

from ..code import LatentMajor
from ..numerics import accumulation_dtype, weighted_bags


def weight_grad(entries: LatentMajor, values: Tensor, rows: Tensor, center: Tensor | None) -> Tensor:
    wide, f = accumulation_dtype(rows), entries.latent_offsets.numel() - 1
    rows, index = rows.to(wide), entries.tokens % len(rows)
    if center is not None and center.dim() == 2:
        latents_per_center = f // len(center)
        index = index + entries.latents.clamp(max=f - 1) // latents_per_center * len(rows)
        rows = (rows - center[:, None]).flatten(0, 1)
    elif center is not None:
        rows = rows - center
    # Unused entries come last and would be summed into the last latent, so they get weight zero.
    is_used = torch.arange(values.numel(), device=rows.device) < entries.latent_offsets[-1]
    weights = torch.where(is_used, values.flatten()[entries.order].to(wide), 0)
    return weighted_bags(rows, index, weights, entries.latent_offsets[:-1])


def latent_sums(entries: LatentMajor, values: Tensor) -> Tensor:
    return weight_grad(entries, values, values.new_ones(1, 1), None)[:, 0]
