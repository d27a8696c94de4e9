"""Kernels of encode_sparse to compile, launch settings to tune, and calls to time."""

from functools import cache, partial
from typing import Any

from ..bench_types import CallOf, Launch, Op, OpBench, Spec, Step, Trial
from ..configs import CONFIGS, FP8_SINCE
from ..encode.bench import SMALL_TILES, TILES, product, product_spec
from ..fp8 import Fp8Rows
from ..selection import candidates_per_tile
from . import cost, encode_threshold, encode_topk

TILE = CONFIGS[min(CONFIGS)]["encode_topk"]["BLOCK_F"]


def _candidates(dtype: str, keep: int, aux_keep: int = 0, *, threshold: bool = False, **variant: Any) -> Spec:
    config = "encode_topk" if dtype in ("bf16", "fp32") else "encode_fp8"
    spec = product_spec(
        "encode_sparse.candidates_kernel", config, dtype, SCALED=config == "encode_fp8", HAS_THRESHOLD=threshold,
        HAS_AUX_LATENTS=aux_keep > 0, EVEN_F=not variant.get("ragged", False), KEEP=keep, AUX_KEEP=aux_keep, **variant,
    )  # fmt: skip
    pointers = dict(aux_latents="u8", candidates="i32", aux_candidates="i32")
    return spec._replace(pointers=spec.pointers | pointers | dict.fromkeys(("x_scale", "w_scale", "threshold"), "fp32"))


def _persistent(keep: int, aux_keep: int = 0, *, threshold: bool = False) -> Spec:
    pointers = dict(x="bf16[64, BLOCK_D]", w=f"bf16[{TILE}, BLOCK_D]", b="fp32", threshold="fp32", aux_latents="u8")
    pointers |= dict(candidates="i32", aux_candidates="i32")
    flags = dict(HAS_THRESHOLD=threshold, HAS_AUX_LATENTS=aux_keep > 0, EVEN_F=True, KEEP=keep, AUX_KEEP=aux_keep)
    kernel = "encode_sparse.persistent.persistent_candidates_kernel"
    return Spec(kernel, "encode_topk_persistent", pointers, flags | {"BLOCK_F": TILE}, only=90)


def _second_pass(kernel: str, pointers: dict[str, str], **flags: int) -> Spec:
    config = kernel.partition(".")[2]
    pointers |= dict(candidates="i32", values="fp32", indices="i32", unsure="i8", cut="i64", above="i64", equal="i64")
    pointers |= dict.fromkeys(("starts", "least", "block_tiles", "block_ends", "offsets"), "i64")
    pointers |= dict.fromkeys(("tiles", "tokens", "packed"), "i32")
    flags |= dict(KEEP=4) if config == "unsure" else dict(KEEP=4, BLOCK_F=TILE)
    unit = ("stride_wd",) if "w" in pointers else ()
    return Spec(f"encode_sparse.{kernel}_kernel", config, pointers, flags, hot=config == "merge", unit=unit)


def _products(dtype: str) -> dict[str, Spec]:
    pointers = dict(x=dtype, w=dtype, b="fp32", mask="i32", pos="i64", aux_latents="u8", threshold="fp32", rows="i64")
    return {
        "rescan": _second_pass("merge.rescan", pointers, MASK=1, HAS_AUX_LATENTS=False, BLOCK_K=64),
        "recompute": _second_pass("ragged.recompute", pointers, MASK=1, HAS_THRESHOLD=False, EVEN_D=True),
        "recompute, thresholds": _second_pass("ragged.recompute", pointers, MASK=2, HAS_THRESHOLD=True, EVEN_D=False),
    }


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
    } | _products(dtype)


UNSURE = 0.9  # tiles of a token that may drop an entry of a ragged code: simulated, L0 = K
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
    return [_candidates_launch(step, variant, stored * (keep + aux_keep)), *selection]


def _candidates_launch(step: Step, variant: str, output: float) -> Launch:
    plain, persistent = step.config["encode_topk"], step.config["encode_topk_persistent"]
    if not persistent["USE"]:
        return product(step, f"candidates{variant} bf16", "encode_topk", output)
    step = step._replace(config={**step.config, "encode_topk": {**plain, **persistent}})
    launch = product(step, f"candidates, persistent{variant}", "encode_topk", output)
    depth = launch.trips["product.start"]
    trips = {"select_tiles.tile": 1, "select_tiles.step": depth, "load_tiles.tile": 1, "load_tiles.start": depth}
    return launch._replace(trips=trips, groups=2)


