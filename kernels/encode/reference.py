"""encode in plain torch."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..code import SparseCode
from ..numerics import accumulation_dtype
from ..select.reference import select_batch_topk, select_topk


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None, mask: Tensor | None, pos: Tensor | None, relu: bool
) -> Tensor:
    return _encode(x, W_enc, b_enc, center, mask, pos, relu).to(x.dtype)


def _encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None, mask: Tensor | None, pos: Tensor | None, relu: bool
) -> Tensor:
    """Not rounded to x's dtype yet, where it was accumulated in a wider one."""
    wide = accumulation_dtype(x)
    if x.is_cuda:  # a half-precision product on CUDA accumulates in float32 by itself, from operands in half precision
        wide = x.dtype
    x = x.to(wide) if center is None else (x.to(accumulation_dtype(x)) - center).to(wide)
    acts = torch.addmm(b_enc.to(wide), x, W_enc.to(wide))
    if relu:
        acts = acts.relu_()  # a second [N, F] costs as much as the rectifier
    if mask is not None and pos is not None:
        acts = acts * mask.index_select(0, pos)
    return acts


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, center: Tensor | None, mask: Tensor | None, pos: Tensor | None,
    aux_k: int, aux_latents: Tensor | None, across_batch: bool,
) -> tuple[SparseCode, SparseCode | None]:  # fmt: skip
    acts = _encode(x, W_enc, b_enc, center, mask, pos, True)
    return select_both(acts, k, aux_k, aux_latents, across_batch, select_topk, select_batch_topk)


def select_both(
    acts: Tensor, k: int, aux_k: int, aux_latents: Tensor | None, across_batch: bool,
    select_topk: Callable[[Tensor, int], SparseCode], select_batch_topk: Callable[[Tensor, int], SparseCode],
) -> tuple[SparseCode, SparseCode | None]:  # fmt: skip
    """Both selections of `encode_topk` from activations that nobody else holds."""

    def widened(code: SparseCode) -> SparseCode:
        return code.with_values(code.values.to(accumulation_dtype(acts)))

    code = widened(select_batch_topk(acts, len(acts) * k) if across_batch else select_topk(acts, k))
    if not aux_k:
        return code, None
    if aux_latents is not None:
        acts.masked_fill_(~aux_latents, 0)
    return code, widened(select_topk(acts, aux_k))
