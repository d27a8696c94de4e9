"""encode_sparse as Triton kernels.

A GEMM keeps a few candidates per token and tile of latents (select/triton.py describes their format). The result is
selected among them. A tile that may have dropped an entry of the result is computed again for the tokens concerned.

Each of S dictionaries side by side has its own TILES tiles. Token s N + n is token n in dictionary s, and kernels that
select among candidates have one program for each of these S N tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_kernel, launch_options
from ..code import SparseCode
from ..encode.triton import Operands, encode, halves, masked, operands, product
from ..encoder_inputs import EncoderInputs
from ..fp8 import Fp8Rows
from ..masks import Mask
from ..select.triton import (
    COUNT,
    DIGITS,
    FILL,
    VALUE_BITS,
    kth_largest,
    latents_of,
    may_have_more,
    ranked,
    select_batch_topk,
    select_threshold,
    select_topk,
    tally,
)
from ..selection import Selection, candidates_per_tile, select_above, select_both

# A candidate has 17 of the 24 significant bits of an activation. The others are cut off, after their mean is added.
# Activations of 17 bits, such as small whole numbers, stay exact.
MEAN_CUT = tl.constexpr(1 + 46 * 2**-23)


@triton.jit
def rank_keys(acts, cols, F, BLOCK_F: tl.constexpr, EVEN_F: tl.constexpr, FIRST: tl.constexpr = 0):
    """Return int32 [BLOCK_N, BLOCK_F], different within a row, that order a tile's activations like candidates. NaN,
    which is positive on a GPU, comes first. With EVEN_F, activations below zero have negative keys in any order.
    Otherwise their keys have value zero, and only those of columns past the end are negative."""
    bits = (acts * MEAN_CUT).to(tl.int32, bitcast=True)
    column = (BLOCK_F - 1 - FIRST - tl.arange(0, acts.shape[1]))[None, :]
    if EVEN_F:
        return (bits & VALUE_BITS) | column
    return tl.where((cols < F)[None, :], (tl.maximum(bits, 0) & VALUE_BITS) | column, ~column)


@triton.jit
def candidate_of(key, EVEN_F: tl.constexpr):
    """Return the candidate of a key: value zero, or -1 past the last latent, instead of a negative one."""
    return tl.where(key < 0, key & ~VALUE_BITS, key) if EVEN_F else tl.maximum(key, -1)


@triton.jit
def pack(acts, cols, F, BLOCK_F: tl.constexpr):
    """Return candidates [BLOCK_N, BLOCK_F] of a tile. Values that are not positive become zero."""
    return candidate_of(rank_keys(acts, cols, F, BLOCK_F, False), False)


@triton.jit
def store_largest(keys, ptrs, inside, KEEP: tl.constexpr, EVEN_F: tl.constexpr):
    """Store the candidates of the KEEP largest keys of each row, in descending order."""
    inverted = ~keys  # the largest key is the least
    last = tl.min(inverted, 1)
    tl.store(ptrs, candidate_of(~last, EVEN_F), mask=inside)
    for rank in tl.static_range(1, KEEP):
        # [BLOCK_N, BLOCK_F] distance to the last one stored, minus 1. That one and those before it wrap around, so they
        # are further away than any other.
        distance = (inverted + ~last[:, None]).to(tl.uint32, bitcast=True)
        last += 1 + tl.min(distance, 1).to(tl.int32, bitcast=True)
        tl.store(ptrs + rank, candidate_of(~last, EVEN_F), mask=inside)


@triton.jit
def only_aux(packed, aux_latents_ptr, cols, F):
    """Set the values of candidates or keys to zero for latents outside of `aux_latents`."""
    is_aux = tl.load(aux_latents_ptr + cols, mask=cols < F, other=1)
    return packed & tl.where(is_aux != 0, -1, ~VALUE_BITS)[None, :]


@triton.jit
def above_threshold(acts, threshold_ptr, cols, F):
    """Return acts where they are above their latent's threshold or NaN, else zero."""
    limit = tl.load(threshold_ptr + cols, mask=cols < F, other=0.0)
    return tl.where(acts <= limit[None, :], 0.0, acts)


