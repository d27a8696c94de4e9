"""Minimum description length: bits per token that the dictionary's codes need (Ayonrinde et al., arXiv 2410.11179).

Activations f are rounded to the middle of bins [m w, (m + 1) w), one width w for all latents, because decoder rows have norm
1. An inactive latent stays 0. w is the coarsest of the widths 2^(i / 4) at which the reconstruction from rounded activations
has an FVU of at most `TOLERANCE` times that of the unrounded one, or of `LEAST` if that is more. Then

    bits_per_token = sum_j H(q_j) = active_bits + value_bits      q_j: the bin of latent j, or "inactive"
    active_bits    = sum_j H(active_j)                            which latents are active
    value_bits     = sum_j P(active_j) H(bin_j | active_j)        and how strongly
    uniform_bits   = active_bits + sum_j P(active_j) log2 n_j     bins of equal length in bits; n_j from lowest to highest

with H in bits, from the frequencies over all tokens. Each latent has its own optimal code, independent of the others.
The dictionary's weights and the tables of frequencies are not counted. Estimated entropies are too small, by about
(symbols - 1) / (2 ln 2 tokens) bits for each latent (Miller 1955).

SAEBench 0.6.0 measures something else (`saebench_mdl.py`, the protocol `saebench`):

- Its bins go from 0 to the largest activation of a latent, or to 100 if that is more, so each latent has a width of its own.
- The numbers of bins are settings, and the shortest length within a limit of sqrt(mean squared error) / D is chosen. That
  limit depends on the scale of the activations and on D, not on the dictionary's error before rounding.
- Inactive latents are rounded, too, to the middle of the first bin. The error thus grows with F.
- The error is measured with the 16, 24 or 32 largest activations of each token, the length with all.
- H(bin_j) is over all tokens, inactive ones included. The length then counts them twice.

The bits of a row of text are the length of its code, -sum log2 p(q_j). Their mean over tokens is `bits_per_token`, so that
intervals come from resampled rows, with the code of all rows.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.errors import UserError
from ..kernels.code import SparseCode
from ..kernels.numerics import sum_by
from . import saebench_mdl
from .evaluation import SAEBENCH, Autoencoder, Evaluation, TextActivations, chunks, squared_distance
from .intervals import Outcomes, interval
from .positions import held_out

ROWS = 1024
TOLERANCE = 1.1  # FVU from rounded activations, over the unrounded one
LEAST = 1e-3  # FVU that is always good enough
STEPS = 4  # widths per factor of 2
FINEST = 2.0**-24  # width as a share of the largest activation: float32 has no finer ones


@dataclass
class CodeLength:
    """Bits of a rounded code of n tokens on F latents: `active` and `value` [F] per token, `bins` [F] from the lowest to the
    highest (0 without a firing), `by_token` [n]."""

    active: Tensor
    value: Tensor
    bins: Tensor
    by_token: Tensor
    firing: Tensor

    @property
    def bits(self) -> float:
        return float((self.active + self.value).sum())

    @property
    def uniform(self) -> float:
        return float((self.active + self.firing * self.bins.clamp_min(1).double().log2()).sum())


@torch.no_grad()
def mdl(evaluation: Evaluation, *, rows: int = ROWS) -> dict[str, Any]:
    """Measure the description length of the dictionary's codes and its controls' on up to `rows` held-out rows.

    Returns `bits_per_token`, `bits_per_dimension` (over the D dimensions of the activations), their parts, `fvu` and
    `fvu_rounded`, `width`, `bins` (the most of a latent), `l0`, `controls` and `intervals` over rows. Lengths compare at
    equal FVU only: `at_fvu_of` {control: bits_per_token, width} has the dictionary rounded further, until its FVU is the
    rounded control's limit; None if that can't be reached. Raises UserError for a transcoder, whose output is at another
    hook.

    With the protocol `saebench`, lengths and rounding are SAEBench's (`saebench_mdl`). Then `num_bins`, `k`, `mse_loss` and
    `within_threshold` describe the chosen setting, and `settings` has all of them. There is no `width`, `bins`,
    `uniform_bits` and `at_fvu_of`, and no interval of `bits_per_token`, which isn't a mean over tokens.
    """
    began = time.monotonic()
    if (d_out := evaluation.sae.cfg.d_out) is not None:
        raise UserError(f"sae.d_out: {d_out} is not allowed; a transcoder's output is at another hook")
    collected = held_out(evaluation, rows)
    of_protocol = _by_saebench if evaluation.protocol == SAEBENCH else _by_code
    return {
        **of_protocol(evaluation, collected, squared_distance(collected.x, collected.mean)),
        "protocol_name": evaluation.protocol,
        "rows": len(collected),
        "tokens": len(collected.x),
        "seconds": round(time.monotonic() - began, 2),
    }


def _by_code(evaluation: Evaluation, collected: TextActivations, spread: Tensor) -> dict[str, Any]:
    """Lengths of codes, by our own protocol. `spread` [n]: squared distances from the mean."""
    results, bits, errors, limits = {}, {}, {}, {}
    for name, autoencoder in evaluation.autoencoders(collected, mean=False).items():
        results[name], by_token, error, limits[name] = _measure(autoencoder, collected, float(spread.sum()))
        bits[name] = _by_row(collected, by_token, torch.ones_like(by_token))
        errors[name] = _by_row(collected, error, spread)
    draw = evaluation.generator("mdl")
    scores = results.pop("sae")
    return {
        **scores,
        "at_fvu_of": _at_limits(evaluation.sae, collected, {name: limits[name] for name in results}),
        "controls": results,
        "protocol": {"tolerance": TOLERANCE, "least": LEAST, "steps": STEPS},
        "intervals": {"bits_per_token": interval(bits, draw), "fvu": interval(errors, draw)},
    }


def _by_saebench(evaluation: Evaluation, collected: TextActivations, spread: Tensor) -> dict[str, Any]:
    """Lengths by SAEBench's protocol."""
    results, errors = {}, {}
    for name, autoencoder in evaluation.autoencoders(collected, mean=False).items():
        code = collected.code(autoencoder)
        error, total = _errors(autoencoder, collected.x, code), float(spread.sum())
        shared = {"fvu": float(error.sum()) / total if total else None, "l0": code.values.numel() / len(error)}
        results[name] = saebench_mdl.figures(autoencoder, collected) | shared
        errors[name] = _by_row(collected, error, spread)
    scores = results.pop("sae")
    fvu = interval(errors, evaluation.generator("mdl"))
    return {**scores, "controls": results, "protocol": saebench_mdl.PROTOCOL, "intervals": {"fvu": fvu}}


