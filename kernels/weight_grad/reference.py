"""weight_grad in plain torch."""

import torch
from torch import Tensor

from ..code import LatentMajor
from ..numerics import accumulation_dtype, weighted_bags


def weight_grad(entries: LatentMajor, values: Tensor, rows: Tensor, center: Tensor | None) -> Tensor:
    wide = accumulation_dtype(rows)
    rows = rows.to(wide) if center is None else rows.to(wide) - center
    # Unused entries come last; they are given no weight, because the last latent takes in all that follow.
    used = torch.arange(values.numel(), device=rows.device) < entries.latent_offsets[-1]
    weights = torch.where(used, values.flatten()[entries.order].to(wide), 0)
    return weighted_bags(rows, entries.tokens % rows.shape[0], weights, entries.latent_offsets[:-1])
