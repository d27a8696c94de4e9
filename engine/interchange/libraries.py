"""The layouts of the libraries that dictionaries travel between: each reads its own as a `Plain`, and most write one.

What a library can't hold is refused with the reason. Tensors are float32; latents and decoder rows stay as they are.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .places import Where, after_layer, begins_with_bos, in_hooked_transformer, known, of_module, residual_layer
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

SAELENS_VERSION = "6.54.12"  # whose layout we write; a file without a version is read there as one from before 6.0
_SAELENS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
_SAELENS_TRANSCODERS = {"transcoder": "relu", "jumprelu_transcoder": "jumprelu"}


def _read_saelens(cfg: Settings, tensors: State, _: Path) -> Plain:
    """Also files from before 6.0, which have the settings of the model beside the others and call a topk standard."""
    kind, k = cfg.get("architecture", "standard"), cfg.get("k")
    function = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    options = cfg.get("activation_fn_kwargs") or {}
    if function == "topk" and options.get("k") is not None:
        kind, k = "topk", options["k"]
    elif function != "relu":
        raise UserError(f"activation_fn: {function} is not allowed; it must be relu or topk")
    if options.get("signed"):
        raise UserError("activation_fn_kwargs.signed: true is not allowed; it must be false")
    activation = (_SAELENS | _SAELENS_TRANSCODERS).get(kind)
    if activation is None:
        allowed = ", ".join(_SAELENS | _SAELENS_TRANSCODERS)
        raise UserError(f"architecture: {kind} is not allowed; it must be {allowed}")
    if activation == "topk" and k is None:
        raise KeyError("k")
    if (scaled := cfg.get("normalize_activations") or "none") != "none":
        raise UserError(f"normalize_activations: {scaled} is not allowed; fold it into the weights, so that it is none")
    if (shaped := cfg.get("reshape_activations", "none")) not in ("none", "hook_z"):
        raise UserError(f"reshape_activations: {shaped} is not allowed; it must be none or hook_z")
    own = {name: tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    if activation == "jumprelu":
        own["threshold"] = tensors["log_threshold"].exp() if "log_threshold" in tensors else tensors["threshold"]
    if "scaling_factor" in tensors and not (tensors["scaling_factor"] == 1).all():
        raise UserError("scaling_factor: not allowed; it must be 1 throughout")
    if cfg.get("rescale_acts_by_decoder_norm"):  # W_dec of unit rows, and latents that count the norm
        norm = own["W_dec"].norm(dim=1)
        own |= {"W_enc": own["W_enc"] * norm, "b_enc": own["b_enc"] * norm, "W_dec": own["W_dec"] / norm[:, None]}
    is_transcoder = kind in _SAELENS_TRANSCODERS
    return Plain(
        activation, own, not is_transcoder and bool(cfg.get("apply_b_dec_to_input", True)), is_transcoder,
        k if activation == "topk" else None, None, _saelens_place(cfg),
    )  # fmt: skip


def _saelens_place(cfg: Settings) -> Where:
    """A dictionary of one attention head is of a place that we have no name for."""
    about = cfg | (cfg.get("metadata") or {})
    hook, target = about.get("hook_name") or about.get("hook_point"), about.get("hook_name_out")
    if about.get("hook_head_index", about.get("hook_point_head_index")) is not None:
        hook = None
    if about.get("hook_head_index_out") is not None:
        target = None
    special = about.get("exclude_special_tokens")
    return known(
        model=about.get("model_name"), hook=hook, target=target, context=about.get("context_size"),
        bos=about.get("prepend_bos"), data=about.get("dataset_path"),
        drop_special=special if isinstance(special, bool) else None,
    )  # fmt: skip


def _write_saelens(plain: Plain) -> tuple[Settings, State]:
    """batchtopk as jumprelu, as SAELens itself saves it."""
    trained_as = _saelens_training(plain)
    if plain.activation == "batchtopk":
        plain = plain.jumping()
    if plain.is_transcoder and plain.activation == "topk":
        raise UserError("activation: topk is not allowed; SAELens' transcoders have relu and jumprelu")
    kinds = _SAELENS_TRANSCODERS if plain.is_transcoder else _SAELENS
    D, F, d_out = plain.sizes
    is_head_output = str(plain.where.get("hook")).endswith(".hook_z")  # [heads, D / heads] there
    cfg: Settings = {
        "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": plain.subtracts,
        "normalize_activations": "none", "reshape_activations": "hook_z" if is_head_output else "none",
        "metadata": _saelens_metadata(plain) | trained_as,
        "architecture": next(kind for kind, activation in kinds.items() if activation == plain.activation),
    }  # fmt: skip
    cfg |= {"d_out": d_out} if plain.is_transcoder else {}
    cfg |= {"k": plain.k, "rescale_acts_by_decoder_norm": False} if plain.activation == "topk" else {}
    return cfg, plain.tensors


def _saelens_metadata(plain: Plain) -> Settings:
    """What SAELens says of a dictionary that it trained, as far as it is known of this one. Left out, its version in use
    would count as the one that trained it."""
    about: Settings = {"sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None}
    where = plain.where
    if not where:
        return about
    about |= {
        "model_name": where.get("model"), "model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {},
        "hook_name": in_hooked_transformer(where.get("hook")), "hook_head_index": None, "seqpos_slice": [None],
        "context_size": where.get("context"), "prepend_bos": begins_with_bos(where), "dataset_path": where.get("data"),
        "exclude_special_tokens": where.get("drop_special"), "training_tokens": plain.tokens,
        # our rows never join documents
        "disable_concat_sequences": None if plain.tokens is None else True, "sequence_separator_token": None,
    }  # fmt: skip
    if plain.is_transcoder:
        about |= {"hook_name_out": in_hooked_transformer(where.get("target")), "hook_head_index_out": None}
    return about


def _saelens_training(plain: Plain) -> Settings:
    """The kind of dictionary that was trained, which the file's architecture does not tell of a batchtopk. A jumprelu that
    was not trained here may have been one."""
    if plain.is_transcoder or (plain.activation == "jumprelu" and plain.tokens is None):
        return {}
    kind = {"relu": "standard"}.get(plain.activation, plain.activation)
    kind = "matryoshka_batchtopk" if kind == "batchtopk" and plain.prefixes else kind
    details: Settings = {"k": plain.k} if plain.activation == "batchtopk" else {}
    details |= {"matryoshka_widths": list(plain.prefixes)} if plain.prefixes else {}
    return {"training_architecture": kind, "training_architecture_details": details}


# dictionary_learning ----------------------------------------------------------------------------------------------------

_DICTIONARY_LEARNING = {
    "AutoEncoder": "relu", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "batchtopk",
    "JumpReluAutoEncoder": "jumprelu",
}  # fmt: skip
#: by which SAEBench chooses what to load such a dictionary with
_TRAINERS = {
    "AutoEncoder": "StandardTrainer", "AutoEncoderTopK": "TopKTrainer", "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer", "JumpReluAutoEncoder": "JumpReluTrainer",
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
    others = {name: tensors[name] for name in ("threshold",) if name in tensors and activation != "relu"}
    if "encoder.weight" in tensors:
        bias = tensors["bias"] if kind == "AutoEncoder" else tensors["b_dec"]
        own = {
            "W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"],
            "W_dec": tensors["decoder.weight"].T, "b_dec": bias,
        }  # fmt: skip
    else:
        own = {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    where = _dictionary_learning_place(trainer) | known(
        model=trainer.get("lm_name"), context=(config.get("buffer") or {}).get("ctx_len")
    )
    return Plain(activation, own | others, kind != "JumpReluAutoEncoder", k=k, prefixes=prefixes, where=where)


def _dictionary_learning_place(trainer: Settings) -> Where:
    place, layer = trainer.get("submodule_name") or "", trainer.get("layer")
    if place.startswith("blocks."):  # as we write what it has no name for
        return {"hook": place}
    return {"hook": after_layer(layer)} if place.startswith("resid_post") and layer is not None else {}


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
    # whoever reads `layer` takes it for the residual stream after that layer, so there is none for another place
    layer = residual_layer(plain.where.get("hook"))
    trainer = {
        "trainer_class": _TRAINERS[kind], "dict_class": kind, "activation_dim": D, "dict_size": F, "k": plain.k,
        "device": "cpu", "lm_name": plain.where.get("model"), "layer": layer,
        "submodule_name": plain.where.get("hook") if layer is None else f"resid_post_layer_{layer}",
    }  # fmt: skip
    if plain.k is None:
        del trainer["k"]
    buffer = {"d_submodule": D, "io": "out"} | known(ctx_len=plain.where.get("context"))
    return {"trainer": trainer, "buffer": buffer}, tensors


# sparsify ---------------------------------------------------------------------------------------------------------------


def _read_sparsify(cfg: Settings, tensors: State, folder: Path) -> Plain:
    for name, allowed in {"activation": "topk", "skip_connection": False, "signed": False}.items():
        if cfg.get(name, allowed) != allowed:
            raise UserError(f"{name}: {_yaml(cfg[name])} is not allowed; it must be {_yaml(allowed)}")
    own = {
        "W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"], "b_dec": tensors["b_dec"],
    }  # fmt: skip
    is_transcoder = bool(cfg.get("transcode", False))
    return Plain("topk", own, not is_transcoder, is_transcoder, cfg["k"], where=_sparsify_place(folder, is_transcoder))


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _sparsify_place(folder: Path, is_transcoder: bool) -> Where:
    """The folder has the name of a module, and the run's settings are in the folder above it."""
    folder = folder.absolute()
    module = folder.parent if folder.name.startswith("seed") else folder
    file = module.parent / "config.json"
    run = json.loads(file.read_text()) if file.is_file() else {}
    if not isinstance(run, dict) or "ctx_len" not in run:  # the settings of something else
        run = {}
    place = of_module(module.name, is_transcoder)
    return place | known(model=run.get("model"), context=run.get("ctx_len"), data=run.get("dataset"))


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