def _measure(
    autoencoder: Autoencoder, collected: TextActivations, spread: float
) -> tuple[dict[str, float | int | None], Tensor, Tensor, float]:
    """Figures of one dictionary; bits [n] and squared error [n] per token; the limit of the rounded error, summed."""
    code, (n, D) = collected.code(autoencoder), collected.x.shape
    error = _errors(autoencoder, collected.x, code)
    total = float(error.sum())
    limit = max(TOLERANCE * total, LEAST * spread)
    width, rounded_total = coarsest_width(autoencoder, collected.x, code, limit)
    length = code_length(code, width)
    figures = {
        "bits_per_token": length.bits,
        "bits_per_dimension": length.bits / D,
        "active_bits": float(length.active.sum()),
        "value_bits": float(length.value.sum()),
        "uniform_bits": length.uniform,
        "fvu": total / spread if spread else None,
        "fvu_rounded": rounded_total / spread if spread else None,
        "width": width,
        "bins": int(length.bins.max()),
        "l0": code.values.numel() / n,
    }
    return figures, length.by_token, error, limit


def _errors(autoencoder: Autoencoder, x: Tensor, code: SparseCode) -> Tensor:
    """Squared error per token, [n]."""
    return torch.cat([squared_distance(part_x, autoencoder.decode(part)) for part_x, part in chunks(x, code)])


def _at_limits(
    sae: Autoencoder, collected: TextActivations, limits: dict[str, float]
) -> dict[str, dict[str, float] | None]:
    """Bits of the dictionary, rounded until its error is that of each control; None if its own error is larger."""
    code, found = collected.code(sae), dict[str, dict[str, float] | None]()
    for name, limit in limits.items():
        width, error = coarsest_width(sae, collected.x, code, limit)
        found[name] = {"bits_per_token": code_length(code, width).bits, "width": width} if error <= limit else None
    return found


def coarsest_width(autoencoder: Autoencoder, x: Tensor, code: SparseCode, limit: float) -> tuple[float, float]:
    """The coarsest width 2^(i / `STEPS`) whose squared error over x [n, D] is at most `limit`, and that error; the finest
    width if there is none. `code` is ragged and has no zeros."""
    largest = float(code.values.abs().max()) if len(code.values) else 1.0
    step = math.ceil(STEPS * math.log2(2 * largest))
    while True:
        width = 2 ** (step / STEPS)
        step, total, finest = step - 1, 0.0, width <= FINEST * largest
        for part_x, part in chunks(x, code):
            total += float(squared_distance(part_x, autoencoder.decode(rounded(part, width))).sum())
            if total > limit and not finest:  # errors only add up, so most coarse widths end after a few chunks
                break
        else:
            return width, total


def rounded(code: SparseCode, width: float) -> SparseCode:
    """The code with each activation in the middle of its bin."""
    return code.with_values((_bins(code.values, width) + 0.5) * width)


def code_length(code: SparseCode, width: float) -> CodeLength:
    """Length of a ragged code without zeros, rounded to bins of this width. Memory: a few integers per entry."""
    F, n, latent = code.n_latents, code.n_tokens, code.indices.long()
    bins = _bins(code.values, width).long()
    ends = {how: bins.new_zeros(F).scatter_reduce(0, latent, bins, how, include_self=False) for how in ("amin", "amax")}
    firings = torch.bincount(latent, minlength=F)
    spans = torch.where(firings > 0, ends["amax"] - ends["amin"] + 1, 0)
    symbols, symbol, counts = torch.unique(  # only bins in use: an outlier may be millions of bins away
        latent * spans.max() + bins - ends["amin"][latent], return_inverse=True, return_counts=True
    )
    owner, shares = symbols // spans.max().clamp_min(1), counts.double() / n
    active, inactive = firings.double() / n, 1 - firings.double() / n
    code_of_symbol = -shares.log2()  # bits of "active, in this bin"
    code_of_zero = -torch.where(firings < n, inactive, 1.0).log2()
    totals = sum_by(owner, shares * code_of_symbol, F) + inactive * code_of_zero
    which = torch.special.entr(active) / math.log(2) + inactive * code_of_zero
    by_token = sum_by(code.rows, code_of_symbol[symbol] - code_of_zero[latent], n) + code_of_zero.sum()
    return CodeLength(which, (totals - which).clamp_min(0), spans, by_token, active)


def _bins(values: Tensor, width: float) -> Tensor:
    return torch.floor(values / width)


def _by_row(collected: TextActivations, gained: Tensor, counted: Tensor) -> Outcomes:
    """Ratio of sums over rows of figures per token [n]."""
    sums = (sum_by(collected.row, part, len(collected))[:, None].cpu().numpy() for part in (gained, counted))
    return Outcomes(*sums, bounded=False)
