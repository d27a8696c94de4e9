"""A person's own activations: arrays, files of them, or chunks one after the other. No language model is needed."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..config import StreamConfig
from ..errors import UserError
from ..storage.path_names import expand_path
from ..unit_decoder import Dictionary, unit_decoder
from .array_files import StoredArray, as_tensor, fingerprint
from .buffer import PLACES, Batch
from .norm_filter import has_variance

CHUNK = 4096  # tokens that are read at once
HELD_OUT = 20  # of so many rows of an array, the last one is held out
SAMPLED = 64  # rows of arrays in hand, to tell whether they are the same
HOOK = "x"  # what the place of the activations is called
_TOKEN_FIELDS = ("pos", "token", "document")


class _ArrayLike(Protocol):
    """A tensor, an array, a memory map or a slice of a file: what can be cut along its first dimension."""

    @property
    def shape(self) -> Any: ...
    def __getitem__(self, index: slice) -> Any: ...


class ArraySource:
    """Activations in hand as a `ActivationSource`, all at the one hook `x`.

    `x` is [M, D], or [R, T, D] for R rows with positions 0 to T - 1: a tensor, an array or a memory map of floats, of which
    chunks of rows are read in an order that `seed` and the epoch decide, and of which the last twentieth of the rows is held
    out. A dict adds `pos`, `token`, `document`, of shape [M] or [R, T]. Or an iterable of such chunks, of pairs (x, pos) or
    dicts, taken in their order, again and again where it can be iterated over again; nothing is held out. Without positions
    all have position 0. `positions` is how many there can be, where only later chunks would say.

    Raises UserError for what is not finite, by its row, and for a shape, a width or a dtype that doesn't fit.
    """

    label = "activations"

    def __init__(
        self,
        x: Any,
        *,
        name: str = "the activations",
        seed: int = 0,
        repeat: bool = True,
        positions: int | None = None,
        device: str | torch.device | None = None,
        identity: int | None = None,
    ):
        self.name, self.seed, self.repeat = name, seed, repeat
        self._identity, self._mapped_sizes = identity, dict[Path, int]()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.special = torch.zeros(0, dtype=torch.int64)
        self._arrays: dict[str, _ArrayLike] | None = None
        self._chunks: Iterable[Any] = ()
        self._chunks_served = self._epoch = self._rows = self._tokens = 0
        self._first_row = 0  # of the next chunk of an iterable
        if _is_array(x) or isinstance(x, Mapping):
            self._arrays = dict(x) if isinstance(x, Mapping) else {"x": x}
            shape = self._checked_shape(self._arrays)
            self._row_count, self._row_shape = shape[0], shape[1:-1]
            if shape[0] < 2:
                raise UserError(f"activations: {name} holds {shape[0]} rows; at least 2 are needed")
            self._held_out_rows = max(1, shape[0] // HELD_OUT)
            self._rows_per_chunk = max(1, CHUNK // math.prod(self._row_shape))
            self.has_positions = bool(self._row_shape) or "pos" in self._arrays
            last_position = self._last_position() if positions is None else positions - 1
            self._order = self._permuted_chunks()
            for value in self._arrays.values():
                if isinstance(value, np.memmap) and value.filename is not None:
                    self._mapped_sizes[Path(value.filename)] = Path(value.filename).stat().st_size
            if identity is None:
                self._identity = self._sample_fingerprint()
        elif isinstance(x, Iterable) and not isinstance(x, str | bytes):
            self._chunks = x
            self._is_one_pass = iter(x) is x
            self._iterator = iter(x)
            self._next_chunk = next(self._iterator, None)
            if self._next_chunk is None:
                raise UserError(f"activations: {name} is empty; it must give chunks of activations")
            chunk = _as_dict(self._next_chunk)
            shape = self._checked_shape(chunk)
            self.has_positions = len(shape) == 3 or "pos" in chunk
            last_position = (
                shape[1] - 1 if len(shape) == 3 else int(torch.as_tensor(chunk["pos"]).max()) if "pos" in chunk else 0
            )
            last_position = last_position if positions is None else positions - 1
        else:
            raise UserError(
                f"activations: a {type(x).__name__} is not allowed; give a tensor, an array, or an iterable of them"
            )
        self.widths = {HOOK: int(shape[-1])}
        self.positions = last_position + 1

    @property
    def counts(self) -> dict[str, int]:
        return {"rows": self._rows, "tokens": self._tokens, "epoch": self._epoch}

    def next(self) -> Batch | None:
        batch = self._from_array() if self._arrays is not None else self._from_chunks()
        if batch is not None:
            self._tokens += len(batch)
            batch = batch.each(lambda value: value.to(self.device, non_blocking=True))
        return batch

    def held_out(self) -> Iterator[Batch]:
        """The rows that training never sees, a chunk at a time; none of an iterable."""
        if self._arrays is not None:
            for start in range(self._row_count - self._held_out_rows, self._row_count, self._rows_per_chunk):
                batch = self._rows_as_batch(start, min(start + self._rows_per_chunk, self._row_count))
                yield batch.each(lambda value: value.to(self.device))

    def state(self) -> dict[str, Tensor]:
        state = {"own": torch.tensor((self._chunks_served, self._epoch, self._rows, self._tokens, self._first_row))}
        return state if self._identity is None else state | {"identity": torch.tensor([self._identity])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go back to a place; chunks that were taken before it are taken again and passed over. Raises UserError where the
        activations have changed."""
        if self._identity is not None and int(state.get("identity", [self._identity])[0]) != self._identity:
            raise UserError(f"activations: {self.name} has changed; it is not what was read before the stop")
        self._chunks_served, self._epoch, self._rows, self._tokens, self._first_row = state["own"].tolist()
        if self._arrays is not None:
            self._order = self._permuted_chunks()
            return
        if not self._is_one_pass:
            self._iterator = iter(self._chunks)
            self._next_chunk = next(self._iterator, None)
        for _ in range(self._chunks_served):
            if self._next_chunk is None:
                raise UserError(
                    f"activations: {self.name} has changed; it gave {self._chunks_served} chunks before, and fewer now"
                )
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
        return self._rows_as_batch(start, stop)

    def _from_chunks(self) -> Batch | None:
        if self._next_chunk is None:
            if self._is_one_pass or not self.repeat:
                return None
            self._epoch, self._chunks_served, self._first_row = self._epoch + 1, 0, 0
            self._iterator = iter(self._chunks)
            self._next_chunk = next(self._iterator, None)
            if self._next_chunk is None:
                raise UserError(f"activations: {self.name} gives nothing the second time; make it iterable again")
        chunk = _as_dict(self._next_chunk)
        shape = self._checked_shape(chunk, self.widths[HOOK])
        batch = self._as_batch(chunk, self._first_row)
        self._chunks_served += 1
        self._rows += shape[0]
        self._first_row += shape[0]
        self._next_chunk = next(self._iterator, None)
        return batch

    def _permuted_chunks(self) -> list[int]:
        count = -(-(self._row_count - self._held_out_rows) // self._rows_per_chunk)
        return np.random.default_rng((self.seed, self._epoch)).permutation(count).tolist()

    def _rows_as_batch(self, start: int, stop: int) -> Batch:
        return self._as_batch(self._array_rows(start, stop), start)

    def _array_rows(self, start: int, stop: int) -> dict[str, Any]:
        """Rows of the arrays. A map of a file that has been cut would kill the process, and is not looked into."""
        assert self._arrays is not None
        for path, size in self._mapped_sizes.items():
            try:
                current_size = path.stat().st_size
            except OSError:  # a map of a file that has been removed is whole
                continue
            if current_size < size:
                raise UserError(
                    f"activations: {path} has been cut since it was mapped; it has {current_size} bytes of {size}"
                )
        return {name: value[start:stop] for name, value in self._arrays.items()}

    def _sample_fingerprint(self) -> int:
        """A number that tells arrays apart, by rows spread over them."""
        assert self._arrays is not None
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
                raise UserError(
                    f"activations: row {row} of {self.name} holds NaN or infinite values; all must be finite"
                )
        places = {name: torch.full(shape, -1, dtype=dtype) for name, dtype in PLACES.items()}
        row = torch.arange(first_row, first_row + shape[0])
        places["row"] = row[:, None].expand(shape) if len(shape) == 2 else row
        places["pos"] = torch.arange(shape[-1]).expand(shape) if len(shape) == 2 else torch.zeros(shape)
        for name in _TOKEN_FIELDS:
            if name in arrays:
                places[name] = as_tensor(arrays[name])
        pos = places["pos"]
        if pos.numel() and not (int(pos.min()) >= 0 and int(pos.max()) < self.positions):
            bad_position = int(pos[(pos < 0) | (pos >= self.positions)][0])
            raise UserError(
                f"activations: position {bad_position} in {self.name} is not allowed; it must be 0 to {self.positions - 1} "
                "(`positions` of Own says how many there are)"
            )
        flat_places = {name: value.to(PLACES[name]).reshape(-1) for name, value in places.items()}
        return Batch({HOOK: x.reshape(-1, x.shape[-1])}, **flat_places)

    def _checked_shape(self, arrays: Mapping[str, Any], width: int | None = None) -> tuple[int, ...]:
        """The shape of x, once all shapes and dtypes are right."""
        if "x" not in arrays:
            raise UserError(f"activations: {self.name} has {', '.join(map(str, arrays)) or 'nothing'}; it must have x")
        shapes = {name: tuple(int(n) for n in arrays[name].shape) for name in ("x", *_TOKEN_FIELDS) if name in arrays}
        shape = shapes["x"]
        if len(shape) not in (2, 3):
            raise UserError(
                f"activations: {list(shape)} of {self.name} is not allowed; x must have shape [M, D] or [R, T, D]"
            )
        if 0 in shape:
            raise UserError(f"activations: {list(shape)} of {self.name} is not allowed; it holds no activations")
        dtype_name = _dtype_name(arrays["x"])
        if "float" not in dtype_name:
            raise UserError(f"activations: {dtype_name} of {self.name} is not allowed; x must be floating point")
        for name in _TOKEN_FIELDS:
            if name in shapes and shapes[name] != shape[:-1]:
                raise UserError(
                    f"activations: {name} of {self.name} has shape {list(shapes[name])}; x needs {list(shape[:-1])}"
                )
            if name in shapes and "int" not in (dtype_name := _dtype_name(arrays[name])):
                raise UserError(
                    f"activations: {name} of {self.name} is {dtype_name}, which is not allowed; it must be integer"
                )
        if width is not None and shape[-1] != width:
            raise UserError(
                f"activations: a chunk of {self.name} has width {shape[-1]}, which is not allowed; the first has {width}"
            )
        return shape

    def _last_position(self) -> int:
        assert self._arrays is not None
        if "pos" in self._arrays:
            return int(as_tensor(self._arrays["pos"][0 : self._row_count]).max())
        return self._row_shape[0] - 1 if self._row_shape else 0


def open_file(path: str, **options: Any) -> ArraySource:
    """The activations in a .npy file, a .safetensors file (`x`, optional `pos`, `token`, `document`) or a .pt file (a tensor
    or a dict of those names). Rows are read when they are needed; those of a .pt file at once. Raises UserError for what is
    none of them, or would have to be unpickled."""
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
                content = StoredArray.of_safetensors(file, "activations", ("x", *_TOKEN_FIELDS))
            case ".pt":
                content = torch.load(file, map_location="cpu", weights_only=True)
            case suffix:
                raise UserError(
                    f"activations: {path} is not allowed; it must end with .npy, .safetensors or .pt, not {suffix}"
                )
    except UserError:
        raise
    except Exception as error:  # torch's unpickler raises whatever it stumbles on
        is_pickled = any(word in str(error) for word in ("ickle", "weights_only", "objects"))
        reason = "it is no array, or one of pickled objects" if is_pickled else None
        raise UserError(
            f"activations: {path} can't be read ({reason or ' '.join(str(error).split())[:120]}); it must hold arrays"
        ) from None
    if isinstance(content, Mapping):
        content = {name: content[name] for name in ("x", *_TOKEN_FIELDS) if name in content}
    elif not _is_array(content):
        raise UserError(
            f"activations: {path} holds a {type(content).__name__}, which is not allowed; it must be a tensor"
        )
    return ArraySource(content, name=path, identity=fingerprint(file), **options)


def settle(config: StreamConfig, source: ArraySource) -> StreamConfig:
    """`config` over a person's own activations, which have no model. Raises UserError for settings that need one."""
    for name, default in (
        ("model", "none"),
        ("hook", HOOK),
        ("data", None),
        ("split", None),
        ("subset", None),
        ("cache", None),
    ):
        value = getattr(config, name)
        if name in config.model_fields_set and value not in (default, None):
            raise UserError(
                f"stream.{name}: {value} is not allowed with activations, which have no model; leave it out"
            )
    if config.mode == "sequences":
        raise UserError("stream.mode: sequences is not allowed with activations; it must be tokens or grouped")
    update = {"model": "none", "hook": HOOK, "context": max(2, source.positions)}
    return config.model_copy(update=update)


@torch.no_grad()
def held_out_scores(sae: Dictionary, batches: Iterable[Batch]) -> dict[str, Any] | None:
    """`explained_variance`, `fvu`, `l0` and `dead_fraction` of a dictionary on batches of held-out activations, which have
    `tokens` tokens; None where there are none. FVU = sum |x - x_hat|^2 / sum |x - mu|^2, mu the mean of the same tokens.
    Where these don't vary, both are None, and `warnings` says so."""
    sae = unit_decoder(sae)
    error = squares = l0 = 0.0
    x_sum, tokens = torch.zeros((), dtype=torch.float64), 0
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
    for batch in batches:
        sae, fired = sae.to(batch.x.device), fired.to(batch.x.device)
        x = batch.x.float()
        code = sae.encode_sparse(x, batch.pos)
        error += float((x - sae.decode(code)).double().square().sum())
        squares += float(x.double().square().sum())
        x_sum = x_sum.to(x.device) + x.double().sum(0)
        l0 += float(code.l0().double().sum())
        fired[code.indices[code.live(code.values) > 0].long()] = True
        tokens += len(x)
    if not tokens:
        return None
    scores: dict[str, Any] = {"l0": l0 / tokens, "dead_fraction": float((~fired).double().mean()), "tokens": tokens}
    spread = squares - float(x_sum.square().sum()) / tokens
    if not has_variance(spread, squares):
        warning = f"the {tokens} held-out tokens don't vary; there is no variance to explain"
        return {"explained_variance": None, "fvu": None, **scores, "warnings": [warning]}
    return {"explained_variance": 1 - error / spread, "fvu": error / spread, **scores}


def _dtype_name(value: Any) -> str:
    """The name of a dtype, without its byte order."""
    return getattr(value.dtype, "name", str(value.dtype)).removeprefix("torch.")


def _is_array(x: Any) -> bool:
    return isinstance(x, Tensor | np.ndarray | StoredArray)


def _as_dict(chunk: Any) -> dict[str, Any]:
    """A chunk of an iterable as a dict of arrays."""
    if isinstance(chunk, Mapping):
        return dict(chunk)
    if isinstance(chunk, tuple | list) and len(chunk) == 2 and all(map(_is_array, chunk)):
        return {"x": chunk[0], "pos": chunk[1]}
    if not _is_array(chunk):
        raise UserError(
            f"activations: a chunk that is a {type(chunk).__name__} is not allowed; give x, (x, pos) or a dict"
        )
    return {"x": chunk}
