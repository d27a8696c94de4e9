"""Feature store: every latent activation above zero in a text, with its position, as Parquet files.

STORE/
  store.json                 dictionary, model, hook, text, settings, counts, speed; written last, so it marks a full store
  tokens.parquet             one line per encoded token, in text order
  features/part-00000.parquet ...  one line per active latent of a token; parts follow each other in the text

The lines of a part are sorted by latent, then document, row and position, so a search for one latent reads a few row groups
of each part. pandas and DuckDB read `features/` as one table:

    duckdb:  select * from 'STORE/features/*.parquet' where latent = 7
    pandas:  pandas.read_parquet("STORE/features", filters=[("latent", "==", 7)])
"""

import heapq
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache, partial
from importlib.util import find_spec
from itertools import islice, takewhile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.errors import UserError
from ..engine.process.progress import progress_bar
from ..engine.storage.checkpoint import Checkpoint
from ..engine.storage.files import contents
from ..engine.storage.lock import owned
from ..engine.storage.path_names import expand_path, file_name
from ..engine.storage.run_folder import check_free
from ..engine.storage.sealed import read_json, write_json
from ..engine.stream import ActivationStream, TokenRows
from ..engine.stream.token_rows import RowSource, TestbedRows
from ..engine.unit_decoder import Dictionary, UnitDecoder, unit_decoder
from ..kernels.code import SparseCode
from ..kernels.masks import weights_at
from ..kernels.torch_modes import default_modes
from .evaluation import fitted

FORMAT = "temposae-features/1"
MANIFEST, TOKENS, FEATURES = "store.json", "tokens.parquet", "features"

_DENSE = 2**26  # activations of one dense encode; limits how many tokens are encoded at once
_TURNS = 5  # chunks encoded densely too, to compare speed; the first one, which allocates memory, doesn't count


@default_modes()
def encode(
    checkpoint: Checkpoint,
    stream: ActivationStream,
    out: Path,
    *,
    tokens: int | None = None,
    min_activation: float = 0.0,
) -> dict[str, Any]:
    """Encode the stream's text with a checkpoint's dictionary into a store at `out`; returns the content of store.json.

    Encodes every token that `stream.keep` counts once, in text order, held-out rows included: the whole text, or its first
    `tokens` such tokens. The stream should not repeat its text. Memory doesn't grow with the text.

        features/*.parquet   document, row int64, position, token, latent int32, value float32; value > min_activation
        tokens.parquet       document, row int64, position, token int32, text, active int32 (latents above 0, stored or
                             not), squared_error = |x - x_hat|^2 and squared_norm = |x|^2 float32 (for a transcoder, x is
                             its target)

    `speed` has tokens/s of the whole job and of encoding alone, sparse and dense (x @ W_enc, relu, selection, in torch),
    measured in turns on the first chunks.

    Raises UserError for a dictionary that doesn't fit the stream, an endless text without `tokens`, a text without tokens,
    an `out` that is not empty or not writable, and if pyarrow is missing. A failure leaves no store.
    """
    check(out, tokens, min_activation)
    sae = fitted("sae", checkpoint.dictionary(), stream)
    if tokens is None and isinstance(stream.text, TestbedRows):
        raise UserError(f"tokens: needed; {stream.text.name} has no end")
    with owned(out):
        check(out, tokens, min_activation)  # again, in case another process has written a store since
        return _write_store(checkpoint, sae, stream, out, tokens, min_activation)


def _write_store(
    checkpoint: Checkpoint, sae: UnitDecoder, stream: ActivationStream, out: Path, tokens: int | None,
    min_activation: float,
) -> dict[str, Any]:  # fmt: skip
    began = time.monotonic()
    try:
        (out / FEATURES).mkdir(parents=True)
        written = _write_parquet(sae, stream, out, tokens, min_activation)
        seconds = time.monotonic() - began
        written["speed"] |= {"tokens_per_s": round(written["tokens"] / seconds, 1), "seconds": round(seconds, 2)}
        store = {
            "format": FORMAT,
            "dictionary": {
                "checkpoint": str(checkpoint.folder),
                "sha256": checkpoint.manifest["files"]["sae.safetensors"]["sha256"],
                "settings": sae.cfg.model_dump(mode="json"),
            },
            "model": stream.model.name,
            "hook": stream.model.hook,
            "data": stream.text.name,
            "stream": stream.config.model_dump(),
            "asked_tokens": tokens,
            "min_activation": min_activation,
            **written,
        }
        write_json(out / MANIFEST, store)
    except BaseException as error:
        shutil.rmtree(out / FEATURES, ignore_errors=True)
        for name in (TOKENS, MANIFEST):
            (out / name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"out: {out} can't be written ({error.strerror or error})") from None
        raise
    return store


