"""Core metrics of a dictionary: L0, explained variance, CE recovered, dead latents; overall, per position, and of controls.

With x an activation, x_hat its reconstruction, mu the mean of x over the evaluated tokens, and CE the language model's
mean next-token loss in nats when the hook's value is replaced:

    explained variance = 1 - sum |x - x_hat|^2 / sum |x - mu|^2         a dictionary that predicts the mean scores 0
    CE recovered       = (CE_zero - CE_sae) / (CE_zero - CE_clean)      0: as bad as zeros; 1: as good as the model
    CE recovered over mean ablation: the same with CE_mean, from mu in place of x
    L0                 = latents above zero per token
    dead fraction      = share of latents that fire on no evaluated token

Per position both sums run over the tokens at that position (mu stays the overall mean), and "dead" is at that position.
`<bos>` and padding are neither reconstructed nor counted, and keep their own activation when the others are replaced.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.errors import UserError
from ..engine.progress import progress_bar
from ..engine.sae import SparseAutoencoder
from ..engine.stream import ActivationStream, TokenRows

#: x [n, D], pos [n] -> x_hat [n, D]
Reconstruct = Callable[[Tensor, Tensor], Tensor]
_CHUNK = 4096  # tokens that are encoded at once


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
    rows: int = 256,
    ce_rows: int = 96,
) -> dict[str, Any]:
    """Core metrics of `sae` on `rows` held-out rows of the stream's text (CE on the first `ce_rows` of them).

    `controls` are dictionaries to be measured in the same way (`random`); `mean` is always added. The result holds the
    metrics of `sae`, `per_position` lists, a histogram of firing rates, and under `controls` the metrics of each.
    """
    for name, dictionary in {"sae": sae, **controls}.items():
        check_fits(name, dictionary, stream)
    began = time.monotonic()
    T, device = stream.positions, stream.model.device
    dictionaries = {name: d.to(device) for name, d in {"sae": sae, **controls}.items()}
    texts = list(stream.held_out(rows))
    rows = sum(len(text.tokens) for text in texts)
    ce_rows = min(ce_rows, rows)
    with progress_bar("evaluating", total=rows + (len(dictionaries) + 3) * ce_rows, unit="rows") as bar:
        parts: list[_Part] = []
        for text in texts:
            kept = stream.keep(text).to(device)
            pos = torch.arange(T, device=device).expand(kept.shape)[kept]
            acts = [x[kept].float() for x in stream.model.harvest(text.tokens).values()]
            parts.append(_Part(text, kept, acts[0], acts[-1], pos))
            bar.advance(len(text.tokens))
        count = sum((torch.bincount(p.pos, minlength=T) for p in parts), torch.zeros((), device=device))
        total = int(count.sum())
        if total < 2:
            raise UserError(f"data: {rows} held-out rows hold {total} tokens to evaluate on; at least 2 are needed")
        mu = sum((p.target.double().sum(0) for p in parts), torch.zeros((), device=device)) / total
        spread = _per_position(parts, mu.float(), T)

        def ce(replace: Reconstruct | None) -> Tensor:
            summed = torch.zeros(2, T, dtype=torch.float64, device=device)
            seen = 0
            for part in parts:
                if seen >= ce_rows:
                    break
                take = min(len(part.kept), ce_rows - seen)
                summed += _ce(stream, part, take, replace)
                seen += take
                bar.advance(take)
            return summed

        losses = {
            "clean": ce(None),
            "zero": ce(lambda x, pos: torch.zeros_like(mu).expand(len(x), -1)),
            "mean": ce(lambda x, pos: mu.expand(len(x), -1)),
        }
        losses |= {name: ce(dictionary) for name, dictionary in dictionaries.items()}

    found = {name: _measure(d, parts, T) for name, d in dictionaries.items()}
    found["mean"] = {"squared_error": spread, "l0": torch.zeros(T), "rate": None}
    results = {name: _scores(name, values, spread, count, losses) for name, values in found.items()}
    rate = found["sae"]["rate"].sum(0) / total
    return {
        **results["sae"],
        "ce": {name: _mean(value) for name, value in losses.items()},
        "tokens": total,
        "rows": rows,
        "ce_rows": ce_rows,
        "model": stream.model.name,
        "hook": stream.model.hook,
        "controls": {
            name: {k: v for k, v in r.items() if k != "firing_rates"} for name, r in results.items() if name != "sae"
        },
        "firing_rates": _histogram(rate.cpu(), total),
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
def _measure(sae: SparseAutoencoder, parts: list[_Part], T: int) -> dict[str, Any]:
    """Squared error [T], L0 [T] (sums), and how often each latent fired at each position [T, F]."""
    rate = torch.zeros(T, sae.cfg.d_sae, device=sae.b_dec.device)
    l0 = torch.zeros(T, dtype=torch.float64, device=sae.b_dec.device)
    error = torch.zeros(T, dtype=torch.float64, device=sae.b_dec.device)
    for part in parts:
        for x, target, pos in zip(*(t.split(_CHUNK) for t in (part.x, part.target, part.pos)), strict=True):
            code = sae.encode_sparse(x, pos)
            error.index_add_(0, pos, (target - sae.decode(code)).double().square().sum(1))
            l0.index_add_(0, pos, code.l0().double())
            fired = (pos[code.rows] * sae.cfg.d_sae + code.indices).flatten()
            rate.view(-1).index_add_(0, fired, (code.live(code.values) > 0).flatten().to(rate.dtype))
    return {"squared_error": error, "l0": l0, "rate": rate}


def _per_position(parts: list[_Part], mu: Tensor, T: int) -> Tensor:
    """Squared distance from mu [D_out], summed by position [T]."""
    summed = torch.zeros(T, dtype=torch.float64, device=parts[0].x.device)
    for part in parts:
        summed.index_add_(0, part.pos, (part.target - mu).double().square().sum(1))
    return summed


def _ce(stream: ActivationStream, part: _Part, take: int, replace: Reconstruct | None) -> Tensor:
    """Sum of the loss and number of predictions per position, [2, T], over the first `take` rows of a part."""
    kept, tokens = part.kept[:take], part.rows.tokens[:take]
    T = kept.shape[1]
    if replace is None:
        losses = stream.model.losses(tokens).double()
    else:
        n = int(kept.sum())
        chunks = zip(part.x[:n].split(_CHUNK), part.pos[:n].split(_CHUNK), strict=True)
        given = torch.cat([replace(x, pos) for x, pos in chunks])

        def splice(value: Tensor) -> Tensor:
            fresh = value.clone()
            fresh[kept] = given.to(value.dtype)
            return fresh

        losses = stream.model.losses(tokens, splice, hook=stream.model.hooks[-1]).double()
    counts = kept[:, :-1] & (torch.arange(1, T) < part.rows.length[:take, None]).to(kept.device)
    summed = torch.zeros(2, T, dtype=torch.float64, device=losses.device)
    summed[0, :-1] = (losses * counts).sum(0)
    summed[1, :-1] = counts.sum(0)
    return summed


def _scores(
    name: str, found: dict[str, Any], spread: Tensor, count: Tensor, losses: dict[str, Tensor]
) -> dict[str, Any]:
    total = count.sum()
    rate = found["rate"]
    here = {key: losses[key][0] / losses[key][1] for key in ("clean", "zero", name)}
    return {
        "explained_variance": 1 - float(found["squared_error"].sum() / spread.sum()),
        "ce_recovered": _recovered(losses, "zero", name),
        "ce_recovered_over_mean": _recovered(losses, "mean", name),
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
