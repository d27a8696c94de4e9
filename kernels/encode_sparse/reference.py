"""encode_sparse in plain torch: encode, then select."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..code import SparseCode
from ..encode.reference import encode
from ..masks import Mask
from ..numerics import accumulation_dtype
from ..select.reference import select_batch_topk, select_threshold, select_topk


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, center: Tensor | None, mask: Mask | None, pos: Tensor | None,
    aux_k: int, aux_latents: Tensor | None, across_batch: bool, dictionaries: int,
) -> tuple[SparseCode, SparseCode | None]:  # fmt: skip
    acts = encode(x, W_enc, b_enc, center, mask, pos, True)
    return select_both(acts, k, aux_k, aux_latents, across_batch, dictionaries, select_topk, select_batch_topk)


def encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None,
    center: Tensor | None, mask: Mask | None, pos: Tensor | None, capacity: int | None, dictionaries: int,
) -> SparseCode:  # fmt: skip
    acts = encode(x, W_enc, b_enc, center, mask, pos, True)
    return select_above(acts, threshold, capacity, dictionaries, select_threshold)


class Fp8Rows(NamedTuple):
    """rows [M, D] in float8_e4m3fn, D filled up with zeros to a multiple of 128, to be multiplied by their scale [M]."""

    rows: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Fp8Rows":
        """Each row scaled so that its largest element becomes 448, the largest that e4m3 has."""
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = x.abs().amax(1).float().clamp_min(torch.finfo(torch.float32).tiny * largest) / largest
        rows = torch.nn.functional.pad(x.float() / scale[:, None], (0, -x.shape[1] % 128))
        return cls(rows.to(torch.float8_e4m3fn), scale)

    def widened(self) -> Tensor:
        return self.rows.float() * self.scale[:, None]


def preselect(
    x: Fp8Rows, W_enc: Fp8Rows, b_enc: Tensor, k: int, mask: Mask | None, pos: Tensor | None,
    aux_k: int, aux_latents: Tensor | None,
) -> tuple[SparseCode, SparseCode | None]:  # fmt: skip
    """The k largest by the product in fp8."""
    return encode_topk(x.widened(), W_enc.widened().T, b_enc, k, None, mask, pos, aux_k, aux_latents, False, 1)


def select_both(
    acts: Tensor, k: int, aux_k: int, aux_latents: Tensor | None, across_batch: bool, dictionaries: int,
    select_topk: Callable[[Tensor, int], SparseCode], select_batch_topk: Callable[[Tensor, int], SparseCode],
) -> tuple[SparseCode, SparseCode | None]:  # fmt: skip
    """Both selections of `encode_topk` from activations that nobody else holds."""
    blocks = acts.chunk(dictionaries, 1)
    codes = [select_batch_topk(block, len(block) * k) if across_batch else select_topk(block, k) for block in blocks]
    if not aux_k:
        return _side_by_side(codes), None
    if aux_latents is not None and not acts.is_cuda:
        pairs = zip(blocks, aux_latents.chunk(dictionaries), strict=True)
        return _side_by_side(codes), _side_by_side(
            [_select_among(block, latents, aux_k, select_topk) for block, latents in pairs]
        )
    if aux_latents is not None:
        acts.masked_fill_(~aux_latents, 0)
    return _side_by_side(codes), _side_by_side([select_topk(block, aux_k) for block in blocks])


def _select_among(
    acts: Tensor, latents: Tensor, k: int, select_topk: Callable[[Tensor, int], SparseCode]
) -> SparseCode:
    """The k largest of activations [N, F] among `latents` bool [F], the only ones to be looked at: a GPU would have to wait
    to know which. Where there are fewer than k, zeros of others."""
    columns = latents.nonzero()[:, 0]
    if len(columns) > k:
        code = select_topk(acts[:, columns], k)
        return SparseCode(code.values, columns[code.indices].int(), len(latents))
    fillers = (~latents).nonzero()[: k - len(columns), 0]
    values = torch.cat([acts[:, columns], acts.new_zeros(len(acts), len(fillers))], 1)
    return SparseCode(values, torch.cat([columns, fillers]).int().expand(len(acts), -1).contiguous(), len(latents))


def select_above(
    acts: Tensor, threshold: Tensor | None, capacity: int | None, dictionaries: int,
    select_threshold: Callable[[Tensor, float | Tensor, int | None], SparseCode],
) -> SparseCode:  # fmt: skip
    """The selection of `encode_threshold` from activations; each dictionary has an equal part of the capacity."""
    thresholds = [0.0] * dictionaries if threshold is None else threshold.chunk(dictionaries)
    dictionary_capacity = None if capacity is None else capacity // dictionaries
    pairs = zip(acts.chunk(dictionaries, 1), thresholds, strict=True)
    return _side_by_side([select_threshold(block, limit, dictionary_capacity) for block, limit in pairs])


def _side_by_side(codes: list[SparseCode]) -> SparseCode:
    code = SparseCode.side_by_side(codes)
    return code.with_values(code.values.to(accumulation_dtype(code.values)))
