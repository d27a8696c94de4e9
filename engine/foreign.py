"""Dictionaries that SAELens, dictionary_learning and sparsify have saved, read as ours.

SAELens               cfg.json, sae_weights.safetensors   standard, topk, jumprelu (batchtopk and Matryoshka, saved)
dictionary_learning   config.json, ae.pt                  AutoEncoder, AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE,
                                                          JumpReluAutoEncoder
sparsify              cfg.json, sae.safetensors           topk autoencoders

Latents and decoder rows stay as they are there, rows of any norm. Where a library doesn't take b_dec from x, b_enc makes up
for it: x W_enc + b_enc = (x - b_dec) W_enc + (b_enc + b_dec W_enc). dictionary_learning's TopK keeps k per token, as its
`encode` does, and its BatchTopK what is above its threshold.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .config import RunConfig, SAEConfig, StreamConfig
from .errors import UserError
from .sae import SparseAutoencoder

State = dict[str, Tensor]


@dataclass
class Foreign:
    """A dictionary, the file with its weights, and where it was trained, if model and hook are known."""

    sae: SparseAutoencoder
    weights: Path
    run: RunConfig | None


@dataclass
class _Read:
    """What a folder says: an activation of ours, W_enc [D, F], W_dec [F, D], biases, threshold; and where it was trained."""

    activation: str
    tensors: State
    subtracts_b_dec: bool = True
    k: int | None = None
    model: str | None = None
    hook: str | None = None


def read(folder: Path) -> Foreign | None:
    """The dictionary in a folder of one of these libraries; None if it is of none of them.

    Raises UserError for a kind that can't be read, and for files that are damaged or don't fit.
    """
    for settings, weights, reader in _LIBRARIES:
        if (folder / settings).is_file() and (folder / weights).is_file():
            try:
                found = reader(json.loads((folder / settings).read_text()), _tensors(folder / weights))
                sae = _ours(found)
            except UserError as error:
                raise UserError(f"sae: {folder}: {error}") from None
            except KeyError as error:
                raise UserError(f"sae: {folder} has no {error} in {settings} or {weights}") from None
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise UserError(f"sae: {folder} can't be read ({type(error).__name__}: {error})") from None
            run = None
            if found.model is not None and found.hook is not None:
                run = RunConfig(stream=StreamConfig(model=found.model, hook=found.hook), sae=sae.cfg)
            return Foreign(sae, folder / weights, run)
    return None


def _tensors(file: Path) -> State:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{file.name} is damaged, or holds more than tensors ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{file.name} is not allowed; it must hold tensors by name")
    return found


def _ours(found: _Read) -> SparseAutoencoder:
    tensors = {name: tensor.float() for name, tensor in found.tensors.items()}
    if tensors["W_enc"].ndim != 2:
        raise UserError(f"W_enc has shape {list(tensors['W_enc'].shape)}; it must be [D, F]")
    D, F = tensors["W_enc"].shape
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    if found.activation in ("jumprelu", "batchtopk"):
        shapes["threshold"] = (F,) if found.activation == "jumprelu" else ()
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{name} has shape {list(tensors[name].shape)}; with W_enc {[D, F]} it must be {list(shape)}"
            )
        if not tensors[name].isfinite().all():
            raise UserError(f"{name} holds numbers that are not finite")
    if not found.subtracts_b_dec:
        moved = tensors["b_enc"].double() + tensors["b_dec"].double() @ tensors["W_enc"].double()
        tensors["b_enc"] = moved.float()
    if "threshold" in shapes:
        tensors["threshold"] = tensors["threshold"].clamp_min(0)  # what is below 0 is no activation in any case
    settings: dict[str, Any] = {"d_in": D, "d_sae": F, "activation": found.activation}
    sae = SparseAutoencoder(SAEConfig(**settings, k=min(32, F) if found.k is None else found.k))
    sae.load_state_dict({name: tensors[name] for name in shapes}, strict=True)
    return sae


def _saelens(cfg: dict[str, Any], tensors: State) -> _Read:
    kinds = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
    kind = cfg["architecture"]
    if kind not in kinds:
        raise UserError(f"architecture: {kind} is not allowed; it must be {', '.join(kinds)}")
    if (scaled := cfg.get("normalize_activations", "none")) != "none":
        raise UserError(f"normalize_activations: {scaled} is not allowed; fold it into the weights, so that it is none")
    if (shaped := cfg.get("reshape_activations", "none")) != "none":
        raise UserError(f"reshape_activations: {shaped} is not allowed; it must be none")
    tensors = dict(tensors)
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if cfg.get("rescale_acts_by_decoder_norm"):  # W_dec of unit rows, and latents that count the norm
        norm = tensors["W_dec"].norm(dim=1)
        tensors |= {"W_enc": tensors["W_enc"] * norm, "b_enc": tensors["b_enc"] * norm}
        tensors["W_dec"] = tensors["W_dec"] / norm[:, None]
    about = cfg.get("metadata") or cfg
    subtracts = bool(cfg.get("apply_b_dec_to_input", False))
    k = cfg["k"] if kind == "topk" else None
    return _Read(kinds[kind], tensors, subtracts, k, about.get("model_name"), about.get("hook_name"))


def _dictionary_learning(config: dict[str, Any], tensors: State) -> _Read:
    trainer = config["trainer"]
    kinds = {
        "AutoEncoder": "relu", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk",
        "MatryoshkaBatchTopKSAE": "batchtopk", "JumpReluAutoEncoder": "jumprelu",
    }  # fmt: skip
    kind = trainer["dict_class"]
    if kind not in kinds:
        raise UserError(f"trainer.dict_class: {kind} is not allowed; it must be {', '.join(kinds)}")
    if "encoder.weight" in tensors:
        bias = tensors["bias"] if kind == "AutoEncoder" else tensors["b_dec"]
        others = {name: tensors[name] for name in ("threshold",) if name in tensors}
        tensors = others | {
            "W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"],
            "W_dec": tensors["decoder.weight"].T, "b_dec": bias,
        }  # fmt: skip
    place = trainer.get("submodule_name") or ""
    layer = trainer.get("layer")
    hook = f"blocks.{layer}.hook_resid_post" if place.startswith("resid_post") and layer is not None else None
    k = trainer["k"] if kinds[kind] in ("topk", "batchtopk") else None
    return _Read(kinds[kind], tensors, kind != "JumpReluAutoEncoder", k, trainer.get("lm_name"), hook)


def _sparsify(cfg: dict[str, Any], tensors: State) -> _Read:
    for name, allowed in {"activation": "topk", "transcode": False, "skip_connection": False}.items():
        if cfg.get(name, allowed) != allowed:
            raise UserError(f"{name}: {cfg[name]} is not allowed; it must be {allowed}")
    W_enc, b_enc = tensors["encoder.weight"].T, tensors["encoder.bias"]
    own = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": tensors["W_dec"], "b_dec": tensors["b_dec"]}
    return _Read("topk", own, k=cfg["k"])


#: settings, weights, and what reads them; those with the same settings differ in the weights' name
_LIBRARIES: tuple[tuple[str, str, Callable[[dict[str, Any], State], _Read]], ...] = (
    ("cfg.json", "sae_weights.safetensors", _saelens),
    ("config.json", "ae.pt", _dictionary_learning),
    ("cfg.json", "sae.safetensors", _sparsify),
)
