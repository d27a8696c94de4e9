"""Describe settings from their classes: what is allowed, the default, and the field's description."""

import math
from collections.abc import Iterable, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from . import EvalConfig, Layer, MaskConfig, RunConfig, SAEConfig, StreamConfig, SweepConfig, TrainConfig

#: sections of a config file and the classes of their fields; `run` and `sweep` are whole files
SECTIONS: dict[str, tuple[type[BaseModel], ...]] = {
    "run": (RunConfig,),
    "sweep": (SweepConfig,),
    "stream": (StreamConfig, Layer),
    "sae": (SAEConfig,),
    "sae.mask": (MaskConfig,),
    "train": (TrainConfig,),
    "eval": (EvalConfig,),
}
_TYPES = {bool: "true or false", int: "integer", float: "number", str: "text", NoneType: "null"}
_PLURALS = {"integer": "integers", "number": "numbers", "section": "sections"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
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
        settings.append(Setting(key, _allowed(field.annotation, field.metadata), default, field.description or ""))
    return Section(name, summary, tuple(settings))


def _allowed(annotation: Any, constraints: Iterable[Any] = ()) -> str:
    """Describe the values that a type with these constraints allows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(arguments[0], [inner for extra in arguments[1:] for inner in getattr(extra, "metadata", ())])
    if origin in (Union, UnionType):
        words = [get_args(inner) if get_origin(inner) is Literal else [_allowed(inner)] for inner in arguments]
        return _alternatives([word for choices in words for word in choices])
    if origin is Literal:
        return _alternatives(arguments)
    if origin in (tuple, list):
        kind, space, bounds = _allowed(arguments[0]).partition(" ")
        return f"list of {_PLURALS.get(kind, kind)}{space}{bounds}"
    if annotation in _TYPES:
        return _TYPES[annotation] + _range(constraints)
    is_section = origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel))
    return "section" if is_section else "value"


def _alternatives(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}{',' * (len(words) > 2)} or {words[-1]}"


def _range(constraints: Iterable[Any]) -> str:
    bounds = {
        name: _power(bound)
        for constraint in constraints
        for name in _BOUNDS
        if (bound := getattr(constraint, name, None)) is not None
    }
    if bounds.keys() == {"ge", "le"}:
        return f" from {bounds['ge']} to {bounds['le']}"
    return "".join(f"{' and' * (i > 0)} {_BOUNDS[name]} {bound}" for i, (name, bound) in enumerate(bounds.items()))


def _power(number: float) -> str:
    """Format a number, powers as powers: 2^31, 10^15, 0.5."""
    size = abs(number)
    for base in (2, 10):
        if size >= 10_000 and base ** (exponent := round(math.log(size, base))) == size:
            return f"{'-' * (number < 0)}{base}^{exponent}"
    return f"{number:g}".replace("e-0", "e-")


def _value(value: Any) -> str:
    """Format a default as in a config file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        words = [_value(inner) for inner in value]
        return f"[{', '.join(words if len(words) <= MOST_SHOWN else [*words[:2], '...', words[-1]])}]"
    return "{}" if isinstance(value, BaseModel) else str(value)
