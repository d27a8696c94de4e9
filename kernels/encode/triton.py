"""encode as a Triton kernel: a GEMM that adds the bias, rectifies and masks in its epilogue. `encode_sparse` shares it."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..backend import launch_options
from ..encoder_inputs import EncoderInputs
from ..masks import GaussianMask

# kinds of masks: bits, 32 latents a word, [T, F / 32]; weights [T, F]; centres [F] of Gaussians
NO_MASK, BITS, TABLE, GAUSSIAN = (tl.constexpr(kind) for kind in range(4))


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
def is_empty(used_ptr, pos_ptr, tokens, tile_f, N, F, BLOCK_F: tl.constexpr):
    """Whether a hard mask is off for the whole tile. `used` [T + 1, tiles] counts the positions below each at which some
    latent of the tile is on; the tile's tokens are taken to be at all positions from its least to its greatest."""
    tiles_f = tl.cdiv(F, BLOCK_F)
    positions = tl.load(pos_ptr + tokens, mask=tokens < N, other=0).to(tl.int64)
    first = tl.min(tl.where(tokens < N, positions, 0x7FFFFFFF), 0)
    last = tl.max(positions, 0)
    return tl.load(used_ptr + first * tiles_f + tile_f) == tl.load(used_ptr + (last + 1) * tiles_f + tile_f)


