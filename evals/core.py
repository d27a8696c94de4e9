"""Core metrics: L0, explained variance, CE recovered and dead latents of a dictionary and its controls, also per position.

x is an activation, x_hat its reconstruction, mu the mean of x over the evaluated tokens, and CE the language model's mean
next-token loss in nats with the value at the hook replaced:

    explained variance = 1 - sum |x - x_hat|^2 / sum |x - mu|^2         0: as good as predicting the mean
    CE recovered       = (CE_zero - CE_sae) / (CE_zero - CE_clean)      0: as bad as zeros; 1: as good as the model
    CE recovered over mean ablation: the same with CE_mean (mu in place of x) instead of CE_zero
    KL recovered       = (KL_zero - KL_sae) / KL_zero                   KL(p_clean || p) per token, in nats
    L0                 = latents above zero per token
    dead fraction      = share of latents that fire on no evaluated token

    mse                = E |x - x_hat|^2 / D
    cosine             = E <x, x_hat> / |x| |x_hat|
    l2_ratio           = E |x_hat| / |x|
    relative_reconstruction_bias = E |x_hat|^2 / E <x, x_hat>           (arXiv 2404.16014, equation 10)

`NAME_error` is a standard error over rows. For a ratio sum a_r / sum b_r over R rows, it is
sqrt(R / (R - 1) sum (a_r - ratio b_r)^2) / |sum b_r|.

`saebench` has figures as SAEBench 0.6.0 computes them. It has two explained variances. The first is
1 - E |x - x_hat|^2 / (E |x|^2 - (E_d E x_d^2)^2). Its last term is a mean square, not a mean, so the denominator is not a
variance. The second (legacy) is the mean over tokens of 1 - |x - x_hat|^2 / |x - mu_b|^2, dominated by tokens near mu_b.
Its mse is the mean over tokens of |x - x_hat|^2 / n_b. mu_b and n_b are the mean and the number of tokens of a batch of 16
rows (SAEBench's default), whatever `rows_per_forward` is. The first explained variance and the bias average over batches.
SAEBench's ablation zeroes every position, `<bos>` included, and its KL includes the last token of each row.

Per position, both sums run over the tokens at that position (mu stays the overall mean), and "dead" means never firing at
that position. Padding, special tokens and massive activations are left out, as in training: they are neither reconstructed
nor counted, and keep their activation when the others are replaced.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.metrics import fvu, per_token
from ..engine.stream import ActivationStream
from ..engine.unit_decoder import Dictionary
from ..kernels.numerics import sum_by
from .evaluation import Autoencoder, Neurons, fitted, in_rows
from .held_out import EVERYWHERE, Effect, HeldOut, RowBatch, SavedEffects
from .intervals import Outcomes, interval
from .row_budget import CE_ROWS, ROWS


def core(
    stream: ActivationStream,
    sae: Dictionary,
    controls: Mapping[str, Dictionary],
    *,
    rows: int = ROWS,
    ce_rows: int = CE_ROWS,
    neurons: bool = True,
    held_out: HeldOut | None = None,
    saved: SavedEffects | None = None,
) -> dict[str, Any]:
    """Measure core metrics of `sae` on `rows` held-out rows of the stream's text (CE on the first `ce_rows` of them).

    `controls` are dictionaries measured in the same way (`random`). `mean` is always added. `lm_neurons`, the K largest
    neurons of each activation, is added unless `sae` is a transcoder or `neurons` is False. Returns the metrics of `sae`,
    `per_position` lists, a histogram of firing rates, for each of its `latents` the firing rate and the mean number of
    tokens it fires on in rows where it fires, and the metrics of each control under `controls`. `held_out`: these rows, if
    they were already read for another dictionary at the same hooks. `saved`: where an interrupted measurement continues.
    """
    autoencoders: dict[str, Autoencoder] = {
        name: fitted(name, d, stream) for name, d in {"sae": sae, **controls}.items()
    }
    device = stream.model.device
    if sae.cfg.d_out is None and neurons:
        autoencoders["lm_neurons"] = Neurons(sae.cfg.d_in, sae.cfg.k, device)
    text = held_out or HeldOut(stream, rows, ce_rows, [len(autoencoder.W_dec) for autoencoder in autoencoders.values()])
    tallies = {name: _Tally(autoencoder, text) for name, autoencoder in autoencoders.items()}
    text.visit([tally.add for tally in tallies.values()])
    replacements = {name: partial(_reconstruct, autoencoder) for name, autoencoder in autoencoders.items()}
    effects = text.replace(replacements, saved)
    results = {name: _scores(name, tally, text, effects) for name, tally in {**tallies, "mean": None}.items()}
    sae_tally = tallies["sae"]
    rate = sae_tally.fired.double() / text.tokens
    per_row = sae_tally.fired / sae_tally.rows_fired.clamp_min(1)
    losses = {name: effect for name, effect in effects.items() if name != EVERYWHERE}
    return {
        **results["sae"],
        "ce": {name: _mean(effect, 1) for name, effect in losses.items()},
        "kl": {name: _mean(effect, 2) for name, effect in losses.items() if name != "clean"},
        "tokens": text.tokens,
        "ce_tokens": int(effects["clean"].by_row[0].sum()),
        "rows": text.rows,
        "ce_rows": text.ce_rows,
        "model": stream.model.name,
        "hook": stream.model.hook,
        "massive": stream.norms.report(),
        "controls": {name: scores for name, scores in results.items() if name != "sae"},
        "intervals": _intervals(tallies, text, effects),
        "firing_rates": _histogram(rate.cpu(), text.tokens),
        **({"warnings": warnings} if (warnings := _warnings(text, effects)) else {}),
        "latents": {
            "firing_rate": [round(value, 8) for value in rate.tolist()],
            "tokens_per_row": [round(value, 4) for value in per_row.tolist()],
        },
    }


class _Tally:
    """Sums over tokens for one dictionary: squared error float64 [T] by position and [R] by row, L0 [T], tokens and rows on
    which each latent fired [F], whether it fired at each position [T, F], and further measures of reconstruction."""

    def __init__(self, autoencoder: Autoencoder, text: HeldOut):
        T, F, device = len(text.count), len(autoencoder.W_dec), text.device
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.autoencoder, self.mean = autoencoder, text.mean
        self.errors, self.l0, self.errors_of_rows = zeros(T), zeros(T), zeros(text.rows)
        self.fired, self.rows_fired = (torch.zeros(F, dtype=torch.int64, device=device) for _ in range(2))
        self.fired_at = torch.zeros(T, F, dtype=torch.bool, device=device)
        self._n, self._sums = text.tokens, zeros(9)
        self._batches: list[Tensor] = []  # SAEBench's means, per batch of rows

    @torch.no_grad()
    def add(self, batch: RowBatch) -> None:
        F, T = self.fired_at.shape[1], len(self.errors)
        before, squares, mean = self._sums.clone(), torch.zeros_like(self.mean), batch.target.double().mean(0)
        fired_in_rows = torch.zeros(len(batch.kept) * F, dtype=torch.bool, device=self.fired.device)
        places = batch.pos, batch.row
        for x, target, pos, row in in_rows(batch.pos, batch.x, batch.target, *places, latents=F):
            code = self.autoencoder.encode_sparse(x, pos)
            x_hat = self.autoencoder.decode(code)
            y, y_hat = target.double(), x_hat.double()
            errors = (y - y_hat).square().sum(1)
            self.errors += sum_by(pos, errors, T)
            self.errors_of_rows += sum_by(row, errors, len(self.errors_of_rows))
            size, size_hat, dot = y.norm(dim=1), y_hat.norm(dim=1), (y * y_hat).sum(1)
            squares += y.square().sum(0)
            legacy = 1 - errors / (y - mean).square().sum(1)
            nonzero = (size * size_hat).clamp_min(torch.finfo(torch.float32).tiny)
            ratio = size_hat / size.clamp_min(1e-12)
            per_token = (errors, size, size_hat, ratio, dot / nonzero, dot, size_hat**2, legacy)
            l1 = code.live(code.values).double().sum()
            self._sums += torch.stack([*(value.sum() for value in per_token), l1])
            self.l0 += sum_by(pos, code.l0().double(), T)
            active = (code.live(code.values) > 0).flatten()
            latents = code.indices.flatten()[active].long()
            self.fired += torch.bincount(latents, minlength=F)
            self.fired_at[pos[code.rows].flatten()[active], latents] = True
            fired_in_rows[(row[code.rows].flatten()[active] - batch.first) * F + latents] = True
        self.rows_fired += fired_in_rows.view(-1, F).sum(0)
        if n := len(batch.pos):
            sums = (self._sums - before) / n
            self._batches.append(torch.stack([sums[0], squares.sum() / n, squares.mean() / n, sums[6] / sums[5]]))

    def quality(self) -> dict[str, Any]:
        errors, size, size_hat, ratio, cosine, dot, square_hat, _, l1 = (self._sums / self._n).tolist()
        return {
            "mse": errors / len(self.mean), "cosine": cosine, "l1": l1, "l2_norm_in": size, "l2_norm_out": size_hat,
            "l2_ratio": ratio, "relative_reconstruction_bias": square_hat / dot if dot else None,
        }  # fmt: skip

    def saebench(self, effects: Mapping[str, Effect], name: str) -> dict[str, float | None]:
        batch_means = torch.stack(self._batches)
        errors, squares, per_dimension, bias = batch_means.mean(0).tolist()
        kl, kl_zero = (effects[key].kl_of_all / max(1, effects[key].tokens) for key in (name, EVERYWHERE))
        return {
            "explained_variance": _finite(1 - errors / max(squares - per_dimension**2, 1e-300)),
            "explained_variance_legacy": _finite(float(self._sums[7] / self._n)),
            "mse": float(batch_means[:, 0].sum() / self._n),
            "relative_reconstruction_bias": _finite(bias),
            "ce_loss_with_ablation": _mean(effects[EVERYWHERE], 1),
            "ce_loss_score": _recovered(effects, EVERYWHERE, name),
            "kl_div_with_sae": kl,
            "kl_div_with_ablation": kl_zero,
            "kl_div_score": (kl_zero - kl) / kl_zero if kl_zero > 0 else None,
        }


@torch.no_grad()
def _reconstruct(autoencoder: Autoencoder, x: Tensor, pos: Tensor) -> Tensor:
    chunks = in_rows(pos, x, pos, latents=len(autoencoder.W_dec))
    return torch.cat([autoencoder.decode(autoencoder.encode_sparse(*chunk)) for chunk in chunks])


def _scores(name: str, tally: _Tally | None, text: HeldOut, effects: Mapping[str, Effect]) -> dict[str, Any]:
    """Metrics of a dictionary, or of the control `mean`, which has no tally."""
    errors, errors_of_rows = (
        (text.spread, text.spread_of_rows) if tally is None else (tally.errors, tally.errors_of_rows)
    )
    l0 = torch.zeros_like(errors) if tally is None else tally.l0
    dead = torch.ones_like(errors) if tally is None else (~tally.fired_at).double().mean(1)
    count, effect = text.count, effects[name]
    losses = {key: effects[key].by_position[1] / effects[key].by_position[0] for key in ("clean", "zero", name)}
    kl, kl_zero = (float(effects[key].by_row[2].sum()) for key in (name, "zero"))
    clean, zero = effects["clean"], effects["zero"]
    return {
        "explained_variance": 1 - fvu(errors, text.spread) if text.varies else None,
        "explained_variance_error": _error(errors_of_rows, text.spread_of_rows) if text.varies else None,
        "ce_recovered": _recovered(effects, "zero", name),
        "ce_recovered_error": _error(zero.by_row[1] - effect.by_row[1], zero.by_row[1] - clean.by_row[1]),
        "ce_recovered_over_mean": _recovered(effects, "mean", name),
        "kl_recovered": (kl_zero - kl) / kl_zero if kl_zero > 0 else None,
        **({} if tally is None else tally.quality() | {"saebench": tally.saebench(effects, name)}),
        "l0": per_token(l0, count),
        "dead_fraction": 1.0 if tally is None else float((tally.fired == 0).double().mean()),
        "per_position": {
            "position": list(range(len(count))),
            "tokens": count.tolist(),
            "explained_variance": _numbers(1 - errors / text.spread if text.varies else errors * torch.nan),
            "ce_recovered": _numbers((losses["zero"] - losses[name]) / (losses["zero"] - losses["clean"])),
            "l0": _numbers(l0 / count),
            "dead_fraction": _numbers(torch.where(count > 0, dead, torch.nan)),
        },
    }


def _intervals(tallies: Mapping[str, _Tally], text: HeldOut, effects: Mapping[str, Effect]) -> dict[str, Any]:
    """Intervals over rows of text; None for a score that can't be measured."""

    def of(gained: Mapping[str, Tensor], counted: Tensor) -> dict[str, Any] | None:
        if not counted.sum() > 0:
            return None
        outcomes = {
            name: Outcomes(rows.cpu().numpy()[:, None], counted.cpu().numpy()[:, None], bounded=False)
            for name, rows in gained.items()
        }
        return interval(outcomes, np.random.default_rng([*b"core intervals"]))

    zero, clean, spread = effects["zero"].by_row, effects["clean"].by_row, text.spread_of_rows
    return {
        "explained_variance": of({name: spread - t.errors_of_rows for name, t in tallies.items()}, spread),
        "ce_recovered": of({name: zero[1] - effects[name].by_row[1] for name in tallies}, zero[1] - clean[1]),
        "kl_recovered": of({name: zero[2] - effects[name].by_row[2] for name in tallies}, zero[2]),
    }


