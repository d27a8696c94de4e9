"""Errors for users: one line with the field, the value and what is allowed."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

SHOWN = 200  # characters of a value in a message
LONGEST = 300  # characters of a word without spaces, such as a path
_WHOLE = 1500  # characters of a message


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


def check_known(field: str, value: object, allowed: Iterable[object]) -> None:
    """Raise UserError unless a value is one of those allowed. The message has all names, or of many the similar ones."""
    names = list(map(str, allowed))
    if str(value) not in names:
        hint = f"there are {', '.join(names)}" if len(names) < 10 else near(str(value), names)
        raise UserError(f"{field}: {shown(value)} is not allowed; {hint}")


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
