"""Where a dictionary was trained: settings of `StreamConfig` that travel with it, and other libraries' names of places."""

import re
from typing import Any

from ..config import StreamConfig

Where = dict[str, Any]

#: what is said of a dictionary's place and text; the rest of `StreamConfig` is how activations were read
SETTINGS = (
    "model", "hook", "target", "second", "data", "text_field", "split", "subset", "context", "bos",
    "drop_special", "max_norm",
)  # fmt: skip

_MODULE = re.compile(r"(?:.*\.)?(?:layers|h|blocks|layer)\.(\d+)(?:\.(mlp|attn|self_attn|attention))?")
_RESIDUAL = re.compile(r"blocks\.(\d+)\.(?:hook_resid_post|hook_out)")


def metadata_of_stream(stream: StreamConfig) -> Where:
    """The settings of a stream that travel. Nothing for a person's own activations: nobody said which model they are of."""
    if stream.activations is not None:
        return {}
    return {name: getattr(stream, name) for name in SETTINGS}


def stream_settings(where: Where) -> Where:
    """Those that this version of `StreamConfig` has."""
    return {name: value for name, value in where.items() if name in StreamConfig.model_fields}


def begins_with_bos(where: Where) -> bool | None:
    """Whether rows of text began with a BOS token; None where nothing is known of it. Unless a setting forbids it, they do:
    under transformer_lens every tokenizer has one, its EOS if no other."""
    return where["bos"] is not False if "bos" in where else None


def known(**where: Any) -> Where:
    """Without what a file does not say."""
    return {name: value for name, value in where.items() if value is not None and value != ""}


def residual_layer(hook: str | None) -> int | None:
    """The layer whose output, the residual stream after it, passes at a hook; None for any other place."""
    match = _RESIDUAL.fullmatch(hook or "")
    return int(match[1]) if match else None


def after_layer(layer: int | str) -> str:
    """The hook at the residual stream after a layer."""
    return f"blocks.{layer}.hook_resid_post"


def in_hooked_transformer(hook: str | None) -> str | None:
    """A hook's name in a HookedTransformer, where SAELens may look for it. TransformerBridge has others besides."""
    layer = residual_layer(hook)
    return hook if layer is None else after_layer(layer)


def of_module(name: str, is_transcoder: bool) -> Where:
    """Hook, and a transcoder's target, for a module of transformers: layers.5, h.5, layers.5.mlp. Nothing for other names.

    An autoencoder reads what the module gives; a transcoder reads what the module gets.
    """
    match = _MODULE.fullmatch(name)
    if match is None:
        return {}
    layer, sublayer = match[1], match[2]
    if sublayer is None:
        input_hook, output_hook = f"blocks.{layer}.hook_resid_pre", after_layer(layer)
    else:
        input_hook, output_hook = (
            f"blocks.{layer}.{'mlp' if sublayer == 'mlp' else 'attn'}.hook_{side}" for side in ("in", "out")
        )
    return {"hook": input_hook, "target": output_hook} if is_transcoder else {"hook": output_hook}
