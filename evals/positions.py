"""Position specialization: how much each latent tells of where in a row it is active, against a reference dictionary.

Over position bins that hold equally many tokens (contiguous runs of positions, `<bos>` left out, surplus tokens dropped
at random), for a latent with activation a, which is active where a != 0:

    I_j = H(active) - E_bin H(active | bin)    in nats, less its mean over shuffles of activity within rows, at least 0
    S_j = I_j / H(active)                      specialization; 1: position decides whether the latent is active
    nats per firing = sum_bin q log(q B)       with q(bin) = P(bin | active); log R for a latent confined to 1 of R ranges
    variance explained = 1 - E_bin Var(a | bin) / Var(a)
    retention = sum_j min(S_new(j), S_ref(j)) / sum_j S_ref(j)

with j running over a reference dictionary's latents and new(j) the latent that has the largest decoder cosine with j, and
j with it, of at least 0.7 (without one, S_new is 0). I > 0.05 makes a unit positional in Voita et al. (arXiv 2309.04827);
the variance and the bound on Spearman's |rho|, 0.4, are those of arXiv 2506.15679. An active-or-not latent has I <= log 2.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.errors import UserError
from ..engine.process.progress import progress_bar
from ..engine.unit_decoder import Dictionary
from ..kernels.code import SparseCode
from .evaluation import CHUNK, Evaluation, TextActivations, collect, fitted

FIRST = 8  # positions at the beginning of a row, of which models make much: figures are given with and without them
POSITIONAL, CORRELATED, MATCHED = 0.05, 0.4, 0.7


def positions(
    evaluation: Evaluation, reference: Dictionary | None = None, *, rows: int = 1024, bins: int = 16, shuffles: int = 20
) -> dict[str, Any]:
    """What position tells of each latent's activity on `rows` held-out rows; of the dictionary and its controls.

    Means and shares are over the latents that fire (`alive`); `after_first_8` is the same on positions from 8 on. With a
    `reference`, its figures and the `retention`, else None. Raises UserError for bins that the text can't fill.
    """
    if shuffles < 1:
        raise UserError(f"shuffles: {shuffles} is not allowed; give at least 1")
    collected = held_out(evaluation, rows)
    autoencoders = evaluation.autoencoders(collected, mean=False)
    if reference is not None:
        autoencoders["reference"] = fitted("reference", reference, evaluation.stream)
    figures: dict[str, dict[str, Any]] = {name: {} for name in autoencoders}
    score: dict[str, np.ndarray] = {}
    with progress_bar("positions: information", total=2 * len(autoencoders), unit="dictionaries") as bar:
        for first in (0, FIRST):
            draw = evaluation.generator(f"positions from {first}")
            drawn = BinnedTokens.of(evaluation, collected, bins, first, draw)
            shuffled = [drawn.shuffled(draw) for _ in range(shuffles)]
            for name, autoencoder in autoencoders.items():
                latents = information(collected.code(autoencoder), drawn, shuffled)
                result = summary(latents)
                figures[name] |= {"after_first_8": result} if first else result | {"tokens": len(drawn.at)}
                if not first:
                    score[name] = latents["specialization"]
                bar.advance(1)
    retention = None
    if reference is not None:
        match = matches(autoencoders["sae"].W_dec, autoencoders["reference"].W_dec)
        retained = np.minimum(np.where(match < 0, 0, score["sae"][match]), score["reference"]).sum()
        total = score["reference"].sum()
        retention = {"value": float(retained / total) if total > 0 else None, "matched": float((match >= 0).mean())}
    return {
        **figures.pop("sae"),
        "retention": retention,
        "reference": figures.pop("reference", None),
        "controls": figures,
        "bins": bins,
    }


@dataclass
class BinnedTokens:
    """M tokens of a collection, equally many in each of B bins: `at` [M], their ascending places among its n; `bin`, `row`
    and `pos` [M]. `of_position` [T]: the bin of a position, -1 where it is in none."""

    at: np.ndarray
    bin: np.ndarray
    row: np.ndarray
    pos: np.ndarray
    of_position: np.ndarray
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
            raise UserError(
                f"bins: {bins} is not allowed; give 2 to {(counts > 0).sum()}, the positions that have text"
            )
        # bins by the middle of each position's tokens, all tokens in order of position
        middle = np.cumsum(counts) - counts / 2
        of_position = np.where(counts > 0, (middle * bins / counts.sum()).astype(np.int64), -1)
        bin_ = np.where(special, -1, of_position[pos])
        sizes = np.bincount(bin_[bin_ >= 0], minlength=bins)
        if not sizes.all():
            raise UserError(f"bins: {bins} is not allowed; too many for tokens that are this uneven over positions")
        of_bins = [np.flatnonzero(bin_ == b) for b in range(bins)]
        tokens = np.sort(np.concatenate([draw.permutation(in_bin)[: sizes.min()] for in_bin in of_bins]))
        return cls(tokens, bin_[tokens], row[tokens], pos[tokens], of_position, bins, len(pos))

    def shuffled(self, draw: np.random.Generator) -> np.ndarray:
        """Bins [M] in a random order within each row: as if every latent's activity were shuffled there."""
        return self.bin[((self.row << 32) + draw.integers(2**32, size=len(self.row))).argsort()]

    def entries(self, code: SparseCode) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Latent, token (of the M) and value of each of a code's entries on the drawn tokens."""
        place = np.full(self.n, -1)
        place[self.at] = np.arange(len(self.at))
        token = place[code.rows.cpu().numpy()]
        here = token >= 0
        return code.indices.cpu().numpy()[here].astype(np.int64), token[here], code.values.cpu().numpy()[here]


