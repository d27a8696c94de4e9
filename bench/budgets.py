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
    registers_36: int | None = None  # on Triton 3.6, where it needs many more

    def limits(self, triton: str) -> dict[str, int]:
        """The limits of the figures in `aot.report` for a version of Triton."""
        limits = self._asdict()
        registers_36 = limits.pop("registers_36")
        return limits | {"registers": registers_36} if registers_36 and triton.startswith("3.6.") else limits


#: by the names of `aot.SPECS`
BUDGETS: dict[str, Budget] = {
    "encode bf16": Budget(128, 730, 90),
    "encode, hard mask bf16": Budget(128, 1100, 90),
    "encode, soft mask bf16": Budget(176, 1050, 90),
    "fold bf16": Budget(48, 210, 80),
    "candidates bf16": Budget(128, 1160, 90),
    "candidates, 5 of a tile bf16": Budget(128, 1290, 90),
    "candidates, 8 of a tile bf16": Budget(128, 1680, 90),
    "candidates, thresholds bf16": Budget(128, 1380, 90),
    "candidates, hard mask bf16": Budget(128, 1580, 90),
    "candidates, soft mask bf16": Budget(128, 1820, 90),
    "candidates, Gaussians bf16": Budget(128, 1860, 90),
    "candidates, two codes bf16": Budget(128, 1880, 90),
    "candidates fp8": Budget(168, 1370, 90),
    "candidates, persistent": Budget(168, 5650, 5650),
    "candidates, persistent, 5 of a tile": Budget(168, 6400, 6250),
    "candidates, persistent, thresholds": Budget(168, 6700, 6500),
    "candidates, persistent, two codes": Budget(168, 9700, 9700),
    "merge": Budget(64, 1600, 110),
    "topk bf16": Budget(104, 2200, 1840),
    "batch digits bf16": Budget(56, 810, 740),
    "batch count bf16": Budget(40, 270, 200),
    "batch fill bf16": Budget(104, 670, 550),
    "threshold count bf16": Budget(40, 280, 220),
    "threshold fill bf16": Budget(104, 680, 560),
    "decode, fixed K bf16": Budget(48, 490, 130),
    "reconstruct, fixed K bf16": Budget(112, 770, 0),
    "values_grad, fixed K bf16": Budget(56, 320, 110),
    "decode, ragged bf16": Budget(48, 550, 150),
    "reconstruct, ragged bf16": Budget(40, 600, 210),
    "values_grad, ragged bf16": Budget(64, 340, 110),
    "token_loss, fixed K bf16": Budget(40, 450, 180),
    "token_loss, ragged bf16": Budget(40, 490, 210),
    "entry_loss, fixed K": Budget(56, 310, 140),
    "entry_loss, ragged": Budget(48, 300, 130),
    "position_sum": Budget(64, 530, 270),
    "count": Budget(48, 490, 200),
    "weight_grad, D = 768 bf16": Budget(32, 230, 130),
    "windows, D = 768 bf16": Budget(32, 150, 60),
    "weight_grad, D = 2304 bf16": Budget(40, 360, 200),
    "windows, D = 2304 bf16": Budget(32, 220, 90),
    "weight_grad, D = 3584 bf16": Budget(48, 400, 230),
    "windows, D = 3584 bf16": Budget(48, 230, 120, registers_36=64),
    "weight_grad, D = 4096 bf16": Budget(64, 380, 220),
    "windows, D = 4096 bf16": Budget(48, 220, 110),
    "pack": Budget(40, 270, 0),
    "sorted": Budget(40, 440, 60),
    "latent_sums": Budget(40, 250, 100),
    "adam_rows, decoder, D = 768 bf16": Budget(40, 480, 120),
    "adam_rows, decoder, D = 768, 16-bit moments bf16": Budget(40, 560, 120),
    "adam_rows, decoder, D = 768, 8-bit moments bf16": Budget(40, 770, 120),
    "adam_rows, encoder, D = 768 bf16": Budget(40, 340, 120),
    "adam_rows, encoder, D = 768, 16-bit moments bf16": Budget(40, 430, 140),
    "adam_rows, encoder, D = 768, 8-bit moments bf16": Budget(48, 680, 140),
    "adam_rows, encoder with biases, D = 768 bf16": Budget(32, 440, 400),
    "adam_rows, norms, D = 768 bf16": Budget(32, 290, 140),
    "adam_rows, encoder norms, D = 768 bf16": Budget(40, 360, 310),
    "adam_rows, decoder, D = 2304 bf16": Budget(56, 770, 170),
    "adam_rows, decoder, D = 2304, 16-bit moments bf16": Budget(64, 870, 160),
    "adam_rows, decoder, D = 2304, 8-bit moments bf16": Budget(64, 1280, 170),
    "adam_rows, encoder, D = 2304 bf16": Budget(64, 610, 170),
    "adam_rows, encoder, D = 2304, 16-bit moments bf16": Budget(64, 730, 170),
    "adam_rows, encoder, D = 2304, 8-bit moments bf16": Budget(64, 1120, 170),
    "adam_rows, encoder with biases, D = 2304 bf16": Budget(64, 700, 630),
    "adam_rows, encoder in fp8, D = 2304 bf16": Budget(64, 850, 170),
    "adam_rows, encoder in fp8 with biases, D = 2304 bf16": Budget(80, 890, 720),
    "adam_rows, norms, D = 2304 bf16": Budget(48, 400, 210),
    "adam_rows, encoder norms, D = 2304 bf16": Budget(48, 510, 450),
    "adam_rows, decoder, D = 3584 bf16": Budget(80, 1040, 200),
    "adam_rows, decoder, D = 3584, 16-bit moments bf16": Budget(80, 1220, 190),
    "adam_rows, decoder, D = 3584, 8-bit moments bf16": Budget(104, 1770, 190),
    "adam_rows, encoder, D = 3584 bf16": Budget(80, 850, 210),
    "adam_rows, encoder, D = 3584, 16-bit moments bf16": Budget(80, 1050, 200),
    "adam_rows, encoder, D = 3584, 8-bit moments bf16": Budget(104, 1640, 190),
    "adam_rows, norms, D = 3584 bf16": Budget(56, 450, 240),
    "adam_rows, encoder norms, D = 3584 bf16": Budget(104, 530, 450),
    "adam_rows, decoder, D = 4096 bf16": Budget(80, 960, 180),
    "adam_rows, decoder, D = 4096, 16-bit moments bf16": Budget(80, 1190, 180),
    "adam_rows, decoder, D = 4096, 8-bit moments bf16": Budget(112, 1750, 180),
    "adam_rows, encoder, D = 4096 bf16": Budget(80, 770, 190),
    "adam_rows, encoder, D = 4096, 16-bit moments bf16": Budget(72, 990, 190),
    "adam_rows, encoder, D = 4096, 8-bit moments bf16": Budget(104, 1590, 190),
    "adam_rows, norms, D = 4096 bf16": Budget(48, 440, 230),
    "adam_rows, encoder norms, D = 4096 bf16": Budget(104, 520, 440),
    "adam": Budget(56, 860, 0),
    "clip": Budget(40, 270, 120),
    "adam, matrix, 32-bit moments": Budget(80, 750, 0),
    "adam, matrix, 16-bit moments": Budget(80, 1000, 0),
    "adam, matrix, 8-bit moments": Budget(112, 1580, 0),
    "adam, matrix in fp8": Budget(80, 780, 0),
}
#: instructions of the loop that adds two entries to a gradient
GATHER_LOOPS: dict[str, int] = dict.fromkeys(
    (
        "adam_rows, decoder, D = 2304 bf16",
        "adam_rows, encoder, D = 2304 bf16",
        "adam_rows, encoder with biases, D = 2304 bf16",
        "adam_rows, norms, D = 2304 bf16",
        "adam_rows, encoder norms, D = 2304 bf16",
        "weight_grad, D = 2304 bf16",
        "windows, D = 2304 bf16",
    ),
    100,
)
#: instructions of the loop over D of `candidates`, and those after it by variant
PRODUCT_LOOP = 86
EPILOGUES: dict[str, int] = {
    "candidates bf16": 720,
    "candidates, 8 of a tile bf16": 1230,
    "candidates, thresholds bf16": 920,
    "candidates, hard mask bf16": 985,
    "candidates, soft mask bf16": 1370,
    "candidates, Gaussians bf16": 1390,
    "candidates, two codes bf16": 1420,
}


def over_budget(kernels: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line for each figure of `aot.report` that is over its budget. Other architectures have none."""
    faults = []
    for kernel in kernels:
        if kernel["arch"] == ARCH and kernel["name"] in BUDGETS:
            for figure, most in BUDGETS[kernel["name"]].limits(kernel["triton"]).items():
                if kernel[figure] > most:
                    words, version = figure.replace("_", " "), kernel["triton"]
                    faults.append(
                        f"{kernel['name']}: {kernel[figure]} {words}, over its budget of {most} (Triton {version})"
                    )
    return faults
