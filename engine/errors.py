"""What a user did wrong, said in one line: the field, the value, what is allowed."""

import difflib
from collections.abc import Iterable

from pydantic import ValidationError


class UserError(ValueError):
    """A mistake in the input. The message is one line for the person who made it; the command line exits with 2."""


def near(value: str, allowed: Iterable[str], most: int = 5) -> str:
    """The allowed names nearest to `value`, for a message: "did you mean a, b?" or the first few that there are."""
    names = list(allowed)
    close = difflib.get_close_matches(value, names, n=most, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(names[:most])}, ..."


def one_line(error: ValidationError, what: str = "") -> UserError:
    """The first problem that pydantic found, as `field: value is not allowed; what is`."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in (*([what] if what else []), *problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return UserError(f"{place}: no such setting")
    if problem["type"] == "value_error":
        return UserError(f"{place + ': ' if place else ''}{problem.get('ctx', {}).get('error', problem['msg'])}")
    message = problem["msg"].replace("Input should be", "it must be")
    return UserError(f"{place}: {problem['input']!r} is not allowed; {message}")