@triton.jit
def keys_of(
    acts, tokens, tile_f, b_ptr, x_scale_ptr, w_scale_ptr, mask_ptr, sharpness, pos_ptr, threshold_ptr, N, F,
    MASK: tl.constexpr, SCALED: tl.constexpr, HAS_THRESHOLD: tl.constexpr, EVEN_F: tl.constexpr,
    BLOCK_F: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Return the keys of columns of a tile, from its column FIRST, given their product."""
    cols = tile_f * BLOCK_F + FIRST + tl.arange(0, acts.shape[1])
    if SCALED:  # x and W_enc have a scale per token and per latent
        x_scale = tl.load(x_scale_ptr + tokens, mask=tokens < N, other=0.0)
        acts *= x_scale[:, None] * tl.load(w_scale_ptr + cols, mask=cols < F, other=0.0)[None, :]
        acts += tl.load(b_ptr + cols, mask=cols < F, other=0.0)[None, :]
    acts = masked(acts, mask_ptr, sharpness, pos_ptr, tokens, cols, tile_f, N, F, MASK, BLOCK_F, FIRST)
    if HAS_THRESHOLD:
        acts = above_threshold(acts, threshold_ptr, cols, F)
    return rank_keys(acts, cols, F, BLOCK_F, EVEN_F, FIRST)


@triton.jit
def candidates_kernel(
    candidates_ptr, aux_candidates_ptr, x_ptr, w_ptr, b_ptr, mask_ptr, pos_ptr, used_ptr, x_scale_ptr, w_scale_ptr,
    threshold_ptr, aux_latents_ptr,
    N, D, F, sharpness, stride_x, stride_wd, stride_wf, TILES,
    MASK: tl.constexpr, SCALED: tl.constexpr, HAS_THRESHOLD: tl.constexpr, HAS_AUX_LATENTS: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_F: tl.constexpr, TMA: tl.constexpr, KEEP: tl.constexpr, AUX_KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """Candidates [S N, TILES, KEEP] and, for AuxK, [S N, TILES, AUX_KEEP]. One program per [BLOCK_N, BLOCK_F] tile."""
    acts, tokens, tile_f = product(
        x_ptr, w_ptr, b_ptr, pos_ptr, used_ptr, N, D, F, stride_x, stride_wd, stride_wf,
        MASK, not SCALED, EVEN_D, TMA, BLOCK_N, BLOCK_F, BLOCK_D, GROUP_N,
    )  # fmt: skip
    # 2 x [BLOCK_N, BLOCK_F / 2] keys, then [BLOCK_N, BLOCK_F] with columns of the halves in turn
    left, right = halves(acts)
    left = keys_of(
        left, tokens, tile_f, b_ptr, x_scale_ptr, w_scale_ptr, mask_ptr, sharpness, pos_ptr, threshold_ptr, N, F,
        MASK, SCALED, HAS_THRESHOLD, EVEN_F, BLOCK_F, 0,
    )  # fmt: skip
    right = keys_of(
        right, tokens, tile_f, b_ptr, x_scale_ptr, w_scale_ptr, mask_ptr, sharpness, pos_ptr, threshold_ptr, N, F,
        MASK, SCALED, HAS_THRESHOLD, EVEN_F, BLOCK_F, BLOCK_F // 2,
    )  # fmt: skip
    keys = tl.reshape(tl.join(left, right), (BLOCK_N, BLOCK_F))
    # [BLOCK_N] index of each token's slot for this tile
    first = (tokens.to(tl.int64) + tile_f // TILES * N) * TILES + tile_f % TILES
    store_largest(keys, candidates_ptr + first * KEEP, tokens < N, KEEP, EVEN_F)
    if AUX_KEEP > 0:
        if HAS_AUX_LATENTS:
            columns = tl.arange(0, BLOCK_F)
            columns = columns // 2 + columns % 2 * (BLOCK_F // 2)
            keys = only_aux(keys, aux_latents_ptr, tile_f * BLOCK_F + columns, F)
        store_largest(keys, aux_candidates_ptr + first * AUX_KEEP, tokens < N, AUX_KEEP, EVEN_F)


@triton.jit
def dropped_by(
    tile, first_tile, token, x_ptr, w_ptr, b_ptr, mask_ptr, sharpness, pos_ptr, threshold_ptr, aux_latents_ptr,
    candidates_ptr, D, F, stride_x, stride_wd, stride_wf,
    MASK: tl.constexpr, HAS_THRESHOLD: tl.constexpr, HAS_AUX_LATENTS: tl.constexpr,
    KEEP: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute a tile again for one token. Returns its candidates [BLOCK_F], with -1 for those that were kept before,
    and its latents [BLOCK_F]. `candidates_ptr` points to the token's candidates, `tile` counts from `first_tile`."""
    # [BLOCK_F] latents of the tile and their activations, over D in steps of BLOCK_D
    local_tile = tile
    tile += first_tile
    cols = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    acts = tl.zeros((BLOCK_F,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + token.to(tl.int64) * stride_x + depth, mask=depth < D, other=0.0).to(tl.float32)
        w_ptrs = w_ptr + depth[:, None].to(tl.int64) * stride_wd + cols[None, :].to(tl.int64) * stride_wf
        w = tl.load(w_ptrs, mask=(depth < D)[:, None] & (cols < F)[None, :], other=0.0).to(tl.float32)
        acts += tl.sum(x[:, None] * w, 0)
    # [1, BLOCK_F] activations and candidates: a tile of one token
    acts = (acts + tl.load(b_ptr + cols, mask=cols < F, other=0.0))[None, :]
    tokens = token + tl.arange(0, 1)
    acts = masked(acts, mask_ptr, sharpness, pos_ptr, tokens, cols, tile, token + 1, F, MASK, BLOCK_F)
    if HAS_THRESHOLD:
        acts = above_threshold(acts, threshold_ptr, cols, F)
    packed = pack(acts, cols, F, BLOCK_F)
    if HAS_AUX_LATENTS:
        packed = only_aux(packed, aux_latents_ptr, cols, F)
    # [BLOCK_F] candidates without those kept before, which are found by column: values may differ in the last bit
    packed = tl.max(packed, 0)
    for rank in tl.static_range(KEEP):
        column = BLOCK_F - 1 - tl.load(candidates_ptr + local_tile * KEEP + rank) % BLOCK_F
        packed = tl.where(cols == tile * BLOCK_F + column, -1, packed)
    return packed, cols


@triton.jit
def merge_kernel(
    candidates_ptr, values_ptr, indices_ptr, unsure_ptr,
    N, TILES, K,
    KEEP: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a token's K largest candidates, and whether a tile may have dropped one of the K largest latents. One
    program per token."""
    token = tl.program_id(0).to(tl.int64)
    first_tile = tl.program_id(0) // N * TILES
    LENGTH = TILES * KEEP
    candidates_ptr += token * LENGTH
    kth, remaining = kth_largest(candidates_ptr, LENGTH, K, 1, True, 32 - 8, BLOCK)
    kth = kth.to(tl.int32)

    n_kept = 0
    unsure = 0
    for start in range(0, LENGTH, BLOCK):
        # [BLOCK] candidates, their keys, which to keep, and their slots in the code
        entries = start + tl.arange(0, BLOCK)
        packed = tl.load(candidates_ptr + entries, mask=entries < LENGTH, other=-1)
        key = packed >> 7
        equal = (key == kth).to(tl.int32)
        keep = (key > kth) | ((equal != 0) & (tl.cumsum(equal, 0) <= remaining))
        ones = keep.to(tl.int32)
        slot = token * K + n_kept + tl.cumsum(ones, 0) - 1
        tl.store(values_ptr + slot, (packed & VALUE_BITS).to(tl.float32, bitcast=True), mask=keep)
        tl.store(indices_ptr + slot, latents_of(entries, packed, first_tile, KEEP, BLOCK_F), mask=keep)
        remaining -= tl.sum(equal, 0)
        n_kept += tl.sum(ones, 0)
        more = (entries % KEEP == KEEP - 1) & may_have_more(packed, kth)  # dropped zeros do not matter
        unsure |= tl.max(more.to(tl.int32), 0)
    tl.store(unsure_ptr + token, unsure.to(tl.int8))


@triton.jit
def rescan_kernel(
    x_ptr, w_ptr, b_ptr, mask_ptr, pos_ptr, aux_latents_ptr, candidates_ptr, unsure_ptr, values_ptr, indices_ptr,
    N, D, F, sharpness, stride_x, stride_wd, stride_wf, TILES, K,
    MASK: tl.constexpr, HAS_AUX_LATENTS: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Compute a token's unsure tiles again and let what they dropped replace smaller entries. One program per token."""
    token = tl.program_id(0).to(tl.int64)
    if tl.load(unsure_ptr + token) == 0:
        return
    # [BLOCK_K] entries of the token and their keys; slots past K never lose
    slots = tl.arange(0, BLOCK_K)
    value = tl.load(values_ptr + token * K + slots, mask=slots < K, other=0.0)
    latent = tl.load(indices_ptr + token * K + slots, mask=slots < K, other=0)
    best = tl.where(slots < K, ranked(value.to(tl.int32, bitcast=True), latent), 0x7FFFFFFFFFFFFFFF)
    # Entries of value zero are replaced first. Each needs its own key, below all others.
    best = tl.where(best < 0, -2 - slots.to(tl.int64), best)
    first_tile = tl.program_id(0) // N * TILES
    candidates_ptr += token * TILES * KEEP
    least_key = (tl.min(best, 0) >> 39).to(tl.int32)

    for first in range(0, TILES, BLOCK_T):
        # [BLOCK_T] tiles of the token, and which of them are to be computed again (-1: not)
        tiles = first + tl.arange(0, BLOCK_T)
        last = tl.load(candidates_ptr + tiles * KEEP + KEEP - 1, mask=tiles < TILES, other=-1)
        pending = tl.where(may_have_more(last, least_key), tiles, -1)
        tile = tl.max(pending, 0)
        while tile >= 0:
            packed, cols = dropped_by(
                tile, first_tile, tl.program_id(0) % N, x_ptr, w_ptr, b_ptr, mask_ptr, sharpness, pos_ptr, x_ptr,
                aux_latents_ptr, candidates_ptr, D, F, stride_x, stride_wd, stride_wf,
                MASK, False, HAS_AUX_LATENTS, KEEP, BLOCK_F, BLOCK_D,
            )  # fmt: skip
            # [BLOCK_F] keys of the dropped: the largest replaces the smallest entry as long as it is larger
            dropped = ranked(packed, cols)
            largest = tl.max(dropped, 0)
            least = tl.min(best, 0)
            while largest > least:
                best = tl.where(best == least, largest, best)
                dropped = tl.where(dropped == largest, -1, dropped)
                largest = tl.max(dropped, 0)
                least = tl.min(best, 0)
            pending = tl.where(tiles == tile, -1, pending)
            tile = tl.max(pending, 0)

    # [BLOCK_K] entries, unpacked from their keys
    value = tl.where(best < 0, 0.0, (best >> 32).to(tl.int32).to(tl.float32, bitcast=True))
    latent = tl.where(best < 0, latent, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32))
    tl.store(values_ptr + token * K + slots, value, mask=slots < K)
    tl.store(indices_ptr + token * K + slots, latent, mask=slots < K)


@triton.jit
def above_cut_kernel(
    x_ptr, w_ptr, b_ptr, mask_ptr, pos_ptr, threshold_ptr, candidates_ptr, cut_ptr, least_ptr,
    above_ptr, equal_ptr, values_ptr, indices_ptr,
    N, D, F, sharpness, stride_x, stride_wd, stride_wf, TILES,
    MASK: tl.constexpr, HAS_THRESHOLD: tl.constexpr, KEEP: tl.constexpr, MODE: tl.constexpr, SHIFT: tl.constexpr,
    RESCAN: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Apply `tally` to a token's candidates and, with RESCAN, to those dropped by tiles that may have dropped keys of
    `least` or more. One program per token. Each dictionary has its own cut."""
    token = tl.program_id(0).to(tl.int64)
    dictionary = tl.program_id(0) // N
    first_tile = dictionary * TILES
    candidates_ptr += token * TILES * KEEP
    # `first` and `second` of tally, by MODE
    cut = tl.load(cut_ptr + dictionary).to(tl.int32)
    second = 0
    end = 0
    if MODE == DIGITS:
        first = tl.zeros((256,), dtype=tl.int32)
    elif MODE == COUNT:
        first = 0
    else:
        first = tl.load(above_ptr + token)
        second = tl.load(equal_ptr + token).to(tl.int32)
        end = tl.load(above_ptr + token + 1)
    for start in range(0, TILES * KEEP, BLOCK):
        # [BLOCK] candidates and their latents
        entries = start + tl.arange(0, BLOCK)
        packed = tl.load(candidates_ptr + entries, mask=entries < TILES * KEEP, other=-1)
        latents = latents_of(entries, packed, first_tile, KEEP, BLOCK_F)
        first, second = tally(packed, latents, cut, first, second, end, values_ptr, indices_ptr, MODE, SHIFT)
    if RESCAN:
        least = tl.load(least_ptr + dictionary).to(tl.int32)
        for start in range(0, TILES, BLOCK_T):
            # [BLOCK_T] tiles of the token, and which of them are to be computed again (-1: not)
            tiles = start + tl.arange(0, BLOCK_T)
            last = tl.load(candidates_ptr + tiles * KEEP + KEEP - 1, mask=tiles < TILES, other=-1)
            pending = tl.where(may_have_more(last, least), tiles, -1)
            tile = tl.max(pending, 0)
            while tile >= 0:
                packed, latents = dropped_by(
                    tile, first_tile, tl.program_id(0) % N, x_ptr, w_ptr, b_ptr, mask_ptr, sharpness, pos_ptr,
                    threshold_ptr, x_ptr, candidates_ptr, D, F, stride_x, stride_wd, stride_wf,
                    MASK, HAS_THRESHOLD, False, KEEP, BLOCK_F, BLOCK_D,
                )  # fmt: skip
                first, second = tally(packed, latents, cut, first, second, end, values_ptr, indices_ptr, MODE, SHIFT)
                pending = tl.where(tiles == tile, -1, pending)
                tile = tl.max(pending, 0)
    if MODE == DIGITS:
        tl.atomic_add(above_ptr + dictionary * 257 + tl.arange(0, 256), first.to(tl.int64))
    elif MODE == COUNT:
        tl.store(above_ptr + token, first.to(tl.int64))
        tl.store(equal_ptr + token, second.to(tl.int64))


class Candidates:
    """The candidates of all tokens, and the ways to select among them."""

    def __init__(
        self, launch: Operands, keep: int, aux_keep: int = 0, aux_latents: Tensor | None = None,
        threshold: Tensor | None = None, scales: tuple[Tensor, Tensor] | None = None, dictionaries: int = 1,
    ):  # fmt: skip
        x, f = launch.x, launch.W_enc.shape[1]
        self.launch, self.n_latents, self.tile = launch, f, launch.options["BLOCK_F"]
        self.dictionaries, self.n_tokens = dictionaries, dictionaries * len(x)
        self.threshold, self.keep, self.aux_keep = threshold, keep, aux_keep
        self.aux_latents = None if aux_latents is None else aux_latents.view(torch.uint8).contiguous()
        self.tiles = triton.cdiv(f // dictionaries, self.tile)
        self.packed, self.aux_packed = (
            torch.empty((self.n_tokens, self.tiles * per_tile), dtype=torch.int32, device=x.device)
            for per_tile in (keep, aux_keep)
        )
        launch_kernel(
            candidates_kernel, launch.grid,
            self.packed, self.aux_packed, *launch.tiled, *(scales or (x, x)), x if threshold is None else threshold,
            x if self.aux_latents is None else self.aux_latents,
            *launch.numbers, self.tiles,
            SCALED=scales is not None, HAS_THRESHOLD=threshold is not None, HAS_AUX_LATENTS=aux_latents is not None,
            EVEN_F=f % self.tile == 0, KEEP=keep, AUX_KEEP=aux_keep, **launch.settings,
        )  # fmt: skip

    def largest(self, k: int, exact: bool, aux: bool = False) -> SparseCode:
        """Return the k largest of each token. With `aux`, among the latents for AuxK."""
        x, n = self.launch.x, self.n_tokens
        packed, keep = (self.aux_packed, self.aux_keep) if aux else (self.packed, self.keep)
        aux_latents = self.aux_latents if aux else None
        values, indices = (torch.empty((n, k), dtype=dtype, device=x.device) for dtype in (torch.float32, torch.int32))
        unsure = torch.empty(n, dtype=torch.int8, device=x.device)
        launch_kernel(
            merge_kernel, (n,),
            packed, values, indices, unsure, len(x), self.tiles, k,
            KEEP=keep, BLOCK_F=self.tile, **launch_options("merge", x),
        )  # fmt: skip
        if exact:
            launch_kernel(
                rescan_kernel, (n,),
                *self.launch.tensors[:5], x if aux_latents is None else aux_latents, packed, unsure, values, indices,
                *self.launch.numbers, self.tiles, k,
                MASK=self.launch.MASK, HAS_AUX_LATENTS=aux_latents is not None, KEEP=keep,
                BLOCK_F=self.tile, BLOCK_K=triton.next_power_of_2(k), **launch_options("rescan", x),
            )  # fmt: skip
        return SparseCode(values, indices, self.n_latents)

    def largest_of_batch(self, total: int, exact: bool) -> SparseCode:
        """Return the `total` largest of the batch, per dictionary. The cut among candidates is a lower bound of the
        true cut, so finding the true one only needs tiles that may have dropped something above that bound."""
        cut = self._cut(total, None)
        if exact:
            cut = self._cut(total, cut[0])
        return self._above(*cut, exact, capacity=self.dictionaries * total)

    def above_threshold(self, capacity: int | None) -> SparseCode:
        """Return all nonzero candidates. Without a capacity, waits for the device to know their number."""
        zeros = torch.zeros(self.dictionaries, dtype=torch.int64, device=self.packed.device)
        return self._above(zeros, zeros, True, capacity, may_overflow=capacity is not None)

    def _cut(self, total: int, least: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the total-th largest key [S] (0 if fewer are positive), and the number [S] of equal keys to keep."""
        s, device = self.dictionaries, self.packed.device
        cut = torch.zeros(s, dtype=torch.int64, device=device)
        remaining = torch.full((s,), total, dtype=torch.int64, device=device)
        for shift in (16, 8, 0):
            counts = torch.zeros(s, 257, dtype=torch.int64, device=device)
            self._launch_above_cut(cut, least, counts, counts, counts, counts, MODE=DIGITS.value, SHIFT=shift)
            at_least = counts.flip(1).cumsum(1).flip(1)
            digit = ((at_least[:, :256] >= remaining[:, None]).sum(1) - 1).clamp_min(0)
            remaining = remaining - at_least.gather(1, digit[:, None] + 1)[:, 0]
            cut = cut + (digit << shift)
        return cut, remaining

    def _above(
        self, cut: Tensor, remaining: Tensor, exact: bool, capacity: int | None, may_overflow: bool = False
    ) -> SparseCode:
        """Return all entries above the cut and the first `remaining` equal to it."""
        x, s, least = self.launch.x, self.dictionaries, cut if exact else None
        above, equal = (torch.empty(s, len(x), dtype=torch.int64, device=x.device) for _ in range(2))
        self._launch_above_cut(cut, least, above, equal, above, above, MODE=COUNT.value)
        equal_quota = torch.minimum((remaining[:, None] - equal.cumsum(1) + equal).clamp_min(0), equal)
        offsets = torch.cat([equal.new_zeros(1), (above + equal_quota).flatten().cumsum(0)])
        size = int(offsets[-1]) if capacity is None else capacity
        overflow = offsets[-1] > size if may_overflow else None
        # Values next to the cut may round differently when computed again in another kernel. Clamp, so none overflows.
        offsets.clamp_(max=size)
        values, indices = (torch.zeros(size, dtype=dtype, device=x.device) for dtype in (torch.float32, torch.int32))
        self._launch_above_cut(cut, least, offsets, equal_quota, values, indices, MODE=FILL.value)
        return SparseCode(values, indices, self.n_latents, offsets, overflow)

    def _launch_above_cut(self, cut: Tensor, least: Tensor | None, *tensors: Tensor, MODE: int, SHIFT: int = 0) -> None:
        launch, x = self.launch, self.launch.x
        launch_kernel(
            above_cut_kernel, (self.n_tokens,),
            *launch.tensors[:5], x if self.threshold is None else self.threshold,
            self.packed, cut, cut if least is None else least, *tensors,
            *launch.numbers, self.tiles,
            MASK=launch.MASK, HAS_THRESHOLD=self.threshold is not None, KEEP=self.keep, MODE=MODE, SHIFT=SHIFT,
            RESCAN=least is not None, BLOCK_F=self.tile, **launch_options("above_cut", x),
        )  # fmt: skip


def encode_topk(inputs: EncoderInputs, selection: Selection) -> tuple[SparseCode, SparseCode | None]:
    k, aux_k, aux_latents, across_batch, exact, dictionaries = selection
    launch, f = operands("encode_topk", inputs), inputs.W_enc.shape[1] // dictionaries
    tile = launch.options["BLOCK_F"]
    # Tokens of a BatchTopK batch may have more than k entries.
    keep = candidates_per_tile(f, min(2 * k, f) if across_batch else k, tile)
    aux_keep = candidates_per_tile(f, aux_k, tile) if aux_k else 0
    if keep is None or aux_keep is None or (dictionaries > 1 and f % tile):  # a tile must not span dictionaries
        return select_both(encode(inputs), selection, select_topk, select_batch_topk)
    candidates = Candidates(launch, keep, aux_keep, aux_latents, dictionaries=dictionaries)
    code = candidates.largest_of_batch(len(inputs.x) * k, exact) if across_batch else candidates.largest(k, exact)
    return code, candidates.largest(aux_k, exact, aux=True) if aux_k else None


def preselect(
    x: Fp8Rows, W_enc: Fp8Rows, b_enc: Tensor, mask: Mask | None, pos: Tensor | None, selection: Selection
) -> tuple[SparseCode, SparseCode | None] | None:
    """Return the k largest of the product in fp8, or None if F is too small relative to k for candidates."""
    launch = operands("encode_fp8", EncoderInputs(x.rows, W_enc.rows.T, b_enc, None, mask, pos))
    f, tile = len(W_enc.rows), launch.options["BLOCK_F"]
    k, aux_k, aux_latents, *_ = selection
    keep, aux_keep = (candidates_per_tile(f, n_kept, tile) if n_kept else 0 for n_kept in (k, aux_k))
    if keep is None or aux_keep is None:
        return None
    candidates = Candidates(launch, keep, aux_keep, aux_latents, scales=(x.scale, W_enc.scale))
    return candidates.largest(k, False), candidates.largest(aux_k, False, aux=True) if aux_k else None


def encode_threshold(
    inputs: EncoderInputs, threshold: Tensor | None, expected: int, capacity: int | None, dictionaries: int
) -> SparseCode:
    launch, f = operands("encode_topk", inputs), inputs.W_enc.shape[1] // dictionaries
    threshold, tile = None if threshold is None else threshold.float().contiguous(), launch.options["BLOCK_F"]
    keep = candidates_per_tile(f, min(expected, f), tile)
    if keep is None or (dictionaries > 1 and f % tile):
        return select_above(encode(inputs), threshold, capacity, dictionaries, select_threshold)
    return Candidates(launch, keep, threshold=threshold, dictionaries=dictionaries).above_threshold(capacity)
