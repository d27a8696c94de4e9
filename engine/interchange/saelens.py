"""SAELens: cfg.json and sae_weights.safetensors, from its first release to 6.54.

Settings of older files are converted in the same order as in SAELens' loader (`handle_config_defaulting`). A learned
scaling factor of latents (versions 3 to 5) is multiplied into W_dec. Gated dictionaries become jumprelu.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .hook_metadata import Where, in_hooked_transformer, known
from .intermediate import DictionarySpec, State, check_matrices, gated, unit_rows
from .json_settings import Settings, as_json, check_size, read_settings
from .tensor_files import TrackedTensors

VERSION = "6.54.12"  # of the layout that we write; SAELens reads a file without a version as one from before 6.0
_SAES = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
_TRANSCODERS = {"transcoder": "relu", "jumprelu_transcoder": "jumprelu"}
_TRAINED = {"batchtopk": "batchtopk", "matryoshka_batchtopk": "batchtopk"}  # in its trainer's checkpoints
_READ = {**_SAES, "gated": "jumprelu", **_TRANSCODERS, **_TRAINED}
_SCALER = "activation_scaler.json"  # beside the weights in a trainer's checkpoint
_INSTEAD = "; other kinds work only in SAELens"
_OWN_NORM = "it scales each activation by its own norm, which works only in SAELens"


def read(settings: Settings, tensors: TrackedTensors, folder: Path) -> DictionarySpec:
    cfg = _defaulted(settings)
    kind = cfg.one_of("architecture", cfg.get("architecture"), list(_READ), _INSTEAD)
    is_transcoder, activation = kind in _TRANSCODERS, _READ[kind]
    cfg.one_of("reshape_activations", cfg.get("reshape_activations", "none"), ["none", "hook_z"])
    weights = _encoder(kind, tensors) | {"W_dec": tensors["W_dec"], "b_dec": tensors["b_dec"]}
    _check_sizes(cfg, weights)
    if (factor := _latents_factor(cfg, tensors)) is not None:
        weights["W_dec"] = weights["W_dec"] * factor[:, None]
    counts_norms = activation in ("topk", "batchtopk") and cfg.flag("rescale_acts_by_decoder_norm", False)
    if (scale := _activations_factor(cfg, folder)) is not None:
        weights["W_enc"] = weights["W_enc"] * scale
        weights |= {name: weights[name] / scale for name in ("W_dec", "b_dec")}
        if activation == "batchtopk" and counts_norms:
            weights["threshold"] = weights["threshold"] / scale
    if counts_norms:
        weights = unit_rows(weights)
    subtracts = not is_transcoder and cfg.flag("apply_b_dec_to_input", True)
    k, prefixes = None, None
    if activation == "topk":
        if cfg.get("k", 100) is None:
            raise KeyError("k")
        k = cfg.whole("k", 100)  # the default of its class
    elif activation == "batchtopk":
        k = max(1, round(cfg.number("k", 100) or 0))  # an average in SAELens, so it may be a fraction
        prefixes = _prefixes(cfg, weights["W_enc"].shape[1]) if kind.startswith("matryoshka") else None
    where = _place(Settings(cfg | _renamed(settings.section("metadata"))))
    return DictionarySpec(activation, weights, subtracts, is_transcoder, k, prefixes, where)


def _defaulted(settings: Settings) -> Settings:
    """Return settings with the names of version 6 and the defaults of the file's version."""
    version = settings.text("sae_lens_version") or settings.section("metadata").text("sae_lens_version") or "0"
    major = re.match(r"\d+", version)
    if major is None:
        raise UserError(f"sae_lens_version: {as_json(version)} is not allowed; it must be a version such as {VERSION}")
    is_old, cfg = int(major[0]) < 6, _renamed(settings)
    cfg.one_of("activation_fn", function := cfg.get("activation_fn", "relu"), ["relu", "topk"], _INSTEAD)
    options = cfg.section("activation_fn_kwargs")
    if options.flag("signed", False):
        raise UserError("activation_fn_kwargs.signed: true is not allowed; it must be false")
    if not is_old and "architecture" not in cfg:
        raise UserError("architecture: missing; SAELens 6 has one in every file")
    kind = cfg.get("architecture", "standard")
    if function == "topk" and kind != "topk":
        if not is_old:
            raise UserError(f"activation_fn: topk is not allowed with architecture {as_json(kind)} in SAELens 6")
        if options.get("k") is None:
            raise UserError("activation_fn: topk is not allowed without activation_fn_kwargs.k")
        kind = "topk"
    if is_old and kind == "topk" and options.get("k") is not None:
        cfg["k"] = options["k"]
    cfg["architecture"] = kind
    normalised = cfg.get("normalize_activations")
    if normalised is None or isinstance(normalised, bool):
        cfg["normalize_activations"] = "expected_average_only_in" if normalised else "none"
    return cfg


