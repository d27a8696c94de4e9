"""The gather by latent stays within its budget of instructions, registers and spills (compiled for sm_90, no GPU)."""

import json
import os
import subprocess
import sys

import pytest
from temposae.bench.budgets import GATHER_LOOPS, over_budget

FORBIDDEN = ("BAR", "LDS", "STS", "LDGSTS", "MUFU", "I2F", "LDL", "STL")  # shared memory, integer division, spills

MEASURE = r"""
import json, re, sys
from temposae.bench import aot

assemblies = []
disassemble = aot._disassemble


def recorded(cubin):
    usage, assembly = disassemble(cubin)
    assemblies.append(assembly)
    return usage, assembly


def hot_loop(assembly):
    "Return the innermost loop with the most multiply-adds, as a list of instructions."
    instructions, labels, loops = [], {}, []
    for line in map(str.strip, assembly.splitlines()):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"/\*[0-9a-f]+\*/ +(.*?) *;", line):
            target = re.search(r"\bBRA\b.*(\.L\w+)", instruction[1])
            instructions.append(instruction[1])
            if target and target[1] in labels and labels[target[1]] < len(instructions) - 1:
                loops.append((labels[target[1]], len(instructions)))
    inside = lambda inner, outer: inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]
    innermost = [instructions[slice(*loop)] for loop in loops if not any(inside(other, loop) for other in loops)]
    return max(innermost, key=lambda loop: sum("FFMA" in instruction for instruction in loop))


aot._disassemble = recorded
rows = aot.report([90], sys.argv[1:])
for row, assembly in zip(rows, assemblies, strict=True):
    row["loop"] = hot_loop(assembly)
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    """Compile in a process of its own, because this one interprets kernels."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", MEASURE, *GATHER_LOOPS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return {row["name"]: row for row in json.loads(run.stdout)}


@pytest.mark.parametrize("name", GATHER_LOOPS)
def test_gather_stays_within_its_budget(name: str, compiled: dict[str, dict]) -> None:
    row = compiled[name]
    operations = [instruction.split()[instruction.startswith("@")].split(".")[0] for instruction in row["loop"]]
    assert operations.count("FFMA") >= 2 * 9  # two entries, 2048 / 256 + 256 / 256 columns per thread
    assert len(operations) <= GATHER_LOOPS[name]
    assert over_budget([row]) == []
    assert row["spill_bytes"] == 0
    assert not set(operations) & set(FORBIDDEN)