def _warnings(text: HeldOut, effects: Mapping[str, Effect]) -> list[str]:
    messages = []
    if not text.varies:
        messages.append(
            f"the activations of the {text.tokens:,} held-out tokens don't vary; there is no variance to explain"
        )
    if not effects["clean"].by_row[0].sum() > 0:
        messages.append(
            f"no token that counts in {text.ce_rows:,} held-out rows has a next one; CE is not measured (longer documents "
            "have some)"
        )
    return messages


def _recovered(effects: Mapping[str, Effect], floor: str, name: str) -> float | None:
    clean, low, loss = (_mean(effects[key], 1) for key in ("clean", floor, name))
    if clean is None or low is None or loss is None:
        return None
    return (low - loss) / (low - clean) if low > clean else None


def _mean(effect: Effect, index: int) -> float | None:
    """Loss (index 1) or KL (2) per token, summed by position first; None without tokens."""
    tokens = effect.by_position[0].sum()
    return float(effect.by_position[index].sum() / tokens) if tokens > 0 else None


def _error(numerators: Tensor, denominators: Tensor) -> float | None:
    """Standard error of sum(numerators) / sum(denominators), both [R]; None for a single row."""
    R, total = len(numerators), float(denominators.sum())
    if R < 2 or total == 0:
        return None
    residuals = numerators - numerators.sum() / total * denominators
    return float((R / (R - 1) * residuals.square().sum()).sqrt() / abs(total))


def _numbers(values: Tensor) -> list[float | None]:
    """Values for JSON, None if not finite (a position without tokens)."""
    return [_finite(value) for value in values.tolist()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _histogram(rate: Tensor, tokens: int) -> dict[str, Any]:
    """Count latents by log10 of their firing rate, and latents that never fired."""
    alive = rate[rate > 0].log10()
    low = math.floor(-math.log10(tokens))
    counts = torch.histc(alive, bins=10 * -low, min=low, max=0) if len(alive) else torch.zeros(10 * -low)
    edges = torch.linspace(low, 0, 10 * -low + 1)
    return {
        "log10_edges": [round(e, 6) for e in edges.tolist()],
        "latents": counts.int().tolist(),
        "never": int((rate == 0).sum()),
    }
