"""Metadata on where a dictionary was trained: settings of `StreamConfig`, and other libraries' names for hooks."""

import re
from typing import Any

from ..config import StreamConfig

Where = dict[str, Any]

#: settings that describe a dictionary's place and text; the rest of `StreamConfig` is how activations were read
SETTINGS = (
    "model", "hook", "target", "second", "data", "text_field", "split", "subset", "context", "bos",
    "drop_special", "max_norm",
)  # fmt: skip

_MODULE = re.compile(r"(?:.*\.)?(?:layers|h|blocks|layer)\.(\d+)(?:\.(mlp|attn|self_attn|attention))?")
_RESIDUAL = re.compile(r"blocks\.(\d+)\.(?:hook_resid_post|hook_out)")


def metadata_of_stream(stream: StreamConfig) -> Where:
    """Return a stream's metadata, empty for the user's own activations, whose model is not known."""
    if stream.activations is not None:
        return {}
    return {name: getattr(stream, name) for name in SETTINGS}


def stream_settings(where: Where) -> Where:
    """Return the metadata that are settings of this version's `StreamConfig`."""
    return {name: value for name, value in where.items() if name in StreamConfig.model_fields}


def known(**where: Any) -> Where:
    """Drop entries that are None or empty."""
    return {name: value for name, value in where.items() if value is not None and value != ""}


def residual_layer(hook: str | None) -> int | None:
    """Return the layer if a hook is at the residual stream after a layer, else None."""
    match = _RESIDUAL.fullmatch(hook or "")
    return int(match[1]) if match else None


def after_layer(layer: int | str) -> str:
    """Return the hook at the residual stream after a layer."""
    return f"blocks.{layer}.hook_resid_post"


def in_hooked_transformer(hook: str | None) -> str | None:
    """Return a hook's name in a HookedTransformer, as SAELens expects. TransformerBridge also has other names."""
    layer = residual_layer(hook)
    return hook if layer is None else after_layer(layer)


def of_module(name: str, is_transcoder: bool) -> Where:
    """Return the hook, and a transcoder's target, for a module of transformers (layers.5, h.5, layers.5.mlp).

    An autoencoder reads the module's output. A transcoder reads its input and predicts its output. Other names give {}.
    """
    match = _MODULE.fullmatch(name)
    if match is None:
        return {}
    layer, sublayer = match[1], match[2]
    if sublayer is None:
        input_hook, output_hook = f"blocks.{layer}.hook_resid_pre", after_layer(layer)
    else:
        block = f"blocks.{layer}.{'mlp' if sublayer == 'mlp' else 'attn'}"
        input_hook, output_hook = f"{block}.hook_in", f"{block}.hook_out"
    return {"hook": input_hook, "target": output_hook} if is_transcoder else {"hook": output_hook}
