"""Kernels of select to compile, launch settings to tune, and calls to time."""

from functools import partial

from ..bench_types import Op, OpBench, Spec, Trial
from ..cost import Cost
from . import cost, select_batch_topk, select_threshold, select_topk


def _specs(dtype: str) -> dict[str, Spec]:
    pointers = dict(acts=dtype, values=dtype, indices="i32", threshold="fp32")
    pointers |= dict.fromkeys(("cut", "counts", "above", "equal", "offsets"), "i64")

    def spec(kernel: str, config: str = "threshold", **flags: int) -> Spec:
        return Spec(f"select.{kernel}_kernel", config, pointers, flags, unit=("stride_f",))

    return {
        "topk": spec("topk", "topk"),
        **{f"batch {name}": spec("batch", MODE=mode, SHIFT=0) for mode, name in enumerate(("digits", "count", "fill"))},
        "threshold count": spec("count", PER_LATENT=True),
        "threshold fill": spec("fill", PER_LATENT=True),
    }


_topk = lambda i: partial(select_topk, i.acts, i.k)
_batch_topk = lambda i: partial(select_batch_topk, i.acts, len(i.x) * i.k)
# The capacity suffices for all entries, and nothing waits for the device.
_threshold = lambda i: partial(select_threshold, i.acts, float(i.threshold), 2 * i.code.values.numel())
_cost = lambda n, d, f, k, **settings: cost(n, f, k, **settings)
# Reads acts twice: to count and to collect.
_threshold_cost = lambda n, d, f, k, itemsize, backend: Cost(
    0.0, 2 * itemsize * n * f + n * k * (itemsize + 4) + 16 * n
)


def _both(i):
    calls = _threshold(i), _batch_topk(i)
    return lambda: [call() for call in calls]


_GRID = dict(BLOCK_F=(1024, 2048, 4096, 8192), num_warps=(4, 8, 16))
BENCH = OpBench(
    "select",
    ops={
        "select_topk": Op("forward", _topk, [_cost], _cost),
        "select_batch_topk": Op("forward", _batch_topk, [_cost], _cost),
        "select_threshold": Op("forward", _threshold, [_threshold_cost]),
    },
    trials={"topk": Trial("bf16", _topk, _GRID), "threshold": Trial("bf16", _both, _GRID)},
    specs=_specs,
)
