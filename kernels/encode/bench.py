"""Kernels of encode to compile, launch settings to tune, and calls to time."""

from functools import partial
from typing import Any

from ..bench_types import Grid, Launch, Op, OpBench, Spec, Step, Trial
from . import cost, encode

TILES: Grid = dict(BLOCK_D=(32, 64), GROUP_N=(8, 16), num_warps=(4, 8), num_stages=(3, 4), maxnreg=(128, 255))
SMALL_TILES: Grid = dict(BLOCK_N=(64, 128), BLOCK_D=(16, 32), num_warps=(4, 8))


def product_spec(kernel: str, config: str, dtype: str, *, mask: int = 0, ragged: bool = False, **flags: int) -> Spec:
    """Describe a kernel around x @ W_enc. `mask` is a kind of mask as numbered in triton.py."""
    pointers = dict(x=f"{dtype}[BLOCK_N, BLOCK_D]", w=f"{dtype}[BLOCK_F, BLOCK_D]", b="fp32", acts=dtype)
    pointers |= dict(mask="i32" if mask == 1 else "fp32", pos="i64", used="i32")
    if dtype == "fp32" or ragged:
        config += "_small"
    flags |= dict(MASK=mask, EVEN_D=not ragged)
    return Spec(kernel, config, pointers, flags, hot=not ragged, unit=("stride_wd",), aligned=not ragged)


def _specs(dtype: str) -> dict[str, Spec]:
    def encode_spec(**variant: Any) -> Spec:
        return product_spec("encode.encode_kernel", "encode", dtype, RELU=True, **variant)

    fold = dict(w=dtype, b="fp32", center="fp32", out="fp32")
    return {
        "encode": encode_spec(),
        "encode, hard mask": encode_spec(mask=1),
        "encode, soft mask": encode_spec(mask=2),
        "encode, unaligned": encode_spec(mask=2, ragged=True),
        "fold": Spec("encode.fold_kernel", "fold", fold, unit=("stride_wd",)),
    }


def product(step: Step, name: str, config: str, output: float) -> Launch:
    """Describe a launch of a kernel around x @ W_enc that writes `output` bytes."""
    n, d, f, *_ = step
    tiles_n, tiles_f = step.blocks(n, config, "BLOCK_N"), step.blocks(f, config, "BLOCK_F")
    block = step.config[config]
    passes = -(-tiles_n // block["GROUP_N"])  # over W_enc, each for GROUP_N token tiles that L2 holds
    return Launch(
        "encode", name, tiles_n * tiles_f, {"add_product.start": step.blocks(d, config, "BLOCK_D")},
        dram=2 * d * (passes * f + n) + output, output=output,
        l2=2 * d * tiles_n * tiles_f * (block["BLOCK_N"] + block["BLOCK_F"]),
        tensor_flops=2 * n * d * f, waits=1,
    )  # fmt: skip


def _launches(step: Step) -> list[Launch]:
    trips = {"fold_kernel.start": step.blocks(step.d, "fold", "BLOCK_D")}
    programs, waits = step.blocks(step.f, "fold", "BLOCK_F"), 1 + trips["fold_kernel.start"]
    return [Launch("encode", "fold bf16", programs, trips, dram=2 * step.d * step.f + 8 * step.f, waits=waits)]


_cost = lambda n, d, f, k, **settings: cost(n, d, f, **settings)
_encode = lambda i: partial(encode, i.x, i.W_enc, i.b_enc, center=i.b_dec)
BENCH = OpBench(
    "encode",
    ops={"encode": Op("forward", _encode, [_cost], _cost)},
    trials={
        "encode": Trial("bf16", _encode, {**TILES, "BLOCK_F": (128, 256)}),
        "encode_small": Trial("fp32", _encode, {**SMALL_TILES, "BLOCK_F": (64, 128)}),
        "fold": Trial("bf16", _encode, dict(BLOCK_F=(4, 8, 16), BLOCK_D=(256, 512), num_warps=(4, 8))),
    },
    specs=_specs,
    launches=_launches,
)
