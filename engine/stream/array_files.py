"""Arrays in files, read slice by slice.

Files are read, not memory-mapped: truncating a mapped file kills the process (SIGBUS).
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

ROWS = 4096  # per read when iterating
WHOLE = 2**26  # bytes; files up to this size are fingerprinted in full
PIECES, PIECE = 256, 2**16  # number and bytes of the evenly spaced pieces that are hashed of a larger file
LONGEST_HEADER = 2**25  # bytes
#: dtypes by their names in safetensors files
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def safetensors_header(path: Path) -> bytes:
    """The header of a .safetensors file, after its length in 8 bytes. Shorter if the file is cut or that wrong."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), LONGEST_HEADER))


class StoredArray:
    """An array of the given shape and dtype in a file, starting at byte `offset`. `array[start:stop]` reads those rows.

    With `is_fortran` the array is stored column by column. Error messages begin with `setting`. Raises UserError if the
    file is shorter than the shape requires, on opening or on a later read.
    """

    def __init__(
        self, path: Path, offset: int, shape: tuple[int, ...], dtype: Any, setting: str, is_fortran: bool = False
    ):
        self.path, self.offset, self.shape, self.dtype, self.setting = path, offset, shape, dtype, setting
        self.is_fortran = is_fortran and len(shape) > 1
        size = path.stat().st_size
        if size < (needed_bytes := offset + math.prod(shape) * dtype.itemsize):
            raise UserError(f"{setting}: {path} can't be read; its header says {needed_bytes} bytes, but it has {size}")

    @classmethod
    def of_npy(cls, path: Path, setting: str) -> "StoredArray":
        """Open a .npy file. Raises ValueError if it is not one or holds pickled objects."""
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version not in _READ_HEADER:
                raise ValueError(f"unknown format version {version}")
            shape, is_fortran, dtype = _READ_HEADER[version](file)
            if dtype.hasobject:
                raise ValueError("it holds pickled objects")
            if any(n < 0 for n in shape):
                raise ValueError(f"its header says {list(shape)}")
            return cls(path, file.tell(), shape, dtype, setting, is_fortran)

    @classmethod
    def of_safetensors(cls, path: Path, setting: str, names: Sequence[str] | None = None) -> "dict[str, StoredArray]":
        """Open the named tensors, by default all, of a .safetensors file. Raises ValueError for any other file."""
        raw = safetensors_header(path)
        if (header_length := int.from_bytes(raw[:8], "little")) != len(raw) - 8:
            raise ValueError(f"its header says that it is {header_length} bytes long")
        header = json.loads(raw[8:])
        arrays = {}
        for name in header if names is None else filter(header.__contains__, names):
            entry = header[name]
            dtype, shape = DTYPES.get(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            start, stop = entry["data_offsets"]
            if dtype is None:
                raise ValueError(f"{name} has dtype {entry['dtype']}, which is not supported")
            if start < 0 or any(n < 0 for n in shape) or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"its header says {list(shape)} {entry['dtype']} in {stop - start} bytes of {name}")
            arrays[name] = cls(path, len(raw) + start, shape, dtype, setting)
        return arrays

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), ROWS):
            yield from self[start : start + ROWS]

    def without_first(self, rows: int) -> "StoredArray":
        """The same array without its first rows."""
        assert not self.is_fortran
        offset = self.offset + rows * math.prod(self.shape[1:]) * self.dtype.itemsize
        return StoredArray(self.path, offset, (self.shape[0] - rows, *self.shape[1:]), self.dtype, self.setting)

    def __getitem__(self, index: slice) -> Any:
        """Read rows: a tensor if the dtype is torch's, otherwise a numpy array."""
        start, stop, _ = index.indices(self.shape[0])
        row_shape, row_count, itemsize = self.shape[1:], max(0, stop - start), self.dtype.itemsize
        row_items = math.prod(row_shape)
        raw = memoryview(bytearray(row_count * row_items * itemsize))
        if self.is_fortran:
            column_bytes = row_count * itemsize
            for column in range(row_items):
                column_raw = raw[column * column_bytes : (column + 1) * column_bytes]
                self._read(column_raw, (column * self.shape[0] + start) * itemsize)
            return np.frombuffer(raw, self.dtype).reshape(*row_shape[::-1], row_count).T
        self._read(raw, start * row_items * itemsize)
        if not isinstance(self.dtype, torch.dtype):
            return np.frombuffer(raw, self.dtype).reshape(row_count, *row_shape)
        values = torch.frombuffer(raw, dtype=self.dtype) if raw else torch.zeros(0)
        return values.view(row_count, *row_shape)

    def _read(self, buffer: memoryview, start: int) -> None:
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset + start)
                bytes_read = file.readinto(buffer)
        except OSError as error:
            raise UserError(f"{self.setting}: {self.path} can't be read ({error.strerror})") from None
        if bytes_read < len(buffer):
            raise UserError(
                f"{self.setting}: {self.path} has been cut since it was opened; it ends at byte "
                f"{self.offset + start + bytes_read}, before the end of its array"
            )


def fingerprint(*paths: Path, text: str = "") -> int:
    """A 63-bit hash of the names, sizes and contents of files, and of `text`.

    Files above 64 MiB are sampled: 256 evenly spaced pieces of 64 KiB."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    for path in paths:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"\0{path.name}\0{size}\0".encode("utf-8", "surrogatepass"))
            if size <= WHOLE:
                while chunk := file.read(2**20):
                    digest.update(chunk)
                continue
            for n in range(PIECES):
                file.seek((size - PIECE) * n // (PIECES - 1))
                digest.update(file.read(PIECE))
    return int.from_bytes(digest.digest(), "little") >> 1


def as_tensor(value: Any) -> Tensor:
    """A CPU tensor of a slice of an array, copied out of numpy: floats as float32, everything else as int64."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.asarray(value)
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
