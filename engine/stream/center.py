"""The initial value of a dictionary's b_dec."""

import torch
from torch import Tensor


@torch.no_grad()
def center(x: Tensor, kind: str) -> Tensor:
    """The `mean`, `geometric_median` or `zero` of activations x [N, D], float32 [D].

    The geometric median minimises the sum of distances to all activations and is robust to outliers. It is found by
    Weiszfeld's iteration, y <- (sum_n x_n / |x_n - y|) / (sum_n 1 / |x_n - y|), until a step is below 1e-6 of the mean
    distance, or after 200 steps.
    """
    x = x.float()
    point = x.mean(0)
    if kind == "zero":
        return torch.zeros_like(point)
    for _ in range(200 if kind == "geometric_median" else 0):
        distance = (x - point).norm(dim=1)
        mean = distance.mean()
        if mean == 0:
            break
        weight = 1 / distance.clamp_min(1e-6 * mean)
        next_point = (weight @ x) / weight.sum()
        step, point = (next_point - point).norm(), next_point
        if step < 1e-6 * mean:
            break
    return point
