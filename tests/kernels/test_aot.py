"""Every kernel compiles for every GPU generation, without a GPU; the binaries of hot ones are what they should be."""

import json
import os
import re
import subprocess
import sys

import pytest
from temposae.bench.aot import SPECS
from temposae.bench.budgets import over_budget

SHARED_BYTES = 99 * 1024  # what a block may have on the GPUs that borrow a row (sm_86, sm_89, sm_120)


def compile_report(arch: int, dtype: str, names: list[str]) -> list[dict]:
    """In a process of its own, because this one interprets kernels instead of compiling them."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "temposae.bench.aot", "--json", "--arch", str(arch), "--dtype", dtype]
    command += ["--kernel", *names]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("arch", [80, 100], ids="sm_{}".format)
def test_hot_kernels_compile_without_spills(arch):
    """On sm_90 the ordinary tests compile every kernel, here those that take the time, without a mask and aligned;
    `make test-slow` all of them."""
    names = [
        name
        for name, spec in SPECS.items()
        if spec.hot
        and arch >= spec.since
        and not name.endswith(("mask", "Gaussians", "unaligned"))
        and (not (width := re.search(r"D = (\d{3,})", name)) or width[1] == "2304")
    ]
    rows = compile_report(arch, "bf16", names)
    assert len(rows) > 20
    assert [row["name"] for row in rows if row["spill_bytes"]] == []
    assert [row["name"] for row in rows if row["shared_bytes"] > SHARED_BYTES] == []
    gemms = [row for row in rows if row["name"].startswith(("encode", "candidates"))]
    assert gemms
    assert all(row["tensor_core_instructions"] > 0 for row in gemms)


@pytest.mark.parametrize(
    ("dtype", "widths"),
    [
        pytest.param("bf16", ("2304",), id="bf16"),
        pytest.param("bf16", ("768", "3584", "4096"), id="bf16 at other widths", marks=pytest.mark.slow),
        pytest.param("fp32", ("768", "2304"), id="fp32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "arch",
    [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)],
    ids="sm_{}".format,
)
def test_kernels_compile_without_spills_and_with_tensor_cores(arch, dtype, widths):
    names = [name for name in SPECS if not (width := re.search(r"D = (\d{3,})", name)) or width[1] in widths]
    rows = compile_report(arch, dtype, names)
    kernels = {row["name"].split(",")[0].removesuffix(f" {dtype}") for row in rows}
    assert kernels == {
        "encode", "candidates", "merge", "rescan", "unsure", "recompute", "above_cut", "fold", "topk", "batch digits",
        "batch count", "batch fill", "threshold count", "threshold fill", "decode", "reconstruct", "values_grad",
        "token_loss", "entry_loss", "position_sum", "count", "weight_grad", "windows", "pack", "sorted", "latent_sums",
        "adam", "clip", "adam_rows",
    } | ({"candidates fp8"} if arch >= 90 else set())  # fmt: skip
    assert [row["name"] for row in rows if row["hot"] and row["spill_bytes"]] == []
    assert over_budget(rows) == []
    large = [row["name"] for row in rows if row["shared_bytes"] > SHARED_BYTES]
    assert [name for name in large if not SPECS[name].only] == []
    if dtype == "bf16":
        assert all(
            row["tensor_core_instructions"] > 0 for row in rows if row["name"].startswith(("encode", "candidates"))
        )


def test_the_interpreter_is_named():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "temposae.bench.aot", "--arch", "80", "--kernel", "position_sum"]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode != 0
    assert "TRITON_INTERPRET is set" in run.stderr