def information(code: SparseCode, drawn: BinnedTokens, shuffled: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Of each latent [F], by the names of the result: `firings`, and the quantities of the module's formulas."""
    latent, token, value = drawn.entries(code)
    F, B, M = code.n_latents, drawn.bins, len(drawn.at)

    def nats(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """I_j, and nats per firing."""
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
    """How often each latent fires in each bin, [F, B], for each of several assignments of the M tokens to bins. `latent` and
    `token` [n] say which fires where. A matrix product counts where more than one in 16 fires; unless `dense` says."""
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
    for begin in range(0, M, CHUNK):
        here = slice(*np.searchsorted(token, (begin, begin + CHUNK)))
        size = min(CHUNK, M - begin)
        fires, in_cell = np.zeros((size, F), np.float32), np.zeros((size, len(bins) * B), np.float32)
        fires[token[here] - begin, latent[here]] = 1
        np.put_along_axis(in_cell, cells[begin : begin + size], 1, 1)
        counts += fires.T @ in_cell  # exact: sums of so many ones
    return [block.astype(np.int64) for block in np.split(counts, len(bins), 1)]


def matches(new: Tensor, reference: Tensor) -> np.ndarray:
    """Of each row of reference [F_ref, D], the row of new [F, D] that is its best match by cosine, and the other way round;
    int64 [F_ref], -1 where there is none of at least 0.7."""
    new, reference = (torch.nn.functional.normalize(W.detach().float(), dim=1) for W in (new, reference))
    nearest = [(chunk @ new.T).max(1) for chunk in reference.split(CHUNK)]
    cosine, best = torch.cat([p.values for p in nearest]), torch.cat([p.indices for p in nearest])
    back = torch.cat([(chunk @ reference.T).argmax(1) for chunk in new.split(CHUNK)])
    mutual = (back[best] == torch.arange(len(best), device=best.device)) & (cosine >= MATCHED)
    return torch.where(mutual, best, -1).cpu().numpy()


def held_out(evaluation: Evaluation, rows: int) -> TextActivations:
    """Held-out rows; of the embedded language those that the other evals have."""
    if evaluation.is_testbed:
        return evaluation.labelled(rows)
    rows = evaluation.rows(rows)
    return evaluation.once(
        f"held out {rows}", lambda: collect(evaluation.stream, evaluation.stream.held_out(rows), rows)
    )


def summary(latents: dict[str, np.ndarray]) -> dict[str, Any]:
    """Of what `information` gives, over the latents that fire; nats per firing weighted by firings."""
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
    """Of a coin, in nats."""
    return -xlogx(p) - xlogx(1 - p)


def _spearman(latent: np.ndarray, pos: np.ndarray, value: np.ndarray, all_pos: np.ndarray, F: int) -> np.ndarray:
    """Rank correlation [F] of activation with position over the M tokens at `all_pos`, from the entries that aren't zero;
    ties share their mean rank."""
    # one integer, ordered as (latent, float32 value) is, sorts ten times as fast as the pair
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
    # counted from the rank of zero, tokens that the latent isn't active on contribute nothing to the sums
    rank += np.where(value > 0, zeros[latent], 0) - (below + (zeros + 1) / 2)[latent]
    tokens = np.bincount(all_pos)
    of_pos = np.cumsum(tokens) - (tokens - 1) / 2 - (M + 1) / 2
    of_latents = np.bincount(latent, rank**2, minlength=F) - np.bincount(latent, rank, minlength=F) ** 2 / M
    spread = of_latents * (tokens * of_pos**2).sum()
    covariance = np.bincount(latent, rank * of_pos[pos], minlength=F)
    return np.divide(covariance, np.sqrt(spread.clip(0)), out=np.zeros(F), where=spread > 0)
