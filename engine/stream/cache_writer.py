"""Write a disk cache (see `cache`) shard by shard, and resume after a stop."""

import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..config import StreamConfig
from ..errors import UserError
from ..process.progress import ProgressBar, progress_bar
from ..storage.files import LOCK, UNFINISHED, whole_file
from ..storage.lock import owned
from ..storage.path_names import expand_path
from ..storage.sealed import sealed_json
from .array_files import safetensors_header
from .cache import BLOCK, FORMAT, MANIFEST, Manifest, Shard, as_bytes, open_shard, read_manifest, shard_name
from .documents import check_data
from .model import LanguageModel
from .model_loading import with_absolute_paths
from .model_source import ModelSource, open_source
from .token_rows import RowSource, open_text


def write_cache(
    folder: str | Path,
    config: StreamConfig,
    tokens: int,
    *,
    hooks: Sequence[str | int] = (),
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    shard_mb: float = 256,
    resume: bool = False,
    model: LanguageModel | None = None,
    rows: RowSource | None = None,
) -> Manifest:
    """Run the model over the text once and write its activations until `tokens` kept tokens are stored.

    Writing ends after the forward pass that reaches that number, or at the end of the text. `hooks` are the names of
    hooks, or numbers of layers for the residual stream after them; by default `config.hook`. A shard ends with the
    forward pass that fills `shard_mb` * 10^6 bytes. `resume` continues after the last complete shard and produces the
    same files as an uninterrupted run.

    Raises UserError for a folder with other files in it, for settings that differ from those it was begun with, and for
    a failed write. Shards that are already written stay valid.
    """
    folder = expand_path(folder, "cache")
    if tokens < 1:
        raise UserError(f"tokens: {tokens} is not allowed; it must be at least 1")
    if not (math.isfinite(shard_mb) and shard_mb > 0):
        raise UserError(f"shard_mb: {shard_mb} is not allowed; it must be greater than 0")
    with owned(folder):
        earlier = _resumed_manifest(folder, resume)
        source, stream = _model_source(config, hooks, seed, model, rows)
        manifest = Manifest(
            format=FORMAT, stream=stream, seed=seed, hooks=source.widths, dtype=dtype, positions=config.context,
            special=tuple(source.special.tolist()), wanted=tokens, shard_mb=shard_mb,
        )  # fmt: skip
        if earlier is None:
            _write_manifest(folder, manifest)
        else:
            requested = _fixed_settings(manifest)
            for name, value in _fixed_settings(earlier).items():
                if requested[name] != value:
                    raise UserError(f"resume: {name} {requested[name]} is not allowed; {folder} began with {value}")
            manifest = earlier
            if manifest.shards:
                source.load_state({key: torch.tensor(value) for key, value in manifest.shards[-1].place.items()})
        with progress_bar("caching", tokens, "tokens", manifest.tokens) as bar:
            while not manifest.complete:
                manifest = _add_shard(folder, manifest, source, bar)
            if manifest.tokens < tokens:
                bar.note(f"data: {source.name} ended after {manifest.tokens:,} of {tokens:,} tokens")
    return manifest


def _model_source(
    config: StreamConfig, hooks: Sequence[str | int], seed: int, model: LanguageModel | None, rows: RowSource | None
) -> tuple[ModelSource, StreamConfig]:
    if rows is None and config.data is not None:
        check_data(config.data)
    config = config.model_copy(update={"repeat": False, "cache": None})
    if config.hook is not None and not hooks:
        hooks = [config.hook]
    layers = [hook for hook in hooks if isinstance(hook, int)]
    names = [hook for hook in hooks if isinstance(hook, str)]
    if model is None:
        model = LanguageModel(
            config.model, hooks=names, layers=layers, attention=config.attention, compile=config.compile
        )
    elif hooks:
        model.use(hooks=names, layers=layers)
    text = rows or open_text(config, model.tokenizer, seed=seed, vocabulary=model.vocabulary)
    source, config = open_source(config, model, text)
    return source, with_absolute_paths(config)