_GEMMA_SCOPE = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)")


def _read_gemma_scope(_: Settings, tensors: State, folder: Path) -> Plain:
    """Nothing but the folders' names say where it was trained: gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71."""
    own = {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    parts = folder.absolute().parts
    named = {part.partition("_")[0]: part.partition("_")[2] for part in parts}
    release = next((found for part in reversed(parts) if (found := _GEMMA_SCOPE.search(part))), None)
    layer = named.get("layer", "")
    place = {} if release is None or not layer.isdigit() else _gemma_scope_place(release[3], layer)
    if release is not None:
        place["model"] = f"google/gemma-2-{release[1]}" + ("-it" if release[2] == "it" else "")
    is_transcoder = release is not None and release[3] == "transcoders"
    return Plain("jumprelu", own, False, is_transcoder, where=place)


def _gemma_scope_place(site: str, layer: str) -> Where:
    if site == "transcoders":
        return {"hook": f"blocks.{layer}.ln2.hook_normalized", "target": f"blocks.{layer}.hook_mlp_out"}
    return {
        "hook": {
            "res": after_layer(layer), "mlp": f"blocks.{layer}.hook_mlp_out", "att": f"blocks.{layer}.attn.hook_z"
        }[site]
    }  # fmt: skip


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
    for name in tensors:  # norms at the places, which a dictionary without scaling may hold as well
        if name.startswith("dataset_average_activation_norm."):
            tensors[name]
    k = cfg["top_k"] if activation == "topk" else None
    is_transcoder = hook != target
    where = {"hook": hook} | ({"target": target} if is_transcoder else {})
    return Plain(activation, t, False, is_transcoder, k, where=where)


#: by the name that `convert` has for them; those with the same settings differ in the weights' name
LIBRARIES: Mapping[str, Library] = {
    "saelens": Library("cfg.json", "sae_weights.safetensors", _read_saelens, _write_saelens),
    "dictionary_learning": Library("config.json", "ae.pt", _read_dictionary_learning, _write_dictionary_learning),
    "sparsify": Library("cfg.json", "sae.safetensors", _read_sparsify, _write_sparsify),
    "gemma-scope": Library(None, "params.npz", _read_gemma_scope, _write_gemma_scope),
    "llamascopium": Library("config.json", "sae_weights.safetensors", _read_llamascopium),
}
