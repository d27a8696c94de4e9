"""Accumulation dtype and sums in a fixed order, shared by the references, and the columns that kernels hold."""

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def sum_by(index: Tensor, rows: Tensor, size: int) -> Tensor:
    """out[i] = sum of rows[j] over index[j] == i, in the order of j: reproducible bits. Returns [size, ...]."""
    out = rows.new_zeros((size, *rows.shape[1:]))
    if rows.is_cuda:  # index_add_ would use atomics there, while index_put_ sorts
        return out.index_put_((index.long(),), rows, accumulate=True)
    return out.index_add_(0, index, rows)


def added(parts: Tensor) -> Tensor:
    """Return the sum of `parts` [P, ...] over the first dimension, without a pass over a single one."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def weighted_bags(table: Tensor, index: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """out[b] = sum of weights[e] * table[index[e]] over e in starts[b]:starts[b + 1] (to the end for the last b).

    `embedding_bag` never stores the gathered rows. On two CPU cores at N = 1024, K = 32 it takes at most a seventh of
    the time of a dense product at F = 1024, of `index_add_`, or of gather and reduce, for D from 128 to 768.
    """
    if not torch.is_grad_enabled():
        table = table.detach()  # otherwise torch also computes what only its own backward needs
    return F.embedding_bag(index, table, starts.to(index.dtype), mode="sum", per_sample_weights=weights)


def pieces(d: int) -> dict[str, int]:
    """Return the powers of two HIGH <= D and LOW that cover D columns with the least padding."""
    high = 1 << max(0, (d - 1).bit_length() - 1)
    return dict(HIGH=high, LOW=1 << max(0, d - high - 1).bit_length())