@default_modes()
def read(
    store: str | Path, *, latent: int | Sequence[int] | None = None, document: int | Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Read the entries of a store, all or those of the given latents and documents.

    Returns arrays [n] by column: `document`, `row` int64, `position`, `token`, `latent` int32, `value` float32, sorted by
    latent, document, row and position. Reads only the row groups that may hold such a latent.

        entries = temposae.features.read("STORE", latent=7)
        entries["value"].max(), entries["document"]

    Raises UserError for an incomplete or damaged store, and a latent that the dictionary doesn't have.
    """
    _need_pyarrow()
    import pyarrow as pa

    from . import feature_files as files

    folder = expand_path(store, "store")
    about = info(folder)
    latents, documents = (
        None if numbers is None else np.atleast_1d(numbers).tolist() for numbers in (latent, document)
    )
    highest = about["dictionary"]["settings"]["d_sae"] - 1
    for number in latents or ():
        if not 0 <= number <= highest:
            raise UserError(f"latent: {number} is not allowed; the dictionary has 0 to {highest}")
    selections = {"latent": latents, "document": documents}
    filters = {name: values for name, values in selections.items() if values is not None}
    sums = about.get("checks", {})
    try:
        tables = [files.read(folder / name, files.COLUMNS, filters, sums.get(name)) for name in about["parts"]]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"store: {folder} is damaged ({str(error).splitlines()[0]})") from None
    table = pa.concat_tables(tables)
    columns = {name: table[name].to_numpy() for name in files.COLUMNS}
    order = np.argsort(columns["latent"], kind="stable")  # parts are in text order
    return {name: values[order] for name, values in columns.items()}


def info(store: str | Path) -> dict[str, Any]:
    """Read store.json. Raises UserError for an incomplete or damaged store."""
    folder = expand_path(store, "store")
    if not (folder / MANIFEST).is_file():
        reason = "the store is incomplete" if (folder / FEATURES).exists() else "`temposae features` makes a store"
        raise UserError(f"store: {folder} has no {MANIFEST}; {reason}")
    mend = "the store must be made again"
    manifest = read_json(folder / MANIFEST, "store", mend, form=FORMAT, keys={"parts": list})
    for file_path in manifest["parts"]:
        above, _, name = file_path.rpartition("/") if isinstance(file_path, str) else ("", "", "")
        try:
            file_name(name if above == FEATURES else f"{file_path}/")
        except ValueError as error:
            raise UserError(f"store: {folder / MANIFEST} is damaged ({error})") from None
    about = manifest.get("dictionary")
    settings = about.get("settings") if isinstance(about, dict) else None
    if not isinstance(settings, dict) or not isinstance(settings.get("d_sae"), int):
        raise UserError(f"store: {folder / MANIFEST} is damaged: the dictionary's d_sae is missing")
    return manifest


def check(out: Path, tokens: int | None, min_activation: float) -> None:
    """Raise UserError for settings that are not allowed, and for an `out` where no store can be written."""
    _need_pyarrow()
    if tokens is not None and tokens < 1:
        raise UserError(f"tokens: {tokens} is not allowed; it must be at least 1")
    if not (math.isfinite(min_activation) and min_activation >= 0):
        raise UserError(f"min_activation: {min_activation} is not allowed; it must be at least 0")
    if out.exists() and (not out.is_dir() or contents(out)):
        raise UserError(f"out: {out} exists and is not empty; give a new folder")
    check_free(out)


def _need_pyarrow() -> None:
    if find_spec("pyarrow") is None:
        raise UserError("features: pyarrow, which reads and writes Parquet, is missing; pip install pyarrow")


def _write_parquet(
    sae: UnitDecoder, stream: ActivationStream, out: Path, tokens: int | None, min_activation: float
) -> dict[str, Any]:
    """Write tokens and features; returns counts, names and checksums of the parts, and the speed of encoding."""
    from . import feature_files as files

    tokenizer, timer = stream.model.tokenizer, _EncodeTimer(sae)
    decode = cache(
        str if tokenizer is None else lambda token: tokenizer.decode([token], clean_up_tokenization_spaces=False)
    )
    features, lines = files.ActivationWriter(out / FEATURES), files.TokenWriter(out / TOKENS)
    counts = {"tokens": 0, "rows": 0, "documents": 0}
    last = {"row": -1, "document": -1}
    with progress_bar("encoding", tokens, "tokens") as bar, lines:
        for place, x, target in _chunks(stream, tokens, max(1, min(4096, _DENSE // sae.cfg.d_sae))):
            code = timer.encode(x, torch.from_numpy(place["position"]).long().to(x.device))
            with torch.no_grad():
                error = (target - sae.decode(code)).square().sum(1)
            sums = torch.stack([error, target.square().sum(1)]).cpu().numpy()
            owners, latents, values = _entries(code)
            active = np.bincount(owners, minlength=len(x)).astype(np.int32)
            per_token = {"active": active, "squared_error": sums[0], "squared_norm": sums[1]}
            texts = np.array([decode(token) for token in place["token"].tolist()], dtype=object)
            lines.add(place | {"text": texts} | per_token)
            stored = values > min_activation
            per_entry = {name: column[owners[stored]] for name, column in place.items()}
            features.add(per_entry | {"latent": latents[stored], "value": values[stored]})
            counts["tokens"] += len(x)
            for name in last:  # rows and documents ascend, and may continue from the last chunk
                counts[f"{name}s"] += len(np.unique(place[name])) - int(place[name][0] == last[name])
                last[name] = int(place[name][-1])
            bar.advance(len(x))
        features.end()
        if not counts["tokens"]:
            raise UserError(f"data: {stream.text.name} has no token to encode (see stream.drop_special)")
        if tokens is not None and counts["tokens"] < tokens:
            bar.note(f"data: {stream.text.name} ended after {counts['tokens']:,} of {tokens:,} tokens")
    sums = features.checks | {TOKENS: files.checks(out / TOKENS)}
    return {
        **counts, "entries": features.entries, "parts": list(features.checks), "checks": sums, "speed": timer.speed()
    }  # fmt: skip


def _chunks(
    stream: ActivationStream, tokens: int | None, size: int
) -> Iterator[tuple[dict[str, np.ndarray], Tensor, Tensor]]:
    """Columns [n] with the places of tokens, their activations x [n, D] float32, and a transcoder's target (otherwise x
    again), at most `size` tokens at a time."""
    remaining = sys.maxsize if tokens is None else tokens
    for rows in _whole_text(stream.text, stream.config.rows_per_forward):
        read, kept_on_device = stream.read(rows)
        kept = kept_on_device.cpu()
        kept &= (kept.flatten().cumsum(0) <= remaining).view(kept.shape)
        place = {
            "document": rows.document[kept].numpy(),
            "row": rows.row[:, None].expand(kept.shape)[kept].numpy(),
            "position": torch.arange(kept.shape[1], dtype=torch.int32).expand(kept.shape)[kept].numpy(),
            "token": rows.tokens[kept].int().numpy(),
        }
        x, *outputs = (acts[kept.to(acts.device)].float() for acts in read.values())
        target = outputs[-1] if outputs else x
        for start in range(0, len(x), size):
            chunk = slice(start, start + size)
            yield {name: column[chunk] for name, column in place.items()}, x[chunk], target[chunk]
        remaining -= len(x)
        if not remaining:
            return


def _whole_text(text: RowSource, size: int) -> Iterator[TokenRows]:
    """All rows of a text in order, training and held-out rows, `size` at a time."""
    training = takewhile(len, iter(partial(text.next, size), None))
    sources = (training, text.held_out(sys.maxsize, size))
    single_rows = ((rows.slice(i, i + 1) for rows in source for i in range(len(rows))) for source in sources)
    in_order = heapq.merge(*single_rows, key=lambda row: int(row.row))
    while batch := list(islice(in_order, size)):
        yield TokenRows(*map(torch.cat, zip(*(vars(row).values() for row in batch), strict=True)))


def _entries(code: SparseCode) -> tuple[np.ndarray, ...]:
    """Token int64, latent int32 and value float32 of the entries above 0, [n] each, in the order of tokens."""
    values = code.live(code.values).flatten()
    active = (values > 0).nonzero().flatten()
    return tuple(entries.flatten()[active].cpu().numpy() for entries in (code.rows, code.indices, values))


class _EncodeTimer:
    """Encodes; the first chunks are encoded densely too, to compare the speed."""

    def __init__(self, sae: Dictionary):
        self.sae = unit_decoder(sae)
        self.sparse: list[float] = []  # seconds per token
        self.dense: list[float] = []

    def encode(self, x: Tensor, pos: Tensor) -> SparseCode:
        if len(self.dense) == _TURNS:
            return self.sae.encode_sparse(x, pos)
        turns = [(self.sparse, self.sae.encode_sparse), (self.dense, self._densely)]
        outputs: dict[int, Any] = {}
        for index in (0, 1) if len(self.dense) % 2 else (1, 0):
            times, call = turns[index]
            _wait(x.device)
            began = time.perf_counter()
            outputs[index] = call(x, pos)
            _wait(x.device)
            times.append((time.perf_counter() - began) / len(x))
        return outputs[0]

    @torch.no_grad()
    def _densely(self, x: Tensor, pos: Tensor) -> Any:
        """The same latents from all activations [N, F], without the norms of decoder rows."""
        sae, (_, rows, weights) = self.sae.sae, self.sae.sae.inputs(x, pos)
        acts = torch.addmm(sae.b_enc, x if sae.center is None else x - sae.center, sae.W_enc).relu_()
        if weights is not None and rows is not None:
            acts *= weights_at(weights, rows)
        if sae.cfg.activation == "topk":
            return acts.topk(sae.k, dim=1)
        active = (acts > (0.0 if sae.cfg.activation == "relu" else sae.threshold)).nonzero(as_tuple=True)
        return active, acts[active]

    def speed(self) -> dict[str, float]:
        """Median tokens/s of both."""
        sparse, dense = (1 / median(times[1:] or times) for times in (self.sparse, self.dense) if times)
        per_s = {"sparse_tokens_per_s": round(sparse, 1), "dense_tokens_per_s": round(dense, 1)}
        return per_s | {"sparse_over_dense": round(sparse / dense, 3)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
