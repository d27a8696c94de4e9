"""Documents of one file: plain text, JSON, tables, or arrays of token ids. The file's name determines how it is read.

A file is neither loaded whole nor memory-mapped, since truncating a mapped file kills the process.
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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from ..errors import UserError
from ..process import hub_access
from .array_files import StoredArray
from .text_fields import TEXT, Document, TextField, document

LONGEST = 2**22  # bytes of a document in a .txt file; longer ones are split at the end of a line
LONGEST_ITEM = 2**26  # characters of an item in a JSON list, or of a field in a table
READ_AHEAD = 2**20  # bytes
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
WHOLE = (".parquet", ".arrow", ".npy")  # kinds that need random access, so they can't be compressed
ALLOWED = "give .txt, .jsonl, .json, .csv, .tsv (each also .gz, .bz2, .xz), .parquet, .arrow or .npy"
_JSON = re.compile(r"\s*(\{\s*[\"}]|\[\s*[{\"]|\[\s*\[\s*-?\d)")
_FIRST_ITEM, _NEXT_ITEM = re.compile(r"\s*\[\s*"), re.compile(r"\s*,\s*")
_EMPTY_LIST, _LIST_END = re.compile(r"\s*\[\s*\]"), re.compile(r"\s*\]")
_MARKUP = re.compile(r"\s*<(\?xml|!doctype|html)\b", re.IGNORECASE)


class TextTooShort(UserError):
    """A text has only `document_count` documents and so ends before the one to continue with."""

    def __init__(self, name: str, start: int, document_count: int):
        super().__init__(f"data: {name} has changed: it holds fewer than the {start} documents that were read from it")
        self.document_count = document_count


class ItemFile(ABC):
    """A file that yields items in order, each of which holds one document."""

    def __init__(self, path: Path, field: TextField):
        self.path, self.name, self.field = path, str(path), field

    @abstractmethod
    def _items(self) -> Iterator[Any]: ...

    @abstractmethod
    def _document(self, item: Any, number: int) -> Document: ...

    def read(self, start: int = 0) -> Iterator[Document]:
        """The documents from number `start` on. Raises TextTooShort if there are fewer than `start`."""
        count = 0
        for count, item in enumerate(self._items(), 1):
            if count > start:
                yield self._document(item, count - 1)
        if count < start:
            raise TextTooShort(self.name, start, count)


class PlainText(ItemFile):
    """Documents separated by blank lines. Raises UserError for a file that is clearly binary, JSON or markup."""

    def __init__(self, path: Path, field: TextField):
        super().__init__(path, field)
        with _opened(path) as file:
            beginning = file.read(2**16)
        text = beginning.decode("utf-8", "ignore").removeprefix("\ufeff")
        for pattern, kind in ((_JSON, "JSON"), (_MARKUP, "markup")):
            if pattern.match(text):
                raise UserError(f"data: {path} holds {kind}, not plain text; {ALLOWED}")
        if kind_of(path) != ".txt" and (b"\0" in beginning or _is_binary(beginning)):
            raise UserError(f"data: {path} is not plain text, nor of a kind that is read; {ALLOWED}")
        _refuse_fields(path, field)

    def _items(self) -> Iterator[list[tuple[int, bytes]]]:
        """The numbered lines of each document."""
        lines: list[tuple[int, bytes]] = []
        size = 0
        for line_number, line in enumerate(chain(_lines(self.path), [b""]), 1):
            is_blank = not line.strip()
            if not is_blank:
                lines.append((line_number, line))
                size += len(line)
            if lines and (is_blank or size >= LONGEST):
                yield lines
                lines, size = [], 0

    def _document(self, item: list[tuple[int, bytes]], number: int) -> Document:
        lines = (_decoded(line, f"{self.path} line {line_number}") for line_number, line in item)
        return "\n".join(line.rstrip("\r\n") for line in lines)


class JsonLines(ItemFile):
    """A JSON object or string per line; blank lines are skipped."""

    def _items(self) -> Iterator[tuple[int, bytes]]:
        return ((number, line) for number, line in enumerate(_lines(self.path), 1) if line.strip())

    def _document(self, item: tuple[int, bytes], number: int) -> Document:
        place = f"{self.path} line {item[0]}"
        line = _decoded(item[1], place)
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        return _document_of_json(value, self.field, place)


class JsonList(ItemFile):
    """The items of one JSON list: objects or strings."""

    def _document(self, item: Any, number: int) -> Document:
        return _document_of_json(item, self.field, f"{self.path} item {number}")

    def _items(self) -> Iterator[Any]:
        """Parse one item after the other, reading the file only as far as needed."""
        decoder = json.JSONDecoder()
        with _opened(self.path) as file:
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
                            break  # the item may continue in the part that is not read yet
                        raise UserError(f"data: {self.path} item {number} is not JSON, or cut") from None
                    yield item
                    number, position, size = number + 1, item_end, READ_AHEAD


class Delimited(ItemFile):
    """The rows of a .csv or .tsv file, whose first line names the columns."""

    def __init__(self, path: Path, field: TextField, delimiter: str = ","):
        super().__init__(path, field)
        self.delimiter = delimiter
        with self._table() as (names, _):
            if len(set(names)) < len(names):
                raise UserError(f"data: {path} has columns of the same name; its first line must name them all")
            # cells are strings, so a column `tokens` can't hold token ids
            self._column_index = names.index(field.column(names, self.name, ready=()))

    @contextmanager
    def _table(self) -> Iterator[tuple[list[str], Any]]:
        """The column names, and a reader of the rows."""
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST_ITEM))
        lines = (_decoded(line, f"{self.path} line {number}") for number, line in enumerate(_lines(self.path), 1))
        table = csv.reader(lines, delimiter=self.delimiter, strict=True)
        try:
            yield next(table, []), table
        except csv.Error as error:
            raise UserError(f"data: {self.path} line {table.line_num} is not a table row ({error})") from None

    def _items(self) -> Iterator[str]:
        with self._table() as (names, table):
            for cells in filter(None, table):
                if len(cells) != len(names):
                    place = f"{self.path} line {table.line_num}"
                    raise UserError(f"data: {place} has {len(cells)} fields; its first line names {len(names)}")
                yield cells[self._column_index]

    def _document(self, item: str, number: int) -> Document:
        return item


#: column names, and for a column each chunk's number of rows and an iterable of their Arrow scalars
Table = tuple[list[str], Callable[[str], Iterable[tuple[int, Iterable[Any]]]]]


class ColumnFile:
    """One column of a table that is stored in chunks of rows. A row is a document. `opened` opens the table."""

    def __init__(self, path: Path, field: TextField, opened: Callable[[Path], AbstractContextManager[Table]]):
        self.path, self.name, self.field, self.opened = path, str(path), field, opened
        with reading(self.name), opened(path) as (names, _):
            self.column = field.column(names, self.name)

    def read(self, start: int = 0) -> Iterator[Document]:
        count = 0
        with reading(self.name), self.opened(self.path) as (_, chunks_of):
            for size, values in chunks_of(self.column):
                if count + size > start:
                    skipped = max(0, start - count)
                    for number, value in enumerate(islice(values, skipped, None), count + skipped):
                        yield self._document(value, number)
                count += size
        if count < start:
            raise TextTooShort(self.name, start, count)

    def _document(self, item: Any, number: int) -> Document:
        import pyarrow as pa

        place = f"{self.name} document {number}"
        if self.field.name not in (None, self.column):
            return self.field.document({self.column: item.as_py()}, place)
        values = item.values if isinstance(item, pa.ListScalar | pa.FixedSizeListScalar) else None
        if values is None or pa.types.is_nested(values.type):
            content = item.as_py()
        else:
            content = values.to_numpy(zero_copy_only=False)  # without a Python integer per token
        return document(content, f"{place}, column {self.column},")


@contextmanager
def _parquet_table(path: Path) -> Iterator[Table]:
    """A Parquet file, whose chunks are row groups."""
    import pyarrow.parquet as parquet

    def values(group: int, column: str) -> Iterator[Any]:
        for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=[column]):
            yield from batch.column(0)

    # with a buffer, a column of a row group is read piece by piece instead of whole
    with parquet.ParquetFile(path, buffer_size=2**20) as file:
        groups = range(file.metadata.num_row_groups)
        sizes = [file.metadata.row_group(group).num_rows for group in groups]
        yield file.schema_arrow.names, lambda column: zip(sizes, (values(n, column) for n in groups), strict=True)


@contextmanager
def _arrow_table(path: Path) -> Iterator[Table]:
    """An Arrow file or stream, such as `datasets` saves, whose chunks are record batches."""
    import pyarrow as pa

    with pa.OSFile(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
        else:
            file.seek(0)
            reader = batches = pa.ipc.open_stream(file)
        names = reader.schema.names
        yield names, lambda column: ((len(batch), batch.column(names.index(column))) for batch in batches)


class Array:
    """Token ids in a .npy file: each row of [documents, tokens] is a document, or all of [tokens] is one."""

    def __init__(self, path: Path, field: TextField):
        self.path, self.name = path, str(path)
        _refuse_fields(path, field)
        with reading(self.name):
            ids = StoredArray.of_npy(path, "data")
        if ids.dtype.kind not in "iu" or len(ids.shape) not in (1, 2):
            raise UserError(
                f"data: {path} holds {ids.dtype} with {len(ids.shape)} dimensions; "
                "it must hold integers, [documents, tokens] or [tokens]"
            )
        self._documents: StoredArray | list[StoredArray] = ids if len(ids.shape) == 2 else [ids]
        self._step = max(1, READ_AHEAD // max(1, ids.shape[-1] * ids.dtype.itemsize))  # documents per read

    def read(self, start: int = 0) -> Iterator[Document]:
        count = len(self._documents)
        if count < start:
            raise TextTooShort(self.name, start, count)
        for first in range(start, count, self._step):
            yield from self._documents[first : first + self._step]


def _json(path: Path, field: TextField) -> JsonLines | JsonList:
    with _opened(path) as file:
        beginning = file.read(2**12).removeprefix(codecs.BOM_UTF8).lstrip()
    return JsonList(path, field) if beginning.startswith(b"[") else JsonLines(path, field)


TextFile = ItemFile | ColumnFile | Array
READERS: dict[str, Callable[[Path, TextField], TextFile]] = {
    ".txt": PlainText, ".jsonl": JsonLines, ".ndjson": JsonLines, ".json": _json, ".csv": Delimited,
    ".tsv": partial(Delimited, delimiter="\t"), ".npy": Array,
    ".parquet": partial(ColumnFile, opened=_parquet_table), ".arrow": partial(ColumnFile, opened=_arrow_table),
}  # fmt: skip


def kind_of(path: Path) -> str:
    """The ending that says what a file holds, before that of its compression."""
    return (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower()


def open_file(path: Path, field: TextField) -> TextFile:
    """Open a file of documents. Raises UserError for an empty file and for one of an unknown kind."""
    kind = kind_of(path)
    if path.suffix.lower() in PACKED and kind in WHOLE:
        raise UserError(f"data: {path} is not allowed; {kind} files must not be compressed")
    try:
        if not path.stat().st_size:
            raise UserError(f"data: {path} is empty; it must hold text")
    except OSError as error:
        raise UserError(f"data: {path} can't be read: {error.strerror}") from None
    return READERS.get(kind, PlainText)(path, field)


@contextmanager
def reading(name: str, failure: str = "can't be read", is_here: bool = True) -> Iterator[None]:
    """Turn any exception of a library that reads a text into a one-line UserError.

    `is_here` is false for a name that may be on a hub that can't be reached."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_here:
            raise UserError(hub_access.unreachable("data", name, "a local file or folder")) from error
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"data: {name!r} {failure} ({type(error).__name__}: {reason})") from error


