"""The layouts of the libraries that dictionaries travel between: each reads its own as a `Plain`, and most write one.

What a library can't hold is refused with the reason. Tensors are float32; latents and decoder rows stay as they are.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .plain import Plain, State

Settings = dict[str, Any]


@dataclass(frozen=True)
class Library:
    """`settings` (None: there are none) and `weights` are files in a folder. `read` makes a `Plain` of what they hold, and
    of the folder they lie in; `write` makes both of a `Plain`, or raises UserError for one that can't be."""

    settings: str | None
    weights: str
    read: Callable[[Settings, State, Path], Plain]
    write: Callable[[Plain], tuple[Settings, State]] | None = None


# SAELens ----------------------------------------------------------------------------------------------------------------

_SAELENS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
_SAELENS_TRANSCODERS = {"transcoder": "relu", "jumprelu_transcoder": "jumprelu"}


def _read_saelens(cfg: Settings, tensors: State, _: Path) -> Plain:
    kind = cfg["architecture"]
    activation = (_SAELENS | _SAELENS_TRANSCODERS).get(kind)
    if activation is None:
        allowed = ", ".join(_SAELENS | _SAELENS_TRANSCODERS)
        raise UserError(f"architecture: {kind} is not allowed; it must be {allowed}")
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
    is_transcoder = kind in _SAELENS_TRANSCODERS
    return Plain(
        activation, tensors, not is_transcoder and bool(cfg.get("apply_b_dec_to_input", False)), is_transcoder,
        cfg["k"] if kind == "topk" else None, None,
        about.get("model_name"), about.get("hook_name"), about.get("hook_name_out"),
    )  # fmt: skip


def _write_saelens(plain: Plain) -> tuple[Settings, State]:
    """batchtopk as jumprelu, as SAELens itself saves it."""
    if plain.activation == "batchtopk":
        plain = plain.jumping()
    if plain.is_transcoder and plain.activation == "topk":
        raise UserError("activation: topk is not allowed; SAELens' transcoders have relu and jumprelu")
    kinds = _SAELENS_TRANSCODERS if plain.is_transcoder else _SAELENS
    D, F, d_out = plain.sizes
    about = {"model_name": plain.model, "hook_name": plain.hook, "hook_name_out": plain.target}
    cfg: Settings = {
        "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": plain.subtracts,
        "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {name: value for name, value in about.items() if value is not None},
        "architecture": next(kind for kind, activation in kinds.items() if activation == plain.activation),
    }  # fmt: skip
    cfg |= {"d_out": d_out} if plain.is_transcoder else {}
    cfg |= {"k": plain.k, "rescale_acts_by_decoder_norm": False} if plain.activation == "topk" else {}
    return cfg, plain.tensors


# dictionary_learning ----------------------------------------------------------------------------------------------------

_DICTIONARY_LEARNING = {
    "AutoEncoder": "relu", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "batchtopk",
    "JumpReluAutoEncoder": "jumprelu",
}  # fmt: skip


def _read_dictionary_learning(config: Settings, tensors: State, _: Path) -> Plain:
    """TopK keeps k of each token, as its `encode` does unless told otherwise, BatchTopK what is above its threshold."""
    trainer = config["trainer"]
    kind = trainer["dict_class"]
    if kind not in _DICTIONARY_LEARNING:
        raise UserError(f"trainer.dict_class: {kind} is not allowed; it must be {', '.join(_DICTIONARY_LEARNING)}")
    activation = _DICTIONARY_LEARNING[kind]
    k = None
    if activation in ("topk", "batchtopk"):
        k = int(tensors["k"]) if "k" in tensors else trainer["k"]
    prefixes = tuple(tensors["group_sizes"].cumsum(0).tolist()) if "group_sizes" in tensors else None
    if "encoder.weight" in tensors:
        bias = tensors["bias"] if kind == "AutoEncoder" else tensors["b_dec"]
        others = {name: tensors[name] for name in ("threshold",) if name in tensors}
        tensors = others | {
            "W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"],
            "W_dec": tensors["decoder.weight"].T, "b_dec": bias,
        }  # fmt: skip
    place, layer = trainer.get("submodule_name") or "", trainer.get("layer")
    hook = f"blocks.{layer}.hook_resid_post" if place.startswith("resid_post") and layer is not None else None
    subtracts = kind != "JumpReluAutoEncoder"
    return Plain(activation, tensors, subtracts, k=k, prefixes=prefixes, model=trainer.get("lm_name"), hook=hook)


