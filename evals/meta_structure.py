"""Meta structure of a dictionary: how well a small dictionary (a meta-SAE) reconstructs the decoder rows.

Leask et al., arXiv 2502.04878, find that many latents of a large dictionary are sums of a few directions that the latents
share. A BatchTopK dictionary of F_meta latents is trained on the n decoder rows w_i (norm 1) of the latents that fire:

    w_hat_i = sum_m a_im u_m + b       K = 4 active meta-latents per row on average, F_meta = n / 21, at least 8
    meta_explained_variance = 1 - sum_i |w_i - w_hat_i|^2 / sum_i |w_i - mean w|^2

A tenth of the rows is held out if n is at least 1,000, and the score is theirs. With fewer, it is that of the training rows.
The threshold keeps 4 meta-latents per scored row, or fewer if fewer are positive, for the dictionary and its controls.
Neither more nor less is better. A large value means that latents are sums of fewer directions than the dictionary has.

The paper trains on all rows (F_meta = 2,304 for 49,152 latents) and scores those. Here rows of latents that fire on no
evaluated token are left out (`dead`), because training has not given them a direction.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..engine.cohort import Cohort
from ..engine.config import SAEConfig, TrainConfig
from ..engine.learner import Learner
from ..engine.metrics import held_out_scores
from ..engine.process.progress import ProgressBar, progress_bar
from ..engine.sae import SparseAutoencoder
from ..engine.stream import Batch
from ..kernels.torch_modes import default_modes
from .evaluation import Autoencoder, Evaluation, TextActivations
from .positions import held_out

K = 4  # active meta-latents per row, as in the paper
RATIO = 21  # latents per meta-latent: about 49,152 / 2,304
LEAST = 2 * K  # meta-latents of a small dictionary
FEWEST = 4 * LEAST  # live latents for a score
SPLIT = 1000  # live latents from which on a tenth is held out
STEPS, BATCH = 500, 256
ROWS = 1024  # of text, to see which latents fire
SHOWN, MEMBERS = 8, 8  # meta-latents that are listed, and latents of each


class Fit(NamedTuple):
    """A meta-dictionary trained on rows [n, D], and the figures of the result."""

    sae: SparseAutoencoder
    figures: dict[str, Any]


def meta_structure(evaluation: Evaluation) -> dict[str, Any]:
    """Train a meta-dictionary on the decoder rows of the dictionary and of each control.

    Returns `meta_explained_variance` (of the scored rows), `train_explained_variance`, `l0` of the scored rows, `latents`
    (live ones, n), `dead`, `meta_latents`, `held_out` (number of held-out rows, 0 if n is below 1,000), `largest` (the
    meta-latents that most latents use: meta_latent, count, members with their cosines) and `controls`: `random` (as many
    rows of the random decoder), further trained controls, and `shuffled` (each coordinate of the rows permuted). There is no
    `lm_neurons`, because its rows are the coordinate axes, which share nothing by construction. The figures are None, with a
    warning, if fewer than 32 latents fire.
    """
    collected = held_out(evaluation, ROWS)
    live = _live(evaluation.sae, collected)
    rows = evaluation.sae.W_dec[live]
    decoders = {"sae": rows}
    for name, control in evaluation.controls.items():
        # a random decoder's rows are random directions whether or not the latent fires, so n of them are a null of one size
        decoders[name] = control.W_dec[: len(live)] if name == "random" else control.W_dec[_live(control, collected)]
    decoders["shuffled"] = _shuffled(rows, evaluation.generator("meta_structure shuffled"))
    fits: dict[str, Fit | None] = {}
    with progress_bar("training meta-dictionaries", total=STEPS * len(decoders), unit="steps") as bar:
        for name, decoder in decoders.items():
            draw = evaluation.generator("meta_structure rows")
            fits[name] = _fit(decoder, draw, bar) if len(decoder) >= FEWEST else None
    figures = {name: _figures(fits[name], decoder) for name, decoder in decoders.items()}
    fit, result = fits["sae"], figures.pop("sae")
    result |= {
        "dead": evaluation.sae.cfg.d_sae - len(live),
        "largest": [] if fit is None else _largest(fit.sae, rows, live),
        "controls": figures,
        "rows": len(collected),
        "protocol": {"k": K, "ratio": RATIO, "steps": STEPS, "batch": BATCH},
    }
    few = [name for name, of_name in fits.items() if of_name is None]
    return result | ({"warnings": [_too_few(name, len(decoders[name])) for name in few]} if few else {})


def _too_few(name: str, count: int) -> str:
    return f"{name}: {count} latents fire; at least {FEWEST} are needed for a meta-dictionary"


def _figures(fit: Fit | None, rows: Tensor) -> dict[str, Any]:
    names = ("meta_explained_variance", "train_explained_variance", "l0", "meta_latents", "held_out")
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
def _fit(rows: Tensor, draw: np.random.Generator, bar: ProgressBar) -> Fit:
    """Train a meta-dictionary on rows [n, D], and score it on those held out, or on all if there are few."""
    order = torch.from_numpy(draw.permutation(len(rows))).to(rows.device)
    held = len(rows) // 10 if len(rows) >= SPLIT else 0
    train = rows[order[held:]]
    sae = _trained(train, max(LEAST, len(train) // RATIO), draw, bar)
    train_score, _ = _score(sae, train)
    score, l0 = _score(sae, rows[order[:held]] if held else train)
    return Fit(
        sae,
        {
            "meta_explained_variance": score,
            "train_explained_variance": train_score,
            "l0": l0,
            "meta_latents": sae.cfg.d_sae,
            "held_out": held,
        },
    )


def _trained(rows: Tensor, count: int, draw: np.random.Generator, bar: ProgressBar) -> SparseAutoencoder:
    """A BatchTopK dictionary of `count` latents after STEPS steps on rows [n, D], in float32 on every device."""
    size = min(BATCH, len(rows))
    # not the evaluation's seed: a dictionary of that seed has started from the same directions
    seed = int(draw.integers(2**32, 2**63))
    settings = TrainConfig(tokens=STEPS * size, batch=size, seed=seed, control=False, dtype="float32")
    config = SAEConfig(d_in=rows.shape[1], d_sae=count, k=K, activation="batchtopk")
    mean, norm = rows.mean(0), float(rows.norm(dim=1).mean())
    learner = Learner(SparseAutoencoder(config, seed=seed), settings, mean, norm, 1)
    cohort, batches = Cohort([learner]), _batches(rows, size, draw)
    for step in range(1, STEPS + 1):
        cohort.step(next(batches))
        if step % max(1, STEPS // 20) == 0:  # finds dead meta-latents, which AuxK revives
            cohort.settle()
            learner.report()
        bar.advance(1)
    cohort.settle()
    return learner.end()


def _batches(rows: Tensor, size: int, draw: np.random.Generator) -> Iterator[Batch]:
    """Batches of `size` rows without end, each pass in another order. What remains of a pass is left out."""
    pos = torch.zeros(size, dtype=torch.int64, device=rows.device)
    while True:
        order = torch.from_numpy(draw.permutation(len(rows))).to(rows.device)
        for start in range(0, len(rows) - size + 1, size):
            yield Batch.of(rows[order[start : start + size]], pos)


def _score(sae: SparseAutoencoder, rows: Tensor) -> tuple[float | None, float]:
    """Explained variance and L0 on rows [n, D], with the threshold that keeps K activations per row."""
    pos = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    sae.fit_threshold(rows, pos)
    scores = held_out_scores(sae, [Batch.of(rows, pos)])
    assert scores is not None
    return None if scores["fvu"] is None else 1 - scores["fvu"], scores["l0"]


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
