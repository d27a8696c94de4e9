"""Kernels of loss to compile, launch settings to tune, and calls to time."""

from functools import partial

from ..bench_types import POSITIONS, Op, OpBench, Spec, Trial
from . import cost, position_loss


def _specs(dtype: str) -> dict[str, Spec]:
    pointers = dict(offsets="i64", residual=dtype, values=dtype, stats="fp32")
    return {
        f"token_loss, {kind}": Spec(
            "loss.token_loss_kernel", "token_loss", pointers, dict(RAGGED=ragged, SQUARED=False)
        )
        for ragged, kind in ((False, "fixed K"), (True, "ragged"))
    }


_position_loss = lambda i: partial(position_loss, i.reconstruction.squared_error, i.code, i.pos, POSITIONS)
_cost = lambda n, d, f, k, itemsize, backend: cost(n, 1, n * k, POSITIONS, itemsize=4, backend=backend)
BENCH = OpBench(
    "loss",
    ops={"position_loss": Op("forward", _position_loss, [_cost])},
    trials={
        "token_loss": Trial("bf16", _position_loss, dict(BLOCK=(64, 256, 1024), num_warps=(1, 2, 4))),
        "position_sum": Trial("bf16", _position_loss, dict(BLOCK_N=(512, 1024, 2048), num_warps=(4, 8))),
    },
    specs=_specs,
    fixed_specs={
        "position_sum": Spec("loss.position_sum_kernel", "position_sum", dict(stats="fp32", pos="i64", sums="fp32"))
    },
)
