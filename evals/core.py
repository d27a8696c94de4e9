"""Core metrics of a dictionary: L0, explained variance, CE recovered, dead latents; overall, per position, and of controls.

With x an activation, x_hat its reconstruction, mu the mean of x over the evaluated tokens, and CE the language model's
mean next-token loss in nats when the hook's value is replaced:

    explained variance = 1 - sum |x - x_hat|^2 / sum |x - mu|^2         a dictionary that predicts the mean scores 0
    CE recovered       = (CE_zero - CE_sae) / (CE_zero - CE_clean)      0: as bad as zeros; 1: as good as the model
    CE recovered over mean ablation: the same with CE_mean, from mu in place of x
    KL recovered       = (KL_zero - KL_sae) / KL_zero                   KL(p_clean || p) per token, in nats
    L0                 = latents above zero per token
    dead fraction      = share of latents that fire on no evaluated token

    mse                = E |x - x_hat|^2 / D
    cosine             = E <x, x_hat> / |x| |x_hat|
    l2_ratio           = E |x_hat| / |x|
    relative_reconstruction_bias = E |x_hat|^2 / E <x, x_hat>           (arXiv 2404.16014, equation 10)

A figure's `_error` is its standard error, with rows of text as the units that vary: of a ratio sum a_r / sum b_r over R
rows, sqrt(R / (R - 1) sum (a_r - ratio b_r)^2) / |sum b_r|.

`saebench` holds figures as SAEBench 0.6.0 works them out. It calls two of them explained variance:
1 - E |x - x_hat|^2 / (E |x|^2 - (E_d E x_d^2)^2), whose last term is not a mean but a mean square and so says nothing of
variance; and (legacy) the mean over tokens of 1 - |x - x_hat|^2 / |x - mu_b|^2, which tokens near mu_b dominate. Its mse is
the mean over tokens of |x - x_hat|^2 / n_b. mu_b and n_b are mean and number of tokens of a batch of 16 rows, SAEBench's
default, whatever `rows_per_forward` is. Means in the first figure, and the bias, are means over batches of a batch's. Its
ablation zeroes every position, `<bos>` included, and its KL counts the last token of a row, too.

Per position both sums run over the tokens at that position (mu stays the overall mean), and "dead" is at that position.
Padding, special tokens and massive activations, which training leaves out, are neither reconstructed nor counted, and keep
their own activation when the others are replaced.

The text goes through the model up to the hook once, and what is there is held as far as `HELD` bytes go (the rest is read
again when it is needed). The layers behind the hook run once for each replacement (`replaced`).
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine.errors import UserError
from ..engine.process.progress import progress_bar
from ..engine.stream import ActivationStream, TokenRows
from ..engine.stream.norm_filter import has_variance
from ..engine.unit_decoder import Dictionary, UnitDecoder, unit_decoder
from ..kernels.numerics import sum_by
from .evaluation import Autoencoder, Neurons, in_rows
from .replacement_loss import losses_and_kl, rows_at_once
from .row_budget import CE_ROWS, ROWS, Cost, forecast, pace_of_training

#: x [n, D], pos [n] -> x_hat [n, D]
Reconstruct = Callable[[Tensor, Tensor], Tensor]
HELD = 2**29  # bytes of activations that are held at once
SAEBENCH_ROWS = 16  # in a batch, by SAEBench's default
EVERYWHERE = "zero_everywhere"  # SAEBench's ablation


@dataclass
class _RowBatch:
    """Rows of text from number `first` on, what the model has at its hooks [B, T, D], and which tokens count, kept [B, T].

    Of the n tokens that count: what goes into a dictionary, x [n, D], what is to come out, target [n, D_out], their place
    in the row, pos [n], and the row, of all that are evaluated, row [n].
    """

    rows: TokenRows
    first: int
    kept: Tensor
    acts: tuple[Tensor, Tensor]

    @property
    def x(self) -> Tensor:
        return self.acts[0][self.kept].float()

    @property
    def target(self) -> Tensor:
        return self.acts[1][self.kept].float()

    @property
    def pos(self) -> Tensor:
        return self.kept.nonzero()[:, 1]

    @property
    def row(self) -> Tensor:
        return self.first + self.kept.nonzero()[:, 0]

    def slice(self, start: int, stop: int) -> "_RowBatch":
        return _RowBatch(self.rows.slice(start, stop), self.first + start, self.kept[start:stop],
                         (self.acts[0][start:stop], self.acts[1][start:stop]))  # fmt: skip

    def joined(self, other: "_RowBatch") -> "_RowBatch":
        """These rows and then the others."""
        inputs, targets = (torch.cat(pair) for pair in zip(self.acts, other.acts, strict=True))
        return _RowBatch(
            self.rows.joined(other.rows), self.first, torch.cat([self.kept, other.kept]), (inputs, targets)
        )


def _in_batches_of(size: int, batches: Iterator[_RowBatch]) -> Iterator[_RowBatch]:
    """The same rows, `size` at a time."""
    rest: _RowBatch | None = None
    for batch in batches:
        rows = batch if rest is None else rest.joined(batch)
        whole = len(rows.kept) // size * size
        for start in range(0, whole, size):
            yield rows.slice(start, start + size)
        rest = rows.slice(whole, len(rows.kept)) if whole < len(rows.kept) else None
    if rest is not None:
        yield rest


@dataclass
class _Effect:
    """Of a replacement, over the tokens that have a next one: their number, losses and KL [3, T] by position, and [3, R] by
    row; and over all `tokens`, with those that have none, KL."""

    by_position: Tensor
    by_row: Tensor
    tokens: int = 0
    kl_of_all: float = 0.0


class HeldOut:
    """The first `rows` held-out rows of a stream's text, what the model has at the stream's hooks on them, and, on the first
    `ce_rows`, what it makes of it: read once for all dictionaries that are measured there.

    count int64 [T]: tokens by position; mean float64 [D_out], spread float64 [T] and [R]: squared distance from it.
    """

    def __init__(self, stream: ActivationStream, rows: int = ROWS, ce_rows: int = CE_ROWS, latents: Sequence[int] = ()):
        """`latents`: of the dictionaries that are to be measured, for the forecast of how long it takes."""
        self.stream, self.hooks, self.device = stream, stream.model.hooks, stream.model.device
        self._stored: list[_RowBatch] = []
        self._row_limit = rows
        self.pace = pace_of_training(stream)
        announced = self.pace is not None and self._forecast(rows, ce_rows, latents)
        T = stream.positions
        self.count, total = torch.zeros(T, dtype=torch.int64, device=self.device), torch.zeros((), device=self.device)
        self.rows, self.squares, size = 0, 0.0, 0
        with progress_bar("evaluation: reading the text", total=rows, unit="rows") as bar:
            began = time.monotonic()
            for batch in self._read():
                if not announced:
                    passes = batch.kept.numel() * Cost.of(stream.model).before
                    self.pace = (time.monotonic() - began) / passes
                    announced = self._forecast(rows, ce_rows, latents)
                self.count += torch.bincount(batch.pos, minlength=T)
                total = total + batch.target.double().sum(0)
                self.squares += float(batch.target.double().square().sum())
                self.rows += len(batch.rows)
                size += sum(x.nbytes for x in {id(x): x for x in batch.acts}.values())
                if size <= HELD:
                    self._stored.append(batch)
                bar.advance(len(batch.rows))
        self.tokens, self.ce_rows = int(self.count.sum()), min(ce_rows, self.rows)
        if self.tokens < 2:
            raise UserError(
                f"data: {self.rows} held-out rows hold {self.tokens} tokens to evaluate on; at least 2 are needed"
            )
        self.mean = total / self.tokens
        self.spread = torch.zeros(T, dtype=torch.float64, device=self.device)
        self.spread_of_rows = torch.zeros(self.rows, dtype=torch.float64, device=self.device)
        self._spread_is_known = False
        self.effects: dict[str, _Effect] = {}  # those that say nothing of one dictionary

    @property
    def varies(self) -> bool:
        """Whether there is variance to explain; known once something is measured."""
        return has_variance(float(self.spread.sum()), self.squares)

    def _forecast(self, rows: int, ce_rows: int, latents: Sequence[int]) -> bool:
        if latents:
            text = forecast(self.stream, rows, min(rows, ce_rows), latents, self.pace)
            print(text, file=sys.stderr, flush=True)
        return True

    def _read(self) -> Iterator[_RowBatch]:
        first = 0
        for rows in self.stream.held_out(self._row_limit):
            acts, kept = self.stream.read(rows)
            hook_acts = list(acts.values())
            yield _RowBatch(rows, first, kept, (hook_acts[0], hook_acts[-1]))
            first += len(rows)

    def batches(self) -> Iterator[_RowBatch]:
        """All batches, one after the other: those that are held, and the others read again."""
        yield from self._stored
        stored_rows = sum(len(batch.rows) for batch in self._stored)
        if stored_rows < self.rows:
            yield from (batch for batch in self._read() if batch.first >= stored_rows)

    def measure(self, autoencoders: Mapping[str, Autoencoder]) -> dict[str, "_Tally"]:
        """Reconstruction by each of the dictionaries, in one pass over the text."""
        tallies = {name: _Tally(autoencoder, self) for name, autoencoder in autoencoders.items()}
        with progress_bar("evaluation: reconstruction", total=self.rows, unit="rows") as bar:
            for batch in _in_batches_of(SAEBENCH_ROWS, self.batches()):
                if not self._spread_is_known:
                    distance = (batch.target.double() - self.mean).square().sum(1)
                    self.spread += sum_by(batch.pos, distance, len(self.spread))
                    self.spread_of_rows += sum_by(batch.row, distance, self.rows)
                for tally in tallies.values():
                    tally.add(batch)
                bar.advance(len(batch.rows))
        self._spread_is_known = True
        return tallies

    def replace(self, by: Mapping[str, Reconstruct]) -> dict[str, _Effect]:
        """What the model makes of the text with the tokens that count replaced by what these functions give for them.
        `clean`, `zero`, `mean` and zero everywhere are always there, and worked out once."""
        fixed: dict[str, Reconstruct] = {
            "zero": lambda x, pos: torch.zeros_like(self.mean, dtype=x.dtype).expand(len(x), -1),
            "mean": lambda x, pos: self.mean.to(x.dtype).expand(len(x), -1),
        }
        known = bool(self.effects)
        replacements = dict(by) if known else {**fixed, **by}
        names = (*replacements, *(() if known else (EVERYWHERE,)))
        T, R = len(self.count), self.ce_rows
        effects = {name: _Effect(torch.zeros(3, T).double(), torch.zeros(3, R).double()) for name in ("clean", *names)}
        size = rows_at_once(self.stream.model, T, len(self.mean), len(names))
        with progress_bar("evaluation: model behaviour", total=R * (1 + len(names)), unit="rows") as bar:
            for batch in self.batches():
                if batch.first >= R:
                    break
                for start in range(0, min(len(batch.rows), R - batch.first), size):
                    rows = slice(start, min(start + size, len(batch.rows), R - batch.first))
                    self._effects_on(batch, rows, replacements, EVERYWHERE in names, effects)
                    bar.advance((rows.stop - rows.start) * (1 + len(names)))
        if not known:
            self.effects = {name: effects[name] for name in ("clean", *fixed, EVERYWHERE)}
        return self.effects | effects

    def _effects_on(
        self,
        batch: _RowBatch,
        rows: slice,
        by: Mapping[str, Reconstruct],
        everywhere: bool,
        effects: dict[str, _Effect],
    ) -> None:
        longest = int(batch.rows.length[rows].max())
        kept, tokens = batch.kept[rows, :longest], batch.rows.tokens[rows, :longest]
        x, target = (acts[rows, :longest] for acts in batch.acts)
        row, pos = kept.nonzero(as_tuple=True)
        if not len(row):
            return

        def spliced(reconstruct: Reconstruct) -> Tensor:
            fresh = target.clone()
            fresh[kept] = reconstruct(x[kept].float(), pos).to(fresh.dtype)
            return fresh

        values: dict[str, Callable[[], Tensor]] = {
            name: partial(spliced, reconstruct) for name, reconstruct in by.items()
        }
        if everywhere:
            values[EVERYWHERE] = lambda: torch.zeros_like(target)
        losses = losses_and_kl(self.stream.model, tokens, target, kept, values)
        row, pos = row.cpu(), pos.cpu()
        has_next = (pos + 1 < batch.rows.length[rows][row]).double()
        for name, (loss, kl) in losses.items():
            sums = torch.stack([has_next, loss * has_next, kl * has_next], 1)
            effect = effects[name]
            effect.by_position += sum_by(pos, sums, len(self.count)).T
            effect.by_row += sum_by(batch.first + rows.start + row, sums, self.ce_rows).T
            effect.tokens += len(kl)
            effect.kl_of_all += float(kl.sum())


def core(
    stream: ActivationStream,
    sae: Dictionary,
    controls: Mapping[str, Dictionary],
    *,
    rows: int = ROWS,
    ce_rows: int = CE_ROWS,
    neurons: bool = True,
    held_out: HeldOut | None = None,
) -> dict[str, Any]:
    """Core metrics of `sae` on `rows` held-out rows of the stream's text (CE on the first `ce_rows` of them).

    `controls` are dictionaries to be measured in the same way (`random`); `mean` is always added, and `lm_neurons`, each
    activation with its K largest parts alone, unless `sae` is a transcoder or `neurons` False. The result holds the metrics
    of `sae`, `per_position` lists, a histogram of firing rates, of each of its `latents` the firing rate and on how
    many tokens of a row it fires where it does, and under `controls` the metrics of each. `held_out`: those rows, read
    already for another dictionary at the same hooks.
    """
    autoencoders: dict[str, Autoencoder] = {
        name: fitted(name, d, stream) for name, d in {"sae": sae, **controls}.items()
    }
    began = time.monotonic()
    device = stream.model.device
    if sae.cfg.d_out is None and neurons:
        autoencoders["lm_neurons"] = Neurons(sae.cfg.d_in, sae.cfg.k, device)
    text = held_out or HeldOut(stream, rows, ce_rows, [len(autoencoder.W_dec) for autoencoder in autoencoders.values()])
    tallies = text.measure(autoencoders)
    effects = text.replace({name: partial(_reconstruct, autoencoder) for name, autoencoder in autoencoders.items()})
    results = {name: _scores(name, tally, text, effects) for name, tally in {**tallies, "mean": None}.items()}
    sae_tally = tallies["sae"]
    rate = sae_tally.fired.double() / text.tokens
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
        "firing_rates": _histogram(rate.cpu(), text.tokens),
        **({"warnings": warnings} if (warnings := _warnings(text, effects)) else {}),
        "latents": {
            "firing_rate": [round(value, 8) for value in rate.tolist()],
            "tokens_per_row": [
                round(value, 4) for value in (sae_tally.fired / sae_tally.rows_fired.clamp_min(1)).tolist()
            ],
        },
        "seconds": round(time.monotonic() - began, 2),
    }


def fitted(name: str, dictionary: Dictionary, stream: ActivationStream) -> UnitDecoder:
    """A dictionary as evals take it: on the model's device, with decoder rows of norm 1.

    Raises UserError for one that is not for the stream's activations.
    """
    cfg, model = dictionary.cfg, stream.model
    dims = (cfg.d_in,) if cfg.d_out is None else (cfg.d_in, cfg.d_out)
    if dims != tuple(model.widths.values()):
        widths = " and ".join(f"{hook} has width {width}" for hook, width in model.widths.items())
        raise UserError(f"{name}: d_in = {' and d_out = '.join(map(str, dims))} does not fit; {widths} in {model.name}")
    cfg.mask.check_context(stream.positions)
    return unit_decoder(dictionary).to(model.device)


class _Tally:
    """What a dictionary reconstructs: squared error float64 [T] by position and [R] by row, L0 [T] (sums), on how many
    tokens and rows each latent fired [F] and whether at each position [T, F], and sums over tokens of further qualities."""

    def __init__(self, autoencoder: Autoencoder, text: HeldOut):
        T, F, device = len(text.count), len(autoencoder.W_dec), text.device
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.autoencoder, self.mean = autoencoder, text.mean
        self.errors, self.l0, self.errors_of_rows = zeros(T), zeros(T), zeros(text.rows)
        self.fired, self.rows_fired = (torch.zeros(F, dtype=torch.int64, device=device) for _ in range(2))
        self.fired_at = torch.zeros(T, F, dtype=torch.bool, device=device)
        self._n, self._sums = text.tokens, zeros(9)
        self._batches: list[Tensor] = []  # of each batch of rows, as SAEBench has them of a batch

    @torch.no_grad()
    def add(self, batch: _RowBatch) -> None:
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

    @property
    def dead_fraction(self) -> float:
        return float((self.fired == 0).double().mean())

    def quality(self) -> dict[str, Any]:
        errors, size, size_hat, ratio, cosine, dot, square_hat, _, l1 = (self._sums / self._n).tolist()
        return {
            "mse": errors / len(self.mean), "cosine": cosine, "l1": l1, "l2_norm_in": size, "l2_norm_out": size_hat,
            "l2_ratio": ratio, "relative_reconstruction_bias": square_hat / dot if dot else None,
        }  # fmt: skip

    def saebench(self, effects: Mapping[str, _Effect], name: str) -> dict[str, float | None]:
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


def _scores(name: str, tally: _Tally | None, text: HeldOut, effects: Mapping[str, _Effect]) -> dict[str, Any]:
    """Of a dictionary, or without a `tally` of the mean."""
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
        "explained_variance": 1 - float(errors.sum() / text.spread.sum()) if text.varies else None,
        "explained_variance_error": _error(errors_of_rows, text.spread_of_rows) if text.varies else None,
        "ce_recovered": _recovered(effects, "zero", name),
        "ce_recovered_error": _error(zero.by_row[1] - effect.by_row[1], zero.by_row[1] - clean.by_row[1]),
        "ce_recovered_over_mean": _recovered(effects, "mean", name),
        "kl_recovered": (kl_zero - kl) / kl_zero if kl_zero > 0 else None,
        **({} if tally is None else tally.quality() | {"saebench": tally.saebench(effects, name)}),
        "l0": float(l0.sum() / count.sum()),
        "dead_fraction": 1.0 if tally is None else tally.dead_fraction,
        "per_position": {
            "position": list(range(len(count))),
            "tokens": count.tolist(),
            "explained_variance": _numbers(1 - errors / text.spread if text.varies else errors * torch.nan),
            "ce_recovered": _numbers((losses["zero"] - losses[name]) / (losses["zero"] - losses["clean"])),
            "l0": _numbers(l0 / count),
            "dead_fraction": _numbers(torch.where(count > 0, dead, torch.nan)),
        },
    }


def _warnings(text: HeldOut, effects: Mapping[str, _Effect]) -> list[str]:
    """Why figures are missing."""
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


def _recovered(effects: Mapping[str, _Effect], floor: str, name: str) -> float | None:
    clean, low, loss = (_mean(effects[key], 1) for key in ("clean", floor, name))
    if clean is None or low is None or loss is None:
        return None
    return (low - loss) / (low - clean) if low > clean else None


def _mean(effect: _Effect, index: int) -> float | None:
    """Loss (1) or KL (2) per token, by a sum over positions first, then over what they have; None where there are none."""
    tokens = effect.by_position[0].sum()
    return float(effect.by_position[index].sum() / tokens) if tokens > 0 else None


def _error(above: Tensor, below: Tensor) -> float | None:
    """The standard error of sum(above) / sum(below), both [R]; None of a single row."""
    R, whole = len(above), float(below.sum())
    if R < 2 or whole == 0:
        return None
    residuals = above - above.sum() / whole * below
    return float((R / (R - 1) * residuals.square().sum()).sqrt() / abs(whole))


def _numbers(values: Tensor) -> list[float | None]:
    """For JSON: what isn't finite (a position without tokens) is null."""
    return [_finite(value) for value in values.tolist()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _histogram(rate: Tensor, tokens: int) -> dict[str, Any]:
    """Counts of latents by log10 of firing rate; those that never fired apart."""
    alive = rate[rate > 0].log10()
    low = math.floor(-math.log10(tokens))
    counts = torch.histc(alive, bins=10 * -low, min=low, max=0) if len(alive) else torch.zeros(10 * -low)
    edges = torch.linspace(low, 0, 10 * -low + 1)
    return {
        "log10_edges": [round(e, 6) for e in edges.tolist()],
        "latents": counts.int().tolist(),
        "never": int((rate == 0).sum()),
    }
