"""Small JSON and YAML files that start with a SHA-256 of their contents, so that changes are noticed on reading.

    {                               # sha256 4f1c...
     "sha256": "4f1c...",           stream:
     "format": "temposae/1",          model: testbed
    ...

The checksum covers all bytes after it. Files without one, from earlier versions or written by hand, are not checked.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from ..errors import UserError
from .files import write_text

_JSON = re.compile(rb'\{\s*"sha256": "([0-9a-f]{64})",?(.*)', re.DOTALL)
_YAML = re.compile(rb"# sha256 ([0-9a-f]{64})\n(.*)", re.DOTALL)


def sealed_json(text: str) -> str:
    """Insert the checksum into the text of a JSON object, as its first key."""
    rest = text.removeprefix("{")
    comma = "" if rest.startswith("}") else ","
    return f'{{\n "sha256": "{_sha256(rest.encode())}"{comma}{rest}'


def sealed_yaml(text: str) -> str:
    """Put the checksum in front of a YAML text, as a comment in the first line."""
    return f"# sha256 {_sha256(text.encode())}\n{text}"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object as JSON with its checksum, atomically. Raises OSError."""
    write_text(path, sealed_json(json.dumps(values, indent=1, allow_nan=False) + "\n"))


def read_json(
    path: Path, label: str, remedy: str, *, form: str | None = None, keys: Mapping[str, type | UnionType] | None = None
) -> dict[str, Any]:
    """Read the object in a JSON file, without its checksum.

    Error messages begin with `label` and end with `remedy`, which says what to do. `form` is the required value of the
    key `format`; `keys` maps required keys to their types. Raises UserError if the file is missing, can't be read, is
    not a JSON object, or has changed since it was written.
    """

    def refuse(reason: str) -> UserError:
        return UserError(f"{label}: {path} {reason}; {remedy}")

    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise refuse("is missing") from None
    except OSError as error:
        raise refuse(f"can't be read ({error.strerror})") from None
    match = _JSON.match(raw)
    if match is not None and _sha256(match[2]) != match[1].decode():
        raise refuse("is damaged: its contents are not what was written (SHA-256)")
    try:
        values = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise refuse(f"is damaged: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise refuse(f"is damaged: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise refuse("is damaged: it is nested too deeply") from None
    if not isinstance(values, dict):
        raise refuse(f"is damaged: it holds a {type(values).__name__}, not an object")
    first_item = next(iter(values.items()), ("", None))
    if match is not None:
        del values["sha256"]
    elif first_item[0] == "sha256" or (isinstance(first_item[1], str) and re.fullmatch("[0-9a-f]{64}", first_item[1])):
        raise refuse("is damaged: its checksum is not what was written (SHA-256)")
    if form is not None and values.get("format") != form:
        raise UserError(f"{label}: {path} has format {str(values.get('format'))[:80]!r}; this version reads {form}")
    for key, kinds in (keys or {}).items():
        if key not in values:
            raise refuse(f"is damaged: it has no {key}")
        if not isinstance(values[key], kinds):
            raise refuse(f"is damaged: its {key} is a {type(values[key]).__name__}")
    return values


def check_yaml(path: Path, label: str, remedy: str) -> None:
    """Raise UserError if a YAML file has changed since it was written. A file without a checksum passes."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{label}: {path} can't be read ({error.strerror})") from None
    match = _YAML.match(raw)
    if raw.startswith(b"# sha256 ") and (match is None or _sha256(match[2]) != match[1].decode()):
        raise UserError(f"{label}: {path} has changed since it was written (SHA-256 in its first line); {remedy}")


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
