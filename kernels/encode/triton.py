"""encode as a Triton GEMM with bias, rectifier and mask in its epilogue. `encode_sparse` shares its main loop."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..backend import launch_kernel, launch_options
from ..encoder_inputs import EncoderInputs
from ..masks import GaussianMask

# Kinds of masks: none, bits [T, F / 32] with 32 latents per word, weights [T, F], Gaussian centres [F].
NO_MASK, BITS, TABLE, GAUSSIAN = (tl.constexpr(kind) for kind in range(4))

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None


@triton.jit
def tile_of(program, N, F, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, GROUP_N: tl.constexpr):
    """Return the program's token and latent tile. GROUP_N token tiles in a row share a latent tile: L2 holds both."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_f = tl.cdiv(F, BLOCK_F)
    group = program // (GROUP_N * tiles_f)
    within = program % (GROUP_N * tiles_f)
    group_n = min(tiles_n - group * GROUP_N, GROUP_N)
    return group * GROUP_N + within % group_n, within // group_n


@triton.jit
def is_empty(used_ptr, pos_ptr, tokens, tile_f, N, F, BLOCK_F: tl.constexpr):
    """Return whether a hard mask is zero on the whole tile: conservatively, for all positions from the lowest to the
    highest of the tile's tokens. used[p, tile] counts the positions below p at which some latent of the tile is on."""
    tiles_f = tl.cdiv(F, BLOCK_F)
    # [BLOCK_N] positions of the tile's tokens, then their range
    positions = tl.load(pos_ptr + tokens, mask=tokens < N, other=0).to(tl.int64)
    first = tl.min(tl.where(tokens < N, positions, 0x7FFFFFFF), 0)
    last = tl.max(positions, 0)
    return tl.load(used_ptr + first * tiles_f + tile_f) == tl.load(used_ptr + (last + 1) * tiles_f + tile_f)


