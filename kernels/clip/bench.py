"""The kernel of clip to compile, launch settings to tune, and calls to time."""

from functools import partial

import torch

from ..bench_types import Call, Inputs, Launch, Op, OpBench, Spec, Step, Trial
from . import clip, cost


def _launches(step: Step) -> list[Launch]:
    blocks = step.blocks(step.f, "clip", "BLOCK")
    launch = Launch("update", "clip", 1, {"clip_kernel.start": blocks}, dram=12 * step.f, waits=1 + blocks)
    return [launch] if step.clip else []


def _clip(i: Inputs) -> Call:
    norms, factor = i.b_enc.square(), torch.ones(1, device=i.x.device, dtype=i.b_enc.dtype)
    return partial(clip, [norms, norms], [i.b_enc, i.b_dec], 1.0, factor)


BENCH = OpBench(
    "update",
    ops={"clip": Op("backward", _clip, [lambda n, d, f, k, itemsize, backend: cost(f, d, backend=backend)])},
    trials={"clip": Trial("bf16", _clip, dict(BLOCK=(2048, 4096, 8192), num_warps=(8, 16, 32)))},
    specs=lambda dtype: {},
    launches=_launches,
    fixed_specs={
        "clip": Spec(
            "clip.clip_kernel", "clip",
            dict.fromkeys(("norms", "norms2", "norms3", "grads", "grads2", "grads3", "norm", "factor"), "fp32"),
        )
    },
)  # fmt: skip
