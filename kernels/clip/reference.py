"""clip in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def clip(squared_norms: Sequence[Tensor], gradients: Sequence[Tensor], clip_norm: float, factor: Tensor) -> Tensor:
    *others, last = gradients
    squares = [*squared_norms, *(grad.square() for grad in others)]
    runs = [run.view(len(factor), -1).sum(1) for run in squares]
    norm = ((torch.stack(runs).sum(0) if runs else 0) + last.view(len(factor), -1).square().sum(1)).sqrt()
    torch.clamp(clip_norm / (norm + 1e-6), max=1, out=factor)
    return norm
