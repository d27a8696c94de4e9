"""Position specialization: mutual information between a latent's activity and its position in the row.

Position bins are contiguous runs of positions with equally many tokens (`<bos>` left out, surplus tokens dropped at random).
A latent with activation a is active where a != 0:

    I_j = H(active) - E_bin H(active | bin)    in nats, minus its mean over shuffles of activity within rows, at least 0
    S_j = I_j / H(active)                      specialization; 1: the position determines whether the latent is active
    nats per firing = sum_bin q log(q B)       with q(bin) = P(bin | active); log R for a latent confined to 1 of R ranges
    variance explained = 1 - E_bin Var(a | bin) / Var(a)

Voita et al. (arXiv 2309.04827) call a unit positional if I > 0.05. The
variance and the bound of 0.4 on Spearman's |rho| follow arXiv 2506.15679. I is at most log 2.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..engine.errors import UserError
from ..engine.process.progress import progress_bar
from ..kernels.code import SparseCode
from .agreement import compared
from .evaluation import CHUNK, CODES, Evaluation, Reference, TextActivations, collect
from .held_out import HELD

FIRST = 8  # positions at the start of a row, which models treat specially; figures are given with and without them
POSITIONAL, CORRELATED = 0.05, 0.4


def positions(
    evaluation: Evaluation, reference: Reference | None = None, *, rows: int = 1024, bins: int = 16, shuffles: int = 20
) -> dict[str, Any]:
    """Measure position specialization of the dictionary and its controls on `rows` held-out rows.

    Means and shares are over latents that fire (`alive`). `after_first_8` has the same figures for positions from 8 on. A
    `reference` adds its own figures and the `agreement` with it (see `agreement.compared`), else None. Raises UserError for
    bins that the text can't fill.
    """
    if shuffles < 1:
        raise UserError(f"shuffles: {shuffles} is not allowed; give at least 1")
    collected = held_out(evaluation, rows)
    autoencoders, agreement = evaluation.autoencoders(collected, mean=False), None
    if reference is not None:
        compared_with = reference.fitted(evaluation.stream)
        agreement = compared(evaluation, collected, autoencoders, *compared_with)
        autoencoders["reference"] = compared_with[0]
    figures: dict[str, dict[str, Any]] = {name: {} for name in autoencoders}
    with progress_bar("positions: information", total=2 * len(autoencoders), unit="dictionaries") as bar:
        for first in (0, FIRST):
            draw = evaluation.generator(f"positions from {first}")
            drawn = BinnedTokens.of(evaluation, collected, bins, first, draw)
            shuffled = [drawn.shuffled(draw) for _ in range(shuffles)]
            for name, autoencoder in autoencoders.items():
                latents = information(collected.code(autoencoder), drawn, shuffled)
                result = summary(latents)
                figures[name] |= {"after_first_8": result} if first else result | {"tokens": len(drawn.at)}
                bar.advance(1)
    return {
        **figures.pop("sae"),
        "agreement": agreement,
        "reference": figures.pop("reference", None),
        "controls": figures,
        "bins": bins,
    }


@dataclass
class BinnedTokens:
    """M of a collection's n tokens, equally many in each of B bins: `at` [M], their ascending indices; `bin`, `row` and
    `pos` [M]. `position_bin` [T] is the bin of each position, -1 for none."""

    at: np.ndarray
    bin: np.ndarray
    row: np.ndarray
    pos: np.ndarray
    position_bin: np.ndarray
    bins: int
    n: int

    @classmethod
    def of(
        cls, evaluation: Evaluation, collected: TextActivations, bins: int, first: int, draw: np.random.Generator
    ) -> "BinnedTokens":
        pos, row = collected.pos.cpu().numpy(), collected.row.cpu().numpy()
        special = torch.isin(collected.tokens[collected.kept], evaluation.stream.source.special).numpy()
        counts = np.bincount(pos[(pos >= first) & ~special], minlength=collected.tokens.shape[1])
        if not 2 <= bins <= (counts > 0).sum():
            most = (counts > 0).sum()
            raise UserError(f"bins: {bins} is not allowed; give 2 to {most}, the number of positions with text")
        # a position's bin is that of its middle token, with all tokens sorted by position
        middle = np.cumsum(counts) - counts / 2
        position_bin = np.where(counts > 0, (middle * bins / counts.sum()).astype(np.int64), -1)
        bin_ = np.where(special, -1, position_bin[pos])
        sizes = np.bincount(bin_[bin_ >= 0], minlength=bins)
        if not sizes.all():
            raise UserError(f"bins: {bins} is not allowed; a bin is empty, because most tokens are at few positions")
        by_bin = [np.flatnonzero(bin_ == b) for b in range(bins)]
        tokens = np.sort(np.concatenate([draw.permutation(in_bin)[: sizes.min()] for in_bin in by_bin]))
        return cls(tokens, bin_[tokens], row[tokens], pos[tokens], position_bin, bins, len(pos))

    def shuffled(self, draw: np.random.Generator) -> np.ndarray:
        """Bins [M] permuted within each row, as if every latent's activity were."""
        return self.bin[((self.row << 32) + draw.integers(2**32, size=len(self.row))).argsort()]

    def entries(self, code: SparseCode) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Latent, token (of the M) and value of a code's entries on these tokens."""
        number = np.full(self.n, -1)
        number[self.at] = np.arange(len(self.at))
        token = number[code.rows.cpu().numpy()]
        binned = token >= 0
        return code.indices.cpu().numpy()[binned].astype(np.int64), token[binned], code.values.cpu().numpy()[binned]


