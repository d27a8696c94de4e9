"""Parquet files of a feature store: their writers, and reading with checksums.

`checks` has CRC-32 checksums of the footer and of every row group, which `read` verifies. Parquet's own page checksums,
which are written too, leave out the footer and page headers, and few readers verify them. Only the row groups that are read
are verified, so looking up one latent stays fast.
"""

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..engine.errors import UserError
from ..engine.storage.files import whole_file

COLUMNS = ("document", "row", "position", "token", "latent", "value")
PART = 2**22  # entries per part, sorted in memory
GROUP = 2**17  # lines per row group
_PLACE = [("document", pa.int64()), ("row", pa.int64()), ("position", pa.int32()), ("token", pa.int32())]
_ERRORS = [("squared_error", pa.float32()), ("squared_norm", pa.float32())]
TOKEN = pa.schema([*_PLACE, ("text", pa.string()), ("active", pa.int32()), *_ERRORS])
ENTRY = pa.schema([*_PLACE, ("latent", pa.int32()), ("value", pa.float32())])
#: options for writing Parquet
SETTINGS: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
_TAIL = 8  # bytes: the footer's length and PAR1


class _Writer:
    """Buffers lines and passes them to `write`, `enough` at a time."""

    def __init__(self, enough: int, schema: pa.Schema, write: Callable[[pa.Table], None]):
        self.enough, self.write, self.waiting = enough, write, schema.empty_table()

    def add(self, columns: dict[str, np.ndarray]) -> None:
        self.waiting = pa.concat_tables([self.waiting, pa.table(columns, schema=self.waiting.schema)])
        self.flush(self.enough)

    def flush(self, least: int = 1) -> None:
        """Write until fewer than `least` lines are left."""
        while len(self.waiting) >= least:
            self.write(self.waiting.slice(0, self.enough).combine_chunks())
            self.waiting = self.waiting.slice(self.enough)


class TokenWriter(_Writer):
    """Writes tokens.parquet a row group at a time; the file gets its name when it is complete."""

    def __init__(self, path: Path):
        self.place = whole_file(path)
        self.file = pq.ParquetWriter(self.place.__enter__(), TOKEN, **SETTINGS)
        super().__init__(GROUP, TOKEN, self.file.write_table)

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *failure: Any) -> None:
        if failure[0] is None:
            self.flush()
        self.file.close()
        self.place.__exit__(*failure)


class ActivationWriter(_Writer):
    """Writes features/part-*.parquet, each sorted by latent; a file gets its name when it is complete."""

    def __init__(self, folder: Path):
        super().__init__(PART, ENTRY, self._write_part)
        self.folder, self.entries = folder, 0
        self.checks: dict[str, dict[str, Any]] = {}  # checksums of each part

    def _write_part(self, lines: pa.Table) -> None:
        order = np.argsort(lines["latent"].to_numpy(), kind="stable")  # lines come sorted by document, row and position
        name = f"part-{len(self.checks):05d}.parquet"
        with whole_file(self.folder / name) as fresh:
            pq.write_table(lines.take(pa.array(order)), fresh, row_group_size=GROUP, **SETTINGS)
            self.checks[f"{self.folder.name}/{name}"] = checks(fresh)
        self.entries += len(order)

    def end(self) -> None:
        """Write the remaining lines; an empty part if there were none at all."""
        self.flush()
        if not self.checks:
            self.write(self.waiting)


def checks(path: Path) -> dict[str, Any]:
    """Compute the checksums of a file: `bytes`, `footer`, `groups`."""
    with path.open("rb") as file:
        groups = [_crc32(file.fileno(), *span) for span in _spans(pq.ParquetFile(file).metadata)]
        size = os.fstat(file.fileno()).st_size
        return {"bytes": size, "footer": _crc32(file.fileno(), *_footer(file.fileno(), size)), "groups": groups}


def read(
    path: Path, columns: Sequence[str], filters: Mapping[str, Sequence[int]], sums: Mapping[str, Any] | None
) -> pa.Table:
    """Read the lines whose value is one of `filters[column]`, for each column in `filters`.

    `sums`: the file's `checks`, None to skip verification. Raises UserError for a damaged file, and OSError or
    ArrowException for one that can't be read.
    """
    with path.open("rb") as source:
        number = source.fileno()
        if sums is not None:
            size = os.fstat(number).st_size
            if size != sums["bytes"]:
                raise UserError(f"store: {path} is damaged; it has {size} bytes, not {sums['bytes']}")
            if _crc32(number, *_footer(number, size)) != sums["footer"]:
                raise UserError(f"store: {path} is damaged in its footer; the store must be made again")
        file = pq.ParquetFile(source)
        groups = [i for i in range(file.num_row_groups) if _may_hold(file.metadata.row_group(i), filters)]
        if sums is not None:
            spans = _spans(file.metadata)
            for i in groups:
                if _crc32(number, *spans[i]) != sums["groups"][i]:
                    raise UserError(f"store: {path} is damaged in row group {i}; the store must be made again")
        table = file.read_row_groups(groups, columns=list(columns))
    for name, values in filters.items():
        table = table.filter(pc.field(name).isin(pa.array(values, table.schema.field(name).type)))
    return table


def _spans(metadata: Any) -> list[tuple[int, int]]:
    """Start and size in bytes of each row group."""
    spans = []
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        chunks = [group.column(j) for j in range(group.num_columns)]
        starts = [c.dictionary_page_offset if c.has_dictionary_page else c.data_page_offset for c in chunks]
        end = max(start + c.total_compressed_size for start, c in zip(starts, chunks, strict=True))
        spans.append((min(starts), end - min(starts)))
    return spans


def _may_hold(group: Any, filters: Mapping[str, Sequence[int]]) -> bool:
    """Whether a row group may have lines with these values, by the minimum and maximum of its columns."""
    for column in map(group.column, range(group.num_columns)):
        values, limits = filters.get(column.path_in_schema), column.statistics
        if values is None or limits is None or not limits.has_min_max:
            continue
        if not any(limits.min <= value <= limits.max for value in values):
            return False
    return True


def _footer(number: int, size: int) -> tuple[int, int]:
    """Start and size in bytes of the footer, with its length and PAR1."""
    length = int.from_bytes(os.pread(number, 4, max(0, size - _TAIL)), "little") + _TAIL
    return max(0, size - length), min(size, length)


def _crc32(number: int, start: int, count: int) -> int:
    crc, done = 0, 0
    while done < count and (piece := os.pread(number, min(2**24, count - done), start + done)):
        crc, done = zlib.crc32(piece, crc), done + len(piece)
    return crc