@triton.jit
def preactivations(
    x_ptr, w_ptr, b_ptr, pos_ptr, used_ptr, x_scale_ptr, w_scale_ptr,
    N, D, F, stride_x, stride_wd, stride_wf,
    MASK: tl.constexpr, SCALED: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """x @ W_enc + b for this program's tile, in float32, with its tokens, columns and place among the tiles of latents. With
    SCALED, x and W_enc have a scale for each row and latent. Where a hard mask is off for all of the tile, no product."""
    tile_n, tile_f = tile_of(tl.program_id(0), N, F, BLOCK_N, BLOCK_F, GROUP_N)
    tokens = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    length = D
    if MASK == BITS:
        length = tl.where(is_empty(used_ptr, pos_ptr, tokens, tile_f, N, F, BLOCK_F), 0, D)  # no turn of the main loop
    depth = tl.arange(0, BLOCK_D)
    # Rows and columns past the end wrap around instead of being masked in the main loop; they are never stored.
    tokens_in = (tokens % N).to(tl.int64)
    cols_in = (cols % F).to(tl.int64)
    x_ptrs = x_ptr + tokens_in[:, None] * stride_x + depth[None, :]
    w_ptrs = w_ptr + depth[:, None].to(tl.int64) * stride_wd + cols_in[None, :] * stride_wf
    acc = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    for start in range(0, length, BLOCK_D):
        if EVEN_D:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=depth[None, :] < length - start, other=0.0)
            w = tl.load(w_ptrs, mask=depth[:, None] < length - start, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_D
        w_ptrs += BLOCK_D * stride_wd
    if SCALED:
        x_scale = tl.load(x_scale_ptr + tokens, mask=tokens < N, other=0.0)
        acc *= x_scale[:, None] * tl.load(w_scale_ptr + cols, mask=cols < F, other=0.0)[None, :]
    bias = tl.load(b_ptr + cols, mask=cols < F, other=0.0)
    return acc + bias[None, :], tokens, cols, tile_f


@triton.jit
def masked(acts, mask_ptr, sharpness, pos_ptr, tokens, cols, tile_f, N, F, MASK: tl.constexpr, BLOCK_F: tl.constexpr):
    """acts * mask[pos] for a tile."""
    if MASK != NO_MASK:
        positions = tl.load(pos_ptr + tokens, mask=tokens < N, other=0).to(tl.int64)
        if MASK == BITS:
            WORDS: tl.constexpr = BLOCK_F // 32
            words_per_position = tl.cdiv(F, 32)
            word = tile_f * WORDS + tl.arange(0, WORDS)
            word_ptrs = mask_ptr + positions[:, None] * words_per_position + word[None, :]
            words = tl.load(word_ptrs, mask=(tokens < N)[:, None] & (word < words_per_position)[None, :], other=0)
            bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
            acts *= tl.reshape(bits, acts.shape).to(tl.float32)
        elif MASK == TABLE:
            mask_ptrs = mask_ptr + positions[:, None] * F + cols[None, :]
            acts *= tl.load(mask_ptrs, mask=(tokens < N)[:, None] & (cols < F)[None, :], other=0).to(tl.float32)
        else:  # GAUSSIAN
            centre = tl.load(mask_ptr + cols, mask=cols < F, other=0.0)
            distance = positions.to(tl.float32)[:, None] - centre[None, :]
            acts *= tl.exp(-sharpness * distance * distance)
    return acts


@triton.jit
def encode_kernel(
    x_ptr, w_ptr, b_ptr, mask_ptr, pos_ptr, used_ptr, acts_ptr,
    N, D, F, sharpness, stride_x, stride_wd, stride_wf,
    RELU: tl.constexpr, MASK: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    acts, tokens, cols, tile_f = preactivations(
        x_ptr, w_ptr, b_ptr, pos_ptr, used_ptr, x_ptr, w_ptr, N, D, F, stride_x, stride_wd, stride_wf,
        MASK, False, EVEN_D, BLOCK_N, BLOCK_F, BLOCK_D, GROUP_N,
    )  # fmt: skip
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
    """The bias that centres x: b_enc - center @ W_enc, [F] in float32; each RUN of latents has a centre of its own."""
    offsets = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    cols = tl.program_id(1) * RUN + offsets
    center_ptr += tl.program_id(1) * D
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
    """What the kernels take: the tensors that stand for absent ones are never read."""

    x: Tensor
    W_enc: Tensor
    bias: Tensor  # float32, with the centre folded in
    mask: Tensor
    pos: Tensor
    used: Tensor
    sharpness: float
    MASK: int
    options: dict[str, Any]  # of the launch

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.W_enc, self.bias, self.mask, self.pos, self.used

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


def operands(config: str, inputs: EncoderInputs) -> Operands:
    """Unit strides, `center` folded into the bias, a hard mask in bits; launched as `config` says, and in small tiles where
    it takes them (fp8 doesn't)."""
    x, W_enc, b_enc, center, mask, pos = inputs
    options = launch_options(config, x)
    if x.dtype == torch.float32 or (x.element_size() > 1 and x.shape[1] % options["BLOCK_D"]):
        options = launch_options(f"{config}_small", x)
    x = x if x.stride(1) == 1 else x.contiguous()
    W_enc = W_enc if 1 in W_enc.stride() else W_enc.contiguous()
    bias = b_enc.float().contiguous()
    if center is not None:
        (d, f), bias = W_enc.shape, torch.empty_like(bias)
        latents_per_center, fold_options = f * d // center.numel(), launch_options("fold", x)
        fold_kernel[(triton.cdiv(latents_per_center, fold_options["BLOCK_F"]), f // latents_per_center)](
            W_enc, b_enc.contiguous(), center.contiguous(), bias, d, latents_per_center, *W_enc.stride(), **fold_options
        )
    kind, mask_tensor, used, sharpness = NO_MASK, x, x, 0.0
    if isinstance(mask, GaussianMask):
        kind, mask_tensor, sharpness = GAUSSIAN, mask.centre.float().contiguous(), mask.sharpness
    elif mask is not None and mask.dtype == torch.bool:
        kind, (mask_tensor, used) = BITS, hard(mask, options["BLOCK_F"])
    elif mask is not None:
        kind, mask_tensor = TABLE, mask.contiguous()
    pos = x if mask is None or pos is None else pos.contiguous()
    return Operands(x, W_enc, bias, mask_tensor, pos, used, sharpness, kind.value, options)


_hard: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def hard(mask: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """A bool mask [T, F] in bits, int32 [T, F / 32], and what `is_empty` reads of it; kept until the mask is changed."""
    version = None if mask.is_inference() else mask._version
    cached = _hard.get(mask)
    if cached is None or cached[0] != (version, tile) or version is None:
        t, f = mask.shape
        bit_values = torch.tensor([1 << bit for bit in range(31)] + [-(1 << 31)], device=mask.device)
        words = torch.nn.functional.pad(mask, (0, -f % 32)).view(t, -1, 32).mul(bit_values).sum(2).int()
        is_on = torch.nn.functional.pad(mask, (0, -f % tile)).view(t, -1, tile).any(2)
        used = torch.cat([is_on.new_zeros(1, is_on.shape[1]).int(), is_on.cumsum(0, dtype=torch.int32)])
        cached = _hard[mask] = (version, tile), words, used
    return cached[1:]


def encode(inputs: EncoderInputs, relu: bool = True) -> Tensor:
    launch, x = operands("encode", inputs), inputs.x
    acts = torch.empty((len(x), inputs.W_enc.shape[1]), dtype=x.dtype, device=x.device)
    encode_kernel[launch.grid](*launch.tensors, acts, *launch.numbers, RELU=relu, **launch.settings)
    return acts
