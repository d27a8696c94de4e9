"""The base class of all settings, with strict types and ranges.

Booleans and numbers are not converted into each other. Text is not a number, except for numbers such as 1e-4 that YAML
1.1 reads as text. Numbers are finite, at most 1e15 in size unless the field allows less, and either 0 or at least
1e-12. Text is not empty, has no control characters and at most 300 characters, paths in existing folders excepted.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from .errors import LONGEST, UserError, near, shown
from .storage.path_names import expand_path

LEAST, MOST = 1e-12, 1e15
_TYPES = {bool: "true or false", int: "integer", float: "number", str: "text", NoneType: "null"}
_PLURALS = {"integer": "integers", "number": "numbers", "section": "sections"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
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
            raise _in_words(error, self.SECTION, type(self).model_fields) from None

    @field_validator("*", mode="before")
    @classmethod
    def _is_what_it_is_for(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        return _strict(name, value, *_kinds_and_requirement(cls, name))


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
        rule = f"it must have at most {LONGEST} characters, or be a path in an existing folder"
        raise ValueError(f"{name}: {shown(text)} is not allowed; {rule}")
    return text


def _may_be_a_path(text: str) -> bool:
    try:
        path = Path(text).expanduser()
        return path.exists() or (len(path.parts) > 1 and len(path.name) < 256 and path.parent.exists())
    except (OSError, RuntimeError, ValueError):
        return False


def _in_words(error: ValidationError, section: str, fields: Mapping[str, FieldInfo]) -> UserError:
    """Word pydantic's first problem as `section.field: value is not allowed; it must be ...`."""
    problem = error.errors()[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # from a nested section, already worded
        return cause
    location, kind = problem["loc"], problem["type"]
    prefix = f"{section}." if section else ""
    if "[key]" in location:  # the key of a section is wrong, not its value
        prefix = f"{prefix}{location[0]}."
    if cause is not None:  # from one of our validators: "field: ..."
        return UserError(f"{prefix}{cause}")
    setting = prefix + ".".join(str(key) for key in location)
    if kind == "extra_forbidden":
        return UserError(f"{setting}: no such setting; {near(str(location[-1]), fields)}")
    if kind == "missing":
        return UserError(f"{setting}: missing; it must be given")
    requirement = "text" if kind == "invalid_key" else _requirement(fields[str(location[0])])
    return UserError(f"{setting}: {shown(problem['input'])} is not allowed; it must be {requirement}")


def _requirement(field: FieldInfo) -> str:
    """Complete "it must be ..." for a field: "an integer from 1 to 10^15"."""
    words = allowed(field.annotation, field.metadata)
    articles = {"integer": "an ", "number": "a ", "list": "a ", "section": "a "}
    return articles.get(words.partition(" ")[0], "") + words


def _strict(name: str, value: Any, allowed_kinds: frozenset[Any], requirement: str) -> Any:
    """Check `value` for a field that allows these kinds, element by element in lists and sections."""

    def refuse(requirement: str = requirement) -> ValueError:
        return ValueError(f"{name}: {shown(value)} is not allowed; it must be {requirement}")

    numbers = allowed_kinds & {int, float}
    match value:
        case bool():
            if numbers and bool not in allowed_kinds:
                raise refuse()
        case int() | float():
            if bool in allowed_kinds and not numbers:
                raise refuse()
            if numbers and not -MOST <= value <= MOST and int not in allowed_kinds:
                raise refuse("a finite number" if value - value else f"at most {MOST:g} in size")
            if numbers and 0 < abs(value) < LEAST:
                raise refuse(f"0, or at least {LEAST:g} in size")
        case str() if allowed_kinds & {int, float, bool} and not allowed_kinds & {str, Any, Literal}:
            if float in allowed_kinds and len(value) < 64 and _EXPONENT.fullmatch(value):
                return _strict(name, float(value), allowed_kinds, requirement)
            raise refuse()
        case str() if str in allowed_kinds:
            check_text(name, value)
        case bytes():
            raise refuse()
        case dict() if (
            dict not in allowed_kinds and Any not in allowed_kinds and not all(isinstance(key, str) for key in value)
        ):
            raise refuse("a section of settings, whose names are text")
        case dict() if dict in allowed_kinds:
            return {key: _strict(name, inner, allowed_kinds - {dict}, requirement) for key, inner in value.items()}
        case list() | tuple() if allowed_kinds & {tuple, list}:
            return [_strict(name, inner, allowed_kinds - {tuple, list}, requirement) for inner in value]
        case set() | frozenset() if allowed_kinds & {tuple, list}:
            raise refuse()
    return value


@cache
def _kinds_and_requirement(settings: type[BaseModel], name: str) -> tuple[frozenset[Any], str]:
    field = settings.model_fields[name]
    return kinds(field.annotation), _requirement(field)


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


def allowed(annotation: Any, constraints: Iterable[Any] = ()) -> str:
    """Describe the values that a type with these constraints allows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return allowed(arguments[0], [inner for extra in arguments[1:] for inner in getattr(extra, "metadata", ())])
    if origin in (Union, UnionType):
        words = [get_args(inner) if get_origin(inner) is Literal else [allowed(inner)] for inner in arguments]
        return _alternatives([word for choices in words for word in choices])
    if origin is Literal:
        return _alternatives(arguments)
    if origin in (tuple, list):
        kind, space, bounds = allowed(arguments[0]).partition(" ")
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
