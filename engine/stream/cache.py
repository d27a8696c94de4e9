"""Read a disk cache: a model's activations on a text, written once and read any number of times in any order.

DIR/
  cache.json                   format, stream settings, hooks and widths; for each shard its size, blocks, checksums
                               and the state of the text after it
  shard_00000.safetensors ...  per hook acts.HOOK [M, D]; pos, token [M] int32; document, row [M] int64; kept [M] bool

The cache stores whole rows without padding. `kept` is false for the tokenizer's special tokens. A block is a run of
whole rows with a CRC-32 of each tensor, so that only the blocks that are read need to be checked. Each file is written
under a temporary name and renamed, cache.json after the shards that it lists, so a cache is always consistent.
"""

import json
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..config import Config, Count, StreamConfig
from ..errors import UserError
from ..storage.path_names import FileName, expand_path
from ..storage.sealed import read_json
from .array_files import StoredArray, safetensors_header
from .buffer import PLACES, Batch

FORMAT = "temposae-cache/2"
EARLIER = "temposae-cache/1"  # like FORMAT, except that with `packing` a row could hold several documents
MANIFEST = "cache.json"
BLOCK = 4096  # tokens of a block, not counting the rest of its last row
_FIXED_SETTINGS = ("model", "data", "text_field", "split", "subset", "context", "bos")  # those of the cache apply
_DEFAULT_SETTINGS = ("attention", "compile")  # those of the cache apply unless they are set


class Shard(Config):
    """A file with `tokens` tokens in `rows` rows; `kept` of the tokens are not special.

    Block b ends before token `ends[b]` and has the CRC-32 `crc32[tensor][b]`. `header` is the CRC-32 of the file's
    header, and `place` the state of the text after the shard."""

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
    """Contents of cache.json. `tokens` of the `wanted` kept tokens are written so far. `seed` is that of the text."""

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
        """The name of the cached hook with this name or of the residual stream after this layer; the first hook if
        neither is given. `field` is the stream setting that named the hook."""
        if hook is None and layer is None:
            return next(iter(self.hooks))
        name = hook or f"blocks.{layer}.hook_resid_post"
        if name not in self.hooks:
            setting = f"stream.{field}: {name}" if hook else f"layer: {layer}"
            raise UserError(f"{setting} is not allowed; the cache {folder} has {', '.join(self.hooks)}")
        return name

    def settle(self, config: StreamConfig, layer: int | None = None) -> StreamConfig:
        """`config` with the settings that its cache fixes. Raises UserError for a setting that contradicts it."""
        update: dict[str, Any] = {}
        for name in (*_FIXED_SETTINGS, *_DEFAULT_SETTINGS):
            cached, requested = getattr(self.stream, name), getattr(config, name)
            if name not in config.model_fields_set:
                update[name] = cached
            elif name in _FIXED_SETTINGS and requested != cached:
                reason = f"the cache {config.cache} was made with {name} {cached}"
                raise UserError(f"stream.{name}: {requested} is not allowed; {reason}")
        for name in ("target", "second"):
            if (hook := getattr(config, name)) is not None:
                update[name] = self.place(str(config.cache), hook, field=name)
        return config.model_copy(update=update | {"hook": self.place(str(config.cache), config.hook, layer)})


def read_manifest(folder: str | Path) -> Manifest:
    """Read the cache.json of a cache. Raises UserError for a folder that is not a cache, or a damaged one."""
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
        if shard.file != shard_name(number):  # it could name a file outside the cache
            raise UserError(f"cache: {path} is damaged (shard {number} is named {shard.file[:80]!r})")
    return manifest


class CacheSource:
    """An `ActivationSource` that reads a cache block by block, in an order set by `seed` and the epoch.

    After the last block the cache is read again (`repeat`) or ends. `hooks` are the ones to read, by default all. File
    sizes and headers are checked when the cache is opened, and the checksums of a block when it is read.
    """

    label = "cache"

    def __init__(self, folder: str | Path, *, hooks: Sequence[str] = (), seed: int = 0, repeat: bool = True):
        self.folder = expand_path(folder, "cache")
        self.manifest = read_manifest(folder)
        names = tuple(dict.fromkeys(self.manifest.place(folder, hook) for hook in hooks)) or tuple(self.manifest.hooks)
        self.widths = {name: self.manifest.hooks[name] for name in names}
        self.name, self.positions = f"the cache {folder}", self.manifest.positions
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.special = torch.tensor(self.manifest.special, dtype=torch.int64)
        self.seed, self.repeat = seed, repeat
        if not self.manifest.shards:
            raise UserError(f"cache: {folder} holds no activations yet; continue it with `temposae cache --resume`")
        self._arrays = [open_shard(self.folder / shard.file, shard) for shard in self.manifest.shards]
        self._blocks = [(s, b) for s, shard in enumerate(self.manifest.shards) for b in range(len(shard.ends))]
        self._identity = zlib.crc32(json.dumps([shard.crc32 for shard in self.manifest.shards]).encode())
        self._epoch = self._blocks_served = 0  # blocks served in this epoch
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
        return replace(batch.each(lambda value: value.to(self.device, non_blocking=True)), kept=batch.kept)

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
        """Read block number `index` of the order, and start reading the next one in a thread."""
        current, *following = (self._blocks[number] for number in self._order[index : index + 2])
        block_ahead, future = self._block_ahead
        batch = future.result() if future is not None and block_ahead == current else self._read(*current)
        self._block_ahead = (None, None)
        if following:
            self._block_ahead = following[0], self._thread.submit(self._read, *following[0])
        return batch

    def _read(self, number: int, block: int) -> Batch:
        shard = self.manifest.shards[number]
        span = slice(shard.ends[block - 1] if block else 0, shard.ends[block])
        tensors: dict[str, Tensor] = {}
        for name in (*(f"acts.{hook}" for hook in self.widths), *PLACES, "kept"):
            tensors[name] = self._arrays[number][name][span]
            if zlib.crc32(as_bytes(tensors[name])) != shard.crc32[name][block]:
                path = self.folder / shard.file
                raise UserError(f"cache: {path} is damaged in block {block} ({name}); the cache must be made again")
        batch = Batch.from_tensors(tensors)
        return batch.each(Tensor.pin_memory) if self.device.type == "cuda" else batch


def open_shard(path: Path, shard: Shard) -> dict[str, StoredArray]:
    """The tensors of a shard, after checking its size and header."""
    try:
        if (size := path.stat().st_size) != shard.bytes:
            raise UserError(f"cache: {path} is damaged; it has {size} bytes, not {shard.bytes}")
        if zlib.crc32(safetensors_header(path)) != shard.header:
            raise UserError(f"cache: {path} is damaged in its header; the cache must be made again")
        return StoredArray.of_safetensors(path, "cache")
    except FileNotFoundError:
        raise UserError(f"cache: {path} is missing; it should have {shard.bytes} bytes") from None
    except OSError as error:
        raise UserError(f"cache: {path} can't be read ({error.strerror})") from None


def shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def as_bytes(value: Tensor) -> memoryview:
    """The bytes of a CPU tensor [N, ...], without a copy."""
    return value.view(torch.uint8).flatten().numpy().data
