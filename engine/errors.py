"""What a user did wrong, said in one line: the field, the value, what is allowed."""

import difflib
from collections.abc import Iterable

from pydantic import ValidationError


class UserError(ValueError):
    """A mistake in the input. The message is one line for the person who made it; the command line exits with 2.

    try:
        sae = ts.load(path)
    except ts.UserError as error:
        print(error)
    """


class Stopped(BaseException):
    """A command was told to stop by a signal; the message says what is kept and how to go on. Like KeyboardInterrupt it is
    no Exception, so that nothing which carries on after errors carries on after it."""

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.signal = signal


def near(value: str, allowed: Iterable[str], most: int = 5) -> str:
    """The allowed names nearest to `value`, for a message: "did you mean a, b?" or the first few that there are."""
    names = list(allowed)
    close = difflib.get_close_matches(value, names, n=most, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(names[:most])}, ..."


def one_line(error: ValidationError, section: str, fields: Iterable[str]) -> UserError:
    """The first problem that pydantic found, as `section.field: value is not allowed; what is`."""
    problem = error.errors()[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # from a section within this one, already worded
        return cause
    prefix = f"{section}." if section else ""
    if cause is not None:  # from a validator of ours: "field: ..."
        return UserError(f"{prefix}{cause}")
    place = prefix + ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return UserError(f"{place}: no such setting; {near(str(problem['loc'][-1]), fields)}")
    if problem["type"] == "missing":
        return UserError(f"{place}: missing; it must be given")
    message = problem["msg"].replace("Input should be", "it must be")
    return UserError(f"{place}: {problem['input']!r} is not allowed; {message}")
