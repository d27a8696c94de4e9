"""encode_sparse in plain torch: encode, then select."""

from collections.abc import Callable

from torch import Tensor

from ..code import SparseCode
from ..encode.reference import encode
from ..masks import Mask
from ..numerics import accumulation_dtype
from ..select.reference import select_batch_topk, select_threshold, select_topk


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, center: Tensor | None, mask: Mask | None, pos: Tensor | None,
    aux_k: int, aux_latents: Tensor | None, across_batch: bool,
) -> tuple[SparseCode, SparseCode | None]:  # fmt: skip
    acts = encode(x, W_enc, b_enc, center, mask, pos, True)
    return select_both(acts, k, aux_k, aux_latents, across_batch, select_topk, select_batch_topk)


def encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None,
    center: Tensor | None, mask: Mask | None, pos: Tensor | None,
) -> SparseCode:  # fmt: skip
    acts = encode(x, W_enc, b_enc, center, mask, pos, True)
    return widened(select_threshold(acts, 0.0 if threshold is None else threshold, None))


def select_both(
    acts: Tensor, k: int, aux_k: int, aux_latents: Tensor | None, across_batch: bool,
    select_topk: Callable[[Tensor, int], SparseCode], select_batch_topk: Callable[[Tensor, int], SparseCode],
) -> tuple[SparseCode, SparseCode | None]:  # fmt: skip
    """Both selections of `encode_topk` from activations that nobody else holds."""
    code = widened(select_batch_topk(acts, len(acts) * k) if across_batch else select_topk(acts, k))
    if not aux_k:
        return code, None
    if aux_latents is not None:
        acts.masked_fill_(~aux_latents, 0)
    return code, widened(select_topk(acts, aux_k))


def widened(code: SparseCode) -> SparseCode:
    return code.with_values(code.values.to(accumulation_dtype(code.values)))
