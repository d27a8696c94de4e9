"""Positional fidelity: does a dictionary work as well late in a row as early?

    SNR_b = -10 log10(sum |x - x_hat|^2 / sum |x - mean x|^2) dB        sums over the tokens at positions in bin b

`snr` has each bin's, their mean and the worst bin's. 10 dB more are a tenth of the error, so the figure has no ceiling where
explained variance and CE recovered are near 1 (20 dB is an explained variance of 0.99). Bins are those of `positions`.
Further:

    CE recovered   as in `core`, in each bin, with their mean and worst bin
    shift s   A are the latents active at a token, B those active when its text is s tokens later, after another row's text:
              share that stay |A & B| / |A|, and Jaccard |A & B| / |A | B|; means over tokens

At shift 0 only the preceding text changes. What a larger shift loses beyond that is due to position.
"""

import math
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.errors import UserError
from ..engine.process.progress import progress_bar
from ..engine.stream import TokenRows
from ..kernels.code import SparseCode
from ..kernels.numerics import sum_by
from .evaluation import Evaluation, TextActivations, of_tokens, squared_distance
from .positions import BinnedTokens, held_out
from .replacement_loss import losses_and_kl, rows_at_once

SHIFTS = (0, 16, 64)
BEFORE = 16  # tokens of its own row that precede the text to be shifted
ROWS = 32  # rows per forward pass
LEAST = 1e-12  # share of the error below which only rounding is left: at most 120 dB


