"""Activations of dead latents, for AuxK."""

import torch
from torch import Tensor


def among_dead(x: Tensor, W: Tensor, b: Tensor, dead: Tensor) -> Tensor:
    """Pre-activations [N, n_dead] of the dead latents alone: x [N, D], W [D, F], b and dead [F]."""
    return x @ W[:, dead] + b[dead]


def largest(acts: Tensor, k: int) -> Tensor:
    """acts [N, M] with all but the k largest of each row 0, whatever their sign."""
    top = acts.topk(k, sorted=False)
    return torch.zeros_like(acts).scatter(1, top.indices, top.values)
