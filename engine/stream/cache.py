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
import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import Config, Count, StreamConfig
from ..errors import UserError
from ..process.progress import progress_bar
from ..storage.files import LOCK, UNFINISHED, whole_file
from ..storage.lock import owned
from ..storage.path_names import FileName, expand_path
from ..storage.sealed import read_json, sealed_json
from .buffer import PLACES, Batch
from .documents import check_data
from .model import LanguageModel
from .model_loading import with_absolute_paths
from .model_source import ModelSource, bounded, packs
from .token_rows import RowSource, open_text

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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


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
        if shard.file != _shard_name(number):  # a path elsewhere would be read
            raise UserError(f"cache: {path} is damaged (shard {number} is named {shard.file[:80]!r})")
    return manifest


def write_cache(
    folder: str | Path,
    config: StreamConfig,
    tokens: int,
    *,
    hooks: Sequence[str] = (),
    layers: Sequence[int] = (),
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    shard_mb: float = 256,
    resume: bool = False,
    model: LanguageModel | None = None,
    rows: RowSource | None = None,
) -> Manifest:
    """Run the model over the text, once, and write what passes the hooks until `tokens` kept tokens are there.

    It ends behind the forward pass that reaches that number, or where the text does. `hooks` or `layers` say what to
    read, else `config.hook`; a shard is closed by the forward pass that makes it `shard_mb` * 10^6 bytes. With `resume`,
    what was stopped goes on behind its last whole shard, and leaves the files that it would have left without the stop.

    Raises UserError for a folder that holds anything else, for other settings than those that it began with, and for a disk
    that refuses; what was written before stays valid.
    """
    folder = expand_path(folder, "cache")
    if tokens < 1:
        raise UserError(f"tokens: {tokens} is not allowed; it must be at least 1")
    if not (math.isfinite(shard_mb) and shard_mb > 0):
        raise UserError(f"shard_mb: {shard_mb} is not allowed; it must be greater than 0")
    with owned(folder):
        return _write_cache(folder, config, tokens, list(hooks), layers, seed, dtype, shard_mb, resume, model, rows)


def _write_cache(
    folder: Path, config: StreamConfig, tokens: int, hooks: list[str], layers: Sequence[int], seed: int,
    dtype: Literal["float32", "bfloat16"], shard_mb: float, resume: bool, model: LanguageModel | None,
    rows: RowSource | None,
) -> Manifest:  # fmt: skip
    earlier = _resumed_manifest(folder, resume)
    if rows is None and config.data is not None:
        check_data(config.data)
    hook_names = hooks or ([config.hook] if config.hook is not None and not layers else [])
    if model is None:
        model = LanguageModel(
            config.model, hooks=hook_names, layers=layers, attention=config.attention, compile=config.compile
        )
    elif hook_names or layers:
        model.use(hooks=hook_names, layers=layers)
    if config.context > model.context:
        raise UserError(f"stream.context: {config.context} is not allowed; {config.model} has at most {model.context}")
    text = rows or open_text(
        config.data, config.model, model.tokenizer, config.context,
        seed=seed, bos=config.bos, text_field=config.text_field, split=config.split, subset=config.subset, repeat=False,
        vocabulary=model.vocabulary,
    )  # fmt: skip
    packing = packs(config, text)
    config = bounded(config, model)
    source = ModelSource(model, text, config.context, config.rows_per_forward, packing=packing)
    update = {"hook": model.hook, "repeat": False, "cache": None, "packing": packing}
    stream = with_absolute_paths(config.model_copy(update=update))
    manifest = Manifest(
        format=FORMAT, stream=stream, seed=seed, hooks=model.widths, dtype=dtype, positions=config.context,
        special=tuple(source.special.tolist()), wanted=tokens, shard_mb=shard_mb,
    )  # fmt: skip
    if earlier is not None:
        _check_same_settings(folder, earlier, manifest)
        manifest = earlier
        if manifest.shards:
            source.load_state({key: torch.tensor(value) for key, value in manifest.shards[-1].place.items()})
    else:
        _write_manifest(folder, manifest)
    with progress_bar("caching", tokens, "tokens", manifest.tokens) as bar:
        while not manifest.complete:
            batches: list[dict[str, Tensor]] = []
            shard_bytes, kept_tokens = 0, manifest.tokens
            while shard_bytes < shard_mb * 1e6 and kept_tokens < tokens and (batch := source.next()) is not None:
                batches.append(_as_stored(batch, getattr(torch, dtype)))
                shard_bytes += sum(value.nbytes for value in batches[-1].values())
                fresh_tokens = int(batches[-1]["kept"].sum())
                kept_tokens += fresh_tokens
                bar.advance(fresh_tokens)
            if batches:
                shard = _write_shard(folder, len(manifest.shards), batches, source.state())
                manifest = manifest.model_copy(update={"shards": (*manifest.shards, shard), "tokens": kept_tokens})
            if not batches or kept_tokens >= tokens:
                manifest = manifest.model_copy(update={"complete": True})
            _write_manifest(folder, manifest)
        if manifest.tokens < tokens:
            bar.note(f"data: {text.name} ended after {manifest.tokens:,} of {tokens:,} tokens")
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
        self._headers = [_header(self.folder / shard.file, shard) for shard in self.manifest.shards]
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
                    raw = _bytes(value)
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


def _header(path: Path, shard: Shard) -> dict[str, _TensorPlace]:
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


