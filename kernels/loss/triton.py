"""loss as two Triton kernels: sums over each token, then over each position's tokens in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_kernel, launch_options
from ..code import SparseCode
from ..decode.triton import entries_of


@triton.jit
def token_loss_kernel(
    residual_ptr, values_ptr, offsets_ptr, stats_ptr,
    N, D, K, stride_residual,
    RAGGED: tl.constexpr, SQUARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Squared error, L1 and L0 of a token, as rows of `stats` [3, N]. One program per token."""
    token = tl.program_id(0).to(tl.int64)
    first, count = entries_of(token, offsets_ptr, K, RAGGED)
    # [BLOCK] partial sums of squares over columns; `residual` holds squared norms already with SQUARED
    if SQUARED:
        tl.store(stats_ptr + token, tl.load(residual_ptr + token).to(tl.float32))
    else:
        squared_error = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, D, BLOCK):
            dims = start + tl.arange(0, BLOCK)
            residual = tl.load(residual_ptr + token * stride_residual + dims, mask=dims < D, other=0.0).to(tl.float32)
            squared_error += residual * residual
        tl.store(stats_ptr + token, tl.sum(squared_error, 0))
    # [BLOCK] partial sums over the token's entries
    l1 = tl.zeros((BLOCK,), dtype=tl.float32)
    l0 = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + first + slots, mask=slots < count, other=0.0).to(tl.float32)
        l1 += tl.abs(values)
        l0 += (values != 0).to(tl.float32)
    tl.store(stats_ptr + N + token, tl.sum(l1, 0))
    tl.store(stats_ptr + N + N + token, tl.sum(l0, 0))


@triton.jit
def position_sum_kernel(
    stats_ptr, pos_ptr, sums_ptr,
    N, T,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum `stats` [3, N] by position into `sums` [4, T]. One program per position reads every token, because N * T
    comparisons cost less than sorting the tokens by position."""
    # [BLOCK_N] partial sums over tokens
    position = tl.program_id(0)
    count = tl.zeros((BLOCK_N,), dtype=tl.float32)
    squared_error = tl.zeros((BLOCK_N,), dtype=tl.float32)
    l1 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    l0 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        # [BLOCK_N] tokens, and which of them are at this position
        tokens = start + tl.arange(0, BLOCK_N)
        is_here = tl.load(pos_ptr + tokens, mask=tokens < N, other=-1) == position
        count += is_here.to(tl.float32)
        squared_error += tl.load(stats_ptr + tokens, mask=is_here, other=0.0)
        l1 += tl.load(stats_ptr + N + tokens, mask=is_here, other=0.0)
        l0 += tl.load(stats_ptr + N + N + tokens, mask=is_here, other=0.0)
    tl.store(sums_ptr + position, tl.sum(count, 0))
    tl.store(sums_ptr + T + position, tl.sum(squared_error, 0))
    tl.store(sums_ptr + 2 * T + position, tl.sum(l1, 0))
    tl.store(sums_ptr + 3 * T + position, tl.sum(l0, 0))


def position_loss(residual: Tensor, values: SparseCode | Tensor, pos: Tensor, n_positions: int) -> list[Tensor]:
    n, squared = residual.shape[0], residual.dim() == 1
    residual = residual if residual.stride(-1) == 1 else residual.contiguous()
    offsets = values.offsets if isinstance(values, SparseCode) else None
    entries = values.values if isinstance(values, SparseCode) else values
    stats = torch.empty((3, n), dtype=torch.float32, device=residual.device)
    launch_kernel(
        token_loss_kernel, (n,),
        residual, entries.contiguous(), pos if offsets is None else offsets, stats,
        n, 0 if squared else residual.shape[1], 0 if offsets is not None else entries.shape[1], residual.stride(0),
        RAGGED=offsets is not None, SQUARED=squared,
        **launch_options("token_loss", residual),
    )  # fmt: skip
    sums = torch.empty((4, n_positions), dtype=torch.float32, device=residual.device)
    launch_kernel(
        position_sum_kernel, (n_positions,),
        stats, pos.contiguous(), sums, n, n_positions, **launch_options("position_sum", residual),
    )  # fmt: skip
    return list(sums.unbind())
