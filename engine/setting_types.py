"""The base class of all settings, with strict types and ranges.

Booleans and numbers are not converted into each other. Text is not a number, except for numbers such as 1e-4 that YAML
1.1 reads as text. Numbers are finite, at most 1e15 in size unless the field allows less, and either 0 or at least
1e-12. Text is not empty and has no control characters. It has at most 300 characters unless it is a path in an existing
folder.
"""

import re
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from .errors import LONGEST, UserError, one_line, shown
from .storage.path_names import expand_path

LEAST, MOST = 1e-12, 1e15
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+", re.ASCII)


class Config(BaseModel):
    """Base class of settings: frozen, unknown names refused. A wrong value raises UserError, one line with the field,
    the value and what is allowed. `SECTION` is the section of a config file that holds the settings.

    class TrainConfig(Config):
        SECTION = "train"
        tokens: int = Field(default=1_000_000, description="Tokens to train on.")
    """

    SECTION: ClassVar[str] = ""
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise one_line(error, self.SECTION, type(self).model_fields) from None

    @field_validator("*", mode="before")
    @classmethod
    def _is_what_it_is_for(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        return _strict(name, value, _kinds_of(cls, name))


def check_text(name: str, text: str) -> str:
    """Return `text` if it can be a name or a path. Raises ValueError("name: ...")."""
    if not text.strip():
        raise ValueError(f"{name}: {shown(text)} is not allowed; it must not be empty")
    if not text.isprintable():
        raise ValueError(f"{name}: {shown(text)} is not allowed; it must have no line breaks or control characters")
    if text.startswith("~"):
        try:
            expand_path(text, name)
        except UserError as error:
            raise ValueError(str(error)) from None
    if len(text) > LONGEST and not _may_be_a_path(text):
        allowed = f"it must have at most {LONGEST} characters, or be a path in an existing folder"
        raise ValueError(f"{name}: {shown(text)} is not allowed; {allowed}")
    return text


def _may_be_a_path(text: str) -> bool:
    try:
        path = Path(text).expanduser()
        return path.exists() or (len(path.parts) > 1 and len(path.name) < 256 and path.parent.exists())
    except (OSError, RuntimeError, ValueError):
        return False


def _strict(name: str, value: Any, allowed_kinds: frozenset[Any]) -> Any:
    """Check `value` for a field that allows these kinds, element by element in lists and sections."""

    def refuse(allowed: str) -> ValueError:
        return ValueError(f"{name}: {shown(value)} is not allowed; it must be {allowed}")

    numbers = allowed_kinds & {int, float}
    number = "a number" if float in allowed_kinds else "an integer"
    match value:
        case bool():
            if numbers and bool not in allowed_kinds:
                raise refuse(number)
        case int() | float():
            if bool in allowed_kinds and not numbers:
                raise refuse("true or false")
            if numbers and not -MOST <= value <= MOST and int not in allowed_kinds:
                raise refuse("a finite number" if value - value else f"at most {MOST:g} in size")
            if numbers and 0 < abs(value) < LEAST:
                raise refuse(f"0, or at least {LEAST:g} in size")
        case str() if allowed_kinds & {int, float, bool} and not allowed_kinds & {str, Any, Literal}:
            if float in allowed_kinds and len(value) < 64 and _EXPONENT.fullmatch(value):
                return _strict(name, float(value), allowed_kinds)
            if numbers:
                raise refuse(number)
            raise refuse("true or false")
        case str() if str in allowed_kinds:
            check_text(name, value)
        case bytes():
            raise refuse("text" if str in allowed_kinds else number if numbers else "of another kind")
        case dict() if (
            dict not in allowed_kinds and Any not in allowed_kinds and not all(isinstance(key, str) for key in value)
        ):
            raise refuse("a section of settings, whose names are text")
        case dict() if dict in allowed_kinds:
            return {key: _strict(name, inner, allowed_kinds - {dict}) for key, inner in value.items()}
        case list() | tuple() if allowed_kinds & {tuple, list}:
            return [_strict(name, inner, allowed_kinds - {tuple, list}) for inner in value]
        case set() | frozenset() if allowed_kinds & {tuple, list}:
            raise refuse("a list")
        case _:
            pass
    return value


@cache
def _kinds_of(settings: type[BaseModel], name: str) -> frozenset[Any]:
    return kinds(settings.model_fields[name].annotation)


def kinds(annotation: Any) -> frozenset[Any]:
    """Return the types in an annotation: for `tuple[int, ...] | None` int, tuple and None. Choices give Literal."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return kinds(get_args(annotation)[0])
    if origin is Literal:
        return frozenset({Literal})
    if origin in (Union, UnionType, tuple, list):
        arguments = [argument for argument in get_args(annotation) if argument is not Ellipsis]
        return frozenset({origin} & {tuple, list}).union(*map(kinds, arguments))
    if origin is dict:
        return kinds(get_args(annotation)[1]) | {dict}
    return frozenset({annotation})
