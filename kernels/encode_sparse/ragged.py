"""Ragged codes from the candidates of `triton.py`: all positive ones, or the largest of a batch.

Tiles that may have dropped an entry of the result are computed again, sorted by tile, so that W_enc is read once. What
they dropped is kept for all passes over the candidates. Kernels have one program for each of the S N tokens of S
dictionaries side by side, unless they say otherwise.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_kernel, launch_options
from ..code import LatentMajor, SparseCode
from ..encode.triton import add_product, masked
from ..select.triton import (
    LEAST_POSITIVE,
    VALUE_BITS,
    begin_tally,
    end_tally,
    find_cut,
    latents_of,
    may_have_more,
    take_above,
    tally,
)
from .candidates import Candidates
from .triton import above_threshold, pack

KEY_BITS = 24  # of a candidate, without its column


@triton.jit
def unsure_kernel(
    candidates_ptr, least_ptr, starts_ptr, tiles_ptr, tokens_ptr,
    N, TILES, CAPACITY,
    FILL: tl.constexpr, KEEP: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Count a token's tiles that may have dropped a key above `least` [S] or, with FILL, write them to its rows. Dropped
    keys equal to it never matter: at least as many candidates are above or equal to it as can be selected."""
    token = tl.program_id(0).to(tl.int64)
    dictionary = tl.program_id(0) // N
    candidates_ptr += token * TILES * KEEP
    least = tl.load(least_ptr + dictionary).to(tl.int32)
    row = tl.zeros((), dtype=tl.int64)
    if FILL:
        row = tl.load(starts_ptr + token)
    for start in range(0, TILES, BLOCK_T):
        # [BLOCK_T] tiles of the token, which of them are unsure, and their rows
        tiles = start + tl.arange(0, BLOCK_T)
        last = tl.load(candidates_ptr + tiles * KEEP + KEEP - 1, mask=tiles < TILES, other=-1)
        ones = may_have_more(last, least + 1).to(tl.int32)
        if FILL:
            rows = row + tl.cumsum(ones, 0) - 1
            inside = (ones != 0) & (rows < CAPACITY)
            tl.store(tiles_ptr + rows, dictionary * TILES + tiles, mask=inside)
            tl.store(tokens_ptr + rows, token.to(tl.int32) + tl.zeros_like(tiles), mask=inside)
        row += tl.sum(ones, 0)
    if not FILL:
        tl.store(starts_ptr + token, row)