def _renamed(cfg: Settings) -> Settings:
    names = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    return Settings({names.get(name, name): value for name, value in cfg.items()})


def _encoder(kind: str, tensors: TrackedTensors) -> State:
    """Return W_enc, b_enc and, if there is one, the threshold."""
    if kind == "gated":
        return gated(*(tensors[name] for name in ("W_enc", "b_gate", "b_mag", "r_mag")))
    weights = {name: tensors[name] for name in ("W_enc", "b_enc")}
    if kind in _TRAINED:
        return weights | {"threshold": tensors["topk_threshold"].float()}
    if _READ[kind] == "jumprelu":
        is_log = "log_threshold" in tensors
        weights["threshold"] = tensors["log_threshold"].exp() if is_log else tensors["threshold"]
    return weights


def _check_sizes(cfg: Settings, weights: State) -> None:
    check_matrices(weights)
    (D, F), d_out = weights["W_enc"].shape, weights["W_dec"].shape[1]
    d_sae = cfg.whole("d_sae")
    if d_sae is None and (expansion := cfg.number("expansion_factor")) is not None:  # in the first releases
        d_sae = round(D * expansion)
    check_size("d_in", cfg.whole("d_in"), D)
    check_size("d_sae", d_sae, F)
    check_size("d_out", cfg.whole("d_out"), d_out)


def _latents_factor(cfg: Settings, tensors: TrackedTensors) -> Tensor | None:
    """Return the factor [F] on latents before decoding, or None if it is 1. Some releases wrote an untrained one."""
    factor = tensors.take("scaling_factor", "finetuning_scaling_factor")
    if factor is None or torch.allclose(factor, torch.ones_like(factor)):
        return None
    if not cfg.flag("finetuning_scaling_factor", False):
        raise UserError("scaling_factor: not allowed with finetuning_scaling_factor false; it must be 1 throughout")
    if factor.shape != tensors["b_enc" if "b_enc" in tensors else "b_mag"].shape:
        raise UserError(f"scaling_factor has shape {list(factor.shape)}; it must have one number per latent")
    return factor


def _activations_factor(cfg: Settings, folder: Path) -> float | None:
    """Return the factor on activations, which SAELens folds into the weights only when training ends."""
    normalised = cfg["normalize_activations"]
    if normalised == "none":
        return None
    if normalised == "expected_average_only_in" and (folder / _SCALER).is_file():
        factor = read_settings(folder / _SCALER).number("scaling_factor")
        if factor is not None and factor > 0:
            return factor
    reason = {
        "layer_norm": _OWN_NORM,
        "constant_norm_rescale": _OWN_NORM,
        "expected_average_only_in": "SAELens folds it into the weights with fold_activation_norm_scaling_factor",
        "covariance_whitening": "SAELens folds it into the weights with fold_activation_whitening",
    }.get(str(normalised), "it must be none")
    raise UserError(f"normalize_activations: {as_json(normalised)} is not allowed; {reason}")


def _prefixes(cfg: Settings, F: int) -> tuple[int, ...]:
    widths = cfg.get("matryoshka_widths")
    if not isinstance(widths, list) or not widths or not all(type(width) is int for width in widths):
        raise UserError(f"matryoshka_widths: {as_json(widths)} is not allowed; it must be ascending numbers of latents")
    return tuple(widths) if widths[-1] == F else (*widths, F)


