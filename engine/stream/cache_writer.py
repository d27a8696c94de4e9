"""Write a disk cache (`cache` says what it is): shard by shard, continued after a stop."""

import json
import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import StreamConfig
from ..errors import UserError
from ..process.progress import progress_bar
from ..storage.files import LOCK, UNFINISHED, whole_file
from ..storage.lock import owned
from ..storage.path_names import expand_path
from ..storage.sealed import sealed_json
from .buffer import Batch
from .cache import (
    BLOCK,
    DTYPE_NAMES,
    FORMAT,
    MANIFEST,
    Manifest,
    Shard,
    as_bytes,
    read_header,
    read_manifest,
    shard_name,
)
from .documents import check_data
from .model import LanguageModel
from .model_loading import with_absolute_paths
from .model_source import ModelSource, bounded, packs
from .token_rows import RowSource, open_text


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
        read_header(folder / shard.file, shard)
    # the next shard may be there without being in cache.json yet
    half_done = [name for name in names if name.startswith(UNFINISHED) or name == shard_name(len(shards))]
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
    file = shard_name(number)
    row, kept = (torch.cat([batch[name] for batch in batches]) for name in ("row", "kept"))
    ends = _block_ends(row)
    header: dict[str, Any] = {}
    offset = 0
    # the widest elements first, so that each is aligned: what safetensors does, too
    for name in sorted(batches[0], key=lambda name: (-batches[0][name].itemsize, name)):
        first_tensor = batches[0][name]
        size = sum(batch[name].nbytes for batch in batches)
        shape = [len(row), *first_tensor.shape[1:]]
        header[name] = {
            "dtype": DTYPE_NAMES[first_tensor.dtype],
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    crc32: dict[str, tuple[int, ...]] = {}

    def chunks():
        yield head
        for name in header:
            raw = as_bytes(torch.cat([batch.pop(name) for batch in batches]))
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
