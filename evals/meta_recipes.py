"""Recipes for meta structure: which decoder rows are used, and how the meta-dictionary is trained and scored.

temposae   rows of latents that fire; n / 21 meta-latents, at least 8; our trainer, 500 steps of 256 rows, in passes without
           replacement. A tenth of 1,000 rows or more is held out for the score.
saebench   SAEBench 0.6.0 (https://github.com/adamkarvonen/SAEBench), after Bussmann et al., "Learning Multi-Level Features
           with Matryoshka Sparse Autoencoders" (ICML 2025, appendix D.1): all rows, also of latents that never fire;
           ceil(F / 4) meta-latents, at least 4; 1,500 steps of 1,024 rows drawn with replacement, trained as SAELens trains
           (`saelens_trained`). All rows are scored, in batches of 4,096. Each keeps the 4 N largest activations of N rows.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from ..engine.cohort import Cohort
from ..engine.config import SAEConfig, TrainConfig
from ..engine.learner import Learner
from ..engine.sae import SparseAutoencoder
from ..engine.stream import Batch
from ..kernels import autograd
from .evaluation import OWN, SAEBENCH, check_protocol

K = 4  # active meta-latents per row, as in arXiv 2502.04878 and in SAEBench
RATIO = 21  # latents per meta-latent: about 49,152 / 2,304, as in arXiv 2502.04878
LEAST = 2 * K  # meta-latents of a small dictionary
WIDTH_RATIO, LR = 0.25, 5e-4  # SAEBench's meta-latents per latent, and its learning rate
DECODER_NORM = 0.1  # of decoder rows at the start of SAELens' training
CLIP = 1.0  # its largest gradient norm


@dataclass(frozen=True)
class Recipe:
    """`width` gives the number of meta-latents for a number of training rows. `train` trains them on rows [n, D], and calls
    its last argument after every step. `only_live`: leave out rows of latents that don't fire. `fewest`: rows for a score.
    `split`: rows from which on a tenth is held out, None for never. `scored`: rows of a batch in scoring, None for all."""

    name: str
    width: Callable[[int], int]
    train: "Callable[[Tensor, Recipe, np.random.Generator, Callable[[], None]], SparseAutoencoder]"
    steps: int
    batch: int
    only_live: bool
    fewest: int
    split: int | None
    scored: int | None

    def settings(self) -> dict[str, Any]:
        """What a result says, by SAEBench's names with its recipe."""
        if self.name == OWN:
            return {"k": K, "ratio": RATIO, "steps": self.steps, "batch": self.batch}
        # the windows are for AuxK, which begins after more steps than there are, and for statistics
        return {
            "width_ratio": WIDTH_RATIO, "k": K, "train_steps": self.steps, "train_batch_size": self.batch,
            "learning_rate": LR, "weight_decay": 0.0, "autocast": False, "eval_batch_size": self.scored,
            "dead_feature_window": 2000, "feature_sampling_window": 200, "dtype": "float32",
        }  # fmt: skip


