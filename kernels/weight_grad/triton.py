"""weight_grad as Triton kernels: one program per latent and tile of D adds the latent's entries in order.

A latent with very many entries would keep one program busy long after all others. So the sorted entries are split into
windows of SPLIT, and each window that lies within one latent is summed by its own program first. The latent's program
then adds the entries before its first whole window, the windows, and the entries after the last one, in this order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_kernel, launch_options
from ..code import LatentMajor


@triton.jit
def sum_entries(
    acc, first, last, values_ptr, order_ptr, tokens_ptr, rows_ptr, M, dims, D, stride_row,
    BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add values[e] * rows[token of e] over the sorted entries first:last to acc, for columns `dims`."""
    for start in tl.range(first, last, BLOCK_E, num_stages=STAGES):
        # [BLOCK_E] sorted entries: tokens, indices in the code and values
        positions = start + tl.arange(0, BLOCK_E)
        tokens = tl.load(tokens_ptr + positions, mask=positions < last, other=0) % M
        entries = tl.load(order_ptr + positions, mask=positions < last, other=0)
        values = tl.load(values_ptr + entries, mask=positions < last, other=0.0).to(tl.float32)
        # [BLOCK_E, BLOCK_D] rows of their tokens
        row_ptrs = rows_ptr + tokens[:, None].to(tl.int64) * stride_row + dims[None, :]
        rows = tl.load(row_ptrs, mask=(positions < last)[:, None] & (dims < D)[None, :], other=0.0)
        acc += tl.sum(values[:, None] * rows.to(tl.float32), 0)
    return acc


@triton.jit
def sum_latent(
    latent, values_ptr, order_ptr, tokens_ptr, offsets_ptr, rows_ptr, windows_ptr, M, dims, D, stride_row,
    SPLIT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return the sum [BLOCK_D] over all entries of a latent, with whole windows read from `windows` [C / SPLIT, D]."""
    # the latent's entries first:last and its whole windows window:end
    first = tl.load(offsets_ptr + latent)
    last = tl.load(offsets_ptr + latent + 1)
    window = (first + SPLIT - 1) // SPLIT
    end = tl.maximum(last // SPLIT, window)
    # [BLOCK_D] sum of the entries before the windows, the windows, and the entries after them
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    head = tl.minimum(window * SPLIT, last)
    acc = sum_entries(
        acc, first, head, values_ptr, order_ptr, tokens_ptr, rows_ptr, M, dims, D, stride_row, BLOCK_E, STAGES
    )
    for index in range(window, end):
        acc += tl.load(windows_ptr + index * D + dims, mask=dims < D, other=0.0)
    tail = tl.maximum(end * SPLIT, head)
    return sum_entries(
        acc, tail, last, values_ptr, order_ptr, tokens_ptr, rows_ptr, M, dims, D, stride_row, BLOCK_E, STAGES
    )


@triton.jit
def windows_kernel(
    values_ptr, order_ptr, latents_ptr, tokens_ptr, rows_ptr, windows_ptr,
    M, D, F, stride_row,
    SPLIT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum the windows that lie within one latent, and no others. One program per window and BLOCK_D columns."""
    window = tl.program_id(0).to(tl.int64)
    first = window * SPLIT
    latent = tl.load(latents_ptr + first)
    if (latent == tl.load(latents_ptr + first + SPLIT - 1)) & (latent < F):
        # [BLOCK_D] columns and their sum over the window's SPLIT entries
        dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
        acc = sum_entries(
            acc, first, first + SPLIT, values_ptr, order_ptr, tokens_ptr, rows_ptr, M, dims, D, stride_row,
            BLOCK_E, STAGES,
        )  # fmt: skip
        tl.store(windows_ptr + window * D + dims, acc, mask=dims < D)


@triton.jit
def weight_grad_kernel(
    values_ptr, order_ptr, tokens_ptr, offsets_ptr, rows_ptr, windows_ptr, center_ptr, ones_ptr, out_ptr,
    M, D, stride_row, LATENTS_PER_CENTER,
    HAS_CENTER: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dW, in one program per latent and BLOCK_D columns. `ones` [F] holds the sum of each latent's values."""
    # [BLOCK_D] columns and their sum over the latent's entries
    latent = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = sum_latent(
        latent, values_ptr, order_ptr, tokens_ptr, offsets_ptr, rows_ptr, windows_ptr, M, dims, D, stride_row,
        SPLIT, BLOCK_E, BLOCK_D, STAGES,
    )  # fmt: skip
    if HAS_CENTER:  # sum of values * (rows - center) = sum of values * rows - (sum of values) * center
        center = tl.load(center_ptr + latent // LATENTS_PER_CENTER * D + dims, mask=dims < D, other=0.0).to(tl.float32)
        acc -= tl.load(ones_ptr + latent) * center
    tl.store(out_ptr + latent * D + dims, acc, mask=dims < D)


def sum_windows(entries: LatentMajor, values: Tensor, rows: Tensor) -> tuple[Tensor, int]:
    """Return sums [C / SPLIT, D] of the windows that lie within one latent (others are undefined), and SPLIT."""
    (m, d), c = rows.shape, values.numel()
    options = launch_options("windows", rows)
    windows = torch.empty((c // options["SPLIT"], d), dtype=torch.float32, device=rows.device)
    if len(windows):
        launch_kernel(
            windows_kernel, (len(windows), triton.cdiv(d, options["BLOCK_D"])),
            values, entries.order, entries.latents, entries.tokens, rows, windows,
            m, d, entries.latent_offsets.numel() - 1, rows.stride(0), **options,
        )  # fmt: skip
    return windows, options["SPLIT"]


def weight_grad(entries: LatentMajor, values: Tensor, rows: Tensor, center: Tensor | None) -> Tensor:
    (m, d), f = rows.shape, entries.latent_offsets.numel() - 1
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    values = values.contiguous()
    sums = None if center is None else weight_grad(entries, values, rows.new_ones(1, 1), None)
    out = torch.empty((f, d), dtype=torch.float32, device=rows.device)
    windows, split = sum_windows(entries, values, rows)
    options = launch_options("weight_grad", rows)
    launch_kernel(
        weight_grad_kernel, (f, triton.cdiv(d, options["BLOCK_D"])),
        values, entries.order, entries.tokens, entries.latent_offsets, rows, windows,
        rows if center is None else center.contiguous(), rows if sums is None else sums, out,
        m, d, rows.stride(0), f // (1 if center is None else center.numel() // d),
        HAS_CENTER=center is not None, SPLIT=split, **options,
    )  # fmt: skip
    return out
