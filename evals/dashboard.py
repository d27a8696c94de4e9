"""Latent dashboard: how often, where in a row and on which tokens a latent fires, and its direct effect on the logits.

`dashboard` measures on held-out text. `page` writes the figures into one HTML file that loads nothing from a network.

    firing rate    = share of tokens on which the latent is above zero
    mean           = mean activation over those tokens
    profile        = both by position in the row, in at most 32 bins of equal width
    peak           = the bin with the largest activation per token, among bins with enough tokens
    direct logits  = unembed(ln_final(W_dec_j)) - unembed(ln_final(0)), see `LanguageModel.direct_logits`

The strongest contexts alone make a latent look more specific than it is (Bolukbasi et al., arXiv 2104.07143), so a few
contexts from the middle of its activations are shown too.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.errors import UserError
from ..engine.process.progress import progress_bar
from ..engine.storage.files import write_text
from ..engine.stream import ActivationStream, TokenRows
from ..engine.stream.model import LanguageModel
from ..engine.unit_decoder import Dictionary, UnitDecoder
from .evaluation import collect, fitted
from .token_texts import TokenTexts

FORMAT = "temposae-dashboard/1"
TEMPLATE = Path(__file__).with_name("dashboard.html")
DATA = "{{data}}"  # placeholder for the figures in the template

BINS = 32
SCARCE = 0.1  # a bin with a smaller share of the mean bin's tokens can't be a latent's peak
BEFORE, AFTER = 24, 12  # tokens of a context on either side
STRONGEST, ORDINARY = 12, 4  # contexts of each kind
MIDDLE = (0.4, 0.6)  # quantiles of a latent's activations between which ordinary ones are drawn
LOGITS = 10  # tokens raised most, and tokens lowered most
_AT_ONCE = 2**26  # logits in memory at once


def numbers(text: str, n_latents: int) -> list[int]:
    """Parse numbers of latents, "3,17", without duplicates. Raises UserError for anything else."""
    latents = []
    for word in map(str.strip, text.split(",")):
        if not (word.isdecimal() and int(word) < n_latents):
            raise UserError(f"latents: {word!r} is not allowed; give numbers from 0 to {n_latents - 1}, as in 3,17")
        latents.append(int(word))
    return list(dict.fromkeys(latents))


@torch.no_grad()
def dashboard(
    stream: ActivationStream,
    sae: Dictionary,
    *,
    name: str,
    latents: Sequence[int] | None = None,
    count: int = 100,
    rows: int = 1024,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure `latents`, or `count` latents spread evenly over ranks of firing rate, on held-out `rows`.

    Returns the page's content as plain numbers and texts: `name`, `model`, `hook`, `tokens`, `dead_fraction` (of all F
    latents, on this text) and similar; `bins`, each as first position, last position and tokens; and `latents`, each with
    `firing_rate`, `mean`, `max`, `peak` (first and last position), `profile`, its contexts `strongest` (at most one per row)
    and `ordinary` (drawn by `seed`), and `logits`, [token, value] of the tokens it raises and lowers most. Means are None
    for a latent that never fires, values in contexts for tokens that are not counted, and `logits` if the decoder is not as
    wide as the residual stream. Raises UserError for a dictionary that doesn't fit the stream, and text without tokens.
    """
    sae = fitted("sae", sae, stream)
    text, tokens, values, offsets = _read(stream, sae, rows)
    firings = np.diff(offsets)
    chosen = _spread(firings, count) if latents is None else list(latents)
    words, bins = TokenTexts(stream.model.tokenizer), text.bins()
    logits = _logits(stream.model, sae.W_dec[chosen], words)
    shown: list[dict[str, Any]] = []
    with progress_bar("gathering contexts", len(chosen), "latents") as bar:
        for index, latent in enumerate(chosen):
            entries = slice(offsets[latent], offsets[latent + 1])
            token, value = tokens[entries], values[entries]
            figures = _figures(text, bins, token, value)
            contexts = _contexts(text, token, value, np.random.default_rng([seed, latent]), words)
            shown.append({"latent": latent, **figures, **contexts, "logits": logits and logits[index]})
            bar.advance(1)
    return {
        "format": FORMAT,
        "name": name,
        "model": stream.model.name,
        "hook": stream.model.hook,
        "data": stream.text.name,
        "d_sae": sae.cfg.d_sae,
        "activation": sae.cfg.activation,
        "k": sae.cfg.k if sae.cfg.activation in ("topk", "batchtopk") else None,
        "l0": _short(len(values) / len(text.pos)),
        "dead_fraction": float((firings == 0).mean()),
        "tokens": len(text.pos),
        "rows": len(text.tokens),
        "context": text.tokens.shape[1],
        "bins": bins.tolist(),
        "latents": shown,
    }


