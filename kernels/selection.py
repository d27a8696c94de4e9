"""Which activations the sparse encoders keep, and the selection from dense ones, by whichever backend's `select`."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_one_device, check_shape
from .code import SparseCode
from .numerics import accumulation_dtype


class Selection(NamedTuple):
    """The k largest of each token or of the batch, and the aux_k largest among `aux_latents`; see `encode_topk`."""

    k: int
    aux_k: int
    aux_latents: Tensor | None
    across_batch: bool
    exact: bool
    dictionaries: int

    def check(self, x: Tensor, n_latents: int) -> None:
        """Raise ValueError unless it can be made among so many latents, those of all dictionaries."""
        f = latents_per_dictionary(n_latents, self.dictionaries)
        if not 1 <= self.k <= f:
            raise ValueError(f"k must lie in [1, F] = [1, {f}], got {self.k}")
        if not 0 <= self.aux_k <= f:
            raise ValueError(f"aux_k must lie in [0, F] = [0, {f}], got {self.aux_k}")
        if self.aux_latents is not None:
            check_shape("aux_latents", self.aux_latents, F=n_latents)
            check_one_device(x=x, aux_latents=self.aux_latents)
            if self.aux_latents.dtype != torch.bool:
                raise ValueError(f"aux_latents must be bool, got {self.aux_latents.dtype}")


def latents_per_dictionary(n_latents: int, dictionaries: int) -> int:
    """Divide the latents among dictionaries. Raises ValueError if they can't be."""
    if dictionaries < 1 or n_latents % dictionaries:
        raise ValueError(f"dictionaries must divide the {n_latents} latents, got {dictionaries}")
    return n_latents // dictionaries


def select_both(
    acts: Tensor, selection: Selection, select_topk: Callable[[Tensor, int], SparseCode],
    select_batch_topk: Callable[[Tensor, int], SparseCode],
) -> tuple[SparseCode, SparseCode | None]:  # fmt: skip
    """Both codes of `encode_topk` from activations [N, S F] that nobody else holds."""
    k, aux_k, aux_latents, across_batch, _, dictionaries = selection
    blocks = acts.chunk(dictionaries, 1)
    code = _side_by_side(
        [select_batch_topk(block, len(block) * k) if across_batch else select_topk(block, k) for block in blocks]
    )
    if not aux_k:
        return code, None
    if aux_latents is not None and not acts.is_cuda:
        pairs = zip(blocks, aux_latents.chunk(dictionaries), strict=True)
        return code, _side_by_side([_select_among(block, latents, aux_k, select_topk) for block, latents in pairs])
    if aux_latents is not None:
        acts.masked_fill_(~aux_latents, 0)
    return code, _side_by_side([select_topk(block, aux_k) for block in blocks])


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
    """The code of `encode_threshold` from activations [N, S F]; each dictionary has an equal part of the capacity."""
    thresholds = [0.0] * dictionaries if threshold is None else threshold.chunk(dictionaries)
    dictionary_capacity = None if capacity is None else capacity // dictionaries
    pairs = zip(acts.chunk(dictionaries, 1), thresholds, strict=True)
    return _side_by_side([select_threshold(block, limit, dictionary_capacity) for block, limit in pairs])


def _side_by_side(codes: list[SparseCode]) -> SparseCode:
    code = SparseCode.side_by_side(codes)
    return code.with_values(code.values.to(accumulation_dtype(code.values)))


@functools.cache
def candidates_per_tile(f: int, k: int, tile: int) -> int | None:
    """How many of each tile of latents to keep, so that one token in a hundred has a tile with as many among its k largest
    when latents are in random order; None if that takes more than 16, when writing all activations costs less."""
    tiles = -(-f // tile)
    mean = k / tiles
    term = math.exp(-mean)  # Poisson
    at_least = 1.0 - term
    for keep in range(1, 17):
        rarely_more = tiles * at_least <= 0.01 or keep >= k
        if rarely_more and (tiles - 1) * min(keep, tile) + min(keep, f - (tiles - 1) * tile) >= k:
            return keep
        term *= mean / keep
        at_least -= term
    return None