def _resumed_manifest(folder: Path, resume: bool) -> Manifest | None:
    """The cache to go on with, if any, cleared of what a kill left half done. Refuses a folder that holds anything else."""
    try:
        names = sorted(set(os.listdir(folder)) - {LOCK})
    except OSError as error:
        raise UserError(f"out: {folder} can't be written ({error.strerror}); give a folder to make") from None
    if names and not resume:
        hint = "--resume goes on with it" if MANIFEST in names else "give a new folder"
        raise UserError(f"out: {folder} exists and is not empty; {hint}")
    manifest = read_manifest(folder) if MANIFEST in names else None
    shards = manifest.shards if manifest is not None else ()
    for shard in shards:
        _header(folder / shard.file, shard)
    # the next shard may be there without being in cache.json yet
    half_done = [name for name in names if name.startswith(UNFINISHED) or name == _shard_name(len(shards))]
    known_names = {MANIFEST, *(shard.file for shard in shards), *half_done}
    if foreign := [name for name in names if name not in known_names]:
        raise UserError(f"out: {folder} holds {foreign[0]}, which is no part of a cache; give a new folder")
    for name in half_done:
        (folder / name).unlink()
    return manifest


def _check_same_settings(folder: Path, earlier: Manifest, requested: Manifest) -> None:
    """Refuse to go on with other settings than a cache began with, by the first that differs."""
    for name in ("seed", "hooks", "dtype", "shard_mb", "positions", "wanted", "special"):
        earlier_value, requested_value = getattr(earlier, name), getattr(requested, name)
        if earlier_value != requested_value or (name == "hooks" and list(earlier_value) != list(requested_value)):
            label = "tokens" if name == "wanted" else name
            earlier_value, requested_value = (
                ", ".join(value) if isinstance(value, Mapping) else value for value in (earlier_value, requested_value)
            )
            raise UserError(f"resume: {label} {requested_value} is not allowed; {folder} began with {earlier_value}")
    for name, earlier_value in with_absolute_paths(earlier.stream):  # of an earlier version
        requested_value = getattr(requested.stream, name)
        if earlier_value != requested_value:
            raise UserError(
                f"resume: stream.{name} {requested_value} is not allowed; {folder} began with {earlier_value}"
            )


def _as_stored(batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch's tensors by name, on the CPU, activations in the cache's dtype."""
    return {
        name: (value.to(dtype) if name.startswith("acts.") else value).cpu().contiguous()
        for name, value in batch.tensors().items()
    }


def _write_shard(folder: Path, number: int, batches: list[dict[str, Tensor]], place: dict[str, Tensor]) -> Shard:
    """Write a shard of these batches, which it takes apart as it goes, so that no second copy is held."""
    file = _shard_name(number)
    row, kept = (torch.cat([batch[name] for batch in batches]) for name in ("row", "kept"))
    ends = _block_ends(row)
    header: dict[str, Any] = {}
    offset = 0
    # the widest elements first, so that each is aligned: what safetensors does, too
    for name in sorted(batches[0], key=lambda name: (-batches[0][name].itemsize, name)):
        first_tensor = batches[0][name]
        size = sum(batch[name].nbytes for batch in batches)
        shape = [len(row), *first_tensor.shape[1:]]
        header[name] = {"dtype": _NAMES[first_tensor.dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    crc32: dict[str, tuple[int, ...]] = {}

    def chunks():
        yield head
        for name in header:
            raw = _bytes(torch.cat([batch.pop(name) for batch in batches]))
            token_bytes = len(raw) // len(row)
            crc32[name] = tuple(
                zlib.crc32(raw[start * token_bytes : end * token_bytes])
                for start, end in zip((0, *ends), ends, strict=False)
            )
            yield raw

    size = _write(folder, file, chunks())
    return Shard(
        file=file, tokens=len(row), kept=int(kept.sum()), rows=1 + int(row.diff().count_nonzero()), bytes=size,
        header=zlib.crc32(head), ends=ends, crc32=crc32,
        place={key: tuple(value.tolist()) for key, value in place.items()},
    )  # fmt: skip


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    content = manifest.model_dump(mode="json")
    shards = ",".join("\n  " + json.dumps(shard, separators=(",", ":")) for shard in content.pop("shards"))
    text = json.dumps(content, indent=1).removesuffix("\n}") + f',\n "shards": [{shards}\n ]\n}}\n'
    _write(folder, MANIFEST, [sealed_json(text).encode()])


def _write(folder: Path, file: str, chunks: Any) -> int:
    """Write a file beside its place and move it there once it is on the disk; gives its size."""
    path = folder / file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary, temporary.open("wb") as out:
            for chunk in chunks:
                out.write(chunk)
            size = out.tell()
    except OSError as error:
        raise UserError(
            f"out: {path} can't be written ({error.strerror}); what was written before is whole, and --resume goes on "
            "from there"
        ) from None
    return size


def _block_ends(row: Tensor) -> tuple[int, ...]:
    """Where the blocks of these rows [M] end: each at the end of a row, with `BLOCK` tokens or more."""
    row_ends = [*(row.diff().nonzero().flatten() + 1).tolist(), len(row)]
    ends, start = [], 0
    for row_end in row_ends:
        if row_end - start >= BLOCK:
            ends.append(row_end)
            start = row_end
    if ends and len(row) - start < BLOCK // 2:  # a small rest goes with the last one
        ends.pop()
    return (*ends, len(row)) if not ends or ends[-1] != len(row) else tuple(ends)


def _shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def _bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor [N, ...], in its own memory."""
    return value.view(torch.uint8).flatten().numpy().data


def _fill(handle: int, buffer: memoryview, offset: int) -> bool:
    """Fill `buffer` with a file's bytes from `offset` on; whether there were so many."""
    bytes_read = 0
    while bytes_read < len(buffer):
        count = os.preadv(handle, [buffer[bytes_read:]], offset + bytes_read)
        if not count:
            return False
        bytes_read += count
    return True
