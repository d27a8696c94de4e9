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

`saebench` holds two figures as SAEBench 0.6.0 works them out, which calls both of them explained variance:
1 - E |x - x_hat|^2 / (E |x|^2 - (E_d E x_d^2)^2), whose last term is not a mean but a mean square and so says nothing of
variance; and (legacy) the mean over tokens of 1 - |x - x_hat|^2 / |x - mu|^2, which tokens near mu dominate.

Per position both sums run over the tokens at that position (mu stays the overall mean), and "dead" is at that position.
Padding, special tokens and massive activations, which training leaves out, are neither reconstructed nor counted, and keep
their own activation when the others are replaced.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine.errors import UserError
from ..engine.progress import ProgressBar, progress_bar
from ..engine.sae import SparseAutoencoder
from ..engine.stream import ActivationStream, TokenRows
from ..engine.stream.model import next_token_losses
from ..kernels.numerics import sum_by
from .collect import Coder, Neurons, in_rows

#: x [n, D], pos [n] -> x_hat [n, D]
Reconstruct = Callable[[Tensor, Tensor], Tensor]
LOGITS = 2**29  # that are held at once
ROWS, CE_ROWS = 256, 96


@dataclass
class _Part:
    """A part of the text, its kept positions [B, T], and of those what goes in, x [n, D], what is to come out, target
    [n, D_out], and pos [n]."""

    rows: TokenRows
    kept: Tensor
    x: Tensor
    target: Tensor
    pos: Tensor


def core(
    stream: ActivationStream,
    sae: SparseAutoencoder,
    controls: dict[str, SparseAutoencoder],
    *,
    rows: int = ROWS,
    ce_rows: int = CE_ROWS,
    neurons: bool = True,
) -> dict[str, Any]:
    """Core metrics of `sae` on `rows` held-out rows of the stream's text (CE on the first `ce_rows` of them).

    `controls` are dictionaries to be measured in the same way (`random`); `mean` is always added, and `lm_neurons`, each
    activation with its K largest parts alone, unless `sae` is a transcoder or `neurons` False. The result holds the metrics
    of `sae`, `per_position` lists, a histogram of firing rates, of each of its `latents` the firing rate and on how
    many tokens of a row it fires where it does, and under `controls` the metrics of each.
    """
    for name, dictionary in {"sae": sae, **controls}.items():
        check_fits(name, dictionary, stream)
    began = time.monotonic()
    T, device = stream.positions, stream.model.device
    coders: dict[str, Coder] = {name: d.to(device) for name, d in {"sae": sae, **controls}.items()}
    if sae.cfg.d_out is None and neurons:
        coders["lm_neurons"] = Neurons(sae.cfg.d_in, sae.cfg.k, device)
    texts = list(stream.held_out(rows))
    rows = sum(len(text.tokens) for text in texts)
    ce_rows = min(ce_rows, rows)
    with progress_bar("evaluating", total=rows + (len(coders) + 3) * ce_rows, unit="rows") as bar:
        parts: list[_Part] = []
        for text in texts:
            read, kept = stream.read(text)
            pos = torch.arange(T, device=device).expand(kept.shape)[kept]
            acts = [x[kept].float() for x in read.values()]
            parts.append(_Part(text, kept, acts[0], acts[-1], pos))
            bar.advance(len(text.tokens))
        count = sum((torch.bincount(p.pos, minlength=T) for p in parts), torch.zeros((), device=device))
        total = int(count.sum())
        if total < 2:
            raise UserError(f"data: {rows} held-out rows hold {total} tokens to evaluate on; at least 2 are needed")
        mu = sum((p.target.double().sum(0) for p in parts), torch.zeros((), device=device)) / total
        spread = _per_position(parts, mu.float(), T)

        replacements: dict[str, Reconstruct] = {
            "zero": lambda x, pos: torch.zeros_like(mu).expand(len(x), -1),
            "mean": lambda x, pos: mu.float().expand(len(x), -1),
            **{name: partial(_reconstruct, coder) for name, coder in coders.items()},
        }
        losses: dict[str, Tensor] = {}
        left = ce_rows
        for part in parts:
            take = min(len(part.kept), left)
            left -= take
            for name, summed in _behaviour(stream, part, take, replacements, bar).items():
                losses[name] = losses.get(name, 0) + summed

    found = {name: _measure(coder, parts, mu.float(), T) for name, coder in coders.items()}
    found["mean"] = {"squared_error": spread, "l0": torch.zeros(T), "rate": None, "quality": None}
    results = {name: _scores(name, values, spread, count, losses) for name, values in found.items()}
    rate, fired_in = found["sae"]["rate"].sum(0) / total, found["sae"]["rows"].clamp_min(1)
    return {
        **results["sae"],
        "ce": {name: _mean(value) for name, value in losses.items()},
        "kl": {name: float(value[2].sum() / value[1].sum()) for name, value in losses.items() if name != "clean"},
        "tokens": total,
        "ce_tokens": int(losses["clean"][1].sum()),
        "rows": rows,
        "ce_rows": ce_rows,
        "model": stream.model.name,
        "hook": stream.model.hook,
        "massive": stream.norms.report(),
        "controls": {
            name: {k: v for k, v in r.items() if k != "firing_rates"} for name, r in results.items() if name != "sae"
        },
        "firing_rates": _histogram(rate.cpu(), total),
        "latents": {
            "firing_rate": [round(value, 8) for value in rate.tolist()],
            "tokens_per_row": [round(value, 4) for value in (rate * total / fired_in).tolist()],
        },
        "seconds": round(time.monotonic() - began, 2),
    }


