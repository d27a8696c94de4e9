"""Arrays in files, of which pieces are read where they are cut.

Read and not mapped: a map of a file that is cut meanwhile kills the process (SIGBUS).
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

ROWS = 4096  # read at once, one after the other
WHOLE = 2**26  # bytes up to which a file's fingerprint is of all that it holds
PIECES, PIECE = 256, 2**16  # of a larger one, so many pieces of so many bytes, evenly spread
LONGEST_HEADER = 2**25  # bytes
_TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


class StoredArray:
    """An array of a `shape` and `dtype` in a file, from byte `offset` on; `a[start:stop]` reads those rows.

    In Fortran order (`is_fortran`) the first dimension is the one that lies closest together. `setting` is what messages
    begin with. Raises UserError for a file that has fewer bytes than the shape needs, now or later.
    """

    def __init__(
        self, path: Path, offset: int, shape: tuple[int, ...], dtype: Any, setting: str, is_fortran: bool = False
    ):
        self.path, self.offset, self.shape, self.dtype, self.setting = path, offset, shape, dtype, setting
        self.is_fortran = is_fortran and len(shape) > 1
        size = path.stat().st_size
        if size < (needed_bytes := offset + math.prod(shape) * dtype.itemsize):
            raise UserError(
                f"{setting}: {path} can't be read; its header says that it has {needed_bytes} bytes, and it has {size}"
            )

    @classmethod
    def of_npy(cls, path: Path, setting: str) -> "StoredArray":
        """The array of a .npy file. Raises ValueError for what is none, or holds pickled objects."""
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read_header is None:
                raise ValueError(f"version {version} of the format is not known")
            shape, is_fortran, dtype = read_header(file)
            if dtype.hasobject:
                raise ValueError("it holds pickled objects")
            if any(n < 0 for n in shape):
                raise ValueError(f"its header says {list(shape)}")
            return cls(path, file.tell(), shape, dtype, setting, is_fortran)

    @classmethod
    def of_safetensors(cls, path: Path, setting: str, names: Sequence[str]) -> "dict[str, StoredArray]":
        """Those tensors of a .safetensors file that have these names. Raises ValueError for what is no such file."""
        with path.open("rb") as file:
            header_length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if header_length > min(size - 8, LONGEST_HEADER):
                raise ValueError(f"its header says that it has {header_length} bytes itself")
            header = json.loads(file.read(header_length))
        arrays = {}
        for name in (name for name in names if name in header):
            entry = header[name]
            dtype, shape = _TORCH.get(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            start, stop = entry["data_offsets"]
            if dtype is None:
                raise ValueError(f"{name} is {entry['dtype']}, which is not read")
            if start < 0 or any(n < 0 for n in shape) or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"its header says {list(shape)} {entry['dtype']} in {stop - start} bytes of {name}")
            arrays[name] = cls(path, 8 + header_length + start, shape, dtype, setting)
        return arrays

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), ROWS):
            yield from self[start : start + ROWS]

    def behind(self, rows: int) -> "StoredArray":
        """The same without its first rows."""
        assert not self.is_fortran
        skipped_bytes = rows * math.prod(self.shape[1:]) * self.dtype.itemsize
        return StoredArray(
            self.path, self.offset + skipped_bytes, (self.shape[0] - rows, *self.shape[1:]), self.dtype, self.setting
        )

    def __getitem__(self, index: slice) -> Any:
        """Rows as an array of numpy's, or as a tensor where the dtype is torch's."""
        start, stop, _ = index.indices(self.shape[0])
        inner_shape, n = self.shape[1:], max(0, stop - start)
        if self.is_fortran:
            columns = math.prod(inner_shape)
            raw = bytearray(columns * n * self.dtype.itemsize)
            column_bytes = n * self.dtype.itemsize
            column_stride = self.shape[0] * self.dtype.itemsize
            for column in range(columns):
                self._read(
                    memoryview(raw)[column * column_bytes : (column + 1) * column_bytes],
                    column * column_stride + start * self.dtype.itemsize,
                )
            return np.frombuffer(raw, self.dtype).reshape(*inner_shape[::-1], n).T
        row_bytes = math.prod(inner_shape) * self.dtype.itemsize
        raw = bytearray(n * row_bytes)
        self._read(memoryview(raw), start * row_bytes)
        if isinstance(self.dtype, torch.dtype):
            return (
                torch.frombuffer(raw, dtype=self.dtype).view(n, *inner_shape) if raw else torch.zeros(n, *inner_shape)
            )
        return np.frombuffer(raw, self.dtype).reshape(n, *inner_shape)

    def _read(self, buffer: memoryview, start: int) -> None:
        try:
            handle = os.open(self.path, os.O_RDONLY)
            try:
                bytes_read = 0
                while bytes_read < len(buffer):
                    count = os.preadv(handle, [buffer[bytes_read:]], self.offset + start + bytes_read)
                    if not count:
                        raise UserError(
                            f"{self.setting}: {self.path} has been cut since it was opened; it ends at byte "
                            f"{self.offset + start + bytes_read}, and must be there whole"
                        )
                    bytes_read += count
            finally:
                os.close(handle)
        except OSError as error:
            raise UserError(f"{self.setting}: {self.path} can't be read: {error.strerror}") from None


def fingerprint(*paths: Path, text: str = "") -> int:
    """A number of 63 bits that differs, but by rare chance, where names, sizes or contents of files do, or `text`.

    Of files above 64 MiB, 256 pieces of 64 KiB are looked at, evenly spread."""
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
    """A tensor on the CPU of a piece of an array, in memory of its own where it was mapped."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.asarray(value)
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
