"""weight_grad as a Triton kernel: one program per latent and tile of D walks the latent's tokens in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_options
from ..code import SparseCode


@triton.jit
def weight_grad_kernel(
    values_ptr, order_ptr, tokens_ptr, offsets_ptr, rows_ptr, out_ptr,
    D, stride_row,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    latent = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(offsets_ptr + latent)
    count = (tl.load(offsets_ptr + latent + 1) - first).to(tl.int32)

    acc = tl.zeros((BLOCK_E, BLOCK_D), dtype=tl.float32)
    for start in tl.range(0, count, BLOCK_E, num_stages=STAGES):
        nth = start + tl.arange(0, BLOCK_E)
        tokens = tl.load(tokens_ptr + first + nth, mask=nth < count, other=0).to(tl.int64)
        entries = tl.load(order_ptr + first + nth, mask=nth < count, other=0)
        values = tl.load(values_ptr + entries, mask=nth < count, other=0.0).to(tl.float32)
        row_ptrs = rows_ptr + tokens[:, None] * stride_row + dims[None, :]
        rows = tl.load(row_ptrs, mask=(nth < count)[:, None] & (dims < D)[None, :], other=0.0)
        acc += values[:, None] * rows.to(tl.float32)
    tl.store(out_ptr + latent * D + dims, tl.sum(acc, 0), mask=dims < D)


def weight_grad(code: SparseCode, values: Tensor, rows: Tensor) -> Tensor:
    d = rows.shape[1]
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    order, tokens, latent_offsets = code.transpose()
    out = torch.empty((code.n_latents, d), dtype=torch.float32, device=rows.device)
    options = launch_options("weight_grad", rows)
    weight_grad_kernel[(code.n_latents, triton.cdiv(d, options["BLOCK_D"]))](
        values.contiguous(), order, tokens, latent_offsets, rows, out, d, rows.stride(0), **options
    )
    return out
