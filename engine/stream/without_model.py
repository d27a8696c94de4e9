"""Sources of activations that need no model: the user's own arrays and synthetic worlds."""

from typing import Any

from ..config import StreamConfig
from ..errors import UserError
from .arrays import HOOK, ArraySource, open_file
from .world_source import WorldSource

OwnSource = ArraySource | WorldSource


def open_own(config: StreamConfig, seed: int = 0) -> OwnSource | None:
    """Open the source without a model that `config` names, if it names one."""
    if config.world is not None:
        return WorldSource(config.world, seed=seed)
    if config.activations is not None:
        return open_file(config.activations, seed=seed, repeat=config.repeat)
    return None


def settle(config: StreamConfig, source: OwnSource) -> StreamConfig:
    """`config` for a source without a model. Raises UserError for settings that need a model."""
    allowed = {"model": "none", "hook": HOOK, "data": None, "split": None, "subset": None, "cache": None}
    for name, default in allowed.items():
        value = getattr(config, name)
        if name in config.model_fields_set and value not in (default, None):
            raise UserError(f"stream.{name}: {value} is not allowed with {source.modelless}")
    if config.mode == "sequences" and not source.has_rows:
        raise UserError(f"stream.mode: sequences is not allowed with {source.label}; it must be tokens or grouped")
    update: dict[str, Any] = {"model": "none", "hook": HOOK, "context": max(2, source.positions)}
    if config.world is not None and "max_norm" not in config.model_fields_set:
        update["max_norm"] = None  # a world has no massive activations
    return config.model_copy(update=update)
