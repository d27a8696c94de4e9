"""The code of the guides, the quick start and the page on masks, block by block, as a reader would run it."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from temposae.bench.libraries import skip_init

from .commandline import run

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "guides"
OTHERS = ("quick-start.md", "concepts/masks.md")
GUIDES = {path.stem: path for path in [*sorted(FOLDER.glob("*.md")), *(FOLDER.parent / name for name in OTHERS)]}
NEEDS = {"saelens": "sae_lens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}


#: pages without code of their own, or whose commands another test runs
NOT_RUN = {"many-gpus", "troubleshooting"}
#: in place of what takes a GPU, a hub or hours: all must occur
SMALL = {
    "gemma": {
        "google/gemma-2-2b\n": "testbed\n", "blocks.12.": "blocks.1.", "monology/pile-uncopyrighted": "text.txt",
        "context: 1024": "context: 64", "buffer_tokens: 1000000": "buffer_tokens: 8192",
        "tokens: 200000000": "tokens: 16384", "batch: 8192": "batch: 1024",
        "held_out_rows: 64": "held_out_rows: 4", "[16384, 65536]": "[64, 128]",
        "[32, 64, 128]": "[4, 8]", "d_sae65536_k64": "d_sae128_k8",
    },
    "parts": {"d_sae: 1024": "d_sae: 64", "tokens: 500000": "tokens: 8192"},
    "quick-start": {"tokens: 1000000": "tokens: 8192"},
    "activations": {},
    "masks": {},
    "reports": {},
    "sweeps-and-caches": {
        "tokens: 1000000": "tokens: 2048", "k: [8, 16, 32], d_sae: [512, 2048]": "k: [4, 8], d_sae: [64]",
        "--tokens 100000": "--tokens 8192", "--tokens 50000": "--tokens 4096",
    },
    "kernels": {"--n 8192": "--n 64", "--d 2304": "--d 32", "--f 65536": "--f 128", "--k 64": "--k 4"},
}  # fmt: skip


def shortened(name: str, text: str) -> str:
    for old, new in SMALL.get(name, {}).items():
        assert old in text, f"{name}.md has no {old!r}"
        text = text.replace(old, new)
    return text


def run_page(text: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """Its blocks in their order: Python in one namespace, or into a file where its first line names one; commands."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for kind, block in re.findall(r"^```(python|yaml|sh)\n(.*?)^```", text, re.M | re.S):
        named = re.match(r"# file: (\S+)\n", block)
        if named is not None:
            Path(named[1]).parent.mkdir(exist_ok=True)
            Path(named[1]).write_text(block.removeprefix(named[0]))
        elif kind == "python":
            exec(compile(block, "guide", "exec"), names)
        else:
            done = subprocess.run(["bash", "-ec", block], capture_output=True, text=True)
            assert done.returncode == 0, f"{block}{done.stdout}{done.stderr}"
    return names


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_every_block_of_a_librarys_guide_runs_and_learns(name, tmp_path, monkeypatch):
    library = NEEDS[name]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    if library == "dictionary_learning":
        skip_init(library, unless="nnsight")
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    names = run_page((FOLDER / f"{name}.md").read_text(), monkeypatch, tmp_path)
    assert names["losses"][-1] < 0.8 * names["losses"][0]
    assert names["exported"] is not None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "parts" else name for name in SMALL]
)
def test_every_block_of_a_guide_runs(name, tmp_path, monkeypatch):
    documents = run("testbed", "sample", "--count", "600").out
    (tmp_path / "text.txt").write_text(documents)
    run_page(shortened(name, GUIDES[name].read_text()), monkeypatch, tmp_path)
    left = {
        "activations": "runs/own/summary.json", "gemma": "for_saelens/cfg.json", "kernels": "trace.json",
        "masks": "runs/masked/config.yaml", "parts": "copy/checkpoint.json", "quick-start": "dashboard.html",
        "reports": "runs/report/report.html", "sweeps-and-caches": "runs/cached/config.yaml",
    }  # fmt: skip
    assert (tmp_path / left[name]).stat().st_size > 0


def test_every_guide_is_run():
    assert GUIDES.keys() == {*NEEDS, *SMALL, *NOT_RUN}


def test_guides_are_found_from_the_readme():
    readme = (FOLDER.parents[1] / "README.md").read_text()
    for name, guide in GUIDES.items():
        assert f"/{guide.name}" in readme
        assert name in NOT_RUN or len(re.findall(r"^```(?:python|sh)$", guide.read_text(), re.M)) >= 1
