"""Meta structure of a dictionary: how well a small dictionary (a meta-SAE) reconstructs the decoder rows.

Leask et al., arXiv 2502.04878, find that many latents of a large dictionary are sums of a few directions that the latents
share. A BatchTopK dictionary of F_meta latents is trained on n decoder rows w_i (norm 1):

    w_hat_i = sum_m a_im u_m + b                              K = 4 active meta-latents per row on average
    meta_explained_variance = 1 - sum_i |w_i - w_hat_i|^2 / sum_i |w_i - mean w|^2
    mse = sum_i |w_i - w_hat_i|^2 / (n D)

4 meta-latents are kept per scored row, or fewer if fewer are positive, for the dictionary and its controls. Neither more nor
less is better. A large value means that latents are sums of fewer directions than the dictionary has.

There are two recipes (`meta_recipes.py`), by the evaluation's `protocol`. `temposae` leaves out rows of latents that fire on
no evaluated token (`dead`), because training has not given them a direction, trains n / 21 meta-latents, and scores held-out
rows if n is at least 1,000. `saebench` trains F / 4 meta-latents on all rows and scores those. The paper also trains on all
rows and scores those, with 2,304 meta-latents for 49,152 latents and 2,000 passes.
"""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..engine.metrics import HeldOutSums
from ..engine.process.progress import ProgressBar, progress_bar
from ..engine.sae import SparseAutoencoder
from ..engine.stream.norm_filter import has_variance
from ..kernels.torch_modes import default_modes
from .evaluation import SAEBENCH, Autoencoder, Evaluation, TextActivations
from .meta_recipes import Recipe, recipe_of
from .positions import held_out

ROWS = 1024  # of text, to see which latents fire
SHOWN, MEMBERS = 8, 8  # meta-latents that are listed, and latents of each


class Fit(NamedTuple):
    """A meta-dictionary trained on rows [n, D] in `seconds`, and the figures of the result."""

    sae: SparseAutoencoder
    figures: dict[str, Any]
    seconds: float


def meta_structure(evaluation: Evaluation) -> dict[str, Any]:
    """Train a meta-dictionary on the decoder rows of the dictionary and of each control.

    Returns `meta_explained_variance` and `mse` (of the scored rows), `train_explained_variance`, `l0` of the scored rows,
    `latents` (rows used, n), `dead` (rows left out), `meta_latents`, `held_out` (number of held-out rows), `largest` (the
    meta-latents that most latents use: meta_latent, count, members with their cosines) and `controls`: `random` (as many
    rows of the random decoder), further trained controls, and `shuffled` (each coordinate of the rows permuted). There is no
    `lm_neurons`, because its rows are the coordinate axes, which share nothing by construction. The figures are None, with a
    warning, if there are too few rows (`Recipe.fewest`). With the protocol saebench also the seconds of `training`.
    """
    chosen = recipe_of(evaluation.protocol)
    decoders, live, read = _decoders(evaluation, chosen)
    fits: dict[str, Fit | None] = {}
    with progress_bar("training meta-dictionaries", total=chosen.steps * len(decoders), unit="steps") as bar:
        for name, decoder in decoders.items():
            draw = evaluation.generator("meta_structure rows")
            fits[name] = _fit(decoder, draw, chosen, bar) if len(decoder) >= chosen.fewest else None
    figures = {name: _figures(fits[name], decoder) for name, decoder in decoders.items()}
    fit, result = fits["sae"], figures.pop("sae")
    result |= {
        "dead": evaluation.sae.cfg.d_sae - len(live),
        "largest": [] if fit is None else _largest(fit.sae, decoders["sae"], live),
        "controls": figures,
        "rows": read,
        "protocol": chosen.settings(),
        "protocol_name": chosen.name,
    }
    if chosen.name == SAEBENCH and fit is not None:
        result["training"] = {"seconds": round(fit.seconds, 2)}
    few = [name for name, of_name in fits.items() if of_name is None]
    warnings = [_too_few(name, len(decoders[name]), chosen.fewest) for name in few]
    return result | ({"warnings": warnings} if few else {})


def _decoders(evaluation: Evaluation, chosen: Recipe) -> tuple[dict[str, Tensor], Tensor, int]:
    """Decoder rows of the dictionary and its controls, the dictionary's latents that they belong to, and the number of rows
    of text that were read to see which latents fire."""
    sae, controls = evaluation.sae, evaluation.controls
    if chosen.only_live:
        collected = held_out(evaluation, ROWS)
        live, read = _live(sae, collected), len(collected)
        # a random decoder's rows are random directions whether or not the latent fires, so n of them are a null of one size
        of_controls = {
            name: control.W_dec[: len(live)] if name == "random" else control.W_dec[_live(control, collected)]
            for name, control in controls.items()
        }
    else:
        live, read = torch.arange(sae.cfg.d_sae, device=sae.device), 0
        of_controls = {name: control.W_dec for name, control in controls.items()}
    rows = sae.W_dec[live]
    shuffled = _shuffled(rows, evaluation.generator("meta_structure shuffled"))
    return {"sae": rows, **of_controls, "shuffled": shuffled}, live, read


