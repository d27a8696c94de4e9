"""Activations that the user supplies, without a model: arrays, files of arrays, or an iterable of chunks."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..storage.path_names import expand_path
from .array_files import StoredArray, as_tensor, fingerprint
from .buffer import PLACES, Batch

CHUNK = 4096  # tokens per read
HELD_OUT = 20  # one row in this many is held out, at the end of the array
SAMPLED = 64  # rows that go into the fingerprint of arrays in memory
HOOK = "x"  # name of the only hook
_TOKEN_FIELDS = ("pos", "token", "document")
_FIELDS = ("x", *_TOKEN_FIELDS)


class ArraySource:
    """An `ActivationSource` over the user's own activations, all at one hook named `x`.

    `x` is one of:

    - a floating-point tensor, numpy array, memory map or StoredArray, [M, D], or [R, T, D] for R rows at positions 0 to
      T - 1. Chunks of rows are read in an order set by `seed` and the epoch. The last twentieth of rows is held out.
    - a dict of such an array `x` and integer arrays `pos`, `token` and `document`, [M] or [R, T].
    - an iterable of chunks: arrays, (x, pos) or dicts. They are read in order, again if possible; none is held out.

    Without positions every activation has position 0. `positions` sets the number of positions where the first chunk
    does not show it. Raises UserError for non-finite values, naming the row, and for a wrong shape, width or dtype.
    """

    label = "activations"
    modelless = "activations, which have no model"
    has_rows = False

    def __init__(
        self,
        x: Any,
        *,
        name: str = "the activations",
        seed: int = 0,
        repeat: bool = True,
        positions: int | None = None,
        identity: int | None = None,
    ):
        self.name, self.seed, self.repeat = name, seed, repeat
        self._identity, self._mapped_sizes = identity, dict[Path, int]()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.special = torch.zeros(0, dtype=torch.int64)
        self._arrays: dict[str, Any] = {}  # empty for an iterable of chunks
        self._chunks: Iterable[Any] = ()
        self._chunks_served = self._epoch = self._rows = self._tokens = 0
        self._first_row = 0  # row number of the next chunk of an iterable
        if _is_array(x) or isinstance(x, Mapping):
            first_chunk = self._arrays = dict(x) if isinstance(x, Mapping) else {"x": x}
            shape = self._checked_shape(first_chunk)
            self._open_arrays(shape)
        elif isinstance(x, Iterable) and not isinstance(x, str | bytes):
            self._chunks, self._is_one_pass = x, iter(x) is x
            self._restart()
            if self._next_chunk is None:
                raise UserError(f"activations: {name} is empty; it must give chunks of activations")
            first_chunk = _as_dict(self._next_chunk)
            shape = self._checked_shape(first_chunk)
        else:
            raise UserError(f"activations: a {type(x).__name__} is not allowed; give arrays or an iterable of them")
        self.has_positions = len(shape) == 3 or "pos" in first_chunk
        if positions is None:
            positions = shape[1] if len(shape) == 3 else 1
            if "pos" in first_chunk and (self._arrays or len(shape) == 2):
                positions = int(as_tensor(first_chunk["pos"][0 : shape[0]]).max()) + 1
        self.positions, self.widths = positions, {HOOK: shape[-1]}

    def _open_arrays(self, shape: tuple[int, ...]) -> None:
        self._row_count = shape[0]
        if self._row_count < 2:
            raise UserError(f"activations: {self.name} holds {self._row_count} rows; at least 2 are needed")
        self._held_out_rows = max(1, self._row_count // HELD_OUT)
        self._rows_per_chunk = max(1, CHUNK // math.prod(shape[1:-1]))
        self._order = self._permuted_chunks()
        for value in self._arrays.values():
            if isinstance(value, np.memmap) and value.filename is not None:
                self._mapped_sizes[Path(value.filename)] = Path(value.filename).stat().st_size
        if self._identity is None:
            self._identity = self._sample_fingerprint()

    def _restart(self) -> None:
        self._iterator = iter(self._chunks)
        self._next_chunk = next(self._iterator, None)

    @property
    def counts(self) -> dict[str, int]:
        return {"rows": self._rows, "tokens": self._tokens, "epoch": self._epoch}

    def next(self) -> Batch | None:
        batch = self._from_array() if self._arrays else self._from_chunks()
        if batch is not None:
            self._tokens += len(batch)
            batch = batch.each(lambda value: value.to(self.device, non_blocking=True))
        return batch

    def held_out(self) -> Iterator[Batch]:
        """The rows that training never sees, one chunk at a time; nothing for an iterable."""
        if self._arrays:
            for start in range(self._row_count - self._held_out_rows, self._row_count, self._rows_per_chunk):
                batch = self._as_batch(self._array_rows(start, start + self._rows_per_chunk), start)
                yield batch.each(lambda value: value.to(self.device))

    def state(self) -> dict[str, Tensor]:
        state = {"own": torch.tensor((self._chunks_served, self._epoch, self._rows, self._tokens, self._first_row))}
        return state if self._identity is None else state | {"identity": torch.tensor([self._identity])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Return to a saved state; an iterable is read up to it. Raises UserError if the activations have changed."""
        if self._identity is not None and int(state.get("identity", [self._identity])[0]) != self._identity:
            raise UserError(f"activations: {self.name} has changed; it is not what was read before the stop")
        self._chunks_served, self._epoch, self._rows, self._tokens, self._first_row = state["own"].tolist()
        if self._arrays:
            self._order = self._permuted_chunks()
            return
        if not self._is_one_pass:
            self._restart()
        for _ in range(self._chunks_served):
            if self._next_chunk is None:
                raise UserError(f"activations: {self.name} has changed; it has fewer chunks than {self._chunks_served}")
            self._next_chunk = next(self._iterator, None)

    def _from_array(self) -> Batch | None:
        if self._chunks_served == len(self._order):
            if not self.repeat:
                return None
            self._epoch, self._chunks_served = self._epoch + 1, 0
            self._order = self._permuted_chunks()
        start = self._order[self._chunks_served] * self._rows_per_chunk
        stop = min(start + self._rows_per_chunk, self._row_count - self._held_out_rows)
        self._chunks_served += 1
        self._rows += stop - start
        return self._as_batch(self._array_rows(start, stop), start)

    def _from_chunks(self) -> Batch | None:
        if self._next_chunk is None:
            if self._is_one_pass or not self.repeat:
                return None
            self._epoch, self._chunks_served, self._first_row = self._epoch + 1, 0, 0
            self._restart()
            if self._next_chunk is None:
                raise UserError(f"activations: {self.name} is empty when read again; it must be iterable repeatedly")
        chunk = _as_dict(self._next_chunk)
        row_count = self._checked_shape(chunk, self.widths[HOOK])[0]
        batch = self._as_batch(chunk, self._first_row)
        self._chunks_served += 1
        self._rows += row_count
        self._first_row += row_count
        self._next_chunk = next(self._iterator, None)
        return batch

    def _permuted_chunks(self) -> list[int]:
        count = -(-(self._row_count - self._held_out_rows) // self._rows_per_chunk)
        return np.random.default_rng((self.seed, self._epoch)).permutation(count).tolist()

    def _array_rows(self, start: int, stop: int) -> dict[str, Any]:
        """Rows of the arrays. Checks first that no mapped file was truncated, since reading it kills the process."""
        for path, size in self._mapped_sizes.items():
            try:
                length = path.stat().st_size
            except OSError:  # the map of a removed file stays readable
                continue
            if length < size:
                raise UserError(f"activations: {path} has been cut since it was mapped, from {size} to {length} bytes")
        return {name: value[start:stop] for name, value in self._arrays.items()}

    def _sample_fingerprint(self) -> int:
        texts = [str([(name, tuple(value.shape)) for name, value in self._arrays.items()])]
        for row in sorted({row * (self._row_count - 1) // (SAMPLED - 1) for row in range(SAMPLED)}):
            texts += [str(as_tensor(value).double().sum().item()) for value in self._array_rows(row, row + 1).values()]
        return fingerprint(text=" ".join(texts))

    def _as_batch(self, arrays: Mapping[str, Any], first_row: int) -> Batch:
        x = as_tensor(arrays["x"])
        x = x if x.dtype in (torch.bfloat16, torch.float16) else x.float()
        shape = x.shape[:-1]
        if not bool(x.sum(dtype=torch.float32).isfinite()):
            bad_rows = (~x.isfinite()).flatten(1).any(1).nonzero().flatten()
            if len(bad_rows):
                row = first_row + int(bad_rows[0])
                raise UserError(f"activations: row {row} of {self.name} holds NaN or infinite values")
        places = {name: torch.full(shape, -1, dtype=dtype) for name, dtype in PLACES.items()}
        row = torch.arange(first_row, first_row + shape[0])
        places["row"] = row[:, None].expand(shape) if len(shape) == 2 else row
        places["pos"] = torch.arange(shape[-1]).expand(shape) if len(shape) == 2 else torch.zeros(shape)
        places |= {name: as_tensor(arrays[name]) for name in _TOKEN_FIELDS if name in arrays}
        pos = places["pos"]
        bad_positions = pos[(pos < 0) | (pos >= self.positions)]
        if len(bad_positions):
            rule = f"it must be 0 to {self.positions - 1} (set the number of positions with `positions`)"
            raise self._not_allowed(f"position {int(bad_positions[0])}", rule)
        flat_places = {name: value.to(PLACES[name]).reshape(-1) for name, value in places.items()}
        return Batch({HOOK: x.reshape(-1, x.shape[-1])}, **flat_places)

    def _checked_shape(self, arrays: Mapping[str, Any], width: int | None = None) -> tuple[int, ...]:
        if "x" not in arrays:
            raise UserError(f"activations: {self.name} has {', '.join(map(str, arrays)) or 'nothing'}; it must have x")
        shape = tuple(int(n) for n in arrays["x"].shape)
        if len(shape) not in (2, 3):
            raise self._not_allowed(f"x {list(shape)}", "x must have shape [M, D] or [R, T, D]")
        if 0 in shape:
            raise self._not_allowed(f"x {list(shape)}", "it holds no activations")
        if "float" not in (dtype_name := _dtype_name(arrays["x"])):
            raise self._not_allowed(f"x {dtype_name}", "x must be floating point")
        for name in (name for name in _TOKEN_FIELDS if name in arrays):
            field_shape, dtype_name = tuple(int(n) for n in arrays[name].shape), _dtype_name(arrays[name])
            if field_shape != shape[:-1]:
                raise self._not_allowed(f"{name} {list(field_shape)}", f"x needs {list(shape[:-1])}")
            if "int" not in dtype_name:
                raise self._not_allowed(f"{name} {dtype_name}", "it must be integer")
        if width is not None and shape[-1] != width:
            raise self._not_allowed(f"width {shape[-1]} of a chunk", f"the first chunk has {width}")
        return shape

    def _not_allowed(self, value: str, rule: str) -> UserError:
        return UserError(f"activations: {value} of {self.name} is not allowed; {rule}")


def open_file(path: str, **options: Any) -> ArraySource:
    """Open activations in a .npy, .safetensors or .pt file: an array `x`, optionally with `pos`, `token`, `document`.

    Rows of .npy and .safetensors files are read when needed; a .pt file is loaded whole. Raises UserError for any other
    file, and for one that would have to be unpickled."""
    file = expand_path(path, "stream.activations")
    if not file.is_file():
        raise UserError(f"activations: {path} does not exist; give a .npy, .safetensors or .pt file")
    if not file.stat().st_size:
        raise UserError(f"activations: {path} is empty; it must hold activations")
    try:
        match file.suffix.lower():
            case ".npy":
                content: Any = StoredArray.of_npy(file, "activations")
            case ".safetensors":
                content = StoredArray.of_safetensors(file, "activations", _FIELDS)
            case ".pt":
                content = torch.load(file, map_location="cpu", weights_only=True)
            case _:
                raise UserError(f"activations: {path} is not allowed; it must end with .npy, .safetensors or .pt")
    except UserError:
        raise
    except Exception as error:  # torch's unpickler raises any kind of exception
        is_pickled = any(word in str(error) for word in ("ickle", "weights_only", "objects"))
        reason = "not an array, or an array of pickled objects" if is_pickled else " ".join(str(error).split())[:120]
        raise UserError(f"activations: {path} can't be read ({reason}); it must hold arrays") from None
    if isinstance(content, Mapping):
        content = {name: content[name] for name in _FIELDS if name in content}
    elif not _is_array(content):
        raise UserError(f"activations: {path} is not allowed; it holds a {type(content).__name__}, not a tensor")
    return ArraySource(content, name=path, identity=fingerprint(file), **options)


def _dtype_name(value: Any) -> str:
    """The name of a dtype, without its byte order."""
    return getattr(value.dtype, "name", str(value.dtype)).removeprefix("torch.")


def _is_array(x: Any) -> bool:
    return isinstance(x, Tensor | np.ndarray | StoredArray)


def _as_dict(chunk: Any) -> dict[str, Any]:
    if isinstance(chunk, Mapping):
        return dict(chunk)
    if isinstance(chunk, tuple | list) and len(chunk) == 2 and all(map(_is_array, chunk)):
        return {"x": chunk[0], "pos": chunk[1]}
    if not _is_array(chunk):
        raise UserError(f"activations: a {type(chunk).__name__} as chunk is not allowed; give x, (x, pos) or a dict")
    return {"x": chunk}
