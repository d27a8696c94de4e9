"""Gemma Scope (params.npz) and Gemma Scope 2 (params.safetensors): jumprelu without b_dec in the encoder.

Only the names of the folders above a file (gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71) distinguish SAEs
from transcoders, which have the same tensors and shapes. SAELens' loaders use the names as well.
"""

import re
import warnings
from pathlib import Path

import torch

from ..errors import UserError
from .hook_metadata import Where, after_layer
from .intermediate import BESIDE, DictionarySpec, State
from .json_settings import Settings
from .tensor_files import TrackedTensors

_RELEASE = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)")
_RELEASE_2 = re.compile(r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)")
_SITES_2 = ("resid_post", "attn_out", "mlp_out", "transcoder")


def read(_: Settings, tensors: TrackedTensors, folder: Path) -> DictionarySpec:
    weights = _tensors(tensors)
    names = _path_names(folder)
    release = next((match for name in reversed(names) if (match := _RELEASE.search(name))), None)
    layer = _layer(names)
    if release is None:
        nearby_names = (*folder.resolve().parts[-6:], *folder.absolute().parts[-6:])
        is_transcoder = any("transcoder" in name.lower() for name in nearby_names)
        if not is_transcoder and not (folder / BESIDE).is_file():
            problem = "no folder name above it, such as gemma-scope-2b-pt-res, says that it is one"
            warnings.warn(f"{folder}: read as an SAE; {problem}", stacklevel=2)
        return DictionarySpec("jumprelu", weights, False, is_transcoder)
    place: Where = {} if layer is None else _place(release[3], layer)
    is_of_embeddings = layer is None and release[3] == "res" and "embedding" in names
    if is_of_embeddings:  # trained on embeddings before Gemma scales them by sqrt(D)
        scale = weights["W_enc"].shape[0] ** 0.5
        weights |= {"W_enc": weights["W_enc"] / scale, "W_dec": weights["W_dec"] * scale}
        place = {"hook": "hook_embed"}
    place["model"] = f"google/gemma-2-{release[1]}" + ("-it" if release[2] == "it" else "")
    return DictionarySpec("jumprelu", weights, False, release[3] == "transcoders", where=place)


def read_2(cfg: Settings, tensors: TrackedTensors, folder: Path) -> DictionarySpec:
    """Read Gemma Scope 2. Skip connections and cross-layer transcoders are refused."""
    kind = cfg.get("architecture", "jump_relu")
    cfg.one_of("architecture", kind, ["jump_relu"])
    if cfg.flag("affine_connection", False) or "affine_skip_connection" in tensors:
        raise UserError("affine_connection: true is not allowed; skip connections work only in SAELens")
    names = _path_names(folder)
    site = next((site for name in reversed(names) for site in _SITES_2 if site in name.lower()), None)
    if site is None:
        raise UserError(f"no folder name above the file says its place; it must contain one of {', '.join(_SITES_2)}")
    layer = _layer(names)
    release = next((match for name in reversed(names) if (match := _RELEASE_2.search(name))), None)
    place: Where = {} if layer is None else _place({"attn_out": "att", "mlp_out": "mlp"}.get(site, site), layer)
    if release is not None:
        suffix = "" if release[1] == "270m" and release[2] == "pt" else f"-{release[2]}"
        place["model"] = f"google/gemma-3-{release[1]}{suffix}"
    return DictionarySpec("jumprelu", _tensors(tensors), False, site == "transcoder", where=place)


def _tensors(tensors: TrackedTensors) -> State:
    """Return the weights, whose names may be w_enc or W_enc. A factor on latents must be 1."""
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    weights = {name: tensors[name.lower() if name.lower() in tensors else name] for name in names}
    factor = tensors.take("scaling_factor")
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise UserError("scaling_factor: not allowed; it must be 1 throughout")
    return weights


def _path_names(folder: Path) -> tuple[str, ...]:
    """Return the folder names above a file, both of a link and of its target."""
    return (*folder.resolve().parts, *folder.absolute().parts)


def _layer(names: tuple[str, ...]) -> str | None:
    return next((match[1] for name in reversed(names) if (match := re.match(r"layer_(\d+)(?!\d)", name))), None)


def _place(site: str, layer: str) -> Where:
    if site == "transcoders":
        return {"hook": f"blocks.{layer}.ln2.hook_normalized", "target": f"blocks.{layer}.hook_mlp_out"}
    if site == "transcoder":
        return {"hook": f"blocks.{layer}.hook_mlp_in", "target": f"blocks.{layer}.hook_mlp_out"}
    hooks = {"mlp": f"blocks.{layer}.hook_mlp_out", "att": f"blocks.{layer}.attn.hook_z"}
    return {"hook": hooks.get(site, after_layer(layer))}


def write(spec: DictionarySpec) -> tuple[dict[str, object], State]:
    if spec.is_transcoder:
        raise UserError("d_out: not allowed; write transcoders as saelens or temposae")
    spec = spec.jumping().subtracting(False)
    return {}, spec.tensors
