"""Kernels of loss to compile, launch settings to tune, and calls to time."""

from functools import partial

from ..bench_types import POSITIONS, Launch, Op, OpBench, Spec, Step, Trial
from . import cost, position_loss


def _specs(dtype: str) -> dict[str, Spec]:
    pointers = dict(offsets="i64", residual=dtype, values=dtype, stats="fp32")
    return {
        f"token_loss, {kind}": Spec(
            "loss.token_loss_kernel", "token_loss", pointers, dict(RAGGED=ragged, SQUARED=False)
        )
        for ragged, kind in ((False, "fixed K"), (True, "ragged"))
    }


def _launches(step: Step) -> list[Launch]:
    n, kind = step.n, "ragged" if step.ragged else "fixed K"
    blocks = step.blocks(n, "position_sum", "BLOCK_N")
    # The step's residual holds squared norms, so the loop over columns does not run.
    trips = {"token_loss_kernel.start": step.blocks(step.k, "token_loss", "BLOCK")}
    return [
        Launch("loss", f"token_loss, {kind} bf16", n, trips, dram=4 * n * (step.k + 4), waits=2),
        Launch(
            "loss", "position_sum", POSITIONS, {"position_sum_kernel.start": blocks},
            dram=20 * n, l2=20 * n * POSITIONS, waits=2 * blocks,
        ),
    ]  # fmt: skip


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
    launches=_launches,
    fixed_specs={
        "position_sum": Spec("loss.position_sum_kernel", "position_sum", dict(stats="fp32", pos="i64", sums="fp32"))
    },
)
