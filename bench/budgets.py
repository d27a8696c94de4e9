"""Budgets of the hot kernels on sm_90: registers, spilled bytes and instructions that a change must not exceed.

`python -m temposae.bench.aot --arch 90 --dtype bf16 --budgets` compiles them and fails if one is over its budget. They
hold on Triton 3.6.0 and 3.7.1, which allocate registers differently.
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
BUDGETS: dict[str, Budget] = {}


def over_budget(kernels: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line for each figure of `aot.report` that is over its budget. Other architectures have none."""
    return [
        f"{kernel['name']}: {kernel[figure]} {figure.replace('_', ' ')}, over its budget of {most} (Triton {kernel['triton']})"
        for kernel in kernels
        if kernel["arch"] == ARCH and kernel["name"] in BUDGETS
        for figure, most in BUDGETS[kernel["name"]]._asdict().items()
        if kernel[figure] > most
    ]
