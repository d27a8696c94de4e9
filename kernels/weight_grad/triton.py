"""weight_grad as Triton kernels: one program per latent and tile of D walks the latent's entries in order.

A latent that fires on very many tokens would keep one program busy long after all others. So the sorted entries are cut
into windows of SPLIT, and a window that lies within one latent is summed by a program of its own, before; the latent's
program adds up the entries ahead of its first whole window, the windows, and the entries behind the last, in that order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_options
from ..code import LatentMajor


@triton.jit
def sum_entries(
    acc, first, last, values_ptr, order_ptr, tokens_ptr, rows_ptr, M, dims, D, stride_row,
    BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc plus values[e] * rows[token of e] over the sorted entries first:last, for these dims."""
    for start in tl.range(first, last, BLOCK_E, num_stages=STAGES):
        positions = start + tl.arange(0, BLOCK_E)
        tokens = tl.load(tokens_ptr + positions, mask=positions < last, other=0) % M
        entries = tl.load(order_ptr + positions, mask=positions < last, other=0)
        values = tl.load(values_ptr + entries, mask=positions < last, other=0.0).to(tl.float32)
        row_ptrs = rows_ptr + tokens[:, None].to(tl.int64) * stride_row + dims[None, :]
        rows = tl.load(row_ptrs, mask=(positions < last)[:, None] & (dims < D)[None, :], other=0.0)
        acc += tl.sum(values[:, None] * rows.to(tl.float32), 0)
    return acc


@triton.jit
def sum_latent(
    latent, values_ptr, order_ptr, tokens_ptr, offsets_ptr, rows_ptr, windows_ptr, M, dims, D, stride_row,
    SPLIT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sum over all entries of a latent, with whole windows read from `windows` [C / SPLIT, D]."""
    first = tl.load(offsets_ptr + latent)
    last = tl.load(offsets_ptr + latent + 1)
    window = (first + SPLIT - 1) // SPLIT
    end = tl.maximum(last // SPLIT, window)
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
    window = tl.program_id(0).to(tl.int64)
    first = window * SPLIT
    latent = tl.load(latents_ptr + first)
    if (latent == tl.load(latents_ptr + first + SPLIT - 1)) & (latent < F):
        dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
        acc = sum_entries(
            acc, first, first + SPLIT, values_ptr, order_ptr, tokens_ptr, rows_ptr, M, dims, D, stride_row, BLOCK_E, STAGES
        )  # fmt: skip
        tl.store(windows_ptr + window * D + dims, acc, mask=dims < D)


@triton.jit
def weight_grad_kernel(
    values_ptr, order_ptr, tokens_ptr, offsets_ptr, rows_ptr, windows_ptr, center_ptr, ones_ptr, out_ptr,
    M, D, stride_row, LATENTS_PER_CENTER,
    HAS_CENTER: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = sum_latent(
        latent, values_ptr, order_ptr, tokens_ptr, offsets_ptr, rows_ptr, windows_ptr, M, dims, D, stride_row,
        SPLIT, BLOCK_E, BLOCK_D, STAGES,
    )  # fmt: skip
    if HAS_CENTER:
        center = tl.load(center_ptr + latent // LATENTS_PER_CENTER * D + dims, mask=dims < D, other=0.0).to(tl.float32)
        acc -= tl.load(ones_ptr + latent) * center
    tl.store(out_ptr + latent * D + dims, acc, mask=dims < D)


def sum_windows(entries: LatentMajor, values: Tensor, rows: Tensor) -> tuple[Tensor, int]:
    """Sums [C / SPLIT, D] of the windows that lie within one latent (the others hold nothing of use), and SPLIT."""
    (m, d), c = rows.shape, values.numel()
    options = launch_options("windows", rows)
    windows = torch.empty((c // options["SPLIT"], d), dtype=torch.float32, device=rows.device)
    if len(windows):
        windows_kernel[(len(windows), triton.cdiv(d, options["BLOCK_D"]))](
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
    weight_grad_kernel[(f, triton.cdiv(d, options["BLOCK_D"]))](
        values, entries.order, entries.tokens, entries.latent_offsets, rows, windows,
        rows if center is None else center.contiguous(), rows if sums is None else sums, out,
        m, d, rows.stride(0), f // (1 if center is None else center.numel() // d),
        HAS_CENTER=center is not None, SPLIT=split, **options,
    )  # fmt: skip
    return out