def _refuse_fields(path: Path, field: TextField) -> None:
    if field.name not in (None, TEXT):
        raise UserError(f"stream.text_field: {field.name} is not allowed; {path} has no fields; leave it out")


def _document_of_json(value: Any, field: TextField, place: str) -> Document:
    if isinstance(value, dict):
        return field.document(value, place)
    if isinstance(value, str) and field.name is None:
        return value
    options = ", or one of tokens or input_ids, nor a string" if field.name is None else ""
    raise UserError(f'data: {place} is not a JSON object with a "{field.name or TEXT}" field{options}')


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed according to its name."""
    decompress = PACKED.get(path.suffix.lower())
    try:
        with path.open("rb") if decompress is None else decompress(path, "rb") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"data: {path} is not UTF-8 ({error.reason})") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"data: {path} can't be read: {reason}") from None


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, split at line feeds only, without a byte order mark."""
    with _opened(path) as lines:
        for number, line in enumerate(lines):
            yield line if number else line.removeprefix(codecs.BOM_UTF8)


def _decoded(line: bytes, place: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"data: {place} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _is_binary(beginning: bytes) -> bool:
    """Whether the first bytes of a file are not UTF-8. A character cut off at the end is allowed."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(beginning)
    except UnicodeDecodeError:
        return True
    return False
