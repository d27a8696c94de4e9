"""Kernels of encode_sparse to compile, launch settings to tune, and calls to time."""

from functools import cache, partial
from typing import Any

from ..bench_types import CallOf, Launch, Op, OpBench, Spec, Step, Trial
from ..configs import CONFIGS, FP8_SINCE
from ..encode.bench import SMALL_TILES, TILES, product, product_spec
from ..selection import candidates_per_tile
from . import cost, encode_threshold, encode_topk

TILE = CONFIGS[min(CONFIGS)]["encode_topk"]["BLOCK_F"]


def _candidates(dtype: str, keep: int, aux_keep: int = 0, *, threshold: bool = False, **variant: Any) -> Spec:
    config = "encode_topk" if dtype in ("bf16", "fp32") else "encode_fp8"
    spec = product_spec(
        "encode_sparse.candidates_kernel", config, dtype, SCALED=config == "encode_fp8", HAS_THRESHOLD=threshold,
        HAS_AUX_LATENTS=aux_keep > 0, KEEP=keep, AUX_KEEP=aux_keep, **variant,
    )  # fmt: skip
    pointers = dict(aux_latents="u8", candidates="i32", aux_candidates="i32")
    return spec._replace(pointers=spec.pointers | pointers | dict.fromkeys(("x_scale", "w_scale", "threshold"), "fp32"))


def _second_pass(dtype: str, config: str, **flags: int) -> Spec:
    pointers = dict(x=dtype, w=dtype, b="fp32", mask="i32", pos="i64", aux_latents="u8", threshold="fp32")
    pointers |= dict(candidates="i32", values="fp32", indices="i32", unsure="i8")
    pointers |= dict.fromkeys(("cut", "least", "above", "equal"), "i64")
    flags |= dict(MASK=1, KEEP=4, BLOCK_F=TILE)
    return Spec(f"encode_sparse.{config}_kernel", config, pointers, flags, hot=False, unit=("stride_wd",))


def _specs(dtype: str) -> dict[str, Spec]:
    return {
        "candidates": _candidates(dtype, 4),
        "candidates, 5 of a tile": _candidates(dtype, 5),
        "candidates, 8 of a tile": _candidates(dtype, 8),
        "candidates, thresholds": _candidates(dtype, 4, threshold=True),
        "candidates, hard mask": _candidates(dtype, 4, mask=1),
        "candidates, soft mask": _candidates(dtype, 4, mask=2),
        "candidates, Gaussians": _candidates(dtype, 4, mask=3),
        "candidates, two codes": _candidates(dtype, 4, 4),
        "candidates, unaligned": _candidates(dtype, 4, 4, mask=2, ragged=True),
        "rescan": _second_pass(dtype, "rescan", HAS_AUX_LATENTS=False, BLOCK_K=64),
    } | {
        f"above_cut, {name}": _second_pass(dtype, "above_cut", HAS_THRESHOLD=False, MODE=mode, SHIFT=8, RESCAN=True)
        for mode, name in enumerate(("digits", "count", "fill"))
    }


UNSURE = (
    0.9,
    43,
)  # tiles of a token in the mean and at most that may drop an entry of a ragged code: simulated, L0 = K
RESCANNED = 0.005  # share of tokens with such a tile in a TopK step, by `candidates_per_tile`