def _write_dictionary_learning(plain: Plain) -> tuple[Settings, State]:
    if plain.is_transcoder:
        raise UserError("d_out: not allowed; dictionary_learning has no transcoders")
    kinds = {activation: kind for kind, activation in reversed(_DICTIONARY_LEARNING.items())}
    kind = "MatryoshkaBatchTopKSAE" if plain.prefixes and plain.activation == "batchtopk" else kinds[plain.activation]
    plain = plain.subtracting(kind != "JumpReluAutoEncoder")
    t = plain.tensors
    tensors = dict(t)
    if kind in ("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"):
        bias = "bias" if kind == "AutoEncoder" else "b_dec"
        weights = {"encoder.weight": t["W_enc"].T, "decoder.weight": t["W_dec"].T}
        tensors = {**weights, "encoder.bias": t["b_enc"], bias: t["b_dec"]}
    D, F, _ = plain.sizes
    if plain.k is not None:
        tensors["k"] = torch.tensor(plain.k, dtype=torch.int32)
        tensors["threshold"] = t.get("threshold", torch.tensor(-1.0))  # -1: none was followed
    if kind == "MatryoshkaBatchTopKSAE" and plain.prefixes:
        tensors["group_sizes"] = torch.tensor(plain.prefixes).diff(prepend=torch.zeros(1, dtype=torch.int64))
    layer = (plain.hook or "").split(".")[1] if (plain.hook or "").startswith("blocks.") else None
    is_residual = (plain.hook or "").endswith("hook_resid_post")
    trainer = {
        "dict_class": kind, "activation_dim": D, "dict_size": F, "k": plain.k, "lm_name": plain.model,
        "layer": None if layer is None else int(layer),
        "submodule_name": f"resid_post_layer_{layer}" if is_residual else plain.hook,
    }  # fmt: skip
    return {"trainer": trainer}, tensors


# sparsify ---------------------------------------------------------------------------------------------------------------


def _read_sparsify(cfg: Settings, tensors: State, folder: Path) -> Plain:
    for name, allowed in {"activation": "topk", "skip_connection": False}.items():
        if cfg.get(name, allowed) != allowed:
            raise UserError(f"{name}: {cfg[name]} is not allowed; it must be {allowed}")
    own = {
        "W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"], "b_dec": tensors["b_dec"],
    }  # fmt: skip
    is_transcoder = bool(cfg.get("transcode", False))
    return Plain("topk", own, not is_transcoder, is_transcoder, cfg["k"])


