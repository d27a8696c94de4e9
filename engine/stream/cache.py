"""A disk cache: what a model gives for a text, written once, and read as often as wanted in any order.

DIR/
  cache.json                   format, settings of the stream, hooks and widths, and of every shard its size, its blocks
                               with their checksums, and the place in the text behind it
  shard_00000.safetensors ...  per hook acts.HOOK [M, D]; pos, token [M] int32; document, row [M] int64; kept [M] bool

Every token but padding is stored, whole rows only, and `kept` is false for the tokenizer's own tokens, as a `ModelSource`
gives them. A shard is read in blocks, runs of whole rows with a CRC-32 of each tensor's bytes, so that what is read is
checked and nothing else needs to be. Files are written beside their places and moved there, cache.json after the shard that
it names, so that a cache is whole at any moment.
"""

import json
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import Config, Count, StreamConfig
from ..errors import UserError
from ..storage.path_names import FileName, expand_path
from ..storage.sealed import read_json
from .buffer import PLACES, Batch

FORMAT = "temposae-cache/2"
EARLIER = "temposae-cache/1"  # the same, except that with `packing` a row could hold several documents
MANIFEST = "cache.json"
BLOCK = 4096  # tokens of a block, and as many more as its last row has
_OF_THE_TEXT = ("model", "data", "text_field", "split", "subset", "context", "bos")  # settings that a cache decides
_OF_THE_MODEL = ("attention", "compile")  # and those that it proposes
_PLACES = (*PLACES, "kept")
_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Shard(Config):
    """A file of `tokens` activations, `kept` of them of no special tokens, in `rows` rows. Block b ends before token
    `ends[b]` and has CRC-32 `crc32[tensor][b]`; `header` is that of what precedes the tensors. `place`: the text's state
    behind it."""

    file: FileName
    tokens: int
    kept: int
    rows: int
    bytes: int
    header: int
    ends: tuple[int, ...]
    crc32: dict[str, tuple[int, ...]]
    place: dict[str, tuple[int, ...]]


class Manifest(Config):
    """What cache.json holds. `tokens`: those kept so far, of `wanted`; `seed` is of the text."""

    format: str
    stream: StreamConfig
    seed: int
    hooks: dict[str, int]
    dtype: Literal["float32", "bfloat16"]
    positions: int
    special: tuple[int, ...]
    wanted: Count
    shard_mb: float
    tokens: int = 0
    complete: bool = False
    shards: tuple[Shard, ...] = ()

    def place(self, folder: str | Path, hook: str | None, layer: int | None = None, *, field: str = "hook") -> str:
        """The cached hook of this name, or at the residual stream after this layer; the first if neither is given.
        `field`: the setting of the stream that names the hook."""
        if hook is None and layer is None:
            return next(iter(self.hooks))
        name = hook or f"blocks.{layer}.hook_resid_post"
        if name not in self.hooks:
            setting = f"stream.{field}: {name}" if hook else f"layer: {layer}"
            raise UserError(f"{setting} is not allowed; the cache {folder} has {', '.join(self.hooks)}")
        return name

    def settle(self, config: StreamConfig, layer: int | None = None) -> StreamConfig:
        """`config`, whose `cache` this is, with what the cache decides. Raises UserError for what contradicts it."""
        update: dict[str, Any] = {}
        for name in (*_OF_THE_TEXT, *_OF_THE_MODEL):
            cached, requested = getattr(self.stream, name), getattr(config, name)
            if name not in config.model_fields_set:
                update[name] = cached
            elif name in _OF_THE_TEXT and requested != cached:
                raise UserError(
                    f"stream.{name}: {requested} is not allowed; the cache {config.cache} was made with {name} {cached}"
                )
        for name in ("target", "second"):
            if (hook := getattr(config, name)) is not None:
                update[name] = self.place(str(config.cache), hook, field=name)
        return config.model_copy(update=update | {"hook": self.place(str(config.cache), config.hook, layer)})


