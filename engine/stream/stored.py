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
        if size < (wanted := offset + math.prod(shape) * dtype.itemsize):
            raise UserError(
                f"{setting}: {path} can't be read; its header says that it has {wanted} bytes, and it has {size}"
            )

    @classmethod
    def of_npy(cls, path: Path, setting: str) -> "StoredArray":
        """The array of a .npy file. Raises ValueError for what is none, or holds pickled objects."""
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(
                version
            )
            if read is None:
                raise ValueError(f"version {version} of the format is not known")
            shape, is_fortran, dtype = read(file)
            if dtype.hasobject:
                raise ValueError("it holds pickled objects")
            if any(n < 0 for n in shape):
                raise ValueError(f"its header says {list(shape)}")
            return cls(path, file.tell(), shape, dtype, setting, is_fortran)

    @classmethod
    def of_safetensors(cls, path: Path, setting: str, names: Sequence[str]) -> "dict[str, StoredArray]":
        """Those tensors of a .safetensors file that have these names. Raises ValueError for what is no such file."""
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if length > min(size - 8, LONGEST_HEADER):
                raise ValueError(f"its header says that it has {length} bytes itself")
            header = json.loads(file.read(length))
        found = {}
        for name in (name for name in names if name in header):
            value = header[name]
            dtype, shape = _TORCH.get(value["dtype"]), tuple(int(n) for n in value["shape"])
            first, last = value["data_offsets"]
            if dtype is None:
                raise ValueError(f"{name} is {value['dtype']}, which is not read")
            if first < 0 or any(n < 0 for n in shape) or last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"its header says {list(shape)} {value['dtype']} in {last - first} bytes of {name}")
            found[name] = cls(path, 8 + length + first, shape, dtype, setting)
        return found

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), ROWS):
            yield from self[start : start + ROWS]

    def behind(self, rows: int) -> "StoredArray":
        """The same without its first rows."""
        assert not self.is_fortran
        skipped = rows * math.prod(self.shape[1:]) * self.dtype.itemsize
        return StoredArray(
            self.path, self.offset + skipped, (self.shape[0] - rows, *self.shape[1:]), self.dtype, self.setting
        )

    def __getitem__(self, at: slice) -> Any:
        """Rows as an array of numpy's, or as a tensor where the dtype is torch's."""
        start, stop, _ = at.indices(self.shape[0])
        rest, n = self.shape[1:], max(0, stop - start)
        if self.is_fortran:
            runs = math.prod(rest)
            raw = bytearray(runs * n * self.dtype.itemsize)
            step = n * self.dtype.itemsize
            whole = self.shape[0] * self.dtype.itemsize
            for run in range(runs):
                self._read(memoryview(raw)[run * step : (run + 1) * step], run * whole + start * self.dtype.itemsize)
            return np.frombuffer(raw, self.dtype).reshape(*rest[::-1], n).T
        row = math.prod(rest) * self.dtype.itemsize
        raw = bytearray(n * row)
        self._read(memoryview(raw), start * row)
        if isinstance(self.dtype, torch.dtype):
            return torch.frombuffer(raw, dtype=self.dtype).view(n, *rest) if raw else torch.zeros(n, *rest)
        return np.frombuffer(raw, self.dtype).reshape(n, *rest)

    def _read(self, into: memoryview, at: int) -> None:
        try:
            handle = os.open(self.path, os.O_RDONLY)
            try:
                done = 0
                while done < len(into):
                    count = os.preadv(handle, [into[done:]], self.offset + at + done)
                    if not count:
                        raise UserError(
                            f"{self.setting}: {self.path} has been cut since it was opened; it ends at byte "
                            f"{self.offset + at + done}, and must be there whole"
                        )
                    done += count
            finally:
                os.close(handle)
        except OSError as error:
            raise UserError(f"{self.setting}: {self.path} can't be read: {error.strerror}") from None


def fingerprint(*paths: Path, of: str = "") -> int:
    """A number of 63 bits that differs, but by rare chance, where names, sizes or contents of files do, or the text `of`.

    Of files above 64 MiB, 256 pieces of 64 KiB are looked at, evenly spread."""
    digest = blake2b(of.encode("utf-8", "surrogatepass"), digest_size=8)
    for path in paths:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"\0{path.name}\0{size}\0".encode("utf-8", "surrogatepass"))
            if size <= WHOLE:
                while part := file.read(2**20):
                    digest.update(part)
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
