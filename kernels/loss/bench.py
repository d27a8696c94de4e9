"""Kernels of loss to compile, launch settings to tune, and calls to time."""

from functools import partial
from typing import Any

import torch

from ..bench_types import POSITIONS, Call, Launch, Op, OpBench, Spec, Step, Trial
from ..configs import CONFIGS
from ..cost import Cost
from . import cost, count_step, entry_loss, position_loss

PARTS = 2304 // CONFIGS[min(CONFIGS)]["reconstruct"]["BLOCK_D"]


def _specs(dtype: str) -> dict[str, Spec]:
    pointers = dict(offsets="i64", residual=dtype, values=dtype, stats="fp32")
    return {
        f"token_loss, {kind}": Spec(
            "loss.token_loss_kernel", "token_loss", pointers, dict(RAGGED=ragged, SQUARED=False)
        )
        for ragged, kind in ((False, "fixed K"), (True, "ragged"))
    }


def _entry_specs() -> dict[str, Spec]:
    pointers = dict.fromkeys(
        ("errors", "spreads", "projections", "values", "stats", "dvalues", "weights", "along"), "fp32"
    )
    pointers |= dict(indices="i32", offsets="i64", fired="u8")
    return {
        f"entry_loss, {kind}": Spec(
            "loss.entry_loss_kernel", "entry_loss", pointers,
            dict(RAGGED=ragged, HAS_SPREAD=True, ACTIVE_ONLY=True, PARTS=PARTS),
        )
        for ragged, kind in ((False, "fixed K"), (True, "ragged"))
    }  # fmt: skip


def _launches(step: Step) -> list[Launch]:
    n, f, kind = step.n, step.f, "ragged" if step.ragged else "fixed K"
    entry_blocks, blocks = step.blocks(step.k, "entry_loss", "BLOCK"), step.blocks(n, "position_sum", "BLOCK_N")
    columns, latent_blocks = POSITIONS + 1, step.blocks(f, "count", "BLOCK")
    # The parts of tiles and 20 bytes per entry are read or written.
    return [
        Launch("loss", "torch: clear fired", dram=f),
        Launch(
            "loss", f"entry_loss, {kind}", n, {"entry_loss_kernel.start": entry_blocks},
            dram=4 * n * (PARTS * (step.k + 2) + 5 * step.k + 4), waits=2 + entry_blocks,
        ),
        Launch(
            "loss", "position_sum", columns, {"position_sum_kernel.start": blocks},
            dram=24 * n, l2=24 * n * columns, waits=2 * blocks,
        ),
        Launch("loss", "torch: mean of the squared error", dram=8),
        Launch(
            "loss", "count", latent_blocks, {"count_kernel.start": 1 / latent_blocks},
            dram=17 * f + 48 * POSITIONS, waits=1, longest=6,
        ),
    ]  # fmt: skip


def _count_step(i: Any) -> Call:
    """Count a step on copies."""
    sums = position_loss(i.reconstruction.squared_error, i.code, i.pos, POSITIONS)
    f, device = i.code.n_latents, i.x.device
    counts = (
        torch.ones(1, f, dtype=torch.int64, device=device),
        *(torch.ones(size, device=device) for size in ((1, 4, POSITIONS), (1,), (1, 5))),
    )
    one, batch = torch.ones(1, device=device), type(sums)(*(total[None].float() for total in sums))

    def call() -> tuple[torch.Tensor, ...]:
        copies = tuple(count.clone() for count in counts)
        count_step(
            *copies, n=len(i.x), fired=i.code.fired()[None], batch=batch, batch_spread=one, loss=one, aux_loss=None,
            norm=one, recomputed=None,
        )  # fmt: skip
        return copies

    return call


_position_loss = lambda i: partial(position_loss, i.reconstruction.squared_error, i.code, i.pos, POSITIONS)
_entry_loss = lambda i: partial(
    entry_loss, i.code, i.reconstruction.squared_error[None], i.reconstruction.projection[None], -2 / len(i.x),
    spread=i.reconstruction.squared_error[None],
)  # fmt: skip
_cost = lambda n, d, f, k, itemsize, backend: cost(n, 1, n * k, POSITIONS, itemsize=4, backend=backend)
# Reads values, latents and projections, writes three results per entry and four per token. Torch reads most of it again.
_entry_cost = lambda n, d, f, k, itemsize, backend: Cost(
    6.0 * n * k, (24 if backend == "triton" else 72) * n * k + 20 * n + f
)
BENCH = OpBench(
    "loss",
    ops={
        "position_loss": Op("forward", _position_loss, [_cost]),
        "entry_loss": Op("backward", _entry_loss, [_entry_cost]),
    },
    trials={
        "token_loss": Trial("bf16", _position_loss, dict(BLOCK=(64, 256, 1024), num_warps=(1, 2, 4))),
        "position_sum": Trial("bf16", _position_loss, dict(BLOCK_N=(512, 1024, 2048), num_warps=(4, 8))),
        "entry_loss": Trial("bf16", _entry_loss, dict(BLOCK=(64, 128, 256), num_warps=(1, 2, 4))),
        "count": Trial("bf16", _count_step, dict(BLOCK=(512, 1024, 2048), num_warps=(2, 4, 8))),
    },
    specs=_specs,
    launches=_launches,
    fixed_specs=_entry_specs() | {
        "position_sum": Spec(
            "loss.position_sum_kernel", "position_sum",
            dict.fromkeys(("squared_error", "l1", "l0", "spread", "sums"), "fp32") | dict(pos="i64"), dict(HAS_SPREAD=True),
        ),
        "count": Spec(
            "loss.count_kernel", "count",
            dict.fromkeys(
                ("sums", "spread", "totals", "count", "squared_error", "l1", "l0", "batch_spread", "loss", "aux", "norm"),
                "fp32",
            ) | dict(idle="i64", fired="i1", recomputed="i64"),
            dict(HAS_AUX=False, HAS_RECOMPUTED=False),
        ),
    },
)  # fmt: skip
