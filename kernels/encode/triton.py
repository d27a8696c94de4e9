"""encode as one Triton kernel: a GEMM that centres in its prologue and rectifies and masks in its epilogue."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_options


@triton.jit
def encode_kernel(
    x_ptr, w_ptr, b_ptr, center_ptr, mask_ptr, pos_ptr, acts_ptr,
    N, D, F,
    stride_x, stride_wd, stride_wf,
    RELU: tl.constexpr, HAS_CENTER: tl.constexpr, HAS_MASK: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    # Programs walk GROUP_N token tiles before the next latent tile, so that both operands are met again in L2.
    program = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_f = tl.cdiv(F, BLOCK_F)
    group = program // (GROUP_N * tiles_f)
    within = program % (GROUP_N * tiles_f)
    group_n = min(tiles_n - group * GROUP_N, GROUP_N)
    tile_n = group * GROUP_N + within % group_n
    tile_f = within // group_n

    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    depth = tl.arange(0, BLOCK_D)
    # Rows and columns past the end wrap around instead of being masked in the main loop; they are never stored.
    rows_in = (rows % N).to(tl.int64)
    cols_in = (cols % F).to(tl.int64)
    x_ptrs = x_ptr + rows_in[:, None] * stride_x + depth[None, :]
    w_ptrs = w_ptr + depth[:, None].to(tl.int64) * stride_wd + cols_in[None, :] * stride_wf

    acc = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=depth[None, :] < D - start, other=0.0)
            w = tl.load(w_ptrs, mask=depth[:, None] < D - start, other=0.0)
        if HAS_CENTER:
            center = tl.load(center_ptr + start + depth, mask=depth < D - start, other=0.0)
            x = (x.to(tl.float32) - center.to(tl.float32)[None, :]).to(x_ptr.dtype.element_ty)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_D
        w_ptrs += BLOCK_D * stride_wd

    acc += tl.load(b_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # unlike maximum, lets NaN through
    inside = (rows < N)[:, None] & (cols < F)[None, :]
    if HAS_MASK:
        positions = tl.load(pos_ptr + rows, mask=rows < N, other=0).to(tl.int64)
        mask_ptrs = mask_ptr + positions[:, None] * F + cols[None, :]
        acc *= tl.load(mask_ptrs, mask=inside, other=0).to(tl.float32)
    acts_ptrs = acts_ptr + rows[:, None].to(tl.int64) * F + cols[None, :]
    tl.store(acts_ptrs, acc.to(acts_ptr.dtype.element_ty), mask=inside)


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None, mask: Tensor | None, pos: Tensor | None, relu: bool
) -> Tensor:
    (n, d), f = x.shape, W_enc.shape[1]
    x = x if x.stride(1) == 1 else x.contiguous()
    W_enc = W_enc if 1 in W_enc.stride() else W_enc.contiguous()
    acts = torch.empty((n, f), dtype=x.dtype, device=x.device)
    if mask is not None:
        mask = (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).contiguous()
    options = launch_options("encode", x)
    if x.dtype == torch.float32 or d % options["BLOCK_D"]:
        options = launch_options("encode_small", x)
    grid = (triton.cdiv(n, options["BLOCK_N"]) * triton.cdiv(f, options["BLOCK_F"]),)
    encode_kernel[grid](
        x, W_enc, b_enc.contiguous(), x if center is None else center.contiguous(), x if mask is None else mask,
        x if pos is None else pos.contiguous(), acts,
        n, d, f,
        x.stride(0), *W_enc.stride(),
        RELU=relu, HAS_CENTER=center is not None, HAS_MASK=mask is not None, EVEN_D=d % options["BLOCK_D"] == 0,
        **options,
    )  # fmt: skip
    return acts
