"""Llamascopium, formerly Language-Model-SAEs (lm_saes): read only.

2024: hyperparams.json, weights of nn.Linear, settings with one threshold and the dataset's mean norms, and a loader
that folds the norms into the weights before it applies the threshold. 2025: config.json, and tensors with thresholds
and mean norms. From June 2025: tensors W_E and W_D. Mean norms that scaled activations go into biases and decoder.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .hook_metadata import known
from .intermediate import DictionarySpec, State, check_matrices, linear_weights, unit_rows
from .json_settings import Settings, as_json, check_size
from .tensor_files import TrackedTensors

FIRST = "hyperparams.json"
_NORM = "dataset_average_activation_norm"
_INSTEAD = "; other kinds work only in Llamascopium"


def read(cfg: Settings, tensors: TrackedTensors, folder: Path) -> DictionarySpec:
    is_first = not (folder / "config.json").is_file()
    cfg.one_of("sae_type", cfg.get("sae_type", "sae"), ["sae"], _INSTEAD)
    if cfg.flag("use_glu_encoder", False):
        raise UserError(f"use_glu_encoder: true is not allowed; it must be false{_INSTEAD}")
    act_fn = cfg.get("act_fn", "relu")
    act_fn = act_fn.lower() if isinstance(act_fn, str) else act_fn
    activation = cfg.one_of("act_fn", act_fn, ["relu", "topk", "jumprelu"], _INSTEAD)
    t = _weights(tensors, cfg.flag("use_decoder_bias", True))
    _check_sizes(cfg, t)
    D = t["W_enc"].shape[0]
    hook = cfg.text("hook_point_in") or ("blocks.0.hook_resid_pre" if is_first else None)
    if hook is None:
        raise KeyError("hook_point_in")
    target = cfg.text("hook_point_out") or hook
    counts_norms = cfg.flag("sparsity_include_decoder_norm", True)
    input_factor, output_factor = _factors(cfg, tensors, (hook, target), D, is_first)
    fixed_threshold = cfg.number("jump_relu_threshold", 0.0) or 0.0
    threshold = _threshold(tensors, fixed_threshold, t["b_enc"]) if activation == "jumprelu" else None
    if is_first and activation == "topk" and fixed_threshold > 0:  # as in its loader
        activation, threshold = "jumprelu", _threshold(tensors, fixed_threshold, t["b_enc"])
    norm = t["W_dec"].norm(dim=1)
    t["b_enc"], t["b_dec"] = t["b_enc"] / input_factor, t["b_dec"] / output_factor
    t["W_dec"] = t["W_dec"] * (input_factor / output_factor)
    if counts_norms and (is_first or activation == "topk"):  # the first loader scales rows of all kinds to norm 1
        t = unit_rows(t)
    elif threshold is not None and not is_first:  # it applies to input_factor * latent * norm
        scale = input_factor * (norm if counts_norms else torch.ones_like(norm))
        threshold = torch.where(scale > 0, threshold / scale, torch.finfo(torch.float32).max)
    t |= {"threshold": threshold} if threshold is not None and activation == "jumprelu" else {}
    for name in tensors:  # norms, which a dictionary without scaling may also have
        if name.startswith(f"{_NORM}."):
            tensors[name]
    k = cfg.whole("top_k", 50) if activation == "topk" else None
    is_transcoder = hook != target
    subtracts = cfg.flag("apply_decoder_bias_to_pre_encoder", is_first)
    if is_transcoder and subtracts:
        raise UserError(f"apply_decoder_bias_to_pre_encoder: true is not allowed with hook_point_out {as_json(target)}")
    where = known(hook=hook, target=target if is_transcoder else None)
    return DictionarySpec(activation, t, subtracts, is_transcoder, k, where=where)


def _weights(tensors: TrackedTensors, has_bias: bool) -> State:
    if "encoder.weight" in tensors:
        t, bias = linear_weights(tensors), "decoder.bias"
    else:
        t, bias = {"W_enc": tensors["W_E"], "b_enc": tensors["b_E"], "W_dec": tensors["W_D"]}, "b_D"
    check_matrices(t)
    return {**t, "b_dec": tensors[bias] if has_bias else t["W_dec"].new_zeros(t["W_dec"].shape[1])}


def _check_sizes(cfg: Settings, t: State) -> None:
    D, F = t["W_enc"].shape
    latents, expansion = cfg.whole("d_sae"), cfg.number("expansion_factor")
    if latents is None and expansion is not None:
        latents = int((cfg.whole("d_model") or D) * expansion + 1e-6)
    check_size("d_model", cfg.whole("d_model"), D)
    check_size("d_model * expansion_factor", latents, F)


def _threshold(tensors: TrackedTensors, fixed_threshold: float, b_enc: Tensor) -> Tensor:
    """Return the threshold per latent [F]. Before February 2025 it was one setting for all latents."""
    learned = tensors.take("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
    if learned is not None:
        return learned.exp()
    if "encoder.weight" not in tensors:
        raise KeyError("activation_function.log_jumprelu_threshold")
    if fixed_threshold < 0:
        raise UserError(f"jump_relu_threshold: {fixed_threshold} is not allowed; it must be at least 0")
    return torch.full_like(b_enc, fixed_threshold)


def _factors(
    cfg: Settings, tensors: TrackedTensors, hooks: tuple[str, str], D: int, is_first: bool
) -> tuple[float, float]:
    """Return the factors on activations at the two hooks, which give them a mean norm of sqrt(D) over the dataset."""
    scaling = cfg.get("norm_activation", "token-wise" if is_first else "dataset-wise")
    if scaling in ("token-wise", "batch-wise"):
        raise UserError(
            f"norm_activation: {scaling} is not allowed; it scales activations by their own norms, which works only in "
            "Llamascopium"
        )
    cfg.one_of("norm_activation", scaling, ["dataset-wise", "inference", *(["none"] if is_first else [])])
    if scaling != "dataset-wise":
        return 1.0, 1.0
    dataset_norms = cfg.section(_NORM)
    norms: list[float] = []
    for side, hook in zip(("in", "out"), hooks, strict=True):
        norm_tensor = tensors.take(f"{_NORM}.{hook}")
        if norm_tensor is None:
            norm = dataset_norms.number(side)
        else:
            norm = float(norm_tensor) if norm_tensor.numel() == 1 else math.nan
        if norm is None:
            raise UserError(f"{_NORM}.{hook}: missing; without it activations can't be scaled")
        if not 0 < norm < math.inf:
            raise UserError(f"{_NORM}.{hook}: {norm} is not allowed; it must be a positive number")
        norms.append(norm)
    return math.sqrt(D) / norms[0], math.sqrt(D) / norms[1]