def check_fits(name: str, dictionary: SparseAutoencoder, stream: ActivationStream) -> None:
    """Refuse a dictionary that is not for the stream's activations."""
    cfg, model = dictionary.cfg, stream.model
    own = (cfg.d_in,) if cfg.d_out is None else (cfg.d_in, cfg.d_out)
    if own != tuple(model.widths.values()):
        places = " and ".join(f"{hook} has width {width}" for hook, width in model.widths.items())
        raise UserError(f"{name}: d_in = {' and d_out = '.join(map(str, own))} does not fit; {places} in {model.name}")
    dictionary.cfg.mask.check_context(stream.positions)


@torch.no_grad()
def _reconstruct(coder: Coder, x: Tensor, pos: Tensor) -> Tensor:
    return coder.decode(coder.encode_sparse(x, pos))


@torch.no_grad()
def _measure(coder: Coder, parts: list[_Part], mu: Tensor, T: int) -> dict[str, Any]:
    """Squared error [T], L0 [T] (sums), how often each latent fired at each position [T, F], and of all tokens `quality`."""
    F, device = len(coder.W_dec), parts[0].x.device
    rate = torch.zeros(T, F, device=device)
    l0 = torch.zeros(T, dtype=torch.float64, device=device)
    error = torch.zeros(T, dtype=torch.float64, device=device)
    rows_fired = torch.zeros(F, dtype=torch.int64, device=device)
    sums = torch.zeros(9, dtype=torch.float64, device=device)
    squares = torch.zeros_like(mu, dtype=torch.float64)  # of each dimension
    for part in parts:
        row = part.kept.nonzero()[:, 0]
        seen = torch.zeros(len(part.kept) * F, dtype=torch.bool, device=rate.device)
        tokens = (part.x, part.target, part.pos, row)
        for x, target, pos, of in in_rows(part.pos, *tokens):
            code = coder.encode_sparse(x, pos)
            x_hat = coder.decode(code)
            errors = (target - x_hat).double().square().sum(1)
            error += sum_by(pos, errors, T)
            y, y_hat = target.double(), x_hat.double()
            size, size_hat, dot = y.norm(dim=1), y_hat.norm(dim=1), (y * y_hat).sum(1)
            squares += y.square().sum(0)
            legacy = 1 - errors / (target - mu).double().square().sum(1)
            nonzero = (size * size_hat).clamp_min(torch.finfo(torch.float32).tiny)
            of_token = (
                errors,
                size,
                size_hat,
                size_hat / size.clamp_min(1e-12),
                dot / nonzero,
                dot,
                size_hat**2,
                legacy,
            )
            l1 = code.live(code.values).double().sum()
            sums += torch.stack([*(value.sum() for value in of_token), l1])
            l0 += sum_by(pos, code.l0().double(), T)
            active = (code.live(code.values) > 0).flatten()
            fired = (pos[code.rows] * F + code.indices).flatten()
            rate.view(-1).index_add_(0, fired, active.to(rate.dtype))
            seen[(of[code.rows] * F + code.indices).flatten()[active]] = True
        rows_fired += seen.view(len(part.kept), -1).sum(0)
    n = sum(len(part.x) for part in parts)
    errors, size, size_hat, ratio, cosine, dot, square_hat, legacy, l1 = (sums / n).tolist()
    per_dimension = squares / n
    quality = {
        "mse": errors / len(mu), "cosine": cosine, "l1": l1, "l2_norm_in": size, "l2_norm_out": size_hat,
        "l2_ratio": ratio, "relative_reconstruction_bias": square_hat / dot if dot else None,
        "saebench": {
            "explained_variance": float(1 - errors / (per_dimension.sum() - per_dimension.mean() ** 2)),
            "explained_variance_legacy": legacy,
        },
    }  # fmt: skip
    return {"squared_error": error, "l0": l0, "rate": rate, "rows": rows_fired, "quality": quality}