def information(code: SparseCode, drawn: BinnedTokens, shuffled: list[np.ndarray]) -> dict[str, np.ndarray]:
    """`firings` and the quantities of the module's formulas for each latent [F], by the names of the result."""
    latent, token, value = drawn.entries(code)
    F, B, M = code.n_latents, drawn.bins, len(drawn.at)

    def nats(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """I_j and nats per firing."""
        rate = counts * B / M
        q = counts / counts.sum(1, keepdims=True).clip(1)
        return _entropy(rate.mean(1)) - _entropy(rate).mean(1), (xlogx(q).sum(1) + math.log(B)) * (counts.sum(1) > 0)

    counts, *by_chance = firings_per_bin(latent, token, F, [drawn.bin, *shuffled], B)
    chance = np.mean([nats(chance_counts) for chance_counts in by_chance], 0)
    corrected, per_firing = np.maximum(np.array(nats(counts)) - chance, 0)
    firings = counts.sum(1)
    entropy = _entropy(firings / M)
    sums = np.bincount(latent * B + drawn.bin[token], value, minlength=F * B).reshape(F, B)
    mean = sums.sum(1) / M
    variance = np.bincount(latent, value.astype(np.float64) ** 2, minlength=F) / M - mean**2
    between = ((sums * B / M) ** 2).mean(1) - mean**2
    return {
        "firings": firings,
        "mutual_information": corrected,
        "specialization": np.divide(corrected, entropy, out=np.zeros(F), where=entropy > 0),
        "nats_per_firing": per_firing,
        "variance_explained": np.divide(between, variance, out=np.zeros(F), where=variance > 1e-12 * mean**2),
        "spearman": _spearman(latent, drawn.pos[token], value, drawn.pos, F),
    }


def firings_per_bin(
    latent: np.ndarray, token: np.ndarray, F: int, bins: list[np.ndarray], B: int, *, dense: bool | None = None
) -> list[np.ndarray]:
    """Firings of each latent in each bin, [F, B], for each of several assignments of the M tokens to bins. `latent` and
    `token` [n] are the entries. If more than one in 16 fires, a matrix product is used; `dense` overrides this."""
    M = len(bins[0])
    if dense is None:
        dense = 16 * len(latent) > F * M
    if not dense:
        cell = latent * B
        return [np.bincount(cell + assignment[token], minlength=F * B).reshape(F, B) for assignment in bins]
    order = np.argsort(token, kind="stable")
    latent, token = latent[order], token[order]
    counts = np.zeros((F, len(bins) * B))
    cells = np.stack(bins, 1) + B * np.arange(len(bins))  # [M, number of assignments]
    step = max(1, min(CHUNK, CODES // F))  # tokens whose latents are dense in memory at once
    for begin in range(0, M, step):
        chunk = slice(*np.searchsorted(token, (begin, begin + step)))
        size = min(step, M - begin)
        fires, in_cell = np.zeros((size, F), np.float32), np.zeros((size, len(bins) * B), np.float32)
        fires[token[chunk] - begin, latent[chunk]] = 1
        np.put_along_axis(in_cell, cells[begin : begin + size], 1, 1)
        counts += fires.T @ in_cell  # exact: sums of at most `CHUNK` ones
    return [block.astype(np.int64) for block in np.split(counts, len(bins), 1)]


def held_out(evaluation: Evaluation, rows: int) -> TextActivations:
    """Activations of held-out rows, as many as fit `HELD` bytes; for the embedded language, of the labelled documents that
    other evals use."""
    if evaluation.is_testbed:
        return evaluation.labelled(rows)
    stream, rows = evaluation.stream, evaluation.rows(rows)
    rows = min(rows, max(1, HELD // (4 * stream.positions * evaluation.sae.cfg.d_in)))
    return evaluation.once(f"held out {rows}", lambda: collect(stream, stream.held_out(rows), rows))


def summary(latents: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means of `information`'s result over the latents that fire; nats per firing are weighted by firings."""
    alive = latents["firings"] > 0
    alive_values = {name: values[alive] for name, values in latents.items()}

    def mean(values: np.ndarray, weights: np.ndarray | None = None) -> float | None:
        return float(np.average(values, weights=weights)) if len(values) else None

    return {
        "alive": int(alive.sum()),
        "mutual_information": mean(alive_values["mutual_information"]),
        "positional_share": mean(alive_values["mutual_information"] > POSITIONAL),
        "specialization": mean(alive_values["specialization"]),
        "nats_per_firing": mean(alive_values["nats_per_firing"], alive_values["firings"]),
        "variance_explained": mean(alive_values["variance_explained"]),
        "spearman_share": mean(np.abs(alive_values["spearman"]) > CORRELATED),
    }


def xlogx(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1))


def _entropy(p: np.ndarray) -> np.ndarray:
    """Entropy of a Bernoulli variable in nats."""
    return -xlogx(p) - xlogx(1 - p)


def _spearman(latent: np.ndarray, pos: np.ndarray, value: np.ndarray, all_pos: np.ndarray, F: int) -> np.ndarray:
    """Rank correlation [F] of activation with position over the M tokens at `all_pos`, from the nonzero entries; ties share
    their mean rank."""
    # sorting one integer with the order of (latent, float32 value) is ten times as fast as sorting pairs
    bits = value.view(np.int32).astype(np.int64)
    key = (latent << 33) + np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    order = key.argsort()
    latent, pos, value, key = latent[order], pos[order], value[order], key[order]
    M, fired = len(all_pos), np.bincount(latent, minlength=F)
    first = np.flatnonzero(np.r_[True, np.diff(key) != 0][: len(key)])
    last = np.r_[first[1:], len(latent)][: len(first)]
    rank = np.repeat((first + 1 + last) / 2, last - first) - (np.cumsum(fired) - fired)[latent]
    zeros = M - fired
    below = np.bincount(latent[value < 0], minlength=F)
    # relative to the rank of zero, so that inactive tokens contribute nothing to the sums
    rank += np.where(value > 0, zeros[latent], 0) - (below + (zeros + 1) / 2)[latent]
    tokens = np.bincount(all_pos)
    pos_rank = np.cumsum(tokens) - (tokens - 1) / 2 - (M + 1) / 2
    variance = np.bincount(latent, rank**2, minlength=F) - np.bincount(latent, rank, minlength=F) ** 2 / M
    spread = variance * (tokens * pos_rank**2).sum()
    covariance = np.bincount(latent, rank * pos_rank[pos], minlength=F)
    return np.divide(covariance, np.sqrt(spread.clip(0)), out=np.zeros(F), where=spread > 0)
