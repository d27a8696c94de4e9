"""Files of tensors by name: .safetensors, .pt and .npz. Nothing is run that a file may hold besides tensors."""

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from .intermediate import State

INFLATION = 100  # times the size of its file, what the tensors in it may take; no weights can be packed as closely


class TrackedTensors(dict[str, Tensor]):
    """Tensors by name, which remembers the names that somebody looked at."""

    def __init__(self, tensors: State):
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def take(self, *names: str) -> Tensor | None:
        """The tensor that has one of these names, the first that there is."""
        return next((self[name] for name in names if name in self), None)

    def check_all_read(self, file: str) -> None:
        """Raise UserError for a tensor that nobody looked at: it is part of another function than ours."""
        if unread := sorted(self.keys() - self.read):
            names = ", ".join(unread[:8]) + (", ..." if len(unread) > 8 else "")
            raise UserError(f"{file} holds {names}, which can't be read")


def tensors_in(file: Path) -> TrackedTensors:
    """The tensors of a file, floating ones in float32.

    Raises UserError for one that is damaged, that holds more than tensors, or whose tensors would be far larger than it is.
    """
    try:
        tensors = _LOADERS[file.suffix](file)
    except UserError:
        raise
    except UnpicklingError:  # whose own words advise to load it in another way
        raise UserError(f"{file.name} is damaged, or holds more than tensors, and then it is not read") from None
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        MemoryError,
        KeyError,
        zipfile.BadZipFile,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file.name} is damaged, or holds more than tensors ({reason})") from None
    if isinstance(tensors, dict) and isinstance(
        tensors.get("sae"), dict
    ):  # as Llamascopium's .pt has them, with its version
        tensors = tensors["sae"]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{file.name} is not allowed; it must hold tensors by name")
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise UserError(f"{file.name} is not allowed; {name} is no plain tensor")
    _check_size(file, sum(value.numel() * value.element_size() for value in tensors.values()))
    return TrackedTensors(
        {str(name): value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    )


def save(tensors: State, file: Path) -> None:
    """Write tensors in the format that the file's name says."""
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    elif file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})  # pyright: ignore[reportArgumentType]


def _check_size(file: Path, size: int) -> None:
    if size > INFLATION * file.stat().st_size + 2**20:
        raise UserError(
            f"{file.name} is damaged; its tensors would take {size:,} bytes, and it has {file.stat().st_size:,}"
        )


def _load_pt(file: Path) -> Any:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as packed:
            _check_size(file, sum(entry.file_size for entry in packed.infolist()))
    return torch.load(file, map_location="cpu", weights_only=True)


def _load_npz(file: Path) -> State:
    with zipfile.ZipFile(file) as packed:
        entries = packed.infolist()
        _check_size(file, sum(entry.file_size for entry in entries))
        for entry in entries:  # before room is made for what an array's header says
            with packed.open(entry) as array:
                version = np.lib.format.read_magic(array)
                header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = header(array)
                size = math.prod(shape) * dtype.itemsize
                if size > entry.file_size:
                    raise UserError(
                        f"{file.name} is damaged; {entry.filename} has fewer than the {size:,} bytes of its shape"
                    )
    with np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


_LOADERS: dict[str, Callable[[Path], Any]] = {".safetensors": load_file, ".pt": _load_pt, ".npz": _load_npz}
