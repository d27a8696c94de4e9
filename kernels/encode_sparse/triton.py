"""encode_sparse as Triton kernels: candidates. `merge.py` selects among them.

A GEMM keeps a few candidates per token and tile of latents (select/triton.py describes their format).

Each of S dictionaries side by side has its own TILES tiles. Token s N + n is token n in dictionary s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_kernel
from ..encode.triton import Operands, masked, preactivations
from ..select.triton import LEAST_POSITIVE, NAN, VALUE_BITS


@triton.jit
def pack(acts, cols, F, BLOCK_F: tl.constexpr):
    """Return candidates [BLOCK_N, BLOCK_F] of a tile. Values that are not positive become zero, NaN the largest."""
    bits = tl.where(acts == acts, tl.maximum(acts.to(tl.int32, bitcast=True), 0), NAN)
    packed = ((bits + LEAST_POSITIVE // 2) & VALUE_BITS) | (BLOCK_F - 1 - cols % BLOCK_F)[None, :]
    return tl.where((cols < F)[None, :], packed, -1)


@triton.jit
def store_largest(packed, ptrs, inside, KEEP: tl.constexpr):
    """Store the KEEP largest candidates of each row, in descending order."""
    for rank in tl.static_range(KEEP):
        largest = tl.max(packed, 1)
        tl.store(ptrs + rank, largest, mask=inside)
        packed = tl.where(packed == largest[:, None], -1, packed)


@triton.jit
def only_aux(packed, aux_latents_ptr, cols, F):
    """Set the values of latents outside of `aux_latents` to zero."""
    is_aux = tl.load(aux_latents_ptr + cols, mask=cols < F, other=0)
    return tl.where((is_aux != 0)[None, :] | (packed < 0), packed, packed & ~VALUE_BITS)


@triton.jit
def above_threshold(acts, threshold_ptr, cols, F):
    """Return acts where they are above their latent's threshold or NaN, else zero."""
    limit = tl.load(threshold_ptr + cols, mask=cols < F, other=0.0)
    return tl.where(acts <= limit[None, :], 0.0, acts)


@triton.jit
def candidates_kernel(
    x_ptr, w_ptr, b_ptr, mask_ptr, pos_ptr, used_ptr, x_scale_ptr, w_scale_ptr,
    threshold_ptr, aux_latents_ptr, candidates_ptr, aux_candidates_ptr,
    N, D, F, sharpness, stride_x, stride_wd, stride_wf, TILES,
    MASK: tl.constexpr, SCALED: tl.constexpr, HAS_THRESHOLD: tl.constexpr, HAS_AUX_LATENTS: tl.constexpr,
    EVEN_D: tl.constexpr, KEEP: tl.constexpr, AUX_KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """Candidates [S N, TILES, KEEP] and, for AuxK, [S N, TILES, AUX_KEEP]. One program per [BLOCK_N, BLOCK_F] tile."""
    # [BLOCK_N, BLOCK_F] pre-activations, then activations of this tile; pack rectifies
    acts, tokens, cols, tile_f = preactivations(
        x_ptr, w_ptr, b_ptr, pos_ptr, used_ptr, x_scale_ptr, w_scale_ptr, N, D, F, stride_x, stride_wd, stride_wf,
        MASK, SCALED, EVEN_D, BLOCK_N, BLOCK_F, BLOCK_D, GROUP_N,
    )  # fmt: skip
    acts = masked(acts, mask_ptr, sharpness, pos_ptr, tokens, cols, tile_f, N, F, MASK, BLOCK_F)
    if HAS_THRESHOLD:
        acts = above_threshold(acts, threshold_ptr, cols, F)
    # [BLOCK_N, BLOCK_F] candidates, and [BLOCK_N] index of each token's slot for this tile
    packed = pack(acts, cols, F, BLOCK_F)
    first = (tokens.to(tl.int64) + tile_f // TILES * N) * TILES + tile_f % TILES
    store_largest(packed, candidates_ptr + first * KEEP, tokens < N, KEEP)
    if AUX_KEEP > 0:
        if HAS_AUX_LATENTS:
            packed = only_aux(packed, aux_latents_ptr, cols, F)
        store_largest(packed, aux_candidates_ptr + first * AUX_KEEP, tokens < N, AUX_KEEP)


class Candidates:
    """The candidates of all tokens."""

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
            *launch.tensors, *(scales or (x, x)), x if threshold is None else threshold,
            x if self.aux_latents is None else self.aux_latents, self.packed, self.aux_packed,
            *launch.numbers, self.tiles,
            SCALED=scales is not None, HAS_THRESHOLD=threshold is not None, HAS_AUX_LATENTS=aux_latents is not None,
            KEEP=keep, AUX_KEEP=aux_keep, **launch.settings,
        )  # fmt: skip
