"""Writers of a feature store's Parquet files, `tokens.parquet` and the parts of `features/`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..engine.storage.files import whole_file
from . import checked_parquet

COLUMNS = ("document", "row", "position", "token", "latent", "value")
PART = 2**22  # entries per part, sorted in memory
GROUP = 2**17  # lines per row group
PLACE = [("document", pa.int64()), ("row", pa.int64()), ("position", pa.int32()), ("token", pa.int32())]


class _ColumnWriter:
    """Buffers lines and writes them `enough` at a time."""

    def __init__(self, enough: int, write: Callable[[dict[str, np.ndarray]], None]):
        self.enough, self.write = enough, write
        self.waiting: list[dict[str, np.ndarray]] = []

    def add(self, columns: dict[str, np.ndarray]) -> None:
        self.waiting.append(columns)
        if sum(len(block["token"]) for block in self.waiting) >= self.enough:
            self.flush(self.enough)

    def flush(self, least: int = 1) -> None:
        """Write until fewer than `least` lines are left."""
        if not self.waiting:
            return
        columns = {name: np.concatenate([block[name] for block in self.waiting]) for name in self.waiting[0]}
        start, total = 0, len(columns["token"])
        while total - start >= least:
            self.write({name: column[start : start + self.enough] for name, column in columns.items()})
            start = min(total, start + self.enough)
        self.waiting = [{name: column[start:] for name, column in columns.items()}] if start < total else []


class TokenWriter(_ColumnWriter):
    """Writes tokens.parquet a row group at a time; the file gets its name when it is complete."""

    def __init__(self, path: Path):
        super().__init__(GROUP, self._write)
        sums = [("squared_error", pa.float32()), ("squared_norm", pa.float32())]
        self.schema = pa.schema([*PLACE, ("text", pa.string()), ("active", pa.int32()), *sums])
        self.place = whole_file(path)
        self.file = pq.ParquetWriter(self.place.__enter__(), self.schema, **checked_parquet.SETTINGS)

    def _write(self, columns: dict[str, np.ndarray]) -> None:
        self.file.write_table(pa.table(columns, schema=self.schema))

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *failure: Any) -> None:
        if failure[0] is None:
            self.flush()
        self.file.close()
        self.place.__exit__(*failure)


class ActivationWriter(_ColumnWriter):
    """Writes features/part-*.parquet, each sorted by latent; a file gets its name when it is complete."""

    def __init__(self, folder: Path):
        super().__init__(PART, self._write)
        self.schema = pa.schema([*PLACE, ("latent", pa.int32()), ("value", pa.float32())])
        self.folder, self.entries = folder, 0
        self.checks: dict[str, dict[str, Any]] = {}  # checksums of each part

    def _write(self, columns: dict[str, np.ndarray]) -> None:
        order = np.argsort(columns["latent"], kind="stable")  # lines come sorted by document, row and position
        table = pa.table({name: column[order] for name, column in columns.items()}, schema=self.schema)
        name = f"part-{len(self.checks):05d}.parquet"
        with whole_file(self.folder / name) as fresh:
            pq.write_table(table, fresh, row_group_size=GROUP, **checked_parquet.SETTINGS)
            self.checks[f"{self.folder.name}/{name}"] = checked_parquet.checks(fresh)
        self.entries += len(order)

    def end(self) -> None:
        """Write the remaining lines; an empty part if there were none at all."""
        self.flush()
        if not self.checks:
            self._write({name: np.empty(0, np.int32) for name in COLUMNS})