def page(shown: dict[str, Any]) -> str:
    """One HTML file of `dashboard`'s result, with style, script and figures in it."""
    # No token may close the element that holds the figures, so it has no "<". JSON reads \u003c as "<".
    figures = json.dumps(shown, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace(DATA, figures)


def is_page(path: Path) -> bool:
    """Whether `write` made this file."""
    with path.open("rb") as file:
        return b"<title>Latents</title>" in file.read(2048)


def write(path: Path, shown: dict[str, Any]) -> None:
    """Write the page to `path`, completely or not at all. Raises UserError if it can't be written."""
    try:
        write_text(path, page(shown))
    except OSError as error:
        raise UserError(f"out: {path} can't be written ({error.strerror})") from None


@dataclass
class _Text:
    """R rows of text: `tokens`, `kept`, `document` [R, T], row `number` [R]; `row` and `pos` [n] of the kept tokens."""

    tokens: np.ndarray
    kept: np.ndarray
    document: np.ndarray
    number: np.ndarray
    row: np.ndarray
    pos: np.ndarray

    def bins(self) -> np.ndarray:
        """First position, last position and tokens of each bin, int64 [B, 3]."""
        T = self.tokens.shape[1]
        B = min(BINS, T)
        first = -(-np.arange(B + 1) * T // B)
        return np.stack([first[:-1], first[1:] - 1, np.bincount(self.pos * B // T, minlength=B)], 1)


def _read(stream: ActivationStream, sae: UnitDecoder, rows: int) -> tuple[_Text, np.ndarray, np.ndarray, np.ndarray]:
    """A text, and its code sorted by latent: tokens (ascending), values, and the offsets of the latents in these."""
    sources: list[tuple[Tensor, Tensor]] = []

    def batches() -> Iterator[TokenRows]:
        for batch in stream.held_out(rows):
            sources.append((batch.document, batch.row))
            yield batch

    collected = collect(stream, batches(), rows)
    code = collected.code(sae)
    by_latent = code.transpose()
    entries = (by_latent.tokens, code.values[by_latent.order], by_latent.latent_offsets)
    document, number = (torch.cat(tensors) for tensors in zip(*sources, strict=True))
    places = (collected.tokens, collected.kept, document, number, collected.row, collected.pos)
    tokens, values, offsets = (tensor.cpu().numpy() for tensor in entries)
    return _Text(*(tensor.cpu().numpy() for tensor in places)), tokens, values, offsets


def _spread(firings: np.ndarray, count: int) -> list[int]:
    """`count` latents spread evenly over ranks of firing rate, most frequent first; all live ones if fewer."""
    ranked = np.argsort(-firings, kind="stable")[: (firings > 0).sum()]
    ranks = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    return ranked[ranks].tolist()


def _figures(text: _Text, bins: np.ndarray, token: np.ndarray, value: np.ndarray) -> dict[str, Any]:
    B, T = len(bins), text.tokens.shape[1]
    tokens, where = bins[:, 2], text.pos[token] * B // T
    fired = np.bincount(where, minlength=B)
    sums = np.bincount(where, value.astype(np.float64), minlength=B)
    per_token = np.where(tokens >= SCARCE * tokens.mean(), sums / np.maximum(tokens, 1), 0)
    peak = bins[per_token.argmax(), :2].tolist() if per_token.any() else None
    return {
        "firing_rate": _short(len(token) / len(text.pos)),
        "mean": _short(value.mean(dtype=np.float64)) if len(value) else None,
        "max": _short(value.max()) if len(value) else None,
        "peak": peak,
        "profile": {
            "firing_rate": [_short(f / n) if n else None for f, n in zip(fired, tokens, strict=True)],
            "mean": [_short(s / f) if f else None for s, f in zip(sums, fired, strict=True)],
        },
    }


def _contexts(
    text: _Text, token: np.ndarray, value: np.ndarray, draw: np.random.Generator, words: TokenTexts
) -> dict[str, Any]:
    rows = text.row[token]
    strongest = _one_per_row(np.argsort(-value, kind="stable"), rows)[:STRONGEST]
    low, high = np.quantile(value, MIDDLE) if len(value) else (0, 0)
    ordinary = draw.permutation(np.flatnonzero((value >= low) & (value <= high)))
    ordinary = _one_per_row(ordinary[~np.isin(rows[ordinary], rows[strongest])], rows)[:ORDINARY]
    acts = np.where(text.kept, 0, np.nan)
    acts[rows, text.pos[token]] = value

    def context(index: int) -> dict[str, Any]:
        row, pos = rows[index], text.pos[token[index]]
        end = min(pos + AFTER, np.flatnonzero(text.kept[row])[-1]) + 1
        window = slice(max(0, pos - BEFORE), end)
        return {
            "value": _short(value[index]),
            "position": int(pos),
            "document": int(text.document[row, pos]),
            "row": int(text.number[row]),
            "peak": int(pos - window.start),
            "tokens": words.along(text.tokens[row, window].tolist()),
            "values": [None if np.isnan(a) else _short(a) for a in acts[row, window]],
        }

    return {"strongest": [context(index) for index in strongest], "ordinary": [context(index) for index in ordinary]}


def _one_per_row(order: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Keep the first entry of each row, in the given order."""
    return order[np.sort(np.unique(rows[order], return_index=True)[1])]


def _logits(model: LanguageModel, directions: Tensor, words: TokenTexts) -> list[dict[str, Any]] | None:
    """The tokens with the largest and smallest logits of each direction, as [token, value], most extreme first."""
    results: list[dict[str, Any]] = []
    V = model.vocabulary if model.tokenizer is None else len(model.tokenizer)  # there may be more logits than tokens

    def pairs(values: list[float], ids: list[int]) -> list[tuple[str, float]]:
        return list(zip(map(words.of, ids), map(_short, values), strict=True))

    for chunk in directions.split(max(1, _AT_ONCE // V)):
        logits = model.direct_logits(chunk)
        if logits is None:
            return None
        top, bottom = (logits[:, :V].topk(min(LOGITS, V), largest=largest) for largest in (True, False))
        ends = zip(*(end.tolist() for end in (*top, *bottom)), strict=True)
        results += [{"top": pairs(*end[:2]), "bottom": pairs(*end[2:])} for end in ends]
    return results


def _short(value: float) -> float:
    """Round to the five significant digits that a page needs."""
    return float(f"{value:.5g}")
