"""Codes as the libraries have them: dense, with zeros."""

import torch
from torch import Tensor


def scattered(values: Tensor, indices: Tensor, F: int) -> Tensor:
    """[N, F] of values and indices [N, K]. Differentiable in the values."""
    return values.new_zeros(len(values), F).scatter(1, indices.long(), values)


def scattered_ragged(values: Tensor, indices: Tensor, offsets: Tensor, F: int) -> Tensor:
    """[N, F] of a ragged code; unused entries go nowhere."""
    used, rows = used_rows(values, offsets)
    flat = values.new_zeros((len(offsets) - 1) * F)
    return flat.scatter_add(0, rows * F + indices.long(), torch.where(used, values, 0)).view(-1, F)


def used_rows(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries are used, and the token of each."""
    at = torch.arange(len(values), device=values.device)
    return at < offsets[-1], torch.searchsorted(offsets[1:-1].contiguous(), at, right=True)


def among_dead(x: Tensor, W: Tensor, b: Tensor, dead: Tensor) -> Tensor:
    """Pre-activations [N, n_dead] of the dead latents alone: x [N, D], W [D, F], b and dead [F]."""
    return x @ W[:, dead] + b[dead]


def largest(acts: Tensor, k: int) -> Tensor:
    """acts [N, M] with all but the k largest of each row 0, whatever their sign."""
    top = acts.topk(k, sorted=False)
    return torch.zeros_like(acts).scatter(1, top.indices, top.values)
