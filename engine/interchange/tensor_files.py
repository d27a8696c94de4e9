"""Read and write files of named tensors: .safetensors, .pt and .npz. Other objects in a file are never loaded."""

import math
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from .intermediate import State

INFLATION = 100  # largest ratio of the tensors' size to the file's size; weights do not compress that well


class TrackedTensors(dict[str, Tensor]):
    """Tensors by name that records which of them were read."""

    def __init__(self, tensors: State):
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def take(self, *names: str) -> Tensor | None:
        """Return the tensor with the first of these names that exists, or None."""
        return next((self[name] for name in names if name in self), None)

    def check_all_read(self, file: str) -> None:
        """Raise UserError for a tensor that was not read: it would make the dictionary another function."""
        if unread := sorted(self.keys() - self.read):
            names = ", ".join(unread[:8]) + (", ..." if len(unread) > 8 else "")
            raise UserError(f"{file} has {names}, which can't be read")


def tensors_in(file: Path) -> TrackedTensors:
    """Load the tensors of a file, floating-point ones in float32.

    Raises UserError for a file that is damaged, has other objects than tensors, or has tensors far larger than itself.
    """
    try:
        tensors = _LOADERS[file.suffix](file)
    except UserError:
        raise
    except UnpicklingError:  # its message advises an unsafe way to load the file
        raise UserError(f"{file.name} is damaged, or has objects other than tensors, which are never loaded") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, TypeError, MemoryError, KeyError, BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file.name} is damaged, or has objects other than tensors ({reason})") from None
    if isinstance(tensors, dict) and isinstance(tensors.get("sae"), dict):  # in Llamascopium's .pt files
        tensors = tensors["sae"]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{file.name} is not allowed; it must have tensors by name")
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise UserError(f"{file.name} is not allowed; {name} is not a dense tensor on the CPU")
    _check_inflation(file, sum(value.numel() * value.element_size() for value in tensors.values()))
    items = tensors.items()
    return TrackedTensors({str(name): value.float() if value.is_floating_point() else value for name, value in items})


def save(tensors: State, file: Path) -> None:
    """Write tensors in the format of the file's suffix."""
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    elif file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})  # pyright: ignore[reportArgumentType]


def _check_inflation(file: Path, size: int) -> None:
    file_size = file.stat().st_size
    if size > INFLATION * file_size + 2**20:
        raise UserError(f"{file.name} is damaged; its tensors would take {size:,} bytes, and it has {file_size:,}")


def _load_pt(file: Path) -> Any:
    if is_zipfile(file):
        with ZipFile(file) as packed:
            _check_inflation(file, sum(entry.file_size for entry in packed.infolist()))
    return torch.load(file, map_location="cpu", weights_only=True)


def _load_npz(file: Path) -> State:
    with ZipFile(file) as packed:
        entries = packed.infolist()
        _check_inflation(file, sum(entry.file_size for entry in entries))
        for entry in entries:  # before numpy allocates the size in an array's header
            with packed.open(entry) as array:
                read_header = read_array_header_1_0 if read_magic(array) == (1, 0) else read_array_header_2_0
                shape, _, dtype = read_header(array)
            if (size := math.prod(shape) * dtype.itemsize) > entry.file_size:
                problem = f"{entry.filename} has fewer than the {size:,} bytes of its shape"
                raise UserError(f"{file.name} is damaged; {problem}")
    with np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


_LOADERS: dict[str, Callable[[Path], Any]] = {".safetensors": load_file, ".pt": _load_pt, ".npz": _load_npz}
