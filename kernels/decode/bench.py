"""Kernels of decode to compile, launch settings to tune, and calls to time."""

from functools import partial

from ..bench_types import Grid, Launch, Op, OpBench, Spec, Step, Trial
from ..cost import Cost
from ..select import select_batch_topk
from . import cost, decode, decode_values_grad, reconstruct


def _specs(dtype: str) -> dict[str, Spec]:
    specs = {}
    pointers = dict(offsets="i64", indices="i32", values=dtype, w=dtype, b="fp32", target=dtype, grad=dtype, out=dtype)
    sums = dict(values="fp32", residual=dtype, error="fp32", projection="fp32", mean="fp32", spread="fp32")
    for ragged, kind in ((False, "fixed K"), (True, "ragged")):
        flags, config = dict(RAGGED=ragged), "reconstruct_loop" if ragged else "reconstruct"
        specs |= {
            f"decode, {kind}": Spec("decode.decode_kernel", "decode", pointers, flags | dict(RESIDUAL=True)),
            f"reconstruct, {kind}": Spec(
                "decode.reconstruct_kernel", config, pointers | sums, flags | dict(HAS_MEAN=True, ONCE=not ragged)
            ),
            f"values_grad, {kind}": Spec("decode.values_grad_kernel", "values_grad", pointers, flags),
        }
    return specs


def _reconstruct_launches(step: Step, stage: str, k: int, ragged: bool) -> list[Launch]:
    """Describe `reconstruct` of k entries per token. AuxK's tiles of columns are added by torch."""
    n, d, f, *_ = step
    once = not ragged and k <= step.config["reconstruct"]["BLOCK_K"]
    config = "reconstruct" if once else "reconstruct_loop"
    tiles, blocks = step.blocks(d, config, "BLOCK_D"), step.blocks(k, config, "BLOCK_K")
    gathers = 1 if once else 2
    parts = 4 * n * (k + 1)
    # Programs that run together read the same columns of W_dec, which fit in L2.
    return [
        Launch(
            stage, f"reconstruct, {'fixed K' if once else 'ragged'} bf16", n * tiles,
            {} if once else {"reconstruct_kernel.start": 2 * blocks},
            dram=2 * d * (f + 2 * n) + tiles * (parts + 4 * n) + 8 * n * k, gathered=gathers * 2 * n * k * d,
            waits=1.5 if once else 0.5 + 2 * blocks,
        ),
        *([Launch(stage, "torch: sums over columns", dram=(tiles + 1) * parts, launches=2)] if stage == "aux" else []),
    ]  # fmt: skip


def _launches(step: Step) -> list[Launch]:
    aux = _reconstruct_launches(step, "aux", step.aux_k, False) if step.aux_k else []
    return _reconstruct_launches(step, "decode", step.k, step.ragged) + aux


_decode = lambda i: partial(decode, i.code, i.W_dec, i.b_dec, target=i.x)
_reconstruct = lambda i, code=None: partial(reconstruct, code or i.code, i.W_dec, i.b_dec, i.x)
_reconstruct_ragged = lambda i: _reconstruct(i, select_batch_topk(i.acts, len(i.x) * i.k))
_values_grad = lambda i: partial(decode_values_grad, i.code, i.W_dec, i.reconstruction.residual)
_cost = lambda n, d, f, k, **settings: cost(n, d, f, n * k, **settings)


def _reconstruct_cost(n: int, d: int, f: int, k: int, *, itemsize: int, backend: str) -> Cost:
    # Projections are a second multiply-add on rows that were already gathered.
    flops, traffic = cost(n, d, f, n * k, itemsize=itemsize, backend=backend)
    return Cost(2 * flops, traffic + 4 * n * k)


_GATHERS: Grid = dict(BLOCK_D=(256, 512), STAGES=(2, 3), num_warps=(4, 8), BLOCK_K=(4, 8, 16))
_LOOP: Grid = dict(BLOCK_K=(4, 8, 16), BLOCK_D=(128, 256, 512), num_warps=(4, 8))
# reconstruct's BLOCK_K is not tuned: it decides which codes use reconstruct_loop.
BENCH = OpBench(
    "decode",
    ops={
        "decode": Op("forward", _decode, [_cost], _cost),
        "reconstruct": Op("forward", _reconstruct, [_reconstruct_cost], _cost),
        "decode_values_grad": Op("backward", _values_grad, [_cost], _cost),
    },
    trials={
        "decode": Trial("bf16", _decode, _GATHERS),
        "reconstruct": Trial("bf16", _reconstruct, dict(BLOCK_D=(64, 128, 256, 512), num_warps=(4, 8, 16))),
        "reconstruct_loop": Trial("bf16", _reconstruct_ragged, _LOOP),
        "values_grad": Trial("bf16", _values_grad, _GATHERS),
    },
    specs=_specs,
    launches=_launches,
)
