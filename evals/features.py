"""Which latents fire where in a text: a store of all activations above zero in Parquet, each with its place.

STORE/
  store.json                 dictionary, model, hook, text, settings, counts, speed; written last: no store without it
  tokens.parquet             a line for each encoded token, in the order of the text
  features/part-00000.parquet ...  a line for each active latent of a token; the next part goes on in the text

Lines of a part are sorted by latent, then document, row, position, so that whoever looks for a latent reads a few row groups
of each. `features/` is a table to pandas and DuckDB as it is:

    duckdb:  select * from 'STORE/features/*.parquet' where latent = 7
    pandas:  pandas.read_parquet("STORE/features", filters=[("latent", "==", 7)])
"""

import heapq
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
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
from . import checked_parquet
from .evaluation import fitted
from .feature_writer import COLUMNS, ActivationWriter, TokenWriter

FORMAT = "temposae-features/1"
MANIFEST, TOKENS, FEATURES = "store.json", "tokens.parquet", "features"

_DENSE = 2**26  # activations of one dense encode, which bounds how many tokens are encoded at once
_TURNS = 5  # chunks that are encoded densely too; the first one, in which memory is taken, doesn't count


@default_modes()
def encode(
    checkpoint: Checkpoint,
    stream: ActivationStream,
    out: Path,
    *,
    tokens: int | None = None,
    min_activation: float = 0.0,
) -> dict[str, Any]:
    """Encode the stream's text with the dictionary of a checkpoint, into a store at `out`. Returns what store.json holds.

    Every token that `stream.keep` counts is encoded once, in the order of the text, rows for evaluation included: all of
    the text, or its first `tokens` of them. The stream should not repeat its text. Memory doesn't grow with the text.

        features/*.parquet   document, row int64, position, token, latent int32, value float32; value > min_activation
        tokens.parquet       document, row int64, position, token int32, text, active int32 (latents above 0, stored or
                             not), squared_error = |x - x_hat|^2 and squared_norm = |x|^2 float32 (of a transcoder: of its
                             target)

    `speed` gives tokens/s of the whole, and of the sparse and a dense encode (x @ W_enc, relu, then what the activation
    keeps, by torch), which take turns on the same first activations.

    Raises UserError for a dictionary that is not for these activations, a text without end or without tokens, an `out` that
    is not empty or can't be written, and where pyarrow is missing. What fails leaves no store.
    """
    check(out, tokens, min_activation)
    sae = fitted("sae", checkpoint.dictionary(), stream)
    if tokens is None and isinstance(stream.text, TestbedRows):
        raise UserError(f"tokens: needed; {stream.text.name} has no end")
    with owned(out):
        check(out, tokens, min_activation)  # nobody has made one meanwhile
        return _stored(checkpoint, sae, stream, out, tokens, min_activation)


def _stored(
    checkpoint: Checkpoint,
    sae: UnitDecoder,
    stream: ActivationStream,
    out: Path,
    tokens: int | None,
    min_activation: float,
) -> dict[str, Any]:
    began = time.monotonic()
    try:
        (out / FEATURES).mkdir(parents=True)
        written = _encoded(sae, stream, out, tokens, min_activation)
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
    except OSError as error:
        _remove(out)
        raise UserError(f"out: {out} can't be written ({error.strerror or error})") from None
    except BaseException:
        _remove(out)
        raise
    return store


@default_modes()
def read(
    store: str | Path, *, latent: int | Sequence[int] | None = None, document: int | Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """The entries of a store, of these latents and documents only where any are given, as arrays [n] by column: `document`,
    `row` int64, `position`, `token`, `latent` int32, `value` float32. Sorted by latent, document, row, position.

        entries = temposae.features.read("STORE", latent=7)
        entries["value"].max(), entries["document"]

    Only row groups that may hold such a latent are read. Raises UserError for what is not a whole store and for a latent
    that the dictionary doesn't have.
    """
    _need_pyarrow()
    import pyarrow as pa

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
        tables = [checked_parquet.read(folder / name, COLUMNS, filters, sums.get(name)) for name in about["parts"]]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"store: {folder} is damaged ({str(error).splitlines()[0]})") from None
    table = pa.concat_tables(tables)
    columns = {name: table[name].to_numpy() for name in COLUMNS}
    order = np.argsort(columns["latent"], kind="stable")  # parts come in the order of the text
    return {name: values[order] for name, values in columns.items()}


def info(store: str | Path) -> dict[str, Any]:
    """What store.json holds. Raises UserError for what is not a whole store."""
    folder = expand_path(store, "store")
    if not (folder / MANIFEST).is_file():
        reason = "it was not written to its end" if (folder / FEATURES).exists() else "`temposae features` makes one"
        raise UserError(f"store: {folder} holds no {MANIFEST}; {reason}")
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
        raise UserError(f"store: {folder / MANIFEST} is damaged: it doesn't say how many latents the dictionary has")
    return manifest


def check(out: Path, tokens: int | None, min_activation: float) -> None:
    """Refuse, before any work, numbers that are not allowed and a place where no store can be written."""
    _need_pyarrow()
    if tokens is not None and tokens < 1:
        raise UserError(f"tokens: {tokens} is not allowed; it must be at least 1")
    if not (math.isfinite(min_activation) and min_activation >= 0):
        raise UserError(f"min_activation: {min_activation} is not allowed; it must be a number from 0 on")
    if out.exists() and (not out.is_dir() or contents(out)):
        raise UserError(f"out: {out} exists and is not empty; give a new folder")
    check_free(out)


def _need_pyarrow() -> None:
    if find_spec("pyarrow") is None:
        raise UserError("features: pyarrow is missing, which reads and writes Parquet; pip install pyarrow")