def _launches(step: Step) -> list[Launch]:
    n, _, f, k = step[:4]
    tile, is_batch = step.config["encode_topk"]["BLOCK_F"], step.activation == "batchtopk"
    keep = candidates_per_tile(f, 2 * k if is_batch else k, tile) or 0
    aux_keep = candidates_per_tile(f, step.aux_k, tile) or 0 if step.aux_k else 0
    variant = ", 5 of a tile" if is_batch else ", thresholds" if step.ragged else ", two codes" if aux_keep else ""
    stored = 4 * n * -(-f // tile)  # bytes of one candidate of each tile
    selection = _ragged_launches(step, keep) if step.ragged else _merge_launches(step, keep, k, "encode")
    if aux_keep:
        selection += _merge_launches(step, aux_keep, step.aux_k, "encode")
    return [product(step, f"candidates{variant} bf16", "encode_topk", stored * (keep + aux_keep)), *selection]


def _merge_launches(step: Step, keep: int, k: int, stage: str) -> list[Launch]:
    n, d, f, *_ = step
    tiles = -(-f // TILE)
    blocks, depth = step.blocks(tiles * keep, "merge", "BLOCK"), step.blocks(d, "rescan", "BLOCK_D")
    kept = 8 * n * k
    return [
        Launch(
            stage, "merge", n, {"kth_largest.start": 3 * blocks, "merge_kernel.start": blocks},
            dram=4 * n * tiles * keep + kept, waits=1 + 2 * blocks,
        ),
        Launch(
            stage, "rescan bf16", RESCANNED * n,
            {"rescan_kernel.first": 1, "rescan_kernel.tile": 1, "rescan_kernel.largest": 1, "dropped_by.start": depth},
            l2=RESCANNED * n * 2 * d * TILE, waits=6 + depth, longest=6 + depth,
        ),
    ]  # fmt: skip


def _ragged_launches(step: Step, keep: int) -> list[Launch]:
    """Describe the passes that find the cut of a batch, count, and fill the code."""
    n, d, f, *_ = step
    tiles, depth = -(-f // TILE), step.blocks(d, "above_cut", "BLOCK_D")
    blocks = step.blocks(tiles * keep, "above_cut", "BLOCK") + step.blocks(tiles, "above_cut", "BLOCK_T")

    def passes(name: str, count: int, unsure: float, most: int) -> Launch:
        trips = {"above_cut_kernel.start": blocks, "above_cut_kernel.tile": unsure, "dropped_by.start": unsure * depth}
        return Launch(
            "encode", f"above_cut, {name} bf16", n, trips, dram=count * 4 * n * tiles * keep,
            l2=count * n * unsure * 2 * d * TILE, waits=2 + blocks + unsure * (depth + 2),
            longest=most * (depth + 2), launches=count,
        )  # fmt: skip

    cuts = [passes("digits", 3, 0, 0), passes("digits", 3, *UNSURE)] if step.activation == "batchtopk" else []
    tail = [passes(name, 1, *UNSURE) for name in ("count", "fill")]
    return [*cuts, *tail, Launch("encode", "torch: cut", dram=100 * n, launches=12 + 13 * 3 * len(cuts))]


@cache  # so that equal calls are the same object
def _topk(**settings: bool) -> CallOf:
    def call_of(i: Any) -> Any:
        call = partial(encode_topk, i.x, i.W_enc, i.b_enc, i.k, center=i.b_dec, **settings)
        return lambda: call()[0]

    return call_of


_threshold = lambda i: partial(
    encode_threshold, i.x, i.W_enc, i.b_enc, i.threshold.expand(len(i.W_dec)), center=i.b_dec, expected=i.k
)
_cost = lambda n, d, f, k, **settings: cost(n, d, f, **settings)
# encode_topk's BLOCK_F is not tuned: a candidate has 7 bits for its column.
BENCH = OpBench(
    "encode",
    ops={
        "encode_topk": Op("forward", _topk(), [_cost], _cost),
        "encode_batch_topk": Op("forward", _topk(across_batch=True), [_cost], _cost),
        "encode_threshold": Op("forward", _threshold, [_cost], _cost),
    },
    trials={
        "encode_topk": Trial("bf16", _topk(), TILES),
        "encode_topk_small": Trial("fp32", _topk(), SMALL_TILES),
        "encode_fp8": Trial("bf16", _topk(fp8=True), {**TILES, "BLOCK_D": (64, 128)}),
        "merge": Trial("bf16", _topk(), dict(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8))),
        "above_cut": Trial(
            "bf16", _topk(across_batch=True), dict(BLOCK_D=(32, 64, 128), BLOCK=(1024, 2048, 4096), num_warps=(4, 8))
        ),
        "rescan": Trial("bf16", _topk(), dict(BLOCK_D=(32, 64, 128), BLOCK_T=(512, 1024, 2048), num_warps=(4, 8))),
    },
    specs=_specs,
    launches=_launches,
    fixed_specs={
        "candidates fp8": _candidates("fp8e4nv", 4)._replace(since=FP8_SINCE),
        "merge": Spec(
            "encode_sparse.merge_kernel", "merge", dict(candidates="i32", values="fp32", indices="i32", unsure="i8"),
            dict(KEEP=4, BLOCK_F=128),
        ),
    },
)  # fmt: skip