@triton.jit
def add_product(
    acc, x_ptr, w_ptr, tokens, cols, first_token, first_col, N, F, D, stride_x, stride_wd, stride_wf,
    EVEN_D: tl.constexpr, TMA: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return acc + x @ W_enc of tokens [BLOCK_N] and latents `cols` [BLOCK_F], over D in steps of BLOCK_D. TMA: x_ptr
    and w_ptr are descriptors of x and W_enc as [F, D], and tokens and latents follow `first_token` and `first_col`."""
    if not TMA:
        # Pointers to x [BLOCK_N, BLOCK_D] and W_enc [BLOCK_D, BLOCK_F]. Rows and columns past the end wrap around,
        # because that is cheaper than masking every load of the main loop. They are never stored.
        depth = tl.arange(0, BLOCK_D)
        x_ptrs = x_ptr + (tokens % N).to(tl.int64)[:, None] * stride_x + depth[None, :]
        w_ptrs = w_ptr + depth[:, None].to(tl.int64) * stride_wd + (cols % F).to(tl.int64)[None, :] * stride_wf
    for start in range(0, D, BLOCK_D):
        if TMA:
            x = x_ptr.load([first_token, start])
            w = w_ptr.load([first_col, start]).T
        elif EVEN_D:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=depth[None, :] < D - start, other=0.0)
            w = tl.load(w_ptrs, mask=depth[:, None] < D - start, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if not TMA:
            x_ptrs += BLOCK_D
            w_ptrs += BLOCK_D * stride_wd
    return acc


@triton.jit
def product(
    x_ptr, w_ptr, b_ptr, pos_ptr, used_ptr,
    N, D, F, stride_x, stride_wd, stride_wf,
    MASK: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """Return b + x @ W_enc of this program's tile in float32, its tokens [BLOCK_N], and the index of its latent tile.
    TMA as in `add_product`. Tiles that a hard mask empties skip the product."""
    tile_n, tile_f = tile_of(tl.program_id(0), N, F, BLOCK_N, BLOCK_F, GROUP_N)
    tokens = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    length = D
    if MASK == BITS:
        length = tl.where(is_empty(used_ptr, pos_ptr, tokens, tile_f, N, F, BLOCK_F), 0, D)  # 0: skip the main loop
    # [BLOCK_N, BLOCK_F] b + x @ W_enc. Starting with b saves registers after the loop.
    acc = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    if HAS_BIAS:
        acc += tl.load(b_ptr + cols, mask=cols < F, other=0.0)[None, :]
    acc = add_product(
        acc, x_ptr, w_ptr, tokens, cols, tile_n * BLOCK_N, tile_f * BLOCK_F, N, F, length,
        stride_x, stride_wd, stride_wf, EVEN_D, TMA, BLOCK_D,
    )  # fmt: skip
    return acc, tokens, tile_f


@triton.jit
def halves(tile):
    """Return the two halves [BLOCK_N, BLOCK_F / 2] of a tile's columns. What follows the product then needs half of the
    registers at a time."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def masked(
    acts, mask_ptr, sharpness, pos_ptr, tokens, cols, tile_f, N, F,
    MASK: tl.constexpr, BLOCK_F: tl.constexpr, FIRST: tl.constexpr = 0,
):  # fmt: skip
    """Return acts * mask[pos] of columns of a tile, from its column FIRST."""
    if MASK != NO_MASK:
        # [BLOCK_N] positions of the tile's tokens
        positions = tl.load(pos_ptr + tokens, mask=tokens < N, other=0).to(tl.int64)
        if MASK == BITS:
            words_per_position = tl.cdiv(F, 32)
            columns = FIRST + tl.arange(0, acts.shape[1])
            for nth in tl.static_range(FIRST // 32, (FIRST + acts.shape[1] + 31) // 32):
                # [BLOCK_N] bits of 32 latents, and [BLOCK_N, columns] those of them that are off
                word = tile_f * (BLOCK_F // 32) + nth
                word_ptrs = mask_ptr + positions * words_per_position + word
                bits = tl.load(word_ptrs, mask=(tokens < N) & (word < words_per_position), other=0)
                is_off = (bits[:, None] & (1 << columns % 32)[None, :]) == 0
                acts = tl.where(is_off & (columns // 32 == nth)[None, :], acts * 0.0, acts)
        elif MASK == TABLE:
            # [BLOCK_N, columns] mask weights
            mask_ptrs = mask_ptr + positions[:, None] * F + cols[None, :]
            acts *= tl.load(mask_ptrs, mask=(tokens < N)[:, None] & (cols < F)[None, :], other=0).to(tl.float32)
        else:  # GAUSSIAN: [BLOCK_N, columns] distances of positions from centres
            centre = tl.load(mask_ptr + cols, mask=cols < F, other=0.0)
            distance = positions.to(tl.float32)[:, None] - centre[None, :]
            acts *= tl.exp(-sharpness * distance * distance)
    return acts


@triton.jit
def encode_kernel(
    acts_ptr, x_ptr, w_ptr, b_ptr, mask_ptr, pos_ptr, used_ptr,
    N, D, F, sharpness, stride_x, stride_wd, stride_wf,
    RELU: tl.constexpr, MASK: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """One program per [BLOCK_N, BLOCK_F] tile of acts."""
    acts, tokens, tile_f = product(
        x_ptr, w_ptr, b_ptr, pos_ptr, used_ptr, N, D, F, stride_x, stride_wd, stride_wf,
        MASK, True, EVEN_D, TMA, BLOCK_N, BLOCK_F, BLOCK_D, GROUP_N,
    )  # fmt: skip
    cols = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    if RELU:
        acts = tl.where(acts < 0, 0.0, acts)  # unlike maximum, lets NaN through
    acts = masked(acts, mask_ptr, sharpness, pos_ptr, tokens, cols, tile_f, N, F, MASK, BLOCK_F)
    acts_ptrs = acts_ptr + tokens[:, None].to(tl.int64) * F + cols[None, :]
    tl.store(acts_ptrs, acts.to(acts_ptr.dtype.element_ty), mask=(tokens < N)[:, None] & (cols < F)[None, :])


@triton.jit
def fold_kernel(
    w_ptr, b_ptr, center_ptr, out_ptr,
    D, RUN, stride_wd, stride_wf,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """b_enc - center @ W_enc [F] in float32, the bias that centres x; each RUN of latents has its own center [D]. One
    program per BLOCK_F latents of a run."""
    # [BLOCK_F] offsets in the run, and latents
    offsets = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    cols = tl.program_id(1) * RUN + offsets
    center_ptr += tl.program_id(1) * D
    # [BLOCK_F, BLOCK_D] products W_enc * center, summed over columns at the end
    acc = tl.zeros((BLOCK_F, BLOCK_D), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)
        center = tl.load(center_ptr + depth, mask=depth < D, other=0.0).to(tl.float32)
        w_ptrs = w_ptr + cols[:, None].to(tl.int64) * stride_wf + depth[None, :].to(tl.int64) * stride_wd
        w = tl.load(w_ptrs, mask=(offsets < RUN)[:, None] & (depth < D)[None, :], other=0.0)
        acc += w.to(tl.float32) * center[None, :]
    b = tl.load(b_ptr + cols, mask=offsets < RUN, other=0.0).to(tl.float32)
    tl.store(out_ptr + cols, b - tl.sum(acc, 1), mask=offsets < RUN)


class Operands(NamedTuple):
    """Kernel arguments of an encoder. x stands in for absent tensors, which are never read."""

    x: Tensor
    W_enc: Tensor
    bias: Tensor  # float32, with the centre folded in
    mask: Tensor
    pos: Tensor
    used: Tensor
    sharpness: float
    MASK: int
    options: dict[str, Any]  # launch options

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.W_enc, self.bias, self.mask, self.pos, self.used

    @property
    def tiled(self) -> tuple[Any, ...]:
        """`tensors` for kernels over tiles, with descriptors of x and W_enc if they are loaded through TMA."""
        if not self.options["TMA"]:
            return self.tensors
        blocks = ((self.x, "BLOCK_N"), (self.W_enc.T, "BLOCK_F"))
        descriptors = (
            TensorDescriptor(rows, rows.shape, [rows.shape[1], 1], [self.options[block], self.options["BLOCK_D"]])
            for rows, block in blocks
        )
        return *descriptors, *self.tensors[2:]

    @property
    def numbers(self) -> tuple[float, ...]:
        (n, d), f = self.x.shape, self.W_enc.shape[1]
        return n, d, f, self.sharpness, self.x.stride(0), *self.W_enc.stride()

    @property
    def grid(self) -> tuple[int]:
        n, f = len(self.x), self.W_enc.shape[1]
        return (triton.cdiv(n, self.options["BLOCK_N"]) * triton.cdiv(f, self.options["BLOCK_F"]),)

    @property
    def settings(self) -> dict[str, Any]:
        return dict(MASK=self.MASK, EVEN_D=self.x.shape[1] % self.options["BLOCK_D"] == 0, **self.options)


def may_use_tma(rows: Tensor) -> bool:
    """Return whether tiles of `rows` can be loaded through a descriptor. Rows with gaps would do for the hardware, but
    drivers for Blackwell have had errors with small tensors that are not dense."""
    is_aligned = rows.data_ptr() % 16 == 0 and rows.shape[1] * rows.element_size() % 16 == 0
    return TensorDescriptor is not None and rows.is_contiguous() and is_aligned and rows.numel() > 0


def operands(config: str, inputs: EncoderInputs) -> Operands:
    """Prepare the arguments: unit strides, `center` folded into the bias, a hard mask as bits. Options are those of
    `config`, or of its small tiles where loads are element by element (not for fp8, which is padded)."""
    x, W_enc, b_enc, center, mask, pos = inputs
    x = x if x.stride(1) == 1 else x.contiguous()
    W_enc = W_enc if 1 in W_enc.stride() else W_enc.contiguous()
    options, tma = launch_options(config, x), may_use_tma(x) and may_use_tma(W_enc.T)
    in_vectors = x.shape[1] % options["BLOCK_D"] == 0 or x.element_size() == 1 or (tma and options["TMA"])
    if x.dtype == torch.float32 or not in_vectors:
        options = launch_options(f"{config}_small", x)
    options["TMA"] = int(tma and options["TMA"])
    bias = b_enc.float().contiguous()
    if center is not None:
        (d, f), bias = W_enc.shape, torch.empty_like(bias)
        latents_per_center, fold_options = f * d // center.numel(), launch_options("fold", x)
        launch_kernel(
            fold_kernel, (triton.cdiv(latents_per_center, fold_options["BLOCK_F"]), f // latents_per_center),
            W_enc, b_enc.contiguous(), center.contiguous(), bias, d, latents_per_center, *W_enc.stride(),
            **fold_options,
        )  # fmt: skip
    kind, mask_tensor, used, sharpness = NO_MASK, x, x, 0.0
    if isinstance(mask, GaussianMask):
        kind, mask_tensor, sharpness = GAUSSIAN, mask.centre.float().contiguous(), mask.sharpness
    elif mask is not None and mask.dtype == torch.bool:
        kind, (mask_tensor, used) = BITS, hard(mask, options["BLOCK_F"])
    elif mask is not None:
        kind, mask_tensor = TABLE, mask.contiguous()
    pos = x if mask is None or pos is None else pos.contiguous()
    if isinstance(mask, Tensor):
        pos = pos.clamp(0, len(mask) - 1)  # so that kernels never read outside of the mask
    return Operands(x, W_enc, bias, mask_tensor, pos, used, sharpness, kind.value, options)


_hard_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def hard(mask: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Return a bool mask [T, F] as bits int32 [T, F / 32], and `used` of `is_empty`. Cached until it is modified."""
    version = None if mask.is_inference() else mask._version
    cached = _hard_masks.get(mask)
    if cached is None or cached[0] != (version, tile) or version is None:
        t, f = mask.shape
        bit_values = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
        octets = torch.nn.functional.pad(mask, (0, -f % 32)).view(torch.uint8).view(t, -1, 8)
        words = octets.mul(bit_values).sum(2, dtype=torch.uint8).view(torch.int32)  # little-endian
        is_on = torch.nn.functional.pad(mask, (0, -f % tile)).view(t, -1, tile).any(2)
        used = torch.cat([is_on.new_zeros(1, is_on.shape[1]).int(), is_on.cumsum(0, dtype=torch.int32)])
        cached = _hard_masks[mask] = (version, tile), words, used
    return cached[1:]


def encode(inputs: EncoderInputs, relu: bool = True) -> Tensor:
    launch, x = operands("encode", inputs), inputs.x
    acts = torch.empty((len(x), inputs.W_enc.shape[1]), dtype=x.dtype, device=x.device)
    launch_kernel(encode_kernel, launch.grid, acts, *launch.tiled, *launch.numbers, RELU=relu, **launch.settings)
    return acts
