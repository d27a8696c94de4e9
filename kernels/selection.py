"""Which activations the sparse encoders keep, and how to select them from dense activations."""

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
    """The k largest of each token or of the batch, and the aux_k largest among `aux_latents`. See `encode_topk`."""

    k: int
    aux_k: int
    aux_latents: Tensor | None
    across_batch: bool
    exact: bool
    dictionaries: int

    def check(self, x: Tensor, n_latents: int) -> None:
        """Raise ValueError unless it fits `n_latents`, the latents of all dictionaries together."""
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
    """Return F. Raises ValueError unless the latents divide evenly among the dictionaries."""
    if dictionaries < 1 or n_latents % dictionaries:
        raise ValueError(f"dictionaries must divide the {n_latents} latents, got {dictionaries}")
    return n_latents // dictionaries


def select_both(
    acts: Tensor, selection: Selection, select_topk: Callable[[Tensor, int], SparseCode],
    select_batch_topk: Callable[[Tensor, int], SparseCode],
) -> tuple[SparseCode, SparseCode | None]:  # fmt: skip
    """Return both codes of `encode_topk` from activations [N, S F], which may be overwritten."""
    k, aux_k, aux_latents, across_batch, _, dictionaries = selection
    blocks = acts.chunk(dictionaries, 1)
    code = _side_by_side(
        [select_batch_topk(block, len(block) * k) if across_batch else select_topk(block, k) for block in blocks]
    )
    if not aux_k:
        return code, None
    if aux_latents is not None and not acts.is_cuda:
        pairs = zip(blocks, aux_latents.chunk(dictionaries), strict=True)
        return code, _side_by_side([select_among(block[:, among], among, aux_k, select_topk) for block, among in pairs])
    if aux_latents is not None:
        acts.masked_fill_(~aux_latents, 0)
    return code, _side_by_side([select_topk(block, aux_k) for block in blocks])


def select_among(acts: Tensor, latents: Tensor, k: int, select_topk: Callable[[Tensor, int], SparseCode]) -> SparseCode:
    """Return the k largest of the activations [N, C] of C `latents`, bool [F], padded with zeros at other latents.
    Waits for the device, to know C."""
    columns = latents.nonzero()[:, 0]
    if len(columns) > k:
        code = select_topk(acts, k)
        return SparseCode(code.values, columns[code.indices].int(), len(latents))
    fillers = (~latents).nonzero()[: k - len(columns), 0]
    values = torch.cat([acts, acts.new_zeros(len(acts), len(fillers))], 1)
    return SparseCode(values, torch.cat([columns, fillers]).int().expand(len(acts), -1).contiguous(), len(latents))


def select_above(
    acts: Tensor, threshold: Tensor | None, capacity: int | None, dictionaries: int,
    select_threshold: Callable[[Tensor, float | Tensor, int | None], SparseCode],
) -> SparseCode:  # fmt: skip
    """Return the code of `encode_threshold` from activations [N, S F]. Dictionaries share the capacity equally."""
    thresholds = [0.0] * dictionaries if threshold is None else threshold.chunk(dictionaries)
    dictionary_capacity = None if capacity is None else capacity // dictionaries
    pairs = zip(acts.chunk(dictionaries, 1), thresholds, strict=True)
    return _side_by_side([select_threshold(block, limit, dictionary_capacity) for block, limit in pairs])


def _side_by_side(codes: list[SparseCode]) -> SparseCode:
    code = SparseCode.side_by_side(codes)
    return code.with_values(code.values.to(accumulation_dtype(code.values)))


@functools.cache
def candidates_per_tile(f: int, k: int, tile: int) -> int | None:
    """Return how many candidates to keep per tile of latents, so that with latents in random order about one token in a
    hundred has a tile that is full of its k largest. None for more than 16, when writing all activations costs less."""
    tiles = -(-f // tile)
    mean = k / tiles
    term = math.exp(-mean)  # Poisson probability of keep - 1 entries in a tile
    tail = 1.0 - term  # of at least `keep` entries
    for keep in range(1, 17):
        is_rarely_full = tiles * tail <= 0.01 or keep >= k
        if is_rarely_full and (tiles - 1) * min(keep, tile) + min(keep, f - (tiles - 1) * tile) >= k:
            return keep
        term *= mean / keep
        tail -= term
    return None
