"""Errors for users: one line with the field, the value and what is allowed."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import ValidationError

SHOWN = 200  # characters of a value in a message
LONGEST = 300  # characters of a word without spaces, such as a path
_WHOLE = 1500  # characters of a message
_BOUNDS = {
    "gt": "greater than", "ge": "greater than or equal to", "lt": "less than", "le": "less than or equal to",
}  # fmt: skip
_KINDS = {
    "string_type": "it must be text",
    "model_type": "it must be a section of settings",
    "dict_type": "it must be a section of settings",
    "invalid_key": "names of settings must be text",
    "tuple_type": "it must be a list",
    "list_type": "it must be a list",
    "int_parsing_size": "it must be a smaller number",
    "finite_number": "it must be a finite number",
}


class UserError(ValueError):
    """A mistake in the input, described in one line for the user. The command line exits with status 2.

    Line breaks and terminal escapes in the message are shown as \\n and \\x1b. Long messages are cut.

    try:
        sae = ts.load(path)
    except ts.UserError as error:
        print(error)
    """

    def __init__(self, message: object):
        super().__init__(in_one_line(str(message)))


class Stopped(BaseException):
    """A signal stopped the command; the message says what is kept and how to continue. Like KeyboardInterrupt it is not
    an Exception, so code that continues after errors does not catch it."""

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.signal = signal


def in_one_line(text: str) -> str:
    """Escape control characters, and cut long words and long texts."""
    text = printable(text)
    for word in set(re.findall(rf"\S{{{LONGEST + 1},}}", text)):
        text = text.replace(word, cut(word, LONGEST))
    return cut(text, _WHOLE)


def shown(value: Any) -> str:
    """Format a value for a message: escaped, in one line, at most `SHOWN` characters."""
    try:
        text = repr(value[: 2 * SHOWN]) if isinstance(value, str) else repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a number of thousands of digits"
    except RecursionError:
        text = f"a {type(value).__name__} within itself"
    return cut(printable(text), SHOWN)


def printable(text: str) -> str:
    """Escape control characters, such as terminal escape sequences."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def cut(text: str, max_length: int) -> str:
    """Shorten a text to `max_length` characters, keeping its beginning and end."""
    if len(text) <= max_length:
        return text
    tail_length = max_length // 3
    return f"{text[: max_length - tail_length - 3]}...{text[-tail_length:]}"


def near(value: str, allowed: Iterable[str], max_names: int = 5) -> str:
    """Suggest allowed names for a message: "did you mean a, b?", or the first few names if none is similar."""
    names = list(allowed)
    matches = difflib.get_close_matches(value[:SHOWN], names, n=max_names, cutoff=0.5)
    return f"did you mean {', '.join(matches)}?" if matches else f"there are {', '.join(names[:max_names])}, ..."


def _bounds(constraints: Iterable[Any]) -> str:
    """Put numeric constraints into words: "greater than 0 and less than or equal to 10"."""
    bounds = [(words, getattr(constraint, name, None)) for constraint in constraints for name, words in _BOUNDS.items()]
    return " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)


def constraints_in(annotation: Any) -> list[Any]:
    """Return the constraints inside a type, such as `ge` in Annotated[int, Field(ge=1)] | None."""
    constraints = [
        constraint
        for metadata in getattr(annotation, "__metadata__", ())
        for constraint in getattr(metadata, "metadata", ())
    ]
    return constraints + [constraint for argument in get_args(annotation) for constraint in constraints_in(argument)]


def one_line(error: ValidationError, section: str, fields: Mapping[str, Any]) -> UserError:
    """Word pydantic's first problem as `section.field: value is not allowed; it must be ...`."""
    problem = error.errors()[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # from a nested section, already worded
        return cause
    prefix = f"{section}." if section else ""
    if "[key]" in problem["loc"]:  # the key of a section is wrong, not its value
        prefix = f"{prefix}{problem['loc'][0]}."
    if cause is not None:  # from one of our validators: "field: ..."
        return UserError(f"{prefix}{cause}")
    setting = prefix + ".".join(str(key) for key in problem["loc"])
    kind = problem["type"]
    if kind == "extra_forbidden":
        return UserError(f"{setting}: no such setting; {near(str(problem['loc'][-1]), fields)}")
    if kind == "missing":
        return UserError(f"{setting}: missing; it must be given")
    message = _KINDS.get(kind) or problem["msg"].replace("Input should be", "it must be")
    field = fields.get(str(problem["loc"][0])) if len(problem["loc"]) == 1 else None
    if field is not None and kind.startswith(("greater_than", "less_than")):
        message = f"it must be {_bounds(field.metadata or constraints_in(field.annotation))}"
    return UserError(f"{setting}: {shown(problem['input'])} is not allowed; {message}")
