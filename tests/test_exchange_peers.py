"""Dictionaries that go to SAELens, dictionary_learning and sparsify and come from there, through these libraries' code."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from temposae import SAEConfig, SparseAutoencoder, load
from temposae.bench.libraries import skip_init
from temposae.engine import interchange

pytestmark = pytest.mark.slow
D, F, K, N = 24, 96, 8, 1000
X = 3 * torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def library(name: str) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "dictionary_learning":
        skip_init(name, unless="nnsight")


def randomised(module: torch.nn.Module) -> Any:
    """With biases and thresholds that are not all the same, and decoder rows of several norms."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if "threshold" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.3)
            elif tensor.ndim == 2:
                tensor.mul_(0.5 + torch.rand(tensor.shape[0], 1, generator=draw))
    return module


def ours(activation: str, **changes: Any) -> SparseAutoencoder:
    return randomised(SparseAutoencoder(SAEConfig(d_in=D, d_sae=F, k=K, activation=activation, aux_k=5, **changes)))  # pyright: ignore[reportArgumentType]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).norm() <= 1e-5 * b.norm()


def alike(a: SparseAutoencoder, b: SparseAutoencoder) -> None:
    assert a.cfg == b.cfg
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


SAELENS = [
    ("relu", {}), ("topk", {}), ("jumprelu", {}), ("batchtopk", {}), ("topk", {"apply_b_dec_to_input": False}),
    ("relu", {"d_out": 9}), ("jumprelu", {"d_out": 9}), ("batchtopk", {"prefixes": (30, F)}),
]  # fmt: skip


@pytest.mark.parametrize(("activation", "changes"), SAELENS)
def test_saelens_loads_what_we_write_and_we_what_it_saves(tmp_path, activation, changes):
    library("sae_lens")
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    sae = ours(activation, **changes)
    interchange.write(sae, tmp_path / "ours", "saelens")
    theirs = SAE.load_from_disk(tmp_path / "ours")
    with torch.no_grad():
        close(theirs.encode(X), sae.encode(X))
        close(theirs(X), sae(X))
    alike(load(tmp_path / "ours"), sae)
    theirs.save_model(tmp_path / "theirs")
    back = load(tmp_path / "theirs")
    close(back(X), sae(X))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(back.state_dict()[name], sae.state_dict()[name])


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk", "jumprelu", "matryoshka_batchtopk"])
def test_saelens_training_classes_come_over_as_they_are_saved(tmp_path, architecture):
    library("sae_lens")
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.registry import get_sae_training_class  # pyright: ignore[reportMissingImports]

    cls, config = get_sae_training_class(architecture)
    sizes = {"k": K} if "topk" in architecture else {}
    sizes |= {"matryoshka_widths": [32, F]} if "matryoshka" in architecture else {}
    trained = randomised(cls(config(d_in=D, d_sae=F, **sizes)))
    trained.save_inference_model(tmp_path / "theirs")
    theirs, found = SAE.load_from_disk(tmp_path / "theirs"), load(tmp_path / "theirs")
    with torch.no_grad():
        close(found(X), theirs(X))
        close(found.encode(X), theirs.encode(X))
    interchange.write(found, tmp_path / "again", "saelens")
    with torch.no_grad():
        close(SAE.load_from_disk(tmp_path / "again")(X), theirs(X))


DICTIONARY_LEARNING = {
    "relu": ("dictionary", "AutoEncoder", {"normalize_decoder": False}), "topk": ("trainers.top_k", "AutoEncoderTopK", {}),
    "batchtopk": ("trainers.batch_top_k", "BatchTopKSAE", {}), "jumprelu": ("dictionary", "JumpReluAutoEncoder", {}),
    "matryoshka": ("trainers.matryoshka_batch_top_k", "MatryoshkaBatchTopKSAE", {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", DICTIONARY_LEARNING)
def test_dictionary_learning_loads_what_we_write_and_we_what_it_saves(tmp_path, kind):
    library("dictionary_learning")
    from importlib import import_module

    module, name, options = DICTIONARY_LEARNING[kind]
    cls = getattr(import_module(f"dictionary_learning.{module}"), name)
    sae = ours("batchtopk", prefixes=(30, F)) if kind == "matryoshka" else ours(kind)
    interchange.write(sae, tmp_path / "ours", "dictionary_learning")
    theirs = cls.from_pretrained(str(tmp_path / "ours" / "ae.pt"), **options)
    with torch.no_grad():
        close(theirs.encode(X), sae.encode(X))
        close(theirs(X), sae(X))
    alike(load(tmp_path / "ours"), sae)
    torch.save(theirs.state_dict(), _beside(tmp_path / "theirs", tmp_path / "ours" / "config.json") / "ae.pt")
    close(load(tmp_path / "theirs")(X), sae(X))


def _beside(folder: Path, config: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config.read_text())
    return folder


@pytest.mark.parametrize("trainer", ["TopKTrainer", "BatchTopKTrainer"])
def test_dictionaries_that_its_trainers_leave_come_over(tmp_path, trainer):
    library("dictionary_learning")
    from importlib import import_module

    module = {"TopKTrainer": "top_k", "BatchTopKTrainer": "batch_top_k"}[trainer]
    cls = getattr(import_module(f"dictionary_learning.trainers.{module}"), trainer)
    place = {"layer": 3, "lm_name": "gpt2", "submodule_name": "resid_post", "device": "cpu"}
    made = cls(steps=10, warmup_steps=0, activation_dim=D, dict_size=F, k=K, **place)
    for step in range(3):
        made.update(step, X)
    made.ae.threshold.fill_(0.7)
    (tmp_path / "theirs").mkdir()
    torch.save(made.ae.state_dict(), tmp_path / "theirs" / "ae.pt")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"trainer": made.config}))
    found = load(tmp_path / "theirs")
    with torch.no_grad():
        close(found(X), made.ae(X))
        close(found.encode(X), made.ae.encode(X))


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify_loads_what_we_write_and_we_what_it_saves(tmp_path, monkeypatch, transcode):
    library("sparsify")
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    from sparsify import SparseCoder  # pyright: ignore[reportMissingImports]

    sae = ours("topk", **({"d_out": D} if transcode else {}))
    interchange.write(sae, tmp_path / "ours", "sparsify")
    theirs = SparseCoder.load_from_disk(tmp_path / "ours")
    with torch.no_grad():
        close(theirs(X).sae_out, sae(X))
    alike(load(tmp_path / "ours"), sae)
    theirs.save_to_disk(tmp_path / "theirs")
    back = load(tmp_path / "theirs")
    close(back(X), sae(X))
    interchange.write(back, tmp_path / "again", "sparsify")
    with torch.no_grad():
        assert torch.equal(SparseCoder.load_from_disk(tmp_path / "again")(X).sae_out, theirs(X).sae_out)
