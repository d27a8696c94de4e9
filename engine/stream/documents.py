"""Documents of a text by number, read as they are asked for: text, or token ids where a text is tokenised already."""

import codecs
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .. import online
from ..errors import UserError, near
from ..names import expand_path

LONGEST = 2**22  # bytes of a document in a .txt file; a file without blank lines is cut at the end of a line
READY = ("tokens", "input_ids")  # columns that hold token ids, where there is no column of text
_SUFFIXES = (".txt", ".jsonl", ".parquet", ".npy")
_FOLDER = {".txt", ".jsonl", ".parquet", ".json", ".csv", ".arrow"}  # what `datasets` takes a folder's kind from

#: text, or token ids [n] of any integer dtype
Document = str | np.ndarray


@runtime_checkable
class Documents(Protocol):
    """Documents by number, the same at every call. `name` is what messages call them.

    `read(start)` gives those from number `start` on; a text that holds fewer than `start` is a UserError.
    """

    name: str

    def read(self, start: int = 0) -> Iterator[Document]: ...


def check_data(data: str) -> Path:
    """The path of a text, which may also be a dataset's name. Raises UserError for a file that isn't there."""
    path = expand_path(data, "stream.data")
    if not path.exists():
        looks_local = data.startswith((".", "/", "~")) or path.suffix.lower() in _SUFFIXES
        if looks_local or ("." in path.name and "/" not in data):
            here = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
            raise UserError(f"data: {data} does not exist{'; ' + near(path.name, here) if here else ''}")
    return path


def open_documents(data: str, text_field: str = "text") -> Documents:
    """A .txt, .jsonl, .parquet or .npy file, a folder of the first three, or a dataset's name."""
    path = check_data(data)
    if not path.is_file():
        return Dataset(data, path, text_field)
    if not path.stat().st_size:
        raise UserError(f"data: {path} is empty; it must hold text")
    match path.suffix.lower():
        case ".jsonl":
            return JsonLines(path, text_field)
        case ".parquet":
            return Parquet(path, text_field)
        case ".npy":
            return Array(path)
        case _:
            return PlainText(path)


class Listed:
    """Documents that can be iterated over again and again: strings, or token ids."""

    def __init__(self, documents: Iterable[Any], name: str):
        self.documents, self.name = documents, name

    def read(self, start: int = 0) -> Iterator[Document]:
        documents = iter(self.documents)
        if sum(1 for _ in islice(documents, start)) < start:
            raise _shorter(self.name, start)
        for number, document in enumerate(documents, start):
            yield _document(document, f"{self.name} document {number}")


class PlainText:
    """Documents parted by blank lines."""

    def __init__(self, path: Path):
        self.path, self.name = path, str(path)

    def read(self, start: int = 0) -> Iterator[Document]:
        number, size = 0, 0
        part: list[str] = []
        for at, line in enumerate(chain(_lines(self.path), [b""]), 1):
            blank = not line.strip()
            if not blank:
                size += len(line)
                if number >= start:
                    part.append(_decoded(line, f"{self.path} line {at}").rstrip("\r\n"))
            if size >= LONGEST or (blank and size):
                if number >= start:
                    yield "\n".join(part)
                number, size, part = number + 1, 0, []
        if number < start:
            raise _shorter(self.name, start)


class JsonLines:
    """One JSON object on each line; blank lines are none."""

    def __init__(self, path: Path, text_field: str):
        self.path, self.name, self.text_field = path, str(path), text_field

    def read(self, start: int = 0) -> Iterator[Document]:
        number = 0
        for at, line in enumerate(_lines(self.path), 1):
            if not line.strip():
                continue
            if number >= start:
                yield self._parsed(line, f"{self.path} line {at}")
            number += 1
        if number < start:
            raise _shorter(self.name, start)

    def _parsed(self, line: bytes, place: str) -> Document:
        text = _decoded(line, place)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        has = ""
        if isinstance(found, dict):
            if (field := _field(found, self.text_field)) is not None:
                return _document(found[field], f"{place}, field {field},")
            has = f"; it has {_listed(found)}"
        raise UserError(
            f'data: {place} is not a JSON object with a "{self.text_field}" field, or one of {" or ".join(READY)}{has}'
        )


