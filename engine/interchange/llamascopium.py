"""Llamascopium, which was Language-Model-SAEs (lm_saes): read only.

2024: hyperparams.json, weights of nn.Linear, one threshold and the dataset's mean norms among the settings, and a loader
that folds those norms in before the threshold counts. 2025: config.json, and among the tensors thresholds and mean norms.
From June 2025: tensors W_E and W_D. The mean norms, if activations were scaled by them, go into biases and decoder here.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .hook_metadata import known
from .intermediate import DictionarySpec, State, unit_rows
from .json_settings import Settings, as_json
from .tensor_files import TrackedTensors

FIRST = "hyperparams.json"
_NORM = "dataset_average_activation_norm"
_INSTEAD = "; other kinds work in Llamascopium alone"


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
    if is_first and activation == "topk" and fixed_threshold > 0:  # as its loader has it
        activation, threshold = "jumprelu", _threshold(tensors, fixed_threshold, t["b_enc"])
    norm = t["W_dec"].norm(dim=1)
    t["b_enc"], t["b_dec"] = t["b_enc"] / input_factor, t["b_dec"] / output_factor
    t["W_dec"] = t["W_dec"] * (input_factor / output_factor)
    if counts_norms and (is_first or activation == "topk"):  # the first loader makes rows of norm 1 of all kinds
        t = unit_rows(t)
    elif (
        threshold is not None and not is_first
    ):  # of (in * latent) * norm, where latents are those of activations as they are
        scale = input_factor * (norm if counts_norms else torch.ones_like(norm))
        threshold = torch.where(scale > 0, threshold / scale, torch.finfo(torch.float32).max)
    t |= {"threshold": threshold} if threshold is not None and activation == "jumprelu" else {}
    for name in tensors:  # norms at the places, which a dictionary without scaling may hold as well
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
        t = {
            "W_enc": tensors["encoder.weight"].T,
            "b_enc": tensors["encoder.bias"],
            "W_dec": tensors["decoder.weight"].T,
        }
        bias = "decoder.bias"
    else:
        t = {"W_enc": tensors["W_E"], "b_enc": tensors["b_E"], "W_dec": tensors["W_D"]}
        bias = "b_D"
    for name in ("W_enc", "W_dec"):
        if t[name].ndim != 2:
            raise UserError(f"{name} has shape {list(t[name].shape)}; it must be a matrix")
    return {**t, "b_dec": tensors[bias] if has_bias else t["W_dec"].new_zeros(t["W_dec"].shape[1])}


def _check_sizes(cfg: Settings, t: State) -> None:
    D, F = t["W_enc"].shape
    latents, expansion = cfg.whole("d_sae"), cfg.number("expansion_factor")
    if latents is None and expansion is not None:
        latents = int((cfg.whole("d_model") or D) * expansion + 1e-6)
    for name, stated_size, size in (("d_model", cfg.whole("d_model"), D), ("d_model * expansion_factor", latents, F)):
        if stated_size is not None and stated_size != size:
            raise UserError(f"{name}: {stated_size} does not fit the weights, where it is {size}")


def _threshold(tensors: TrackedTensors, fixed_threshold: float, b_enc: Tensor) -> Tensor:
    """For each latent, learned as its logarithm; before February 2025 one for all, among the settings."""
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
    """What activations at the two places are multiplied by: to a mean norm of sqrt(D) over the dataset."""
    scaling = cfg.get("norm_activation", "token-wise" if is_first else "dataset-wise")
    if scaling in ("token-wise", "batch-wise"):
        raise UserError(
            f"norm_activation: {scaling} is not allowed; it scales activations by their own norms, which works in "
            "Llamascopium alone"
        )
    cfg.one_of("norm_activation", scaling, ["dataset-wise", "inference", *(["none"] if is_first else [])])
    if scaling != "dataset-wise":
        return 1.0, 1.0
    dataset_norms = cfg.section(_NORM)
    norms: list[float] = []
    for side, hook in zip(("in", "out"), hooks, strict=True):
        norm_tensor = tensors.take(f"{_NORM}.{hook}")
        norm = (
            dataset_norms.number(side)
            if norm_tensor is None
            else float(norm_tensor)
            if norm_tensor.numel() == 1
            else math.nan
        )
        if norm is None:
            raise UserError(f"{_NORM}.{hook}: missing; without it activations can't be scaled")
        if not 0 < norm < math.inf:
            raise UserError(f"{_NORM}.{hook}: {norm} is not allowed; it must be a positive number")
        norms.append(norm)
    return math.sqrt(D) / norms[0], math.sqrt(D) / norms[1]
