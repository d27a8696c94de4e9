"""Dictionaries and trainers of other libraries, small, with few latents active of a token, for tests of what makes them
faster; `library` skips the test where they are not installed."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from temposae.bench.libraries import skip_init
from temposae.engine.accelerate import common
from torch import Tensor

D, F, K, N = 24, 640, 8, 128
WIDTHS = [80, 240, F]


def no_batch_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours run on the few tokens of tests, too; sparsify, without a GPU."""
    monkeypatch.setattr(common, "TOKENS", 1)
    monkeypatch.setattr(common, "ACTIVATIONS", 1)
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")


def data(seed: int = 0, n: int = N) -> Tensor:
    return 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def library(name: str, module: str = "") -> Any:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "dictionary_learning":
        skip_init(name, unless="nnsight")
    return import_module(f"{name}.{module}" if module else name)


def drawn(module: Any, sparse: bool = False) -> Any:
    """With random biases, and rows of several norms; `sparse`, with latents that are above 0 on few tokens."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if tensor.ndim == 1 and name != "threshold":
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=draw))
                if sparse and name in ("b_enc", "encoder.bias", "b_gate", "gate_bias"):
                    tensor.sub_(2.0)
                if sparse and name in ("b_mag", "mag_bias"):
                    tensor.sub_(1.0)
            elif tensor.ndim == 2 and name in ("W_enc", "encoder.weight"):
                rows = torch.randn(F, D, generator=draw) / D**0.5
                rows *= 0.25 if sparse else 1.0
                tensor.copy_(rows.T if tensor.shape == (D, F) else rows)
            elif tensor.ndim == 2:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=draw).to(tensor))
    return module


def saelens(kind: str, **changes: Any) -> Any:
    saes = library("sae_lens", "saes")
    name, settings = {
        "topk": ("TopKSAE", {"k": K}),
        "jumprelu": ("JumpReLUSAE", {}),
        "standard": ("StandardSAE", {}),
        "gated": ("GatedSAE", {}),
        "transcoder": ("Transcoder", {"d_out": 16, "apply_b_dec_to_input": False}),
        "skip transcoder": ("SkipTranscoder", {"d_out": 16, "apply_b_dec_to_input": False}),
        "jumprelu transcoder": ("JumpReLUTranscoder", {"d_out": 16, "apply_b_dec_to_input": False}),
        "jumprelu skip transcoder": ("JumpReLUSkipTranscoder", {"d_out": 16, "apply_b_dec_to_input": False}),
        "topk training": ("TopKTrainingSAE", {"k": K}),
        "batchtopk training": ("BatchTopKTrainingSAE", {"k": K}),
        "matryoshka training": ("MatryoshkaBatchTopKTrainingSAE", {"k": K, "matryoshka_widths": list(WIDTHS)}),
        "jumprelu training": ("JumpReLUTrainingSAE", {"jumprelu_bandwidth": 0.4, "jumprelu_init_threshold": 0.1}),
        "standard training": ("StandardTrainingSAE", {}),
        "gated training": ("GatedTrainingSAE", {}),
    }[kind]
    module = import_module("sae_lens.saes.transcoder") if "transcoder" in kind else saes
    sae = getattr(module, name)(getattr(module, f"{name}Config")(**{"d_in": D, "d_sae": F, **settings, **changes}))
    drawn(sae, sparse="topk" not in kind and "matryoshka" not in kind)
    if kind.startswith("jumprelu"):
        draw = torch.Generator().manual_seed(2)
        sae.threshold.data.copy_(0.3 * torch.rand(F, generator=draw))
    return sae


LEARNING = {
    "topk": ("top_k", "AutoEncoderTopK", "TopKTrainer"),
    "batchtopk": ("batch_top_k", "BatchTopKSAE", "BatchTopKTrainer"),
    "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"),
    "jumprelu": ("jumprelu", "JumpReluAutoEncoder", "JumpReluTrainer"),
    "standard": ("standard", "AutoEncoder", "StandardTrainer"),
    "april": ("standard", "AutoEncoder", "StandardTrainerAprilUpdate"),
    "gated": ("gdm", "GatedAutoEncoder", "GatedSAETrainer"),
}


def learning(kind: str) -> Any:
    module, name, _ = LEARNING[kind]
    settings: dict[str, Any] = {"k": K} if "topk" in kind or kind == "matryoshka" else {}
    settings |= {"group_sizes": [WIDTHS[0], WIDTHS[1] - WIDTHS[0], F - WIDTHS[1]]} if kind == "matryoshka" else {}
    cls = getattr(library("dictionary_learning", f"trainers.{module}"), name)
    made = drawn(cls(D, F, **settings), sparse=kind not in ("topk", "batchtopk", "matryoshka"))
    if kind in ("batchtopk", "matryoshka"):
        made.threshold.fill_(9.0)
    if kind == "jumprelu":
        made.threshold.data.copy_(0.1 + 0.3 * torch.rand(F, generator=torch.Generator().manual_seed(2)))
    return made


def trainer(kind: str, **changes: Any) -> Any:
    module, _, name = LEARNING[kind]
    cls = getattr(library("dictionary_learning", f"trainers.{module}"), name)
    settings: dict[str, Any] = {"steps": 100, "activation_dim": D, "dict_size": F, "warmup_steps": 0, "lr": 1e-2}
    if "topk" in kind or kind == "matryoshka":
        settings |= {"k": K, "threshold_start_step": 1}
    else:
        settings |= {"sparsity_warmup_steps": 2}
    settings |= {"group_fractions": [0.125, 0.25, 0.625]} if kind == "matryoshka" else {}
    settings |= {"bandwidth": 0.15} if kind == "jumprelu" else {}
    made = cls(**{**settings, **changes}, layer=0, lm_name="none", seed=0, device="cpu")
    made.ae.load_state_dict(learning(kind).state_dict())
    return made


def coder(**changes: Any) -> Any:
    sparsify = library("sparsify")
    made = drawn(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(**{"num_latents": F, "k": K, **changes})))
    if changes.get("transcode"):
        made.W_dec.data.normal_(generator=torch.Generator().manual_seed(3))
    return made


DICTIONARIES: dict[str, Callable[[], Any]] = {
    "saelens topk": lambda: saelens("topk"),
    "saelens topk, counting norms": lambda: saelens("topk", rescale_acts_by_decoder_norm=True),
    "saelens topk, without b_dec": lambda: saelens("topk", apply_b_dec_to_input=False),
    "saelens topk, layer norm": lambda: saelens("topk", normalize_activations="layer_norm"),
    "saelens jumprelu": lambda: saelens("jumprelu"),
    "saelens standard": lambda: saelens("standard"),
    "saelens gated": lambda: saelens("gated"),
    "saelens transcoder": lambda: saelens("transcoder"),
    "saelens skip transcoder": lambda: saelens("skip transcoder"),
    "saelens jumprelu transcoder": lambda: saelens("jumprelu transcoder"),
    "saelens jumprelu skip transcoder": lambda: saelens("jumprelu skip transcoder"),
    "saelens topk training": lambda: saelens("topk training"),
    "saelens batchtopk training": lambda: saelens("batchtopk training"),
    "saelens matryoshka training": lambda: saelens("matryoshka training"),
    "saelens jumprelu training": lambda: saelens("jumprelu training"),
    "saelens standard training": lambda: saelens("standard training"),
    "saelens gated training": lambda: saelens("gated training"),
    "dictionary_learning topk": lambda: learning("topk"),
    "dictionary_learning batchtopk": lambda: learning("batchtopk"),
    "dictionary_learning matryoshka": lambda: learning("matryoshka"),
    "dictionary_learning jumprelu": lambda: learning("jumprelu"),
    "dictionary_learning standard": lambda: learning("standard"),
    "dictionary_learning gated": lambda: learning("gated"),
    "sparsify": coder,
    "sparsify transcoder": lambda: coder(transcode=True),
    "sparsify with skip": lambda: coder(skip_connection=True),
}