@triton.jit
def recompute_kernel(
    x_ptr, w_ptr, b_ptr, mask_ptr, pos_ptr, threshold_ptr, candidates_ptr,
    block_tiles_ptr, block_ends_ptr, offsets_ptr, rows_ptr, tokens_ptr, packed_ptr,
    N, D, F, sharpness, stride_x, stride_wd, stride_wf, TILES,
    MASK: tl.constexpr, HAS_THRESHOLD: tl.constexpr, EVEN_D: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute a tile again for BLOCK_N tokens that are unsure of it. Writes its candidates to their rows, with -1 for
    those that were kept before. One program per block of (tile, token) pairs, sorted by tile."""
    tile = tl.load(block_tiles_ptr + tl.program_id(0))
    if tile >= tl.cdiv(F, BLOCK_F):
        return
    # [BLOCK_N] pairs of this program, their rows and tokens, and [BLOCK_F] latents
    end = tl.load(offsets_ptr + tile + 1)
    first = tl.load(offsets_ptr + tile)
    blocks_left = tl.load(block_ends_ptr + tile) - tl.program_id(0)
    pairs = first + (tl.cdiv(end - first, BLOCK_N) - blocks_left) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = pairs < end
    rows = tl.load(rows_ptr + pairs, mask=inside, other=0)
    tokens = tl.load(tokens_ptr + pairs, mask=inside, other=0)
    cols = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    # [BLOCK_N, BLOCK_F] x @ W_enc
    acts = add_product(
        tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32), x_ptr, w_ptr, tokens, cols, 0, 0, N, F, D,
        stride_x, stride_wd, stride_wf, EVEN_D, False, BLOCK_D,
    )  # fmt: skip
    # [BLOCK_N, BLOCK_F] activations and candidates, without those kept before. These are found by column, because their
    # values may differ in the last bit.
    acts += tl.load(b_ptr + cols, mask=cols < F, other=0.0)[None, :]
    acts = masked(acts, mask_ptr, sharpness, pos_ptr, tokens % N, cols, tile, N, F, MASK, BLOCK_F)
    if HAS_THRESHOLD:
        acts = above_threshold(acts, threshold_ptr, cols, F)
    packed = pack(acts, cols, F, BLOCK_F)
    candidates_ptr += (tokens.to(tl.int64) * TILES + tile % TILES) * KEEP
    columns = tl.arange(0, BLOCK_F)
    for rank in tl.static_range(KEEP):
        kept = BLOCK_F - 1 - tl.load(candidates_ptr + rank, mask=inside, other=0) % BLOCK_F
        packed = tl.where(columns[None, :] == kept[:, None], -1, packed)
    tl.store(packed_ptr + rows[:, None] * BLOCK_F + columns[None, :], packed, mask=inside[:, None])


@triton.jit
def above_cut_kernel(
    candidates_ptr, starts_ptr, tiles_ptr, rows_ptr, cut_ptr, above_ptr, equal_ptr, values_ptr, indices_ptr,
    N, TILES, CAPACITY,
    HAS_ROWS: tl.constexpr, KEEP: tl.constexpr, MODE: tl.constexpr, SHIFT: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Apply `tally` to a token's candidates and, with HAS_ROWS, to what `recompute_kernel` wrote to its rows. Each
    dictionary has its own cut."""
    token = tl.program_id(0).to(tl.int64)
    dictionary = tl.program_id(0) // N
    candidates_ptr += token * TILES * KEEP
    cut = tl.load(cut_ptr + dictionary).to(tl.int32)
    first, second, end = begin_tally(above_ptr, equal_ptr, token, MODE)
    for start in range(0, TILES * KEEP, BLOCK):
        # [BLOCK] candidates and their latents
        entries = start + tl.arange(0, BLOCK)
        packed = tl.load(candidates_ptr + entries, mask=entries < TILES * KEEP, other=-1)
        latents = latents_of(entries, packed, dictionary * TILES, KEEP, BLOCK_F)
        value = (packed & VALUE_BITS).to(tl.float32, bitcast=True)
        first, second = tally(
            packed >> 7, packed >= LEAST_POSITIVE, value, latents, cut, first, second, end, values_ptr, indices_ptr,
            MODE, SHIFT,
        )  # fmt: skip
    if HAS_ROWS:
        first_row = tl.load(starts_ptr + token)
        last_row = tl.load(starts_ptr + token + 1)
        if last_row > CAPACITY:  # the code overflows, too
            last_row = first_row
        for start in range(first_row * BLOCK_F, last_row * BLOCK_F, BLOCK):
            # [BLOCK] dropped candidates and their latents
            entries = start + tl.arange(0, BLOCK)
            inside = entries < last_row * BLOCK_F
            packed = tl.load(rows_ptr + entries, mask=inside, other=-1)
            tile = tl.load(tiles_ptr + entries // BLOCK_F, mask=inside, other=0)
            latents = tile * BLOCK_F + BLOCK_F - 1 - packed % BLOCK_F
            value = (packed & VALUE_BITS).to(tl.float32, bitcast=True)
            first, second = tally(
                packed >> 7, packed >= LEAST_POSITIVE, value, latents, cut, first, second, end, values_ptr, indices_ptr,
                MODE, SHIFT,
            )  # fmt: skip
    end_tally(first, second, above_ptr, equal_ptr, token, dictionary, MODE)


class Rows(NamedTuple):
    """What tiles dropped that may have dropped an entry of the result. Token t has rows starts[t] to starts[t + 1]."""

    starts: Tensor  # int64 [S N + 1]
    tiles: Tensor  # int32 [C]: the tile of each row
    packed: Tensor  # int32 [C, BLOCK_F]: candidates, or -1


def recompute(candidates: Candidates, least: Tensor, capacity: int | None) -> Rows:
    """Compute tiles again that may have dropped a key above `least` [S]. Tokens whose rows exceed the capacity get none.
    Without a capacity, waits for the device to know how many rows there are."""
    launch, x, n, keep = candidates.launch, candidates.launch.x, candidates.n_tokens, candidates.keep
    n_tiles = candidates.dictionaries * candidates.tiles

    def find(starts: Tensor, tiles: Tensor, tokens: Tensor, fill: bool) -> None:
        launch_kernel(
            unsure_kernel, (n,),
            candidates.packed, least, starts, tiles, tokens, len(x), candidates.tiles, len(tiles),
            FILL=fill, KEEP=keep, **launch_options("unsure", x),
        )  # fmt: skip

    counts = torch.empty(n, dtype=torch.int64, device=x.device)
    find(counts, counts, counts, fill=False)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    capacity = int(starts[-1]) if capacity is None else min(capacity, n * candidates.tiles)
    tiles = torch.full((capacity,), n_tiles, dtype=torch.int32, device=x.device)
    packed = torch.empty((capacity, candidates.tile), dtype=torch.int32, device=x.device)
    if not capacity:
        return Rows(starts, tiles, packed)
    tokens = torch.zeros_like(tiles)
    find(starts, tiles, tokens, fill=True)
    _, _, tokens, offsets = by_tile = LatentMajor.of(tiles, tokens, n_tiles)
    options = launch_options("recompute", x)
    block = options["BLOCK_N"]
    block_ends = ((offsets.diff() + block - 1) // block).cumsum(0)
    blocks = torch.arange(min(capacity, capacity // block + n_tiles), device=x.device)
    launch_kernel(
        recompute_kernel, (len(blocks),),
        *launch.tensors[:5], x if candidates.threshold is None else candidates.threshold, candidates.packed,
        torch.searchsorted(block_ends, blocks, right=True), block_ends, offsets, by_tile.order, tokens, packed,
        *launch.numbers, candidates.tiles,
        MASK=launch.MASK, HAS_THRESHOLD=candidates.threshold is not None, KEEP=keep,
        EVEN_D=x.shape[1] % options["BLOCK_D"] == 0, BLOCK_F=candidates.tile, **options,
    )  # fmt: skip
    return Rows(starts, tiles, packed)


class Passes:
    """Passes of `tally` over the candidates and, once there are rows, over what tiles dropped."""

    def __init__(self, candidates: Candidates):
        self.candidates, self.rows, self.device = candidates, None, candidates.packed.device

    def add_rows(self, least: Tensor, capacity: int | None) -> None:
        self.rows = recompute(self.candidates, least, capacity)

    def __call__(self, *tensors: Tensor, MODE: int, SHIFT: int = 0) -> None:
        candidates, x, packed = self.candidates, self.candidates.launch.x, self.candidates.packed
        rows = self.rows or Rows(packed, packed, packed)
        launch_kernel(
            above_cut_kernel, (candidates.n_tokens,),
            packed, *rows, *tensors, len(x), candidates.tiles, len(rows.tiles),
            HAS_ROWS=self.rows is not None, KEEP=candidates.keep, MODE=MODE, SHIFT=SHIFT, BLOCK_F=candidates.tile,
            **launch_options("above_cut", x),
        )  # fmt: skip

    def code(self, cut: Tensor, remaining: Tensor, capacity: int | None, may_overflow: bool = False) -> SparseCode:
        """Return all entries above the cut and the first `remaining` equal to it."""
        n = len(self.candidates.launch.x)
        *entries, offsets, n_entries = take_above(self, cut, remaining, n, capacity, torch.float32)
        overflow = n_entries > capacity if may_overflow else None
        recomputed = None if self.rows is None else self.rows.starts[::n].diff()
        return SparseCode(*entries, self.candidates.n_latents, offsets, overflow, recomputed)


def largest_of_batch(candidates: Candidates, total: int, exact: bool) -> SparseCode:
    """Return the `total` largest of the batch, per dictionary. The cut among candidates is a lower bound of the true
    cut. Fewer than `total` candidates are above it, which bounds the number of full tiles above it."""
    passes = Passes(candidates)
    cut = find_cut(passes, total, KEY_BITS, candidates.dictionaries, passes.device)
    if exact:
        passes.add_rows(cut[0], candidates.dictionaries * ((total - 1) // candidates.keep))
        cut = find_cut(passes, total, KEY_BITS, candidates.dictionaries, passes.device)
    return passes.code(*cut, capacity=candidates.dictionaries * total)


def all_positive(candidates: Candidates, capacity: int | None) -> SparseCode:
    """Return all positive candidates and dropped entries. Where there are too many full tiles for the rows, there are
    also too many candidates for the capacity. Without a capacity, waits for the device to know their numbers."""
    passes = Passes(candidates)
    zeros = torch.zeros(candidates.dictionaries, dtype=torch.int64, device=passes.device)
    passes.add_rows(zeros, None if capacity is None else capacity // candidates.keep)
    return passes.code(zeros, zeros, capacity, may_overflow=capacity is not None)