def _write_sparsify(plain: Plain) -> tuple[Settings, State]:
    if plain.activation != "topk":
        raise UserError(f"activation: {plain.activation} is not allowed; sparsify has topk alone")
    D, F, d_out = plain.sizes
    if d_out != D:
        raise UserError(f"d_out: {d_out} is not allowed; sparsify's transcoders give as many as they get ({D})")
    t = plain.subtracting(True).tensors
    tensors = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    cfg = {
        "activation": "topk", "expansion_factor": max(1, F // D), "normalize_decoder": True, "num_latents": F, "k": plain.k,
        "multi_topk": False, "skip_connection": False, "transcode": plain.is_transcoder, "d_in": D,
    }  # fmt: skip
    return cfg, tensors


# Gemma Scope ------------------------------------------------------------------------------------------------------------


def _read_gemma_scope(_: Settings, tensors: State, folder: Path) -> Plain:
    """Nothing but the folders' names say where it was trained."""
    named = {part.partition("_")[0]: part.partition("_")[2] for part in folder.parts}
    layer, is_residual = named.get("layer"), any("-res" in part for part in folder.parts)
    hook = f"blocks.{layer}.hook_resid_post" if layer is not None and layer.isdigit() and is_residual else None
    return Plain("jumprelu", dict(tensors), False, hook=hook)


def _write_gemma_scope(plain: Plain) -> tuple[Settings, State]:
    if plain.is_transcoder:
        raise UserError("d_out: not allowed; write transcoders as saelens or temposae")
    plain = plain.jumping().subtracting(False)
    return {}, plain.tensors


# Llamascopium -----------------------------------------------------------------------------------------------------------


def _read_llamascopium(cfg: Settings, tensors: State, _: Path) -> Plain:
    """The dataset's mean norms, if activations were scaled by them, go into biases and decoder; and where the selection
    counts decoder norms, latents count them, with W_dec of unit rows."""
    if (kind := cfg["sae_type"]) != "sae":
        raise UserError(f"sae_type: {kind} is not allowed; it must be sae")
    if cfg.get("use_glu_encoder"):
        raise UserError("use_glu_encoder: true is not allowed; it must be false")
    activation = cfg["act_fn"]
    if activation not in ("relu", "topk", "jumprelu"):
        raise UserError(f"act_fn: {activation} is not allowed; it must be relu, topk, jumprelu")
    t = {"W_enc": tensors["W_E"], "b_enc": tensors["b_E"], "W_dec": tensors["W_D"]}
    t["b_dec"] = tensors["b_D"] if cfg.get("use_decoder_bias", True) else t["W_dec"].new_zeros(t["W_dec"].shape[1])
    if activation == "jumprelu":
        t["threshold"] = tensors["activation_function.log_jumprelu_threshold"].exp()
    hook, target = cfg["hook_point_in"], cfg["hook_point_out"]
    norms = cfg.get("norm_activation", "dataset-wise")
    if norms == "dataset-wise":
        root = math.sqrt(cfg["d_model"])
        given, wanted = (root / float(tensors[f"dataset_average_activation_norm.{at}"]) for at in (hook, target))
        t["b_enc"], t["b_dec"] = t["b_enc"] / given, t["b_dec"] / wanted
        t["W_dec"] = t["W_dec"] * (given / wanted)
        if "threshold" in t:
            t["threshold"] = t["threshold"] / (wanted if cfg.get("sparsity_include_decoder_norm", True) else given)
    elif norms != "inference":
        raise UserError(f"norm_activation: {norms} is not allowed; it must be dataset-wise or inference")
    if cfg.get("sparsity_include_decoder_norm", True):
        norm = t["W_dec"].norm(dim=1)
        t |= {"W_enc": t["W_enc"] * norm, "b_enc": t["b_enc"] * norm, "W_dec": t["W_dec"] / norm[:, None]}
    k = cfg["top_k"] if activation == "topk" else None
    is_transcoder = hook != target
    return Plain(activation, t, False, is_transcoder, k, None, None, hook, target if is_transcoder else None)


#: by the name that `convert` has for them; those with the same settings differ in the weights' name
LIBRARIES: Mapping[str, Library] = {
    "saelens": Library("cfg.json", "sae_weights.safetensors", _read_saelens, _write_saelens),
    "dictionary_learning": Library("config.json", "ae.pt", _read_dictionary_learning, _write_dictionary_learning),
    "sparsify": Library("cfg.json", "sae.safetensors", _read_sparsify, _write_sparsify),
    "gemma-scope": Library(None, "params.npz", _read_gemma_scope, _write_gemma_scope),
    "llamascopium": Library("config.json", "sae_weights.safetensors", _read_llamascopium),
}