def _too_few(name: str, count: int, fewest: int) -> str:
    return f"{name}: {count} decoder rows can be used; a meta-dictionary needs at least {fewest}"


def _figures(fit: Fit | None, rows: Tensor) -> dict[str, Any]:
    names = ("meta_explained_variance", "train_explained_variance", "mse", "l0", "meta_latents", "held_out")
    return {"latents": len(rows)} | (dict.fromkeys(names) if fit is None else fit.figures)


@torch.no_grad()
def _live(autoencoder: Autoencoder, collected: TextActivations) -> Tensor:
    """Latents with a decoder row that fire on some token, ascending."""
    code, W_dec = collected.code(autoencoder), autoencoder.W_dec
    fires = torch.bincount(code.indices[code.values != 0], minlength=len(W_dec)) > 0
    return (fires & (W_dec != 0).any(1)).nonzero().flatten()


def _shuffled(rows: Tensor, draw: np.random.Generator) -> Tensor:
    """Rows [n, D] with each coordinate permuted over the rows, scaled to norm 1, so that directions are not shared."""
    permuted = draw.permuted(rows.cpu().numpy(), axis=0)
    return torch.nn.functional.normalize(torch.from_numpy(permuted).to(rows.device), dim=1)


@default_modes()
def _fit(rows: Tensor, draw: np.random.Generator, chosen: Recipe, bar: ProgressBar) -> Fit:
    """Train a meta-dictionary on rows [n, D], and score it on those held out, or on all if none are."""
    order = torch.from_numpy(draw.permutation(len(rows))).to(rows.device)
    held = len(rows) // 10 if chosen.split is not None and len(rows) >= chosen.split else 0
    train = rows[order[held:]] if chosen.split is not None else rows
    began = time.monotonic()
    sae = chosen.train(train, chosen, draw, lambda: bar.advance(1))
    seconds = time.monotonic() - began
    of_train = _score(sae, train, chosen)
    of_scored = _score(sae, rows[order[:held]], chosen) if held else of_train
    figures = {
        "meta_explained_variance": of_scored["explained"],
        "train_explained_variance": of_train["explained"],
        "mse": of_scored["mse"],
        "l0": of_scored["l0"],
        "meta_latents": sae.cfg.d_sae,
        "held_out": held,
    }
    return Fit(sae, figures, seconds)


@torch.no_grad()
def _score(sae: SparseAutoencoder, rows: Tensor, chosen: Recipe) -> dict[str, Any]:
    """Explained variance, mean squared error per coordinate and L0 on rows [n, D], with 4 activations kept per row."""
    sums = HeldOutSums(rows.shape[1], rows.device)
    for part in rows.split(chosen.scored or len(rows)):
        pos = _fit_threshold(sae, part, chosen)
        code = sae.encode_sparse(part, pos)
        sums.add(part, sae.decode(code), code)
    explained = 1 - sums.fvu if has_variance(float(sums.spread), float(sums.squares)) else None
    return {"explained": explained, "mse": float(sums.squared_error) / rows.numel(), "l0": sums.l0}


def _fit_threshold(sae: SparseAutoencoder, rows: Tensor, chosen: Recipe) -> Tensor:
    """Set the threshold that keeps 4 activations per row of rows [n, D]; returns their positions. A recipe that scores in
    batches keeps exactly the largest of a batch, as BatchTopK does in training."""
    pos = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    sae.fit_threshold(rows, pos, chunk=chosen.scored or 1024)
    return pos


@torch.no_grad()
def _largest(sae: SparseAutoencoder, rows: Tensor, latents: Tensor) -> list[dict[str, Any]]:
    """The meta-latents that most of the `latents` [n] with decoder rows [n, D] use, and the latents that use them most."""
    pos = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    sae.fit_threshold(rows, pos)
    code = sae.encode_sparse(rows, pos)
    used = (code.live(code.values) != 0).flatten()
    row, meta, value = (tensor.flatten()[used].cpu() for tensor in (code.rows, code.indices, code.values))
    counts = torch.bincount(meta, minlength=sae.cfg.d_sae)
    found = []
    for m in counts.argsort(descending=True, stable=True)[:SHOWN].tolist():
        of_meta = meta == m
        strongest = row[of_meta][value[of_meta].argsort(descending=True, stable=True)[:MEMBERS]].to(rows.device)
        cosines = torch.nn.functional.cosine_similarity(rows[strongest], sae.W_dec[m][None])
        found.append(
            {
                "meta_latent": m,
                "count": int(counts[m]),
                "members": latents[strongest].tolist(),
                "cosines": [round(cosine, 4) for cosine in cosines.tolist()],
            }
        )
    return found
