"""The guides' code, block by block, as a reader would run it."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from temposae.bench.providers import skip_init

GUIDES = sorted((Path(__file__).resolve().parents[1] / "docs" / "guides").glob("*.md"))
NEEDS = {"saelens": "sae_lens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}


def run_page(text: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(compile(block, "guide", "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_every_block_of_a_guide_runs_and_learns(guide, tmp_path, monkeypatch):
    library = NEEDS[guide.stem]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    if library == "dictionary_learning":
        skip_init(library, unless="nnsight")
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    names = run_page(guide.read_text(), monkeypatch, tmp_path)
    assert names["losses"][-1] < 0.8 * names["losses"][0]
    assert names["theirs"] is not None


def test_guides_are_found_from_the_readme():
    readme = (GUIDES[0].parents[2] / "README.md").read_text()
    for guide in GUIDES:
        assert f"docs/guides/{guide.name}" in readme
        assert len(re.findall(r"^```python$", guide.read_text(), re.M)) >= 2