class Parquet:
    """One document in each row. Row groups before the place to start at are not read."""

    def __init__(self, path: Path, text_field: str):
        self.path, self.name = path, str(path)
        with self._open() as file:
            columns = file.schema_arrow.names
        self.column = _column(columns, text_field, self.name)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        import pyarrow.parquet as parquet

        # The buffer has a column of a row group read piece by piece, and not as a whole.
        with _reading(self.name), parquet.ParquetFile(self.path, buffer_size=2**20) as file:
            yield file

    def read(self, start: int = 0) -> Iterator[Document]:
        with self._open() as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            if sum(sizes) < start:
                raise _shorter(self.name, start)
            first, number = 0, 0
            while first < len(sizes) and number + sizes[first] <= start:
                number += sizes[first]
                first += 1
            if first == len(sizes):
                return
            batches = file.iter_batches(batch_size=64, row_groups=range(first, len(sizes)), columns=[self.column])
            values = chain.from_iterable(batch.column(0) for batch in batches)
            for at, value in enumerate(islice(values, start - number, None), start):
                ids = getattr(value, "values", None)  # of a list: an array, which takes no integers of Python's
                content = value.as_py() if ids is None else ids.to_numpy(zero_copy_only=False)
                yield _document(content, f"{self.name} document {at}, column {self.column},")


class Array:
    """Token ids in a memory-mapped .npy file: a document in each row of [documents, n], or one document [n]."""

    def __init__(self, path: Path):
        self.name = str(path)
        with _reading(self.name):
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
            raise UserError(
                f"data: {path} holds {ids.dtype} with {ids.ndim} dimensions; "
                "it must hold integers, [documents, tokens] or [tokens]"
            )
        self.ids = np.atleast_2d(ids).view(np.ndarray)  # still mapped; slices of a memmap take several times as long

    def read(self, start: int = 0) -> Iterator[Document]:
        if len(self.ids) < start:
            raise _shorter(self.name, start)
        yield from self.ids[start:]


class Dataset:
    """A folder or a name, as Hugging Face `datasets` streams it. In a folder of .txt files blank lines part documents."""

    def __init__(self, data: str, path: Path, text_field: str):
        is_here = path.is_dir() or online.why_not() is None  # asked before `datasets` reads whether it may ask the hub
        import datasets

        self.name = data
        options = {}
        if path.is_dir() and {file.suffix for file in path.rglob("*")} & _FOLDER == {".txt"}:
            options["sample_by"] = "paragraph"  # without it each line is a document
        with _reading(data, "can't be loaded", is_here):
            self._rows: Any = datasets.load_dataset(
                str(path) if path.is_dir() else data, split="train", streaming=True, **options
            )
            first = next(iter(self._rows), None)
        if first is None:
            raise UserError(f"data: {data} is empty; it must hold text")
        self.column = _column(first, text_field, data)

    def read(self, start: int = 0) -> Iterator[Document]:
        with _reading(self.name):
            rows = iter(self._rows.skip(start - 1) if start else self._rows)
            if start and next(rows, None) is None:
                raise _shorter(self.name, start)
            for number, row in enumerate(rows, start):
                yield _document(row.get(self.column), f"{self.name} document {number}, column {self.column},")


def _shorter(name: str, start: int) -> UserError:
    return UserError(f"data: {name} has changed: it holds fewer than the {start} documents that have been read from it")


@contextmanager
def _reading(name: str, what: str = "can't be read", is_here: bool = True) -> Iterator[None]:
    """One line for whatever a library raises over a text, which may be on a hub that can't be reached."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_here:
            raise UserError(online.unreachable("data", name, "a local file or folder")) from error
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"data: {name!r} {what} ({type(error).__name__}: {reason})") from error


def _lines(path: Path) -> Iterator[bytes]:
    """Lines as bytes, which are parted at line feeds alone; without a byte order mark."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines):
                yield line if number else line.removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"data: {path} can't be read: {error.strerror}") from None


def _decoded(line: bytes, place: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"data: {place} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _field(names: Iterable[str], text_field: str) -> str | None:
    names = set(names)
    return next((name for name in (text_field, *READY) if name in names), None)


def _column(columns: Iterable[str], text_field: str, name: str) -> str:
    columns = list(columns)
    found = _field(columns, text_field)
    if found is None:
        raise UserError(
            f"data: {name} has no {text_field!r} column, nor one of {' or '.join(READY)}; it has {_listed(columns)}"
        )
    return found


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "none"


def _document(content: Any, place: str) -> Document:
    """What stands at `place`: text, a list of token ids, or nothing, which is an empty document."""
    if content is None or isinstance(content, str):
        return content or ""
    try:
        ids = np.asarray(content)
    except (ValueError, OverflowError):  # ragged, or beyond 64 bits
        ids = np.empty(())
    if ids.ndim == 1 and (ids.dtype.kind in "iu" or not ids.size):
        return ids if ids.size else ""
    raise UserError(f"data: {place} holds {type(content).__name__} {_short(content)}; it must hold text or token ids")


def _short(content: Any) -> str:
    text = " ".join(str(content).split())
    return text if len(text) < 40 else text[:37] + "..."