def _remove(out: Path) -> None:
    """Remove what was written of a store that won't be one."""
    shutil.rmtree(out / FEATURES, ignore_errors=True)
    for name in (TOKENS, MANIFEST):
        (out / name).unlink(missing_ok=True)


def _encoded(
    sae: UnitDecoder, stream: ActivationStream, out: Path, tokens: int | None, min_activation: float
) -> dict[str, Any]:
    """Write tokens and features; returns counts, the parts' names, and the speed of encoding."""
    words, turns = _TokenTexts(stream.model.tokenizer), _EncodeTimer(sae)
    features, lines = ActivationWriter(out / FEATURES), TokenWriter(out / TOKENS)
    counts = {"tokens": 0, "rows": 0, "documents": 0}
    last = {"row": -1, "document": -1}
    with progress_bar("encoding", tokens, "tokens") as bar, lines:
        for place, x, target in _chunks(stream, tokens, max(1, min(4096, _DENSE // sae.cfg.d_sae))):
            code = turns.encode(x, torch.from_numpy(place["position"]).long().to(x.device))
            with torch.no_grad():
                error = (target - sae.decode(code)).square().sum(1)
            sums = torch.stack([error, target.square().sum(1)]).cpu().numpy()
            owners, latents, values = _entries(code)
            active = np.bincount(owners, minlength=len(x)).astype(np.int32)
            per_token = {"active": active, "squared_error": sums[0], "squared_norm": sums[1]}
            lines.add(place | {"text": words(place["token"])} | per_token)
            stored = values > min_activation
            per_entry = {name: column[owners[stored]] for name, column in place.items()}
            features.add(per_entry | {"latent": latents[stored], "value": values[stored]})
            counts["tokens"] += len(x)
            for name in last:  # both ascend
                counts[f"{name}s"] += len(np.unique(place[name])) - int(place[name][0] == last[name])
                last[name] = int(place[name][-1])
            bar.advance(len(x))
        features.end()
        if not counts["tokens"]:
            raise UserError(f"data: {stream.text.name} holds no token to encode (see stream.drop_special)")
        if tokens is not None and counts["tokens"] < tokens:
            bar.note(f"data: {stream.text.name} ended after {counts['tokens']:,} of {tokens:,} tokens")
    sums = features.checks | {TOKENS: checked_parquet.checks(out / TOKENS)}
    part_names = list(features.checks)
    return {**counts, "entries": features.entries, "parts": part_names, "checks": sums, "speed": turns.speed()}


def _chunks(
    stream: ActivationStream, tokens: int | None, size: int
) -> Iterator[tuple[dict[str, np.ndarray], Tensor, Tensor]]:
    """Columns [n] that say where tokens are, their activations x [n, D] in float32, and those that a transcoder is to give
    (else x again), at most `size` at a time."""
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
    """All rows of a text in their order, those for training and those for evaluation, `size` at a time."""
    fields = ("tokens", "length", "document", "row")

    def training() -> Iterator[TokenRows]:
        while len(rows := text.next(size)):
            yield rows

    def single_rows(batches: Iterable[TokenRows]) -> Iterator[TokenRows]:
        for rows in batches:
            for i in range(len(rows)):
                yield TokenRows(*(getattr(rows, name)[i : i + 1] for name in fields))

    held_out = text.held_out(sys.maxsize, size)
    rows = heapq.merge(single_rows(training()), single_rows(held_out), key=lambda row: int(row.row))
    while batch := list(islice(rows, size)):
        yield TokenRows(*(torch.cat([getattr(row, name) for row in batch]) for name in fields))


def _entries(code: SparseCode) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token int64, latent int32 and value float32 of what is above 0, [n] each, token after token."""
    values = code.live(code.values).flatten()
    active = (values > 0).nonzero().flatten()
    entries = (code.rows.flatten()[active], code.indices.flatten()[active], values[active])
    owners, latents, values = (tensor.cpu().numpy() for tensor in entries)
    return owners, latents, values


class _TokenTexts:
    """The text of tokens, each decoded once."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.known = tokenizer, dict[int, str]()

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        unique, inverse = np.unique(tokens, return_inverse=True)
        for token in unique.tolist():
            if token not in self.known:
                text = (
                    None
                    if self.tokenizer is None
                    else self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
                )
                self.known[token] = str(token) if text is None else text
        return np.array([self.known[token] for token in unique.tolist()], dtype=object)[inverse]


class _EncodeTimer:
    """Encodes, and beside it densely the first chunks, to compare the two."""

    def __init__(self, sae: Dictionary):
        self.sae = unit_decoder(sae)
        self.sparse: list[float] = []  # seconds a token
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
        """The same latents by way of all activations [N, F], before norms of decoder rows."""
        sae, (_, rows, weights) = self.sae.sae, self.sae.sae.inputs(x, pos)
        acts = torch.addmm(sae.b_enc, x if sae.center is None else x - sae.center, sae.W_enc).relu_()
        if weights is not None and rows is not None:
            acts *= weights_at(weights, rows)
        if sae.cfg.activation == "topk":
            return acts.topk(sae.k, dim=1)
        active = (acts > (0.0 if sae.cfg.activation == "relu" else sae.threshold)).nonzero(as_tuple=True)
        return active, acts[active]

    def speed(self) -> dict[str, float]:
        """Tokens/s of both, medians."""
        sparse, dense = (1 / median(times[1:] or times) for times in (self.sparse, self.dense) if times)
        return {
            "sparse_tokens_per_s": round(sparse, 1),
            "dense_tokens_per_s": round(dense, 1),
            "sparse_over_dense": round(sparse / dense, 3),
        }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