def read_manifest(folder: str | Path) -> Manifest:
    """The cache.json of a cache. Raises UserError for what is none, and for a damaged one."""
    path = expand_path(folder, "cache") / MANIFEST
    if not path.is_file():
        raise UserError(f"cache: {folder} holds no {MANIFEST}; give a folder that `temposae cache` made")
    content = read_json(path, "cache", "the cache must be made again")
    stream = content.get("stream")
    if content.get("format") == EARLIER and not (isinstance(stream, dict) and stream.get("packing")):
        content["format"] = FORMAT
    if content.get("format") != FORMAT:
        raise UserError(f"cache: {path} has format {str(content.get('format'))[:80]!r}; this version reads {FORMAT}")
    try:
        manifest = Manifest(**content)
    except UserError as error:
        raise UserError(f"cache: {path} is damaged ({error})") from None
    for number, shard in enumerate(manifest.shards):
        if shard.file != shard_name(number):  # a path elsewhere would be read
            raise UserError(f"cache: {path} is damaged (shard {number} is named {shard.file[:80]!r})")
    return manifest


class CacheSource:
    """The activations of a cache, a block of whole rows at a time, in an order of all its blocks that `seed` decides.

    Every epoch has an order of its own; after the first the cache begins again (`repeat`), or ends. `hooks`: those to read,
    all unless given. Of the files only the block that is wanted is read, and its checksums are compared; sizes are compared
    when the cache is opened. A `ActivationSource`; `counts` are rows, tokens and epoch.
    """

    label = "cache"

    def __init__(
        self,
        folder: str | Path,
        *,
        hooks: Sequence[str] = (),
        seed: int = 0,
        repeat: bool = True,
        device: str | torch.device | None = None,
    ):
        self.folder = expand_path(folder, "cache")
        self.manifest = read_manifest(folder)
        names = tuple(dict.fromkeys(self.manifest.place(folder, hook) for hook in hooks)) or tuple(self.manifest.hooks)
        self.widths = {name: self.manifest.hooks[name] for name in names}
        self.name, self.positions = f"the cache {folder}", self.manifest.positions
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.special = torch.tensor(self.manifest.special, dtype=torch.int64)
        self.seed, self.repeat = seed, repeat
        if not self.manifest.shards:
            raise UserError(f"cache: {folder} holds no activations yet; `temposae cache --resume` goes on with it")
        self._headers = [read_header(self.folder / shard.file, shard) for shard in self.manifest.shards]
        self._blocks = [(s, b) for s, shard in enumerate(self.manifest.shards) for b in range(len(shard.ends))]
        sums = json.dumps([shard.crc32 for shard in self.manifest.shards])
        self._identity = zlib.crc32(sums.encode())
        self._epoch = self._blocks_served = 0  # of the epoch's order, so many blocks are served
        self._rows = self._tokens = 0
        self._order = self._permuted_blocks()
        self._thread = ThreadPoolExecutor(1, "cache")
        self._block_ahead: tuple[tuple[int, int], Future[Batch]] | tuple[None, None] = (None, None)

    @property
    def counts(self) -> dict[str, int]:
        return {"rows": self._rows, "tokens": self._tokens, "epoch": self._epoch}

    def next(self) -> Batch | None:
        if self._blocks_served == len(self._order):
            if not self.repeat:
                return None
            self._epoch, self._blocks_served = self._epoch + 1, 0
            self._order = self._permuted_blocks()
        batch = self._read_ahead(self._blocks_served)
        self._blocks_served += 1
        self._rows += 1 + int(batch.row.diff().count_nonzero())
        self._tokens += len(batch)
        kept, batch.kept = batch.kept, None
        batch = batch.each(lambda value: value.to(self.device, non_blocking=True))
        batch.kept = kept
        return batch

    def state(self) -> dict[str, Tensor]:
        return {"cache": torch.tensor((self._identity, self._epoch, self._blocks_served, self._rows, self._tokens))}

    def load_state(self, state: dict[str, Tensor]) -> None:
        identity, self._epoch, self._blocks_served, self._rows, self._tokens = state["cache"].tolist()
        if identity != self._identity:
            raise UserError(f"stream.cache: {self.folder} is not the cache that the run was trained on; it has changed")
        self._order = self._permuted_blocks()

    def _permuted_blocks(self) -> list[int]:
        return np.random.default_rng((self.seed, self._epoch)).permutation(len(self._blocks)).tolist()

    def _read_ahead(self, index: int) -> Batch:
        """Block number `index` of the order; the one behind it is read by a thread meanwhile."""
        current, *following = (self._blocks[number] for number in self._order[index : index + 2])
        block_ahead, future = self._block_ahead
        batch = future.result() if future is not None and block_ahead == current else self._read(*current)
        self._block_ahead = (
            (following[0], self._thread.submit(self._read, *following[0])) if following else (None, None)
        )
        return batch

    def _read(self, number: int, block: int) -> Batch:
        """One block, on the CPU. Read and not mapped: a map of a file that is cut meanwhile kills the process."""
        shard, header = self.manifest.shards[number], self._headers[number]
        path = self.folder / shard.file
        start, end = shard.ends[block - 1] if block else 0, shard.ends[block]
        tensors: dict[str, Tensor] = {}
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                for name in (*(f"acts.{hook}" for hook in self.widths), *_PLACES):
                    offset, dtype, shape = header[name]
                    value = torch.empty(end - start, *shape, dtype=dtype, pin_memory=self.device.type == "cuda")
                    raw = as_bytes(value)
                    token_bytes = len(raw) // (end - start)
                    if (
                        not _fill(handle, raw, offset + start * token_bytes)
                        or zlib.crc32(raw) != shard.crc32[name][block]
                    ):
                        raise UserError(
                            f"cache: {path} is damaged in block {block} ({name}); it is not what was written there, "
                            "and the cache must be made again"
                        )
                    tensors[name] = value
            finally:
                os.close(handle)
        except OSError as error:
            raise UserError(f"cache: {path} can't be read ({error.strerror})") from None
        return Batch.from_tensors(tensors)


