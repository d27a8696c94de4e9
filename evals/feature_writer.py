"""Writers of a feature store's Parquet files, `tokens.parquet` and the parts of `features/`."""

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
TOKEN = [("text", pa.string()), ("active", pa.int32()), ("squared_error", pa.float32()), ("squared_norm", pa.float32())]


class _Writer:
    """Buffers lines and writes them `enough` at a time."""

    def __init__(self, enough: int, columns: list[tuple[str, pa.DataType]]):
        self.enough, self.schema = enough, pa.schema([*PLACE, *columns])
        self.waiting = self.schema.empty_table()

    def write(self, lines: pa.Table) -> None:
        raise NotImplementedError

    def add(self, columns: dict[str, np.ndarray]) -> None:
        self.waiting = pa.concat_tables([self.waiting, pa.table(columns, schema=self.schema)])
        self.flush(self.enough)

    def flush(self, least: int = 1) -> None:
        """Write until fewer than `least` lines are left."""
        while len(self.waiting) >= least:
            self.write(self.waiting.slice(0, self.enough).combine_chunks())
            self.waiting = self.waiting.slice(self.enough)


class TokenWriter(_Writer):
    """Writes tokens.parquet a row group at a time; the file gets its name when it is complete."""

    def __init__(self, path: Path):
        super().__init__(GROUP, TOKEN)
        self.place = whole_file(path)
        self.file = pq.ParquetWriter(self.place.__enter__(), self.schema, **checked_parquet.SETTINGS)

    def write(self, lines: pa.Table) -> None:
        self.file.write_table(lines)

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
        super().__init__(PART, [("latent", pa.int32()), ("value", pa.float32())])
        self.folder, self.entries = folder, 0
        self.checks: dict[str, dict[str, Any]] = {}  # checksums of each part

    def write(self, lines: pa.Table) -> None:
        order = np.argsort(lines["latent"].to_numpy(), kind="stable")  # lines come sorted by document, row and position
        name = f"part-{len(self.checks):05d}.parquet"
        with whole_file(self.folder / name) as fresh:
            pq.write_table(lines.take(pa.array(order)), fresh, row_group_size=GROUP, **checked_parquet.SETTINGS)
            self.checks[f"{self.folder.name}/{name}"] = checked_parquet.checks(fresh)
        self.entries += len(order)

    def end(self) -> None:
        """Write the remaining lines; an empty part if there were none at all."""
        self.flush()
        if not self.checks:
            self.write(self.waiting)
