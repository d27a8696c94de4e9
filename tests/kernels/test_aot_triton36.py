"""Hot kernels compile without spills and within their budgets on an older Triton, too (`make .venv/.triton36`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from temposae.bench.aot import SPECS
from temposae.bench.budgets import over_budget

from .test_aot import SHARED_BYTES, compile_report

FOLDER = Path(sys.prefix, "triton36")


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs `make .venv/.triton36`")
@pytest.mark.parametrize("arch", [80, 90, 100], ids="sm_{}".format)
def test_hot_kernels_compile_without_spills(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]))
    version = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    assert subprocess.run(version, capture_output=True, text=True, check=True).stdout.startswith("3.6.")
    rows = compile_report(arch, "bf16", [name for name, spec in SPECS.items() if spec.hot])
    assert len(rows) > 20
    assert [row["name"] for row in rows if row["spill_bytes"]] == []
    assert over_budget(rows) == []
    large = [row["name"] for row in rows if row["shared_bytes"] > SHARED_BYTES]
    assert [name for name in large if not SPECS[name].only] == []
