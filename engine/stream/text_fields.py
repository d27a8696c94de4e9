"""Find the field of a record that holds its text or token ids."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..errors import UserError, cut, near
from .array_files import StoredArray

TEXT = "text"  # default field
READY = ("tokens", "input_ids")  # default fields of token ids, if there is no `text`
LONGEST_NAME = 60  # characters of a field's name in messages

#: text, or token ids [n] of any integer dtype, in memory or in a file
Document = str | np.ndarray | StoredArray


class TextField:
    """The field `name`, which every record must have. By default it is `text`, otherwise `tokens` or `input_ids`.

    A name with dots, such as `messages.content`, is a path into structs and lists, unless a field has exactly that
    name. Texts found in a list are joined by line feeds into one document.
    """

    def __init__(self, name: str | None = None):
        self.name = name

    def column(self, columns: Iterable[str], place: str, ready: tuple[str, ...] = READY) -> str:
        """The table column to read: the field, or the one in which its path begins. Without a name, `text` or one of
        `ready`. Raises UserError, naming `place`, if there is none."""
        columns = [str(column) for column in columns]
        for name in (TEXT, *ready) if self.name is None else (self.name, *_beginnings(self.name)):
            if name in columns:
                return name
        if self.name is None:
            options = f", nor one of {' or '.join(ready)}" if ready else ""
            raise UserError(
                f"data: {place} has no {TEXT!r} column{options}; it has {_listed(columns)} (stream.text_field)"
            )
        raise self._missing(columns, place)

    def document(self, record: Mapping[str, Any], place: str) -> Document:
        """The content of the field in a record. Raises UserError, naming `place`, if it is missing or not text."""
        if self.name is None:
            name = next((name for name in (TEXT, *READY) if name in record), None)
            if name is None:
                raise UserError(
                    f'data: {place} is not a JSON object with a "{TEXT}" field, or one of {" or ".join(READY)}; '
                    f"it has {_listed(record)} (stream.text_field names another)"
                )
            return document(record[name], f"{place}, field {name},")
        if self.name in record:
            return document(record[self.name], f"{place}, field {self.name},")
        beginning = next((name for name in _beginnings(self.name) if name in record), None)
        if beginning is None:
            raise self._missing(record, place)
        content = self._inside(record[beginning], self.name[len(beginning) + 1 :].split("."), place)
        is_list = isinstance(content, list | np.ndarray) and len(content) > 0
        if is_list and all(isinstance(item, str | None) for item in content):
            content = "\n".join(filter(None, content))
        return document(content, f"{place}, field {self.name},")

    def _inside(self, content: Any, path: list[str], place: str) -> Any:
        """Follow a path into structs, and into each item of a list."""
        if not path or content is None:
            return content
        if isinstance(content, list | np.ndarray):
            return [self._inside(item, path, place) for item in content]
        if not isinstance(content, Mapping) or path[0] not in content:
            raise self._missing(content if isinstance(content, Mapping) else (), place)
        return self._inside(content[path[0]], path[1:], place)

    def _missing(self, names: Iterable[str], place: str) -> UserError:
        assert self.name is not None
        names = [str(name) for name in names]
        suggestion = f" ({hint})" if names and (hint := near(self.name, names)).startswith("did") else ""
        return UserError(
            f"stream.text_field: {self.name[:LONGEST_NAME]} is not allowed; {place} has {_listed(names)}{suggestion}"
        )


def document(content: Any, place: str) -> Document:
    """A document from text, a list of token ids, or None (empty). Raises UserError, naming `place`, for all else."""
    if content is None or isinstance(content, str):
        return content or ""
    try:
        ids = np.asarray(content)
    except (ValueError, OverflowError):  # ragged, or more than 64 bits
        ids = np.empty(())
    if ids.ndim == 1 and (ids.dtype.kind in "iu" or not ids.size):
        return ids if ids.size else ""
    items = content if isinstance(content, list) else [content]
    record = next((item for item in items if isinstance(item, Mapping)), None)
    hint = f" (its fields are {_listed(record)}; stream.text_field takes a path with dots to one)" if record else ""
    value = cut(" ".join(str(content)[:1000].split()), 40)
    raise UserError(f"data: {place} holds {type(content).__name__} {value}; it must hold text or token ids{hint}")


def _beginnings(name: str) -> list[str]:
    """The beginnings `a.b` and `a` of a path `a.b.c`."""
    path = name.split(".")
    return [".".join(path[:n]) for n in range(len(path) - 1, 0, -1)]


def _listed(names: Iterable[Any]) -> str:
    names = [str(name)[:LONGEST_NAME] for name in names]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "none"
