"""encode as Triton kernels: a GEMM that adds the bias, rectifies and masks in its epilogue. `encode` writes the result;
`encode_topk` keeps a few candidates of each tile of latents, merges them, and looks again where a tile may have had more.

A candidate is an int32: the float's bits rounded to 24 of them, which order like the values because none is negative,
above 7 bits that name its column, the first column highest. A tile with nothing left gives -1.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_options
from ..code import SparseCode
from ..select.triton import kth_largest, select_batch_topk, select_topk
from .reference import select_both

_VALUE_BITS = tl.constexpr(-128)  # a mask
_LEAST_POSITIVE = tl.constexpr(128)
_NAN = tl.constexpr(0x7F800080)  # the lowest NaN that rounding keeps


@triton.jit
def tile_of(program, N, F, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, GROUP_N: tl.constexpr):
    """Tile of tokens and of latents. GROUP_N token tiles come before the next latent tile: both operands meet in L2."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_f = tl.cdiv(F, BLOCK_F)
    group = program // (GROUP_N * tiles_f)
    within = program % (GROUP_N * tiles_f)
    group_n = min(tiles_n - group * GROUP_N, GROUP_N)
    return group * GROUP_N + within % group_n, within // group_n


@triton.jit
def product(
    x_ptr, w_ptr, rows, cols, N, D, F, stride_x, stride_wd, stride_wf,
    EVEN_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x @ W_enc for these rows and columns, in float32."""
    depth = tl.arange(0, BLOCK_D)
    # Rows and columns past the end wrap around instead of being masked in the main loop; they are never stored.
    rows_in = (rows % N).to(tl.int64)
    cols_in = (cols % F).to(tl.int64)
    x_ptrs = x_ptr + rows_in[:, None] * stride_x + depth[None, :]
    w_ptrs = w_ptr + depth[:, None].to(tl.int64) * stride_wd + cols_in[None, :] * stride_wf
    acc = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=depth[None, :] < D - start, other=0.0)
            w = tl.load(w_ptrs, mask=depth[:, None] < D - start, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_D
        w_ptrs += BLOCK_D * stride_wd
    return acc


@triton.jit
def masked(acts, mask_ptr, pos_ptr, rows, cols, N, F):
    """acts * mask[pos]; the mask is uint8 for a hard one."""
    positions = tl.load(pos_ptr + rows, mask=rows < N, other=0).to(tl.int64)
    mask_ptrs = mask_ptr + positions[:, None] * F + cols[None, :]
    return acts * tl.load(mask_ptrs, mask=(rows < N)[:, None] & (cols < F)[None, :], other=0).to(tl.float32)


@triton.jit
def is_empty(used_ptr, pos_ptr, rows, tile_f, N, F, BLOCK_F: tl.constexpr):
    """Whether a hard mask is off for the whole tile. `used` [T + 1, tiles] counts the positions below each at which some
    latent of the tile is on; the tile's tokens are taken to be at all positions from its least to its greatest."""
    tiles_f = tl.cdiv(F, BLOCK_F)
    positions = tl.load(pos_ptr + rows, mask=rows < N, other=0).to(tl.int64)
    first = tl.min(tl.where(rows < N, positions, 0x7FFFFFFF), 0)
    last = tl.max(positions, 0)
    return tl.load(used_ptr + first * tiles_f + tile_f) == tl.load(used_ptr + (last + 1) * tiles_f + tile_f)


@triton.jit
def encode_kernel(
    x_ptr, w_ptr, b_ptr, mask_ptr, pos_ptr, used_ptr, acts_ptr,
    N, D, F,
    stride_x, stride_wd, stride_wf,
    RELU: tl.constexpr, HAS_MASK: tl.constexpr, HARD: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    tile_n, tile_f = tile_of(tl.program_id(0), N, F, BLOCK_N, BLOCK_F, GROUP_N)
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    depth = D
    if HARD:
        depth = tl.where(is_empty(used_ptr, pos_ptr, rows, tile_f, N, F, BLOCK_F), 0, D)  # no turn of the main loop
    acts = product(
        x_ptr, w_ptr, rows, cols, N, depth, F, stride_x, stride_wd, stride_wf, EVEN_D, BLOCK_N, BLOCK_F, BLOCK_D
    )
    acts += tl.load(b_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acts = tl.where(acts < 0, 0.0, acts)  # unlike maximum, lets NaN through
    if HAS_MASK:
        acts = masked(acts, mask_ptr, pos_ptr, rows, cols, N, F)
    acts_ptrs = acts_ptr + rows[:, None].to(tl.int64) * F + cols[None, :]
    tl.store(acts_ptrs, acts.to(acts_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (cols < F)[None, :])


@triton.jit
def pack(acts, cols, F, BLOCK_F: tl.constexpr):
    """Candidates [rows, BLOCK_F] of a tile; what isn't positive counts as zero, NaN as the largest."""
    bits = tl.where(acts == acts, tl.maximum(acts.to(tl.int32, bitcast=True), 0), _NAN)
    packed = ((bits + _LEAST_POSITIVE // 2) & _VALUE_BITS) | (BLOCK_F - 1 - cols % BLOCK_F)[None, :]
    return tl.where((cols < F)[None, :], packed, -1)


@triton.jit
def store_largest(packed, ptrs, inside, KEEP: tl.constexpr):
    """The KEEP largest of each row, the largest first."""
    for nth in tl.static_range(KEEP):
        largest = tl.max(packed, 1)
        tl.store(ptrs + nth, largest, mask=inside)
        packed = tl.where(packed == largest[:, None], -1, packed)


@triton.jit
def candidates_kernel(
    x_ptr, w_ptr, b_ptr, mask_ptr, pos_ptr, aux_latents_ptr, used_ptr, candidates_ptr, aux_candidates_ptr,
    N, D, F,
    stride_x, stride_wd, stride_wf,
    HAS_MASK: tl.constexpr, HARD: tl.constexpr, HAS_AUX_LATENTS: tl.constexpr, EVEN_D: tl.constexpr,
    KEEP: tl.constexpr, AUX_KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    tile_n, tile_f = tile_of(tl.program_id(0), N, F, BLOCK_N, BLOCK_F, GROUP_N)
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    depth = D
    if HARD:
        depth = tl.where(is_empty(used_ptr, pos_ptr, rows, tile_f, N, F, BLOCK_F), 0, D)  # no turn of the main loop
    acts = product(
        x_ptr, w_ptr, rows, cols, N, depth, F, stride_x, stride_wd, stride_wf, EVEN_D, BLOCK_N, BLOCK_F, BLOCK_D
    )
    acts += tl.load(b_ptr + cols, mask=cols < F, other=0.0)[None, :]
    if HAS_MASK:
        acts = masked(acts, mask_ptr, pos_ptr, rows, cols, N, F)
    packed = pack(acts, cols, F, BLOCK_F)
    tiles = tl.cdiv(F, BLOCK_F)
    first = rows.to(tl.int64) * tiles + tile_f
    store_largest(packed, candidates_ptr + first * KEEP, rows < N, KEEP)
    if AUX_KEEP > 0:
        if HAS_AUX_LATENTS:
            is_aux = tl.load(aux_latents_ptr + cols, mask=cols < F, other=0)
            packed = tl.where((is_aux != 0)[None, :] | (packed < 0), packed, packed & ~_VALUE_BITS)
        store_largest(packed, aux_candidates_ptr + first * AUX_KEEP, rows < N, AUX_KEEP)


@triton.jit
def merge_kernel(
    candidates_ptr, values_ptr, indices_ptr, unsure_ptr,
    LENGTH, K,
    KEEP: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The K largest of a token's candidates, and whether a tile may have had more of them than it gave."""
    token = tl.program_id(0).to(tl.int64)
    candidates_ptr += token * LENGTH
    kth, wanted = kth_largest(candidates_ptr, LENGTH, K, 1, True, 32 - 8, BLOCK)

    kept = 0
    unsure = 0
    for start in range(0, LENGTH, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        packed = tl.load(candidates_ptr + entries, mask=entries < LENGTH, other=-1)
        key = (packed & _VALUE_BITS) >> 7
        equal = (key == kth.to(tl.int32)).to(tl.int32)
        keep = (key > kth.to(tl.int32)) | ((equal != 0) & (tl.cumsum(equal, 0) <= wanted))
        ones = keep.to(tl.int32)
        slot = token * K + kept + tl.cumsum(ones, 0) - 1
        latents = entries // KEEP * BLOCK_F + (BLOCK_F - 1 - packed % BLOCK_F)
        tl.store(values_ptr + slot, (packed & _VALUE_BITS).to(tl.float32, bitcast=True), mask=keep)
        tl.store(indices_ptr + slot, latents, mask=keep)
        wanted -= tl.sum(equal, 0)
        kept += tl.sum(ones, 0)
        # The last of a tile's candidates is its least, and bounds what the tile dropped. Which zeros are kept is all one,
        # and a row of NaN need not be looked at again.
        last = entries % KEEP == KEEP - 1
        may_have_more = last & (packed >= _LEAST_POSITIVE) & (key >= kth.to(tl.int32)) & (kth < (_NAN >> 7))
        unsure |= tl.max(may_have_more.to(tl.int32), 0)
    tl.store(unsure_ptr + token, unsure.to(tl.int8))


@triton.jit
def ranked(packed, latents):
    """Candidates as int64 keys that order by value, then by the lower latent; -1 for those that aren't positive."""
    key = ((packed & _VALUE_BITS).to(tl.int64) << 32) | (0x7FFFFFFF - latents).to(tl.int64)
    return tl.where(packed >= _LEAST_POSITIVE, key, -1)


@triton.jit
def rescan_kernel(
    x_ptr, w_ptr, b_ptr, mask_ptr, pos_ptr, aux_latents_ptr, candidates_ptr, unsure_ptr, values_ptr, indices_ptr,
    N, D, F, K,
    stride_x, stride_wd, stride_wf,
    HAS_MASK: tl.constexpr, ONLY_AUX: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """For a token with unsure tiles: compute each of those tiles again, and let what it dropped replace lesser entries."""
    token = tl.program_id(0).to(tl.int64)
    if tl.load(unsure_ptr + token) == 0:
        return
    slots = tl.arange(0, BLOCK_K)
    value = tl.load(values_ptr + token * K + slots, mask=slots < K, other=0.0)
    latent = tl.load(indices_ptr + token * K + slots, mask=slots < K, other=0)
    best = tl.where(slots < K, ranked(value.to(tl.int32, bitcast=True), latent), 0x7FFFFFFFFFFFFFFF)
    # Entries of value zero are the first to go. Each needs a key of its own, below all others.
    best = tl.where(best < 0, -2 - slots.to(tl.int64), best)
    tiles = tl.cdiv(F, BLOCK_F)
    candidates_ptr += token * tiles * KEEP
    least_value = tl.maximum((tl.min(best, 0) >> 32).to(tl.int32), _LEAST_POSITIVE)

    for first in range(0, tiles, BLOCK_T):
        numbers = first + tl.arange(0, BLOCK_T)
        last = tl.load(candidates_ptr + numbers * KEEP + KEEP - 1, mask=numbers < tiles, other=-1)
        pending = tl.where((last & _VALUE_BITS) >= least_value, numbers, -1)
        tile = tl.max(pending, 0)
        while tile >= 0:
            cols = tile * BLOCK_F + tl.arange(0, BLOCK_F)
            acts = tl.zeros((BLOCK_F,), dtype=tl.float32)
            for start in range(0, D, BLOCK_D):
                depth = start + tl.arange(0, BLOCK_D)
                x = tl.load(x_ptr + token * stride_x + depth, mask=depth < D, other=0.0).to(tl.float32)
                w_ptrs = w_ptr + depth[:, None].to(tl.int64) * stride_wd + cols[None, :].to(tl.int64) * stride_wf
                w = tl.load(w_ptrs, mask=(depth < D)[:, None] & (cols < F)[None, :], other=0.0).to(tl.float32)
                acts += tl.sum(x[:, None] * w, 0)
            acts += tl.load(b_ptr + cols, mask=cols < F, other=0.0)
            if HAS_MASK:
                position = tl.load(pos_ptr + token).to(tl.int64)
                acts *= tl.load(mask_ptr + position * F + cols, mask=cols < F, other=0).to(tl.float32)
            packed = tl.max(pack(acts[None, :], cols, F, BLOCK_F), 0)
            if ONLY_AUX:
                packed = tl.where(tl.load(aux_latents_ptr + cols, mask=cols < F, other=0) != 0, packed, -1)
            for nth in tl.static_range(KEEP):  # by column: its value may differ in the last bit
                given = BLOCK_F - 1 - tl.load(candidates_ptr + tile * KEEP + nth) % BLOCK_F
                packed = tl.where(cols == tile * BLOCK_F + given, -1, packed)
            dropped = ranked(packed, cols)
            largest = tl.max(dropped, 0)
            least = tl.min(best, 0)
            while largest > least:
                best = tl.where(best == least, largest, best)
                dropped = tl.where(dropped == largest, -1, dropped)
                largest = tl.max(dropped, 0)
                least = tl.min(best, 0)
            pending = tl.where(numbers == tile, -1, pending)
            tile = tl.max(pending, 0)

    value = tl.where(best < 0, 0.0, (best >> 32).to(tl.int32).to(tl.float32, bitcast=True))
    latent = tl.where(best < 0, latent, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32))
    tl.store(values_ptr + token * K + slots, value, mask=slots < K)
    tl.store(indices_ptr + token * K + slots, latent, mask=slots < K)


@triton.jit
def fold_kernel(
    w_ptr, b_ptr, center_ptr, out_ptr,
    D, F, stride_wd, stride_wf,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The bias that centres x: b_enc - center @ W_enc, [F] in float32."""
    cols = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    acc = tl.zeros((BLOCK_F, BLOCK_D), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)
        center = tl.load(center_ptr + depth, mask=depth < D, other=0.0).to(tl.float32)
        w_ptrs = w_ptr + cols[:, None].to(tl.int64) * stride_wf + depth[None, :].to(tl.int64) * stride_wd
        w = tl.load(w_ptrs, mask=(cols < F)[:, None] & (depth < D)[None, :], other=0.0)
        acc += w.to(tl.float32) * center[None, :]
    b = tl.load(b_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)
    tl.store(out_ptr + cols, b - tl.sum(acc, 1), mask=cols < F)


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None, mask: Tensor | None, pos: Tensor | None, relu: bool
) -> Tensor:
    (n, d), f = x.shape, W_enc.shape[1]
    x, W_enc, bias, mask = _prepared(x, W_enc, b_enc, center, mask)
    acts = torch.empty((n, f), dtype=x.dtype, device=x.device)
    options = _options("encode", x)
    used = _used(mask, options["BLOCK_F"])
    encode_kernel[_grid(n, f, options)](
        x, W_enc, bias, x if mask is None else mask, x if pos is None else pos.contiguous(),
        x if used is None else used, acts,
        n, d, f, x.stride(0), *W_enc.stride(),
        RELU=relu, HAS_MASK=mask is not None, HARD=used is not None, EVEN_D=d % options["BLOCK_D"] == 0,
        **options,
    )  # fmt: skip
    return acts


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, center: Tensor | None, mask: Tensor | None, pos: Tensor | None,
    aux_k: int, aux_latents: Tensor | None, across_batch: bool, exact: bool,
) -> tuple[SparseCode, SparseCode | None]:  # fmt: skip
    (n, d), f = x.shape, W_enc.shape[1]
    options = _options("encode_topk", x)
    keep = candidates_per_tile(f, k, options["BLOCK_F"])
    aux_keep = candidates_per_tile(f, aux_k, options["BLOCK_F"]) if aux_k else 0
    if keep is None or aux_keep is None or across_batch:
        acts = encode(x, W_enc, b_enc, center, mask, pos, True)
        return select_both(acts, k, aux_k, aux_latents, across_batch, select_topk, select_batch_topk)

    x, W_enc, bias, mask = _prepared(x, W_enc, b_enc, center, mask)
    tiles, used = triton.cdiv(f, options["BLOCK_F"]), _used(mask, options["BLOCK_F"])
    candidates, aux_candidates = (
        torch.empty((n, tiles * kept), dtype=torch.int32, device=x.device) for kept in (keep, aux_keep)
    )
    is_aux = x if aux_latents is None else aux_latents.view(torch.uint8).contiguous()
    operands = (x, W_enc, bias, x if mask is None else mask, x if pos is None else pos.contiguous(), is_aux)
    sizes, strides = (n, d, f), (x.stride(0), *W_enc.stride())
    candidates_kernel[_grid(n, f, options)](
        *operands, x if used is None else used, candidates, aux_candidates,
        *sizes, *strides,
        HAS_MASK=mask is not None, HARD=used is not None, HAS_AUX_LATENTS=aux_latents is not None,
        EVEN_D=d % options["BLOCK_D"] == 0, KEEP=keep, AUX_KEEP=aux_keep,
        **options,
    )  # fmt: skip

    def merge(candidates: Tensor, k: int, keep: int, only_aux: bool) -> SparseCode:
        values = torch.empty((n, k), dtype=torch.float32, device=x.device)
        indices = torch.empty((n, k), dtype=torch.int32, device=x.device)
        unsure = torch.empty(n, dtype=torch.int8, device=x.device)
        merge_kernel[(n,)](
            candidates, values, indices, unsure, tiles * keep, k,
            KEEP=keep, BLOCK_F=options["BLOCK_F"], **launch_options("merge", x),
        )  # fmt: skip
        if exact:
            rescan_kernel[(n,)](
                *operands, candidates, unsure, values, indices,
                *sizes, k, *strides,
                HAS_MASK=mask is not None, ONLY_AUX=only_aux, KEEP=keep,
                BLOCK_F=options["BLOCK_F"], BLOCK_K=triton.next_power_of_2(k), **launch_options("rescan", x),
            )  # fmt: skip
        return SparseCode(values, indices, f)

    code = merge(candidates, k, keep, False)
    return code, merge(aux_candidates, aux_k, aux_keep, aux_latents is not None) if aux_k else None


@functools.cache
def candidates_per_tile(f: int, k: int, tile: int) -> int | None:
    """How many of each tile of latents to keep, so that one row in a hundred has a tile with as many among its k largest
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


def _prepared(x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None, mask: Tensor | None):
    """Operands as the kernels take them: unit strides, `center` folded into a float32 bias, a hard mask in bytes."""
    x = x if x.stride(1) == 1 else x.contiguous()
    W_enc = W_enc if 1 in W_enc.stride() else W_enc.contiguous()
    bias = b_enc.float().contiguous()
    if center is not None:
        (d, f), bias = W_enc.shape, torch.empty_like(bias)
        options = launch_options("fold", x)
        fold_kernel[(triton.cdiv(f, options["BLOCK_F"]),)](
            W_enc, b_enc.contiguous(), center.contiguous(), bias, d, f, *W_enc.stride(), **options
        )
    if mask is not None:
        mask = (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).contiguous()
    return x, W_enc, bias, mask


def _used(mask: Tensor | None, tile: int) -> Tensor | None:
    """What `is_empty` reads, for a hard mask as `_prepared` gives it; None for others."""
    if mask is None or mask.dtype != torch.uint8:
        return None
    t, f = mask.shape
    on = torch.nn.functional.pad(mask, (0, -f % tile)).view(t, -1, tile).amax(2)
    return torch.cat([on.new_zeros(1, on.shape[1], dtype=torch.int32), on.cumsum(0, dtype=torch.int32)])


def _options(op: str, x: Tensor) -> dict:
    options = launch_options(op, x)
    if x.dtype == torch.float32 or x.shape[1] % options["BLOCK_D"]:
        return launch_options(f"{op}_small", x)
    return options


def _grid(n: int, f: int, options: dict) -> tuple[int]:
    return (triton.cdiv(n, options["BLOCK_N"]) * triton.cdiv(f, options["BLOCK_F"]),)