def _add_shard(folder: Path, manifest: Manifest, source: ModelSource, bar: ProgressBar) -> Manifest:
    batches: list[dict[str, Tensor]] = []
    shard_bytes, kept_tokens, dtype = 0, manifest.tokens, getattr(torch, manifest.dtype)
    while shard_bytes < manifest.shard_mb * 1e6 and kept_tokens < manifest.wanted:
        if (batch := source.next()) is None:
            break
        batch.acts = {hook: x.to(dtype) for hook, x in batch.acts.items()}
        batches.append({name: value.cpu().contiguous() for name, value in batch.tensors().items()})
        shard_bytes += sum(value.nbytes for value in batches[-1].values())
        fresh_tokens = int(batches[-1]["kept"].sum())
        kept_tokens += fresh_tokens
        bar.advance(fresh_tokens)
    update: dict[str, Any] = {"complete": not batches or kept_tokens >= manifest.wanted}
    if batches:
        shard = _write_shard(folder, len(manifest.shards), batches, source.state())
        update |= {"shards": (*manifest.shards, shard), "tokens": kept_tokens}
    manifest = manifest.model_copy(update=update)
    _write_manifest(folder, manifest)
    return manifest


def _resumed_manifest(folder: Path, resume: bool) -> Manifest | None:
    """The manifest of the cache to resume, if there is one, after removing unfinished files of a killed process.

    Raises UserError for a folder with any other file in it."""
    try:
        names = sorted(set(os.listdir(folder)) - {LOCK})
    except OSError as error:
        raise UserError(f"out: {folder} can't be written ({error.strerror}); give a new folder") from None
    if names and not resume:
        hint = "--resume goes on with it" if MANIFEST in names else "give a new folder"
        raise UserError(f"out: {folder} exists and is not empty; {hint}")
    manifest = read_manifest(folder) if MANIFEST in names else None
    shards = manifest.shards if manifest is not None else ()
    for shard in shards:
        open_shard(folder / shard.file, shard)
    # the next shard may have been written before cache.json listed it
    unfinished = [name for name in names if name.startswith(UNFINISHED) or name == shard_name(len(shards))]
    known_names = {MANIFEST, *(shard.file for shard in shards), *unfinished}
    if foreign := [name for name in names if name not in known_names]:
        raise UserError(f"out: {folder} holds {foreign[0]}, which is no part of a cache; give a new folder")
    for name in unfinished:
        (folder / name).unlink()
    return manifest


def _fixed_settings(manifest: Manifest) -> dict[str, Any]:
    """The settings that a resumed cache must keep, by the names that messages use."""
    settings = {"seed": manifest.seed, "hooks": ", ".join(manifest.hooks), "widths": list(manifest.hooks.values())}
    settings |= {name: getattr(manifest, name) for name in ("dtype", "shard_mb", "positions")}
    settings |= {"tokens": manifest.wanted, "special": manifest.special}
    # earlier versions stored relative paths
    return settings | {f"stream.{name}": value for name, value in with_absolute_paths(manifest.stream)}


def _write_shard(folder: Path, number: int, batches: list[dict[str, Tensor]], place: dict[str, Tensor]) -> Shard:
    """Write batches as a shard. Removes tensors from `batches` once they are joined, so that memory holds them once."""
    tensors = {name: torch.cat([batch.pop(name) for batch in batches]) for name in list(batches[0])}
    path, row = folder / shard_name(number), tensors["row"]
    ends = _block_ends(row)
    blocks = [slice(*span) for span in pairwise((0, *ends))]
    with _writing(path) as temporary:
        save_file(tensors, temporary)
    return Shard(
        file=path.name, tokens=len(row), kept=int(tensors["kept"].sum()), rows=1 + int(row.diff().count_nonzero()),
        bytes=path.stat().st_size, header=zlib.crc32(safetensors_header(path)), ends=ends,
        crc32={name: tuple(zlib.crc32(as_bytes(x[block])) for block in blocks) for name, x in tensors.items()},
        place={key: tuple(value.tolist()) for key, value in place.items()},
    )  # fmt: skip


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    content = manifest.model_dump(mode="json")
    shards = ",".join("\n  " + json.dumps(shard, separators=(",", ":")) for shard in content.pop("shards"))
    text = json.dumps(content, indent=1).removesuffix("\n}") + f',\n "shards": [{shards}\n ]\n}}\n'
    with _writing(folder / MANIFEST) as temporary:
        temporary.write_text(sealed_json(text))


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A temporary path for a file, which is renamed once it is on the disk."""
    try:
        with whole_file(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"out: {path} can't be written ({reason}); continue with --resume") from None


def _block_ends(row: Tensor) -> tuple[int, ...]:
    """Ends of blocks: each is the first end of a row [M] after `BLOCK` tokens. A small rest joins the last block."""
    ends, start = [], 0
    for row_end in [*(row.diff().nonzero().flatten() + 1).tolist(), len(row)]:
        if row_end - start >= BLOCK:
            ends.append(row_end)
            start = row_end
    if ends and len(row) - start < BLOCK // 2:
        ends.pop()
    return (*ends, len(row))
