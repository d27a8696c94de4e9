"""Describe settings from their classes: what is allowed, the default, and the field's description."""

from typing import Any, NamedTuple

from pydantic import BaseModel

from ..setting_types import allowed
from . import EvalConfig, Layer, MaskConfig, RunConfig, SAEConfig, StreamConfig, SweepConfig, TrainConfig, WorldConfig

#: sections of a config file and the classes of their fields; `run` and `sweep` are whole files
SECTIONS: dict[str, tuple[type[BaseModel], ...]] = {
    "run": (RunConfig,),
    "sweep": (SweepConfig,),
    "stream": (StreamConfig, Layer),
    "stream.world": (WorldConfig,),
    "sae": (SAEConfig,),
    "sae.mask": (MaskConfig,),
    "train": (TrainConfig,),
    "eval": (EvalConfig,),
}
MOST_SHOWN = 8  # list entries shown in a default


class Setting(NamedTuple):
    """A described field. `default` is None if the setting is required."""

    name: str
    allowed: str
    default: str | None
    description: str


class Section(NamedTuple):
    """The described settings of a section of a file, or of a part."""

    name: str
    summary: str
    settings: tuple[Setting, ...]


def explain(name: str, documented: type, *classes: type[BaseModel]) -> Section:
    """Describe the fields of `classes`, with the first sentence of the docstring of `documented` as summary."""
    summary = " ".join((documented.__doc__ or "").partition("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."
    fields = {key: field for cls in classes for key, field in cls.model_fields.items()}
    settings = []
    for key, field in fields.items():
        default = None if field.is_required() else _value(field.get_default(call_default_factory=True))
        settings.append(Setting(key, allowed(field.annotation, field.metadata), default, field.description or ""))
    return Section(name, summary, tuple(settings))


def _value(value: Any) -> str:
    """Format a default as in a config file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        words = [_value(inner) for inner in value]
        return f"[{', '.join(words if len(words) <= MOST_SHOWN else [*words[:2], '...', words[-1]])}]"
    return "{}" if isinstance(value, BaseModel) else str(value)
