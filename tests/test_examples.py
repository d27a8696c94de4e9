"""The example scripts and notebooks, run at small size."""

import json
import re
import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def needs_peers(path: Path) -> None:
    if "sae_lens" in path.name and find_spec("sae_lens") is None:
        pytest.skip("sae_lens is not installed")


def main_of(name: str):
    path = FOLDER / f"{name}.py"
    needs_peers(path)
    return runpy.run_path(str(path))["main"]


def test_a_dictionary_is_trained_and_used_in_the_model():
    losses = main_of("train_and_use")(tokens=60_000)
    assert losses["fvu"] < 0.2
    assert abs(losses["dictionary"] / losses["model"] - 1) < 0.05
    assert losses["without the latent"] != losses["dictionary"]


def test_own_activations_are_trained_on():
    run = main_of("own_activations")(rows=3000)
    assert run.held_out["sae"]["fvu"] < run.held_out["random"]["fvu"] < 1


def test_a_sweep_trades_sparsity_for_error():
    runs = main_of("sweep")(tokens=40_000, sparsities=(4, 16))
    assert runs["k16"].metrics[-1]["fvu"] < runs["k4"].metrics[-1]["fvu"]


def test_an_accelerated_dictionary_learns_the_same():
    results = main_of("accelerate_sae_lens")(steps=8, d_sae=512)
    plain, accelerated = results["SAELens"], results["accelerated"]
    assert accelerated["last"] == pytest.approx(plain["last"], rel=1e-3)
    assert accelerated["last"] < 0.9 * accelerated["first"]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    needs_peers(path)
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.read(path, 4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    small = {"TOKENS": 30_000, "ROWS": 32, "STEPS": 8, "D_SAE": 512}
    names = re.findall(r"^(\w+) = ", parameters.source, re.M)
    parameters.source = "\n".join(f"{name} = {small[name]}" for name in names)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    tables = [
        row for cell in notebook.cells for row in printed(cell).splitlines() if row.startswith(("dictionary", "plain"))
    ]
    if tables:
        explained_variance = numbers(tables[0])[0]
        assert 0.5 < explained_variance < 1


def printed(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", []) if output.get("name") == "stdout")


def test_there_are_five_short_scripts_and_three_executed_notebooks():
    assert len(SCRIPTS) == 5
    assert all(len(path.read_text().splitlines()) < 60 for path in SCRIPTS)
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), path.name
        assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
        assert sum(bool(cell["outputs"]) for cell in cells) >= 3
        assert path.stat().st_size < 100_000
    assert not any(str(FOLDER.parent) in path.read_text() for path in NOTEBOOKS), "a machine's own path"