def _place(metadata: Settings) -> Where:
    """Return the place and text. We have no name for the hook of a single attention head."""
    hook, target = (
        metadata.text(f"hook_name{side}") if metadata.get(f"hook_head_index{side}") is None else None
        for side in ("", "_out")
    )
    special = metadata.get("exclude_special_tokens")
    return known(
        model=metadata.text("model_name"), hook=hook, target=target, context=metadata.whole("context_size", least=2),
        bos=None if metadata.get("prepend_bos") is None else metadata.flag("prepend_bos", True),
        data=metadata.text("dataset_path"), drop_special=special if isinstance(special, bool) else None,
    )  # fmt: skip


def write(spec: DictionarySpec) -> tuple[dict[str, object], State]:
    """Write a dictionary. batchtopk becomes jumprelu, as in SAELens itself."""
    trained_as = _training(spec)
    if spec.activation == "batchtopk":
        spec = spec.jumping()
    if spec.is_transcoder and spec.activation == "topk":
        raise UserError("activation: topk is not allowed; SAELens' transcoders are relu or jumprelu")
    kinds = _TRANSCODERS if spec.is_transcoder else _SAES
    D, F, d_out = spec.sizes
    is_head_output = str(spec.where.get("hook")).endswith(".hook_z")  # [heads, D / heads] there
    cfg: dict[str, object] = {
        "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": spec.subtracts,
        "normalize_activations": "none", "reshape_activations": "hook_z" if is_head_output else "none",
        "metadata": _metadata(spec) | trained_as,
        "architecture": next(kind for kind, activation in kinds.items() if activation == spec.activation),
    }  # fmt: skip
    cfg |= {"d_out": d_out} if spec.is_transcoder else {}
    cfg |= {"k": spec.k, "rescale_acts_by_decoder_norm": False} if spec.activation == "topk" else {}
    return cfg, spec.tensors


def _metadata(spec: DictionarySpec) -> dict[str, object]:
    """Return the metadata that SAELens writes, as far as they are known. The training version is an explicit null,
    because SAELens would otherwise fill in its own version."""
    metadata: dict[str, object] = {"sae_lens_version": VERSION, "sae_lens_training_version": None}
    where = spec.where
    if not where:
        return metadata
    metadata |= {
        "model_name": where.get("model"), "model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {},
        "hook_name": in_hooked_transformer(where.get("hook")), "hook_head_index": None, "seqpos_slice": [None],
        # under transformer_lens every tokenizer has a BOS token, if necessary its EOS
        "prepend_bos": where["bos"] is not False if "bos" in where else None,
        "context_size": where.get("context"), "dataset_path": where.get("data"),
        "exclude_special_tokens": where.get("drop_special"), "training_tokens": spec.tokens,
        # temposae's rows never join documents
        "disable_concat_sequences": None if spec.tokens is None else True, "sequence_separator_token": None,
    }  # fmt: skip
    if spec.is_transcoder:
        metadata |= {"hook_name_out": in_hooked_transformer(where.get("target")), "hook_head_index_out": None}
    return metadata


def _training(spec: DictionarySpec) -> dict[str, object]:
    """Return the kind that was trained, because a batchtopk dictionary is written as jumprelu. The kind is unknown for
    a jumprelu dictionary that was not trained by temposae."""
    if spec.is_transcoder or (spec.activation == "jumprelu" and spec.tokens is None):
        return {}
    kind = {"relu": "standard"}.get(spec.activation, spec.activation)
    kind = "matryoshka_batchtopk" if kind == "batchtopk" and spec.prefixes else kind
    details: dict[str, object] = {"k": spec.k} if spec.activation == "batchtopk" else {}
    details |= {"matryoshka_widths": list(spec.prefixes)} if spec.prefixes else {}
    return {"training_architecture": kind, "training_architecture_details": details}