def _per_position(parts: list[_Part], mu: Tensor, T: int) -> Tensor:
    """Squared distance from mu [D_out], summed by position [T]."""
    summed = torch.zeros(T, dtype=torch.float64, device=parts[0].x.device)
    for part in parts:
        summed += sum_by(part.pos, (part.target - mu).double().square().sum(1), T)
    return summed


def _behaviour(
    stream: ActivationStream, part: _Part, take: int, replacements: dict[str, Reconstruct], bar: ProgressBar
) -> dict[str, Tensor]:
    """[3, T] for `clean` and for each replacement, over the first `take` rows of a part: per position the sum of the
    losses, the number of predictions, and the sum of KL(p_clean || p). As many rows at once as `LOGITS` allows."""
    T, V = part.kept.shape[1], len(stream.model.tokenizer)
    size = max(1, LOGITS // (T * V))
    found = {name: torch.zeros(3, T, dtype=torch.float64) for name in ("clean", *replacements)}
    first = part.kept.flatten(1).sum(1).cumsum(0).tolist()
    for at in range(0, take, size):
        rows = slice(at, min(at + size, take))
        kept, tokens = part.kept[rows], part.rows.tokens[rows]
        tokens_before = slice(first[at - 1] if at else 0, first[rows.stop - 1])
        x, pos = part.x[tokens_before], part.pos[tokens_before]
        counts = kept[:, :-1] & (torch.arange(1, T) < part.rows.length[rows, None]).to(kept.device)
        log_p = None
        for name in found:
            if name == "clean":
                logits = stream.model.logits(tokens)
            else:
                given = torch.cat([replacements[name](*chunk) for chunk in in_rows(pos, x, pos)])

                def splice(value: Tensor, kept: Tensor = kept, given: Tensor = given) -> Tensor:
                    fresh = value.clone()
                    fresh[kept] = given.to(value.dtype)
                    return fresh

                logits = stream.model.logits(tokens, splice, hook=stream.model.hooks[-1])
            losses = next_token_losses(logits, tokens).double() * counts
            log_q = logits[:, :-1].float().log_softmax(-1)
            log_p = log_q if log_p is None else log_p
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).double() * counts
            found[name][:, :-1] += torch.stack([losses.sum(0), counts.sum(0).double(), kl.sum(0)]).cpu()
            bar.advance(len(tokens))
    return found


def _scores(
    name: str, found: dict[str, Any], spread: Tensor, count: Tensor, losses: dict[str, Tensor]
) -> dict[str, Any]:
    total = count.sum()
    rate = found["rate"]
    here = {key: losses[key][0] / losses[key][1] for key in ("clean", "zero", name)}
    kl, kl_zero = (float(losses[key][2].sum()) for key in (name, "zero"))
    return {
        "explained_variance": 1 - float(found["squared_error"].sum() / spread.sum()),
        "ce_recovered": _recovered(losses, "zero", name),
        "ce_recovered_over_mean": _recovered(losses, "mean", name),
        "kl_recovered": (kl_zero - kl) / kl_zero if kl_zero > 0 else None,
        **(found["quality"] or {}),
        "l0": float(found["l0"].sum() / total),
        "dead_fraction": 1.0 if rate is None else float((rate.sum(0) == 0).double().mean()),
        "per_position": {
            "position": list(range(len(count))),
            "tokens": count.tolist(),
            "explained_variance": _numbers(1 - found["squared_error"] / spread),
            "ce_recovered": _numbers((here["zero"] - here[name]) / (here["zero"] - here["clean"])),
            "l0": _numbers(found["l0"].to(count.device) / count),
            "dead_fraction": _numbers(
                torch.where(count > 0, 1.0 if rate is None else (rate == 0).double().mean(1), torch.nan)
            ),
        },
    }


def _recovered(losses: dict[str, Tensor], floor: str, name: str) -> float | None:
    clean, low, own = (_mean(losses[key]) for key in ("clean", floor, name))
    return (low - own) / (low - clean) if low > clean else None


def _mean(summed: Tensor) -> float:
    return float(summed[0].sum() / summed[1].sum())


def _numbers(values: Tensor) -> list[float | None]:
    """For JSON: what isn't finite (a position without tokens) is null."""
    return [v if math.isfinite(v) else None for v in values.tolist()]


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
