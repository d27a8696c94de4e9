"""loss as two Triton kernels: sums of each token, then of each position over its tokens in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_options
from ..code import SparseCode


@triton.jit
def token_loss_kernel(
    residual_ptr, values_ptr, offsets_ptr, stats_ptr,
    N, D, K, stride_residual,
    RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    if RAGGED:
        first = tl.load(offsets_ptr + token)
        count = (tl.load(offsets_ptr + token + 1) - first).to(tl.int32)
    else:
        first = token * K
        count = K

    squared_error = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        dims = start + tl.arange(0, BLOCK)
        residual = tl.load(residual_ptr + token * stride_residual + dims, mask=dims < D, other=0.0).to(tl.float32)
        squared_error += residual * residual
    l1 = tl.zeros((BLOCK,), dtype=tl.float32)
    l0 = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        nth = start + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + first + nth, mask=nth < count, other=0.0).to(tl.float32)
        l1 += tl.abs(values)
        l0 += (values != 0).to(tl.float32)
    tl.store(stats_ptr + token, tl.sum(squared_error, 0))
    tl.store(stats_ptr + N + token, tl.sum(l1, 0))
    tl.store(stats_ptr + N + N + token, tl.sum(l0, 0))


@triton.jit
def position_sum_kernel(
    stats_ptr, order_ptr, offsets_ptr, sums_ptr,
    N, T,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    stat = tl.program_id(1).to(tl.int64)
    first = tl.load(offsets_ptr + position)
    count = (tl.load(offsets_ptr + position + 1) - first).to(tl.int32)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, count, BLOCK_N):
        nth = start + tl.arange(0, BLOCK_N)
        tokens = tl.load(order_ptr + first + nth, mask=nth < count, other=0)
        acc += tl.load(stats_ptr + stat * N + tokens, mask=nth < count, other=0.0)
    tl.store(sums_ptr + stat * T + position, tl.sum(acc, 0))


def position_loss(residual: Tensor, values: SparseCode | Tensor, pos: Tensor, n_positions: int) -> list[Tensor]:
    n, d = residual.shape
    residual = residual if residual.stride(1) == 1 else residual.contiguous()
    offsets = values.offsets if isinstance(values, SparseCode) else None
    entries = values.values if isinstance(values, SparseCode) else values
    stats = torch.empty((3, n), dtype=torch.float32, device=residual.device)
    token_loss_kernel[(n,)](
        residual, entries.contiguous(), pos if offsets is None else offsets, stats,
        n, d, 0 if offsets is not None else entries.shape[1], residual.stride(0),
        RAGGED=offsets is not None,
        **launch_options("token_loss", residual),
    )  # fmt: skip
    by_position, order = torch.sort(pos, stable=True)
    bounds = torch.arange(n_positions + 1, device=pos.device, dtype=pos.dtype)
    position_offsets = torch.searchsorted(by_position, bounds)
    sums = torch.empty((3, n_positions), dtype=torch.float32, device=residual.device)
    position_sum_kernel[(n_positions, 3)](
        stats, order, position_offsets, sums, n, n_positions, **launch_options("position_sum", residual)
    )
    return [position_offsets.diff().float(), *sums.unbind()]
