"""Registers, spills and instructions of the encoder's kernels on sm_90, counted in the binary."""

import json
import os
import subprocess
import sys

import pytest
from temposae.bench.budgets import BUDGETS, EPILOGUES, PRODUCT_LOOP

COUNT = """
import json, re, sys
from temposae.bench import aot

sass = []
disassemble = aot._disassemble
aot._disassemble = lambda cubin: sass.append(disassemble(cubin)) or sass[-1]
rows = aot.report([90], json.loads(sys.argv[1]))
for row, (_, assembly) in zip(rows, sass, strict=True):
    # instructions, or the targets of branches
    lines = re.findall(r"^\\s*(?:(\\.L\\w+):|/\\*[0-9a-f]{4,}\\*/\\s+(.*?);)", assembly, re.MULTILINE)
    tensor_cores = [n for n, (_, text) in enumerate(lines) if re.search(aot.TENSOR_CORE[90], text)]
    label = {name: n for n, (name, _) in enumerate(lines) if name}
    branches = [(n, re.search(r"BRA.*\\((\\.L\\w+)\\)", text)) for n, (_, text) in enumerate(lines)]
    jumps = {n: label.get(branch[1], n) for n, branch in branches if branch}
    end = min(n for n, start in jumps.items() if start <= tensor_cores[0] and n > tensor_cores[-1])
    row["loop"] = sum(bool(text) for _, text in lines[jumps[end] : end + 1])
    row["epilogue"] = sum(bool(text) and not re.match("NOP|BRA", text) for _, text in lines[end + 1 :])
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, int]]:
    """In a process of its own, because this one interprets kernels instead of compiling them."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COUNT, json.dumps(list(EPILOGUES))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return {row["name"]: row for row in json.loads(run.stdout)}


@pytest.mark.parametrize("name", EPILOGUES)
def test_two_blocks_share_an_sm(counted, name):
    assert counted[name]["registers"] <= BUDGETS[name].registers <= 128  # two blocks of 256 threads share an SM
    assert counted[name]["spill_bytes"] == 0
    assert 2 * counted[name]["shared_bytes"] <= 227 * 1024 - 2048  # of which each block reserves 1 KiB


@pytest.mark.parametrize("name", EPILOGUES)
def test_instructions(counted, name):
    assert counted[name]["tensor_core_instructions"] == 4
    assert counted[name]["loop"] <= PRODUCT_LOOP
    assert 100 < counted[name]["epilogue"] <= EPILOGUES[name]
