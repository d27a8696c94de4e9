"""Budgets of the hot kernels on sm_90: registers, spilled bytes and instructions that a change must not exceed.

`python -m temposae.bench.aot --arch 90 --dtype bf16 --budgets` compiles them and fails if one is over its budget. They
hold on Triton 3.6.0 and 3.7.1, which allocate registers differently: the larger count, 2% and a rounding. With 8 warps, two
CTAs share a multiprocessor up to 128 registers. Lower a budget with the change that makes it smaller.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

ARCH = 90


class Budget(NamedTuple):
    """The most registers per thread, instructions in the binary, instructions inside of loops, and spilled bytes."""

    registers: int
    instructions: int
    loop_instructions: int
    spill_bytes: int = 0


#: by the names of `aot.SPECS`
BUDGETS: dict[str, Budget] = {
    "encode bf16": Budget(128, 860, 100),
    "encode, hard mask bf16": Budget(136, 1360, 100),
    "encode, soft mask bf16": Budget(184, 1190, 110),
    "fold bf16": Budget(48, 210, 80),
    "candidates bf16": Budget(128, 1870, 100),
    "candidates, 5 of a tile bf16": Budget(128, 2060, 100),
    "candidates, 8 of a tile bf16": Budget(128, 2620, 100),
    "candidates, thresholds bf16": Budget(184, 2030, 100),
    "candidates, hard mask bf16": Budget(152, 2350, 110),
    "candidates, soft mask bf16": Budget(192, 2570, 110),
    "candidates, Gaussians bf16": Budget(160, 2530, 110),
    "candidates, two codes bf16": Budget(184, 2840, 110),
    "candidates fp8": Budget(144, 1960, 80),
    "merge": Budget(168, 5210, 4650),
    "topk bf16": Budget(104, 2200, 1840),
    "batch digits bf16": Budget(48, 700, 650),
    "batch count bf16": Budget(40, 270, 160),
    "batch fill bf16": Budget(104, 680, 550),
    "threshold count bf16": Budget(32, 140, 70),
    "threshold fill bf16": Budget(80, 450, 340),
    "decode, fixed K bf16": Budget(48, 490, 130),
    "reconstruct, fixed K bf16": Budget(104, 740, 0),
    "values_grad, fixed K bf16": Budget(56, 320, 250),
    "decode, ragged bf16": Budget(48, 550, 150),
    "reconstruct, ragged bf16": Budget(40, 540, 210),
    "values_grad, ragged bf16": Budget(64, 340, 260),
    "token_loss, fixed K bf16": Budget(40, 450, 180),
    "token_loss, ragged bf16": Budget(40, 490, 210),
    "position_sum": Budget(56, 350, 150),
    "weight_grad bf16": Budget(56, 1410, 600),
    "weight_grad, D = 1 (biases) bf16": Budget(48, 940, 410),
    "windows bf16": Budget(40, 560, 270),
    "adam_rows, decoder, D = 768 bf16": Budget(64, 1590, 600),
    "adam_rows, decoder, D = 768, 16-bit moments bf16": Budget(64, 1640, 600),
    "adam_rows, decoder, D = 768, 8-bit moments bf16": Budget(64, 1860, 600),
    "adam_rows, encoder, D = 768 bf16": Budget(64, 1500, 600),
    "adam_rows, encoder, D = 768, 16-bit moments bf16": Budget(64, 1550, 600),
    "adam_rows, encoder, D = 768, 8-bit moments bf16": Budget(64, 1770, 600),
    "adam_rows, norms, D = 768 bf16": Budget(64, 1420, 600),
    "adam_rows, decoder, D = 2304 bf16": Budget(
        80, 2140, 730, spill_bytes=8
    ),  # by Triton 3.6.0, until the gather is rewritten
    "adam_rows, decoder, D = 2304, 16-bit moments bf16": Budget(80, 2250, 720),
    "adam_rows, decoder, D = 2304, 8-bit moments bf16": Budget(80, 2620, 720),
    "adam_rows, encoder, D = 2304 bf16": Budget(64, 1980, 730),
    "adam_rows, encoder, D = 2304, 16-bit moments bf16": Budget(64, 2120, 720),
    "adam_rows, encoder, D = 2304, 8-bit moments bf16": Budget(104, 2450, 710),
    "adam_rows, norms, D = 2304 bf16": Budget(64, 1800, 760),
    "adam_rows, decoder, D = 3584 bf16": Budget(80, 2570, 930),
    "adam_rows, decoder, D = 3584, 16-bit moments bf16": Budget(120, 2700, 910),
    "adam_rows, decoder, D = 3584, 8-bit moments bf16": Budget(128, 3310, 910),
    "adam_rows, encoder, D = 3584 bf16": Budget(80, 2460, 940),
    "adam_rows, encoder, D = 3584, 16-bit moments bf16": Budget(120, 2540, 910),
    "adam_rows, encoder, D = 3584, 8-bit moments bf16": Budget(128, 3150, 910),
    "adam_rows, norms, D = 3584 bf16": Budget(64, 2060, 950),
    "adam_rows, decoder, D = 4096 bf16": Budget(80, 2570, 930),
    "adam_rows, decoder, D = 4096, 16-bit moments bf16": Budget(120, 2700, 910),
    "adam_rows, decoder, D = 4096, 8-bit moments bf16": Budget(128, 3310, 910),
    "adam_rows, encoder, D = 4096 bf16": Budget(80, 2460, 940),
    "adam_rows, encoder, D = 4096, 16-bit moments bf16": Budget(120, 2540, 910),
    "adam_rows, encoder, D = 4096, 8-bit moments bf16": Budget(128, 3150, 910),
    "adam_rows, norms, D = 4096 bf16": Budget(64, 2060, 950),
    "adam": Budget(56, 500, 0),
    "adam, matrix, 32-bit moments": Budget(80, 780, 0),
    "adam, matrix, 16-bit moments": Budget(80, 1000, 0),
    "adam, matrix, 8-bit moments": Budget(112, 1580, 0),
}


def over_budget(kernels: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line for each figure of `aot.report` that is over its budget. Other architectures have none."""
    faults = []
    for kernel in kernels:
        if kernel["arch"] == ARCH and kernel["name"] in BUDGETS:
            for figure, most in BUDGETS[kernel["name"]]._asdict().items():
                if kernel[figure] > most:
                    words, version = figure.replace("_", " "), kernel["triton"]
                    faults.append(
                        f"{kernel['name']}: {kernel[figure]} {words}, over its budget of {most} (Triton {version})"
                    )
    return faults
