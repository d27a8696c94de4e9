"""Read other libraries' JSON settings, with limits on their size and checked types."""

import json
import math
from pathlib import Path
from typing import Any

from ..errors import SHOWN, UserError, cut, printable

MOST_BYTES = 16 * 2**20  # limit of a settings file; the libraries' files have a few thousand


class Settings(dict[str, Any]):
    """Settings by name. A value of the wrong type raises UserError with the setting, the value and what is allowed.

    A missing setting has the value `default`. So does null, except for `flag`.
    """

    def flag(self, name: str, default: bool) -> bool:
        return self._checked(name, default, bool, "true or false")

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int | None:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise self.refused(name, f"a whole number from {least} on")
        return value

    def number(self, name: str, default: float | None = None) -> float | None:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refused(name, "a finite number")
        return float(value)

    def text(self, name: str) -> str | None:
        """Return text, or None if it is missing, null or empty."""
        return None if self.get(name) is None else self._checked(name, "", str, "text") or None

    def section(self, name: str) -> "Settings":
        """Return nested settings, empty if they are missing or null."""
        return Settings({} if self.get(name) is None else self._checked(name, {}, dict, "settings by name"))

    def one_of(self, name: str, value: Any, allowed: list[str], instead: str = "") -> str:
        """Return `value`, given by the setting `name`, if it is allowed. Raises UserError that ends with `instead`."""
        if not isinstance(value, str) or value not in allowed:
            raise UserError(f"{name}: {as_json(value)} is not allowed; it must be {', '.join(allowed)}{instead}")
        return value

    def refused(self, name: str, allowed: str) -> UserError:
        return UserError(f"{name}: {as_json(self[name])} is not allowed; it must be {allowed}")

    def _checked(self, name: str, default: Any, kind: type, allowed: str) -> Any:
        if not isinstance(self.get(name, default), kind):
            raise self.refused(name, allowed)
        return self.get(name, default)


def check_size(name: str, stated_size: int | None, size: int) -> None:
    """Raise UserError if the setting `name` gives another size than the weights have."""
    if stated_size not in (None, size):
        raise UserError(f"{name}: {stated_size} does not fit the weights, where it is {size}")


def read_settings(file: Path, name: str | None = None) -> Settings:
    """Read the settings in a JSON file. Raises UserError, naming the file as `name`, if it is damaged or too large."""
    name = name or file.name
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UserError(f"{name} has {file.stat().st_size:,} bytes; settings have at most {MOST_BYTES:,}")
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error).partition("\n")[0]
        raise UserError(f"{name} is damaged ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} is not allowed; it must be an object with settings by name")
    return Settings(content)


def as_json(value: Any) -> str:
    """Format a value for a message as JSON, but text without quotes."""
    return cut(printable(value if isinstance(value, str) else json.dumps(value)), SHOWN)