def _merge_launches(step: Step, keep: int, k: int, stage: str) -> list[Launch]:
    n, d, f, *_ = step
    tiles, depth = -(-f // TILE), step.blocks(d, "rescan", "BLOCK_D")
    return [
        # two bisections of keys of 24 bits, which usually end early
        Launch(stage, "merge", n, {"cut_among.high": 2 * 16}, dram=4 * n * tiles * keep + 8 * n * k, waits=2.5),
        Launch(
            stage, "rescan bf16", RESCANNED * n,
            {"rescan_kernel.first": 1, "rescan_kernel.tile": 1, "rescan_kernel.largest": 1, "dropped_by.start": depth},
            l2=RESCANNED * n * 2 * d * TILE, waits=6 + depth, longest=6 + depth,
        ),
    ]  # fmt: skip


def _ragged_launches(step: Step, keep: int) -> list[Launch]:
    """Describe the passes that find the cut of a batch, count, and fill the code, and the tiles computed again."""
    n, d, f, k, *_ = step
    tiles, candidates = -(-f // TILE), 4 * n * -(-f // TILE) * keep
    pairs, block = UNSURE * n, step.config["recompute"]["BLOCK_N"]
    programs = pairs / block + tiles / 2  # the last block of a tile is half empty
    blocks = step.blocks(tiles * keep, "above_cut", "BLOCK")

    def passes(name: str, count: int, rows: float) -> Launch:
        trips = {"above_cut_kernel.start": blocks + (rows > 0)}
        dram = count * (candidates + 4 * rows * TILE)
        return Launch(
            "encode", f"above_cut, {name}", n, trips, dram=dram, waits=2 + blocks + (rows > 0), launches=count
        )

    is_batch = step.activation == "batchtopk"
    return [
        *([passes("digits", 3, 0), passes("digits", 3, pairs)] if is_batch else []),
        Launch(
            "encode", "unsure", n, {"unsure_kernel.start": step.blocks(tiles, "unsure", "BLOCK_T")},
            dram=2 * candidates, waits=1, launches=2,
        ),
        Launch("encode", "torch: sort by tile", dram=150 * n * k / keep, launches=24),
        Launch(
            "encode", "recompute bf16", programs, {"add_product.start": step.blocks(d, "recompute", "BLOCK_D")},
            dram=2 * d * f + 4 * pairs * TILE, output=4 * pairs * TILE, l2=2 * d * programs * (block + TILE),
            tensor_flops=2 * programs * block * TILE * d, waits=3,
        ),
        passes("count", 1, pairs), passes("fill", 1, pairs),
        Launch("encode", "torch: cut", dram=100 * n, launches=12 + 13 * 6 * is_batch),
    ]  # fmt: skip


@cache  # so that equal calls are the same object
def _topk(fp8: bool = False, **settings: bool) -> CallOf:
    def call_of(i: Any) -> Any:
        encoder = Fp8Rows.of(i.W_enc.T) if fp8 else None
        call = partial(encode_topk, i.x, i.W_enc, i.b_enc, i.k, center=i.b_dec, fp8=encoder, **settings)
        return lambda: call()[0]

    return call_of


_batch_topk = _topk(across_batch=True)
_threshold = lambda i: partial(
    encode_threshold, i.x, i.W_enc, i.b_enc, i.threshold.expand(len(i.W_dec)), center=i.b_dec, expected=i.k
)
_cost = lambda n, d, f, k, **settings: cost(n, d, f, **settings)
# encode_topk's BLOCK_F is not tuned: a candidate has 7 bits for its column.
BENCH = OpBench(
    "encode",
    ops={
        "encode_topk": Op("forward", _topk(), [_cost], _cost),
        "encode_batch_topk": Op("forward", _batch_topk, [_cost], _cost),
        "encode_threshold": Op("forward", _threshold, [_cost], _cost),
    },
    trials={
        "encode_topk": Trial("bf16", _topk(), TILES),
        "encode_topk_persistent": Trial(
            "bf16", _topk(), dict(USE=(1,), GROUP_N=(8, 16), STAGES=(4, 5)), ("candidates_kernel",)
        ),
        "encode_topk_small": Trial("fp32", _topk(), SMALL_TILES),
        "encode_fp8": Trial("bf16", _topk(fp8=True), {**TILES, "BLOCK_D": (64, 128)}),
        "merge": Trial("bf16", _topk(), dict(num_warps=(1, 2, 4))),
        "unsure": Trial("bf16", _batch_topk, dict(BLOCK_T=(512, 1024, 2048), num_warps=(2, 4, 8))),
        "recompute": Trial(
            "bf16", _batch_topk, dict(BLOCK_N=(32, 64, 128), BLOCK_D=(32, 64), num_warps=(4, 8), num_stages=(3, 4))
        ),
        "above_cut": Trial("bf16", _batch_topk, dict(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8))),
        "rescan": Trial("bf16", _topk(), dict(BLOCK_D=(32, 64, 128), BLOCK_T=(512, 1024, 2048), num_warps=(4, 8))),
    },
    specs=_specs,
    launches=_launches,
    fixed_specs={
        "candidates fp8": _candidates("fp8e4nv", 4)._replace(since=FP8_SINCE),
        "candidates, persistent": _persistent(4),
        "candidates, persistent, 5 of a tile": _persistent(5),
        "candidates, persistent, thresholds": _persistent(4, threshold=True),
        "candidates, persistent, two codes": _persistent(4, 4),
        "merge": _second_pass("merge.merge", {}, ALL=False, BLOCK_T=512, BLOCK=256),
        "unsure": _second_pass("ragged.unsure", {}, FILL=True),
    } | {
        f"above_cut, {name}": _second_pass("ragged.above_cut", dict(rows="i32"), MODE=mode, SHIFT=8, HAS_ROWS=True)
        for mode, name in enumerate(("digits", "count", "fill"))
    },
)  # fmt: skip
