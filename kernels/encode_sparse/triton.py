"""encode_sparse as Triton kernels: candidates. `candidates.py` launches them, `merge.py` selects among them.

A GEMM keeps a few candidates per token and tile of latents (select/triton.py describes their format).

Each of S dictionaries side by side has its own TILES tiles. Token s N + n is token n in dictionary s.
"""

import triton
import triton.language as tl

from ..encode.triton import halves, masked, product
from ..select.triton import VALUE_BITS

# A candidate has 17 of the 24 significant bits of an activation. The others are cut off, after their mean is added.
# Activations of 17 bits, such as small whole numbers, stay exact.
MEAN_CUT = tl.constexpr(1 + 46 * 2**-23)


@triton.jit
def rank_keys(acts, columns, cols, F, BLOCK_F: tl.constexpr, EVEN_F: tl.constexpr):
    """Return int32 of the shape of acts, different within a row, that order a tile's activations like candidates. `columns`
    are theirs in the tile and `cols` their latents. NaN, which is positive on a GPU, comes first. With EVEN_F, activations
    below zero have negative keys in any order. Otherwise their keys have value zero, and only those of columns past the end
    are negative."""
    bits = (acts * MEAN_CUT).to(tl.int32, bitcast=True)
    column = (BLOCK_F - 1 - columns)[None, :]
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
    return candidate_of(rank_keys(acts, tl.arange(0, BLOCK_F), cols, F, BLOCK_F, False), False)


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
    columns = FIRST + tl.arange(0, acts.shape[1])
    cols = tile_f * BLOCK_F + columns
    if SCALED:  # x and W_enc have a scale per token and per latent
        x_scale = tl.load(x_scale_ptr + tokens, mask=tokens < N, other=0.0)
        acts *= x_scale[:, None] * tl.load(w_scale_ptr + cols, mask=cols < F, other=0.0)[None, :]
        acts += tl.load(b_ptr + cols, mask=cols < F, other=0.0)[None, :]
    acts = masked(acts, mask_ptr, sharpness, pos_ptr, tokens, cols, tile_f, N, F, MASK, BLOCK_F, FIRST)
    if HAS_THRESHOLD:
        acts = above_threshold(acts, threshold_ptr, cols, F)
    return rank_keys(acts, columns, cols, F, BLOCK_F, EVEN_F)


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