class _TensorPlace(NamedTuple):
    """Where a tensor begins in its file, its dtype, and its shape but for the first dimension."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path, shard: Shard) -> dict[str, _TensorPlace]:
    """Where the tensors of a shard lie, once it has the size and the header that it was written with."""
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            raise UserError(f"cache: {path} is damaged; it has {size} bytes of {shard.bytes}")
        with path.open("rb") as file:
            length = file.read(8)
            header = file.read(min(int.from_bytes(length, "little"), size))
    except FileNotFoundError:
        raise UserError(f"cache: {path} is missing; it must be there with {shard.bytes} bytes") from None
    except OSError as error:
        raise UserError(f"cache: {path} can't be read ({error.strerror})") from None
    if zlib.crc32(length + header) != shard.header:
        raise UserError(f"cache: {path} is damaged in its header; the cache must be made again")
    tensors_start = 8 + len(header)
    return {
        name: _TensorPlace(tensors_start + value["data_offsets"][0], _DTYPES[value["dtype"]], tuple(value["shape"][1:]))
        for name, value in json.loads(header).items()
    }


def _fill(handle: int, buffer: memoryview, offset: int) -> bool:
    """Fill `buffer` with a file's bytes from `offset` on; whether there were so many."""
    bytes_read = 0
    while bytes_read < len(buffer):
        count = os.preadv(handle, [buffer[bytes_read:]], offset + bytes_read)
        if not count:
            return False
        bytes_read += count
    return True


def shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def as_bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor [N, ...], in its own memory."""
    return value.view(torch.uint8).flatten().numpy().data
