"""Documents of a file: plain text, JSON, tables, arrays of token ids; each read as what its name says it is.

A file is read from its beginning, or from a document's number on, without being held whole or mapped: a map of a file that
is cut meanwhile kills the process.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from ..errors import UserError
from ..process import hub_access
from .array_files import StoredArray
from .text_fields import TEXT, Document, TextField, document

LONGEST = 2**22  # bytes of a document in a .txt file; a file without blank lines is cut at the end of a line
LONGEST_ITEM = 2**26  # characters of an item in a JSON list
READ_AHEAD = 2**20  # bytes
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_JSON = re.compile(r"\s*(\{\s*[\"}]|\[\s*[{\"]|\[\s*\[\s*-?\d)")
_FIRST_ITEM, _NEXT_ITEM = re.compile(r"\s*\[\s*"), re.compile(r"\s*,\s*")
_EMPTY_LIST, _LIST_END = re.compile(r"\s*\[\s*\]"), re.compile(r"\s*\]")
_MARKUP = re.compile(r"\s*<(\?xml|!doctype|html)\b", re.IGNORECASE)


class TextTooShort(UserError):
    """Says that a text ends before the document that is to be read next; it has only `document_count`."""

    def __init__(self, name: str, start: int, document_count: int):
        super().__init__(f"data: {name} has changed: it holds fewer than the {start} documents that were read from it")
        self.document_count = document_count


class PlainText:
    """Documents parted by blank lines. Raises UserError for a file that is plainly something else: binary, JSON, markup."""

    def __init__(self, path: Path, field: TextField | None = None):
        self.path, self.name = path, str(path)
        with _opened(path) as file:
            beginning = file.read(2**16)
        text = beginning.decode("utf-8", "ignore").removeprefix("\ufeff")
        for pattern, kind in ((_JSON, "JSON"), (_MARKUP, "markup")):
            if pattern.match(text):
                raise UserError(f"data: {path} holds {kind}, not plain text; {ALLOWED}")
        if kind_of(path) != ".txt" and (b"\0" in beginning or _is_binary(beginning)):
            raise UserError(f"data: {path} is not plain text, nor of a kind that is read; {ALLOWED}")
        _refuse_fields(path, field)

    def read(self, start: int = 0) -> Iterator[Document]:
        number, size = 0, 0
        document_lines: list[str] = []
        for line_number, line in enumerate(chain(_lines(self.path), [b""]), 1):
            blank = not line.strip()
            if not blank:
                size += len(line)
                if number >= start:
                    document_lines.append(_decoded(line, f"{self.path} line {line_number}").rstrip("\r\n"))
            if size >= LONGEST or (blank and size):
                if number >= start:
                    yield "\n".join(document_lines)
                number, size, document_lines = number + 1, 0, []
        if number < start:
            raise TextTooShort(self.name, start, number)


class JsonLines:
    """One JSON object or string on each line; blank lines are none."""

    def __init__(self, path: Path, field: TextField):
        self.path, self.name, self.field = path, str(path), field

    def read(self, start: int = 0) -> Iterator[Document]:
        number = 0
        for line_number, line in enumerate(_lines(self.path), 1):
            if not line.strip():
                continue
            if number >= start:
                place = f"{self.path} line {line_number}"
                text = _decoded(line, place)
                try:
                    item = json.loads(text)
                except (ValueError, RecursionError):
                    item = None
                yield _of_item(item, self.field, place)
            number += 1
        if number < start:
            raise TextTooShort(self.name, start, number)


class JsonList:
    """The items of one JSON list: objects or strings."""

    def __init__(self, path: Path, field: TextField):
        self.path, self.name, self.field = path, str(path), field

    def read(self, start: int = 0) -> Iterator[Document]:
        number = 0
        for number, item in enumerate(self._items(), 1):
            if number > start:
                yield _of_item(item, self.field, f"{self.path} item {number - 1}")
        if number < start:
            raise TextTooShort(self.name, start, number)

    def _items(self) -> Iterator[Any]:
        """One after the other, each parsed from no more text than it has."""
        decoder = json.JSONDecoder()
        with _opened(self.path) as file, _decoding(self.path):
            reader = io.TextIOWrapper(file, "utf-8-sig")
            pending, position, number, size = "", 0, 0, READ_AHEAD
            while True:
                added = reader.read(size)
                pending, position = pending[position:] + added, 0
                while True:
                    if (list_end := (_LIST_END if number else _EMPTY_LIST).match(pending, position)) is not None:
                        if pending[list_end.end() :].strip() or reader.read(READ_AHEAD).strip():
                            raise UserError(f"data: {self.path} holds more than one JSON list; it must hold one")
                        return
                    separator = (_NEXT_ITEM if number else _FIRST_ITEM).match(pending, position)
                    try:
                        if separator is None:
                            raise ValueError
                        item, item_end = decoder.raw_decode(pending, separator.end())
                    except (ValueError, RecursionError) as error:
                        if added and len(pending) - position <= LONGEST_ITEM and not isinstance(error, RecursionError):
                            size = max(READ_AHEAD, len(pending) - position)
                            break  # it may go on in what isn't read yet
                        raise UserError(f"data: {self.path} item {number} is not JSON, or cut") from None
                    yield item
                    number, position, size = number + 1, item_end, READ_AHEAD


class Delimited:
    """The rows of a .csv or .tsv file below the one that names its columns."""

    def __init__(self, path: Path, field: TextField, delimiter: str = ","):
        self.path, self.name, self.delimiter = path, str(path), delimiter
        with self._table() as (names, _):
            if len(set(names)) < len(names):
                raise UserError(f"data: {path} has columns of the same name; its first line must name them all")
            # the cells of a table are text: a column `tokens` would hold digits
            self.column = field.column(names, self.name, ready=())
            self._column_index = names.index(self.column)

    @contextmanager
    def _table(self) -> Iterator[tuple[list[str], Any]]:
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST_ITEM))
        lines = (
            _decoded(line, f"{self.path} line {line_number}") for line_number, line in enumerate(_lines(self.path), 1)
        )
        table = csv.reader(lines, delimiter=self.delimiter, strict=True)
        try:
            yield next(table, []), table
        except csv.Error as error:
            raise UserError(f"data: {self.path} line {table.line_num} is not as in a table ({error})") from None

    def read(self, start: int = 0) -> Iterator[Document]:
        number = 0
        with self._table() as (names, table):
            for cells in table:
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise UserError(
                        f"data: {self.path} line {table.line_num} has {len(cells)} fields; its first line names {len(names)}"
                    )
                if number >= start:
                    yield cells[self._column_index]
                number += 1
        if number < start:
            raise TextTooShort(self.name, start, number)


class Parquet:
    """One document in each row. Row groups before the place to start at are not read."""

    def __init__(self, path: Path, field: TextField):
        self.path, self.name, self.field = path, str(path), field
        with self._open() as file:
            self.column = field.column(file.schema_arrow.names, self.name)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        import pyarrow.parquet as parquet

        # The buffer has a column of a row group read piece by piece, and not as a whole.
        with reading(self.name), parquet.ParquetFile(self.path, buffer_size=2**20) as file:
            yield file

    def read(self, start: int = 0) -> Iterator[Document]:
        with self._open() as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            if sum(sizes) < start:
                raise TextTooShort(self.name, start, sum(sizes))
            first, number = 0, 0
            while first < len(sizes) and number + sizes[first] <= start:
                number += sizes[first]
                first += 1
            if first == len(sizes):
                return
            batches = file.iter_batches(batch_size=64, row_groups=range(first, len(sizes)), columns=[self.column])
            values = chain.from_iterable(batch.column(0) for batch in batches)
            for document_number, value in enumerate(islice(values, start - number, None), start):
                yield _of_cell(value, self.column, self.field, f"{self.name} document {document_number}")


class Arrow:
    """One document in each row of an Arrow file, as `datasets` saves them to disk."""

    def __init__(self, path: Path, field: TextField):
        self.path, self.name, self.field = path, str(path), field
        with self._open() as (names, _):
            self.column = field.column(names, self.name)

    @contextmanager
    def _open(self) -> Iterator[tuple[list[str], Iterator[Any]]]:
        """Names of the columns, and record batches."""
        import pyarrow as pa

        with reading(self.name), pa.OSFile(str(self.path)) as file:
            if file.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(file)
                yield reader.schema.names, (reader.get_batch(n) for n in range(reader.num_record_batches))
            else:
                file.seek(0)
                stream = pa.ipc.open_stream(file)
                yield stream.schema.names, iter(stream)

    def read(self, start: int = 0) -> Iterator[Document]:
        number = 0
        with self._open() as (names, batches):
            column_index = names.index(self.column)
            for batch in batches:
                if number + len(batch) > start:
                    first = max(0, start - number)
                    for document_number, value in enumerate(batch.column(column_index)[first:], number + first):
                        yield _of_cell(value, self.column, self.field, f"{self.name} document {document_number}")
                number += len(batch)
        if number < start:
            raise TextTooShort(self.name, start, number)


class Array:
    """Token ids in a .npy file: a document in each row of [documents, n], or one document [n]."""

    def __init__(self, path: Path, field: TextField | None = None):
        self.name = str(path)
        _refuse_fields(path, field)
        with reading(self.name):
            ids = StoredArray.of_npy(path, "data")
        if ids.dtype.kind not in "iu" or len(ids.shape) not in (1, 2):
            raise UserError(
                f"data: {path} holds {ids.dtype} with {len(ids.shape)} dimensions; "
                "it must hold integers, [documents, tokens] or [tokens]"
            )
        self.ids = ids

    def read(self, start: int = 0) -> Iterator[Document]:
        documents = self.ids.shape[0] if len(self.ids.shape) == 2 else 1
        if documents < start:
            raise TextTooShort(self.name, start, documents)
        if len(self.ids.shape) == 1:
            if start == 0:
                yield self.ids
            return
        step = max(1, READ_AHEAD // max(1, self.ids.shape[1] * self.ids.dtype.itemsize))
        for first in range(start, documents, step):
            yield from self.ids[first : min(first + step, documents)]


def _json(path: Path, field: TextField) -> JsonLines | JsonList:
    """A .json file: a list, or objects and strings on lines of their own."""
    with _opened(path) as file:
        beginning = file.read(2**12).removeprefix(codecs.BOM_UTF8).lstrip()
    return JsonList(path, field) if beginning.startswith(b"[") else JsonLines(path, field)


def _tabs(path: Path, field: TextField) -> Delimited:
    return Delimited(path, field, "\t")


READERS: dict[str, Callable[[Path, TextField], Any]] = {
    ".txt": PlainText, ".jsonl": JsonLines, ".ndjson": JsonLines, ".json": _json, ".csv": Delimited, ".tsv": _tabs,
    ".parquet": Parquet, ".arrow": Arrow, ".npy": Array,
}  # fmt: skip
WHOLE = (".parquet", ".arrow", ".npy")  # kinds that are read at many places, and so not when packed
ALLOWED = "give .txt, .jsonl, .json, .csv, .tsv (each also .gz, .bz2, .xz), .parquet, .arrow or .npy"


def kind_of(path: Path) -> str:
    """The ending that says what a file holds, without that of a compressor."""
    name = path.name.lower()
    compression_ending = next((ending for ending in PACKED if name.endswith(ending)), "")
    return Path(name.removesuffix(compression_ending)).suffix


def open_file(path: Path, field: TextField) -> Any:
    """The documents of a file. Raises UserError for a kind that isn't read, and for an empty file."""
    kind = kind_of(path)
    if path.suffix.lower() in PACKED and kind in WHOLE:
        raise UserError(f"data: {path} is not allowed; {kind} files are read unpacked only")
    try:
        if not path.stat().st_size:
            raise UserError(f"data: {path} is empty; it must hold text")
    except OSError as error:
        raise UserError(f"data: {path} can't be read: {error.strerror}") from None
    return READERS.get(kind, PlainText)(path, field)


