"""Checkpoints of every release (tests/layouts.py), by the libraries' own loaders: what is read here computes the same."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from temposae import load
from torch import Tensor

from . import layouts
from .peers import library

pytestmark = pytest.mark.slow
Computed = tuple[Tensor, Tensor]  # latents [N, F], reconstruction [N, D]
X = layouts.X


def loads(cases: dict[str, layouts.Case]) -> list[str]:
    return [name for name, case in cases.items() if case.loads]


def same(tmp_path: Path, case: layouts.Case, theirs: Callable[[Path], Computed]) -> None:
    folder = tmp_path / case.folder
    case.write(folder)
    ours = load(folder)
    with torch.no_grad():
        for found, expected in zip((ours.encode(X), ours(X)), theirs(folder), strict=True):
            assert (found - expected).norm() <= 1e-5 * expected.norm()


def computed(sae: Any) -> Computed:
    return sae.encode(X), sae(X)


@pytest.mark.parametrize("name", loads(layouts.SAELENS))
def test_saelens_loads_the_same(tmp_path, name):
    library("sae_lens")
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.sae import TrainingSAE  # pyright: ignore[reportMissingImports]

    def theirs(folder: Path) -> Computed:
        if not name.startswith("training"):
            return computed(SAE.load_from_disk(folder, dtype="float32"))
        trained = TrainingSAE.load_from_disk(folder, dtype="float32")
        scaler = folder / "activation_scaler.json"
        if scaler.is_file():
            trained.fold_activation_norm_scaling_factor(json.loads(scaler.read_text())["scaling_factor"])
        trained.save_inference_model(tmp_path / "saved")
        return computed(SAE.load_from_disk(tmp_path / "saved"))

    same(tmp_path, layouts.SAELENS[name], theirs)


@pytest.mark.parametrize("name", loads(layouts.DICTIONARY_LEARNING))
def test_dictionary_learning_loads_the_same(tmp_path, name, monkeypatch):
    library("dictionary_learning")
    for module in ("nnsight", "zstandard"):  # with which it reads text
        if module not in sys.modules:
            monkeypatch.setitem(sys.modules, module, SimpleNamespace(LanguageModel=None))
    from dictionary_learning.utils import load_dictionary  # pyright: ignore[reportMissingImports]

    same(tmp_path, layouts.DICTIONARY_LEARNING[name], lambda folder: computed(load_dictionary(str(folder), "cpu")[0]))


@pytest.mark.parametrize("name", loads(layouts.SPARSIFY))
def test_sparsify_loads_the_same(tmp_path, monkeypatch, name):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    library("sparsify")
    from sparsify import SparseCoder  # pyright: ignore[reportMissingImports]

    def theirs(folder: Path) -> Computed:
        coder = SparseCoder.load_from_disk(folder)
        acts, indices, before = coder.encode(X)
        return torch.zeros_like(before).scatter_(1, indices, acts), coder(X).sae_out

    same(tmp_path, layouts.SPARSIFY[name], theirs)


@pytest.mark.parametrize("name", loads(layouts.GEMMA_SCOPE))
def test_saelens_loads_the_same_of_gemma_scope(tmp_path, monkeypatch, name):
    library("sae_lens")
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.loading import pretrained_sae_loaders as loaders  # pyright: ignore[reportMissingImports]

    case = layouts.GEMMA_SCOPE[name]
    repo, _, inside = case.folder.partition("/")

    def download(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        return str(tmp_path / Path(repo_id).name / subfolder / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    shapes = {key: list(tensor.shape) for key, tensor in layouts.LOWER.items()}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
    which = "gemma_3_sae" if name.startswith("2") else "gemma_2_transcoder" if name == "transcoder" else "gemma_2_sae"
    loader = getattr(loaders, f"{which}_huggingface_loader")

    def theirs(_: Path) -> Computed:
        sizes = {"d_in": layouts.D, "d_sae": layouts.F} | ({"d_out": layouts.D} if "transcoder" in name else {})
        converter = lambda **options: loader(**options | {"cfg_overrides": options["cfg_overrides"] | sizes})
        return computed(SAE.from_pretrained(f"google/{repo}", inside, converter=converter))

    same(tmp_path, case, theirs)