@torch.no_grad()
def fidelity(
    evaluation: Evaluation, *, rows: int = 1024, bins: int = 16, ce_rows: int = 64, shift_rows: int = 64
) -> dict[str, Any]:
    """Measure positional fidelity of the dictionary and its controls: reconstruction on `rows` held-out rows, CE on the
    first `ce_rows` (on kept tokens after kept tokens), shifts on `shift_rows`.

    Raises UserError for a transcoder, whose output is at another hook, and for rows too short for the shifts.
    """
    began = time.monotonic()
    if evaluation.sae.cfg.d_out is not None:
        raise UserError(
            f"sae.d_out: {evaluation.sae.cfg.d_out} is not allowed; a transcoder's output is at another hook"
        )
    collected = held_out(evaluation, rows)
    drawn = BinnedTokens.of(evaluation, collected, bins, 0, evaluation.generator("fidelity"))
    ce_rows = max(1, min(ce_rows, evaluation.sizes.ce_rows) // evaluation.share)
    shift_rows = evaluation.rows(shift_rows)
    before, shifted = _shifted(evaluation, collected, shift_rows)
    autoencoders = evaluation.autoencoders(collected, mean=False)
    ce_tokens = int(collected.kept[:ce_rows].sum())
    first = torch.arange(len(collected.x), device=collected.x.device) < ce_tokens
    spliced = {name: a.decode(of_tokens(collected.code(a), first)) for name, a in autoencoders.items()}
    ce = _ce(evaluation, collected, drawn, ce_rows, {"zero": torch.zeros_like(collected.x[:ce_tokens]), **spliced})
    bin_ = torch.from_numpy(drawn.position_bin).to(collected.x.device)[collected.pos]

    def by_bin(squares: Tensor) -> Tensor:
        return sum_by(bin_ + 1, squares, bins + 1)[1:].cpu()

    spread = by_bin(squared_distance(collected.x, collected.mean))
    figures: dict[str, dict[str, Any]] = {}
    for name, autoencoder in autoencoders.items():
        errors = by_bin(squared_distance(collected.x, autoencoder.decode(collected.code(autoencoder))))
        losses = zip(ce["zero"], ce[name], ce["clean"], strict=True)
        recovered = [(zero - loss) / (zero - clean) if zero > clean else None for zero, loss, clean in losses]
        old = before.code(autoencoder)
        figures[name] = {
            "snr": _over_bins((-10 * (errors / spread).clamp_min(LEAST).log10()).tolist()),
            "ce_recovered": _over_bins(recovered),
            "shifts": {str(shift): _overlap(old, later.code(autoencoder)) for shift, later in shifted.items()},
        }
    ends = [np.flatnonzero(drawn.position_bin == b)[[0, -1]].tolist() for b in range(bins)]
    scores = figures.pop("sae")
    return {**scores, "controls": figures, "bins": ends, "seconds": round(time.monotonic() - began, 2)}


def _ce(
    evaluation: Evaluation, collected: TextActivations, drawn: BinnedTokens, rows: int, decoded: dict[str, Tensor]
) -> dict[str, list[float]]:
    """Mean loss in each bin on the first rows, over kept tokens after kept tokens: of the `clean` model, and with each of
    the `decoded` x [n, D] at the hook."""
    model, T = evaluation.stream.model, collected.tokens.shape[1]
    summed = {name: torch.zeros(drawn.bins + 1, dtype=torch.float64) for name in ("clean", *decoded)}
    counts, used = torch.zeros(drawn.bins + 1, dtype=torch.float64), 0
    bin_ = torch.from_numpy(drawn.position_bin) + 1
    size = min(ROWS, rows_at_once(model, T, collected.x.shape[1], len(decoded)))
    batches = zip(collected.tokens[:rows].split(size), collected.kept[:rows].split(size), strict=True)
    with progress_bar("fidelity: model behaviour", total=min(rows, len(collected)), unit="rows") as bar:
        for tokens, kept in batches:
            span, used = slice(used, used + int(kept.sum())), used + int(kept.sum())
            x, mask = model.activations(tokens), kept.to(model.device)[..., None]

            scored = kept.clone()
            scored[:, :-1] &= kept[:, 1:]
            scored[:, -1] = False
            bins = bin_[scored.nonzero()[:, 1]]
            values = {name: partial(x.masked_scatter, mask, value[span].to(x.dtype)) for name, value in decoded.items()}
            for name, (loss, _) in losses_and_kl(model, tokens, x, scored, values).items():
                summed[name].index_add_(0, bins, loss)
            counts += torch.bincount(bins, minlength=len(counts))
            bar.advance(len(tokens))
    return {name: (losses / counts)[1:].tolist() for name, losses in summed.items()}


def _over_bins(values: list[float | None]) -> dict[str, Any]:
    values = [value if value is not None and math.isfinite(value) else None for value in values]
    known = [value for value in values if value is not None]
    return {"by_bin": values, "mean": sum(known) / len(known) if known else None, "worst": min(known, default=None)}


def _shifted(
    evaluation: Evaluation, collected: TextActivations, rows: int
) -> tuple[TextActivations, dict[int, TextActivations]]:
    """Text of some rows at its place, and after other rows' text, later by each of `SHIFTS`."""
    T = collected.tokens.shape[1]
    least = BEFORE + max(SHIFTS) + 2  # tokens of a row
    width = T - least + 1  # tokens of text that are shifted
    end = max(T - width, 1 + BEFORE + width)  # positions that a row must have
    full = collected.kept[:, end - 1 :].any(1).nonzero().flatten()[: rows + 1]
    if width < 1 or len(full) < 2:
        raise UserError(f"stream.context: {T} is not allowed; shifts need two rows of {least} tokens")
    texts, other_texts = collected.tokens[full[:-1]], collected.tokens[full[1:]]

    def placed(before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of tokens, activations of the shifted ones [R, width, D], and which of them are kept [R, width]."""
        tokens = torch.cat([texts[:, :1], before, texts[:, 1 + BEFORE :][:, :width]], 1)
        length, row = torch.full((len(tokens),), tokens.shape[1]), torch.arange(len(tokens))
        x, kept = [], []
        for batch in row.split(ROWS):
            rows = TokenRows(tokens[batch], length[batch], torch.zeros_like(tokens[batch]), batch)
            read, batch_kept = evaluation.stream.read(rows)
            x.append(next(iter(read.values()))[:, -width:].float())
            kept.append(batch_kept[:, -width:])
        return tokens, torch.cat(x), torch.cat(kept)

    placements = [placed(texts[:, 1 : 1 + BEFORE]), *(placed(other_texts[:, 1 : 1 + BEFORE + s]) for s in SHIFTS)]
    common = torch.stack([kept for _, _, kept in placements]).all(0)  # tokens kept at every shift

    def chosen(tokens: Tensor, x: Tensor) -> TextActivations:
        kept = torch.zeros_like(tokens, dtype=torch.bool)
        kept[:, -width:] = common.to(kept.device)
        return TextActivations.of(tokens, kept, x[common])

    unshifted, *shifted = (chosen(tokens, x) for tokens, x, _ in placements)
    return unshifted, dict(zip(SHIFTS, shifted, strict=True))


def _overlap(old: SparseCode, new: SparseCode) -> dict[str, float | None]:
    """Overlap of the active latents in two codes of the same tokens: share of the old ones that stay, and Jaccard."""
    F, n = old.n_latents, old.n_tokens
    sets = [(code.rows * F + code.indices).cpu() for code in (old, new)]
    both = torch.bincount(sets[0][torch.isin(*sets)] // F, minlength=n).double()
    first, second = (torch.bincount(entries // F, minlength=n) for entries in sets)
    shares = {"stay": (both / first)[first > 0], "jaccard": (both / (first + second - both))[first + second > 0]}
    return {name: float(values.mean()) if len(values) else None for name, values in shares.items()}