def own_trained(
    rows: Tensor, recipe: Recipe, draw: np.random.Generator, done: Callable[[], None]
) -> SparseAutoencoder:  # fmt: skip
    """A BatchTopK dictionary trained on rows [n, D] by our trainer, in float32 on every device."""
    size = min(recipe.batch, len(rows))
    # not the evaluation's seed: a dictionary of that seed has started from the same directions
    seed = int(draw.integers(2**32, 2**63))
    settings = TrainConfig(tokens=recipe.steps * size, batch=size, seed=seed, control=False, dtype="float32")
    config = SAEConfig(d_in=rows.shape[1], d_sae=recipe.width(len(rows)), k=K, activation="batchtopk")
    mean, norm = rows.mean(0), float(rows.norm(dim=1).mean())
    learner = Learner(SparseAutoencoder(config, seed=seed), settings, mean, norm, 1)
    cohort, batches = Cohort([learner]), _batches(rows, size, draw)
    for step in range(1, recipe.steps + 1):
        cohort.step(next(batches))
        if step % max(1, recipe.steps // 20) == 0:  # finds dead meta-latents, which AuxK revives
            cohort.settle()
            learner.report()
        done()
    cohort.settle()
    return learner.end()


def _batches(rows: Tensor, size: int, draw: np.random.Generator) -> Iterator[Batch]:
    """Batches of `size` rows without end, each pass in another order. What remains of a pass is left out."""
    pos = torch.zeros(size, dtype=torch.int64, device=rows.device)
    while True:
        order = torch.from_numpy(draw.permutation(len(rows))).to(rows.device)
        for start in range(0, len(rows) - size + 1, size):
            yield Batch.of(rows[order[start : start + size]], pos)


@torch.enable_grad()
def saelens_trained(
    rows: Tensor, recipe: Recipe, draw: np.random.Generator, done: Callable[[], None]
) -> SparseAutoencoder:  # fmt: skip
    """A BatchTopK dictionary trained on rows [n, D] as SAELens 6.54 trains one (`rescale_acts_by_decoder_norm`):

        f = the K N largest of relu((x - b_dec) W_enc + b_enc) s over a batch of N rows     s_m = |W_dec,m|
        x_hat = (f / s) W_dec + b_dec                                                      loss = mean |x - x_hat|^2

    by Adam at the constant rate `LR`, with the gradient clipped to norm 1. Biases start at 0, decoder rows at random with
    norm 0.1, and W_enc as W_dec^T. W_enc and W_dec share no scale, so the rate turns these short rows fast at first. The
    dictionary that is returned has decoder rows of norm 1. Random draws are those of SAELens after `torch.manual_seed`.
    """
    generator, M = torch.Generator().manual_seed(int(draw.integers(2**62))), recipe.width(len(rows))
    W = torch.nn.init.kaiming_uniform_(torch.empty(M, rows.shape[1]), generator=generator)
    W = (W / W.norm(dim=1, keepdim=True) * DECODER_NORM).to(rows.device)
    W_enc, W_dec = Parameter(W.clone()), Parameter(W.clone())  # both [M, D]
    b_enc, b_dec = Parameter(W.new_zeros(M)), Parameter(W.new_zeros(rows.shape[1]))
    adam = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=LR, fused=True)
    for _ in range(recipe.steps):
        x = rows[torch.randint(len(rows), (recipe.batch,), generator=generator).to(rows.device)]
        s = W_dec.norm(dim=1)
        code, _ = autograd.encode_topk(x, (W_enc * s[:, None]).T, b_enc * s, b_dec, k=K, across_batch=True)
        squared_error, _ = autograd.reconstruct(code, W_dec / s[:, None], b_dec, x)
        adam.zero_grad()
        squared_error.mean().backward()
        torch.nn.utils.clip_grad_norm_([W_enc, W_dec, b_enc, b_dec], CLIP)
        adam.step()
        done()
    sae = SparseAutoencoder(SAEConfig(d_in=rows.shape[1], d_sae=M, k=K, activation="batchtopk")).to(rows.device)
    with torch.no_grad():
        s = W_dec.norm(dim=1)
        for parameter, value in (
            (sae.W_enc, (W_enc * s[:, None]).T), (sae.b_enc, b_enc * s), (sae.W_dec, W_dec / s[:, None]), (sae.b_dec, b_dec)
        ):  # fmt: skip
            parameter.copy_(value)
    return sae


def _own_width(rows: int) -> int:
    return max(LEAST, rows // RATIO)


def _saebench_width(rows: int) -> int:
    return max(K, math.ceil(rows * WIDTH_RATIO))


#: by the names of `evaluation.PROTOCOLS`
RECIPES = {
    OWN: Recipe(
        OWN, _own_width, own_trained, 500, 256, only_live=True, fewest=4 * LEAST, split=1000, scored=None
    ),
    SAEBENCH: Recipe(
        SAEBENCH, _saebench_width, saelens_trained, 1500, 1024, only_live=False, fewest=2, split=None, scored=4096
    ),
}  # fmt: skip


def recipe_of(name: str) -> Recipe:
    """The recipe of this name. Raises UserError if there is none."""
    check_protocol(name)
    return RECIPES[name]


def saebench_form(result: dict[str, Any], seed: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]] | None:
    """Metrics and settings by SAEBench's names, and further figures. None if the result isn't of its recipe."""
    score = result["meta_explained_variance"]
    if result.get("protocol_name") != SAEBENCH or score is None:
        return None
    metrics = {
        "decoder_fraction_variance_explained": score,
        "train_time_seconds": result["training"]["seconds"],
        "final_reconstruction_mse": result["mse"],
    }
    further = {name: result[name] for name in ("latents", "meta_latents", "l0")}
    return {"meta_structure": metrics}, {"random_seed": seed, **result["protocol"]}, further