@contextmanager
def reading(name: str, failure: str = "can't be read", is_here: bool = True) -> Iterator[None]:
    """One line for whatever a library raises over a text, which may be on a hub that can't be reached."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_here:
            raise UserError(hub_access.unreachable("data", name, "a local file or folder")) from error
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"data: {name!r} {failure} ({type(error).__name__}: {reason})") from error


def _refuse_fields(path: Path, field: TextField | None) -> None:
    if field is not None and field.name not in (None, TEXT):
        raise UserError(f"stream.text_field: {field.name} is not allowed; {path} has no fields; leave it out")


def _of_item(item: Any, field: TextField, place: str) -> Document:
    """The document in a JSON value."""
    if isinstance(item, dict):
        return field.document(item, place)
    if isinstance(item, str) and field.name is None:
        return item
    field_name = field.name or TEXT
    raise UserError(
        f'data: {place} is not a JSON object with a "{field_name}" field'
        + (", or one of tokens or input_ids, nor a string" if field.name is None else "")
    )


def _of_cell(value: Any, column: str, field: TextField, place: str) -> Document:
    """The document in an Arrow scalar."""
    import pyarrow as pa

    if field.name in (None, column):
        ids = value.values if isinstance(value, pa.ListScalar | pa.FixedSizeListScalar) else None
        # a list's values: an array, which takes no integers of Python's
        if ids is None or pa.types.is_nested(ids.type):
            content = value.as_py()
        else:
            content = ids.to_numpy(zero_copy_only=False)
        return document(content, f"{place}, column {column},")
    return field.document({column: value.as_py()}, place)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked where its name says that they are packed."""
    unpack = PACKED.get(path.suffix.lower())
    try:
        with path.open("rb") if unpack is None else unpack(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"data: {path} can't be read: {reason}") from None


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"data: {path} is not UTF-8 ({error.reason})") from None


def _lines(path: Path) -> Iterator[bytes]:
    """Lines as bytes, which are parted at line feeds alone; without a byte order mark."""
    with _opened(path) as lines:
        for number, line in enumerate(lines):
            yield line if number else line.removeprefix(codecs.BOM_UTF8)


def _decoded(line: bytes, place: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"data: {place} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _is_binary(beginning: bytes) -> bool:
    """Whether the beginning of a file isn't UTF-8, a character cut at its end aside."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(beginning)
    except UnicodeDecodeError:
        return True
    return False
