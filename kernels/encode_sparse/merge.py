"""Select the k largest among the candidates of `triton.py`, and compute again the tiles that may have dropped one.

Kernels have one program for each of the S N tokens of S dictionaries side by side. `ragged.py` makes ragged codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_kernel, launch_options
from ..code import SparseCode
from ..encode.triton import encode, masked, operands
from ..encoder_inputs import EncoderInputs
from ..fp8 import Fp8Rows
from ..masks import Mask
from ..select.triton import (
    VALUE_BITS,
    latents_of,
    may_have_more,
    ranked,
    select_batch_topk,
    select_threshold,
    select_topk,
)
from ..selection import Selection, candidates_per_tile, select_above, select_both
from .candidates import Candidates
from .ragged import all_positive, largest_of_batch
from .triton import only_aux, pack


@triton.jit
def cut_among(keys, K, low):
    """Bisect for a cut of `low` or more, so that K keys are at the cut or above, or more if several equal it. At least
    K keys must be `low` or more."""
    high = tl.max(keys, 0) + 1
    reached = tl.zeros((), dtype=tl.int32)
    while (high - low > 1) & (reached != K):
        middle = (low + high) // 2
        reached = tl.sum((keys >= middle).to(tl.int32), 0)
        low = tl.where(reached >= K, middle, low)
        high = tl.where(reached >= K, high, middle)
    return low


@triton.jit
def first_above(keys, cut, K):
    """Return which K keys are the largest, the first ones of those equal to the cut, and the slot of each."""
    above = keys > cut
    equal = (keys == cut).to(tl.int32)
    keep = above | ((equal != 0) & (tl.cumsum(equal, 0) <= K - tl.sum(above.to(tl.int32), 0)))
    return keep, tl.cumsum(keep.to(tl.int32), 0) - 1


@triton.jit
def merge_kernel(
    candidates_ptr, values_ptr, indices_ptr, unsure_ptr,
    N, TILES, K,
    ALL: tl.constexpr, KEEP: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a token's K largest candidates, and whether a tile may have dropped one of the K largest latents. ALL: the
    token has no more than K tiles. Otherwise only the K tiles with the largest maxima matter, the lower ones first
    among equals, because their maxima alone are K candidates that no other tile exceeds."""
    token = tl.program_id(0).to(tl.int64)
    candidates_ptr += token * TILES * KEEP
    values_ptr += token * K
    indices_ptr += token * K
    low = tl.zeros((), dtype=tl.int32)
    n_tiles = TILES
    if not ALL:
        # [BLOCK_T] keys of the tiles' maxima. `indices` holds the chosen tiles, until they are read.
        tiles = tl.arange(0, BLOCK_T)
        maxima = tl.load(candidates_ptr + tiles * KEEP, mask=tiles < TILES, other=-1) >> 7
        low = cut_among(maxima, K, tl.min(tl.where(tiles < TILES, maxima, 0x7FFFFFFF), 0))
        chosen, slot = first_above(maxima, low, K)
        tl.store(indices_ptr + slot, tiles, mask=chosen)
        tl.debug_barrier()
        n_tiles = K
    # [BLOCK] candidates of these tiles, their keys, which to keep, and their slots in the code
    entries = tl.arange(0, BLOCK)
    inside = entries < n_tiles * KEEP
    if not ALL:
        tile = tl.load(indices_ptr + entries // KEEP, mask=inside, other=0)
        entries = tile * KEEP + entries % KEEP
    packed = tl.load(candidates_ptr + entries, mask=inside, other=-1)
    key = packed >> 7
    cut = cut_among(key, K, low)
    keep, slot = first_above(key, cut, K)
    tl.store(values_ptr + slot, (packed & VALUE_BITS).to(tl.float32, bitcast=True), mask=keep)
    latents = latents_of(entries, packed, tl.program_id(0) // N * TILES, KEEP, BLOCK_F)
    tl.store(indices_ptr + slot, latents, mask=keep)
    more = inside & (entries % KEEP == KEEP - 1) & may_have_more(packed, cut)  # dropped zeros do not matter
    tl.store(unsure_ptr + token, tl.max(more.to(tl.int32), 0).to(tl.int8))


@triton.jit
def dropped_by(
    tile, first_tile, token, x_ptr, w_ptr, b_ptr, mask_ptr, sharpness, pos_ptr, aux_latents_ptr, candidates_ptr,
    D, F, stride_x, stride_wd, stride_wf,
    MASK: tl.constexpr, HAS_AUX_LATENTS: tl.constexpr, KEEP: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
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
                tile, first_tile, tl.program_id(0) % N, x_ptr, w_ptr, b_ptr, mask_ptr, sharpness, pos_ptr,
                aux_latents_ptr, candidates_ptr, D, F, stride_x, stride_wd, stride_wf,
                MASK, HAS_AUX_LATENTS, KEEP, BLOCK_F, BLOCK_D,
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


def largest(candidates: Candidates, k: int, exact: bool, aux: bool = False) -> SparseCode:
    """Return the k largest of each token. With `aux`, among the latents for AuxK."""
    launch, x, n = candidates.launch, candidates.launch.x, candidates.n_tokens
    packed, keep, aux_latents = candidates.packed, candidates.keep, None
    if aux:
        packed, keep, aux_latents = candidates.aux_packed, candidates.aux_keep, candidates.aux_latents
    values, indices = (torch.empty((n, k), dtype=dtype, device=x.device) for dtype in (torch.float32, torch.int32))
    unsure = torch.empty(n, dtype=torch.int8, device=x.device)
    sizes = [triton.next_power_of_2(size) for size in (candidates.tiles, min(k, candidates.tiles) * keep)]
    options = launch_options("merge", x)  # with the warps for up to 1024 tiles or candidates
    options["num_warps"] = min(16, options["num_warps"] * max(1, max(sizes) // 1024))
    launch_kernel(
        merge_kernel, (n,),
        packed, values, indices, unsure, len(x), candidates.tiles, k,
        ALL=candidates.tiles <= k, KEEP=keep, BLOCK_F=candidates.tile, BLOCK_T=sizes[0], BLOCK=sizes[1], **options,
    )  # fmt: skip
    if exact:
        launch_kernel(
            rescan_kernel, (n,),
            *launch.tensors[:5], x if aux_latents is None else aux_latents, packed, unsure, values, indices,
            *launch.numbers, candidates.tiles, k,
            MASK=launch.MASK, HAS_AUX_LATENTS=aux_latents is not None, KEEP=keep,
            BLOCK_F=candidates.tile, BLOCK_K=triton.next_power_of_2(k), **launch_options("rescan", x),
        )  # fmt: skip
    return SparseCode(values, indices, candidates.n_latents)


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
    if across_batch:
        code = largest_of_batch(candidates, len(inputs.x) * k, exact)
    else:
        code = largest(candidates, k, exact)
    return code, largest(candidates, aux_k, exact, aux=True) if aux_k else None


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
    return largest(candidates, k, False), largest(candidates, aux_k, False, aux=True) if aux_k else None


def encode_threshold(
    inputs: EncoderInputs, threshold: Tensor | None, expected: int, capacity: int | None, dictionaries: int
) -> SparseCode:
    launch, f = operands("encode_topk", inputs), inputs.W_enc.shape[1] // dictionaries
    threshold, tile = None if threshold is None else threshold.float().contiguous(), launch.options["BLOCK_F"]
    keep = candidates_per_tile(f, min(expected, f), tile)
    if keep is None or (dictionaries > 1 and f % tile):
        return select_above(encode(inputs), threshold, capacity, dictionaries, select_threshold)
    return all_positive(Candidates(launch, keep, threshold=threshold, dictionaries=dictionaries), capacity)
