"""Recipes for SCR and TPP: the probes, the choice of latents to ablate, and the rule for small gaps.

temposae   logistic regressions with an L2 penalty (scikit-learn, C = 1). Latents with an effect are ablated in the order
           of their effects. SCR is None if A_clean - A_base is below 0.05.
saebench   SAEBench 0.6.0 (https://github.com/adamkarvonen/SAEBench): linear probes trained by AdamW (`saebench_probe`).
           The n latents with the largest effects are ablated, or as many as have an effect: positive effects, then zeros,
           then negative ones. A gap below 0.001 scores 0, and if both base accuracies are equal, there is no
           scr_metric. The biased training set is as large as the balanced one. What the ablated latents would write at
           positions that are not read (padding and special tokens) is also subtracted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import binary_cross_entropy_with_logits

from .evaluation import OWN, SAEBENCH, check_protocol

EPOCHS, BATCH, LR, L1 = 20, 16, 1e-3, 1e-3  # SAEBench's probes
TEST_BATCH = 500  # its rows per batch in testing; given in result files


@dataclass(frozen=True)
class Task:
    """Rows X [n, D] and y bool [n] for training a probe, and for testing it."""

    X: np.ndarray
    y: np.ndarray
    test_X: np.ndarray
    test_y: np.ndarray


Probes = tuple[np.ndarray, np.ndarray]  # W [C, D] and b [C]


@dataclass(frozen=True)
class Recipe:
    """`fit` trains a probe per task; `order` gives the latents to ablate, first to last, of effects [F]. SCR is `no_gap` if
    A_clean - A_base is below `gap`. `even_sizes`: biased and balanced training sets are of one size. `scores_ties`: there is
    an scr_metric if both base accuracies are equal. `padding`: see above."""

    name: str
    fit: Callable[[list[Task], np.random.Generator], Probes]
    order: Callable[[np.ndarray], np.ndarray]
    gap: float
    no_gap: float
    even_sizes: bool
    scores_ties: bool
    padding: bool
    settings: dict[str, Any]  # by SAEBench's names


def _regressions(tasks: list[Task], _: np.random.Generator) -> Probes:
    fitted = [LogisticRegression(max_iter=1000).fit(task.X, task.y) for task in tasks]
    return np.concatenate([p.coef_ for p in fitted]), np.concatenate([p.intercept_ for p in fitted])


def _with_effect(effects: np.ndarray) -> np.ndarray:
    """Latents with an effect above rounding error, largest first, negative ones last."""
    order = np.argsort(-effects, kind="stable")
    return order[np.abs(effects[order]) > 1e-12 * max(np.abs(effects).max(), 1e-300)]


def _largest(effects: np.ndarray) -> np.ndarray:
    """As many latents as have an effect, largest first: effects of 0 come before negative ones."""
    return np.argsort(-effects, kind="stable")[: np.count_nonzero(effects)]


def _saebench_probes(tasks: list[Task], draw: np.random.Generator) -> Probes:
    probes = [saebench_probe(task, int(draw.integers(2**62))) for task in tasks]
    return np.stack([w for w, _ in probes]), np.array([b for _, b in probes])


@torch.enable_grad()
def saebench_probe(task: Task, seed: int) -> tuple[np.ndarray, float]:
    """Train a linear probe w [D], b by AdamW at `LR` for `EPOCHS` epochs in batches of `BATCH`:

        loss = mean BCE(x . w + b, y) + `L1` sum_i |w_i|

    Returns the weights after the epoch with the best test accuracy, the first of several. Random draws are those of a
    `torch.nn.Linear` and of `torch.randperm` in each epoch, after `torch.manual_seed(seed)`.
    """
    X, y = torch.from_numpy(task.X).float(), torch.from_numpy(task.y).float()
    test_X, test_y = torch.from_numpy(task.test_X).float(), torch.from_numpy(task.test_y)
    draw, bound = torch.Generator().manual_seed(seed), X.shape[1] ** -0.5
    w = torch.empty(1, X.shape[1]).uniform_(-bound, bound, generator=draw).requires_grad_()
    b = torch.empty(1).uniform_(-bound, bound, generator=draw).requires_grad_()
    adam = torch.optim.AdamW([w, b], lr=LR)
    best, accuracy = (w.detach().clone(), b.detach().clone()), 0.0
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(X), generator=draw).split(BATCH):
            logits = torch.nn.functional.linear(X[rows], w, b)[:, 0]
            loss = binary_cross_entropy_with_logits(logits, y[rows]) + L1 * w.abs().sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
        with torch.no_grad():
            right = float(((torch.nn.functional.linear(test_X, w, b)[:, 0] > 0) == test_y).float().mean())
        if right > accuracy:
            best, accuracy = (w.detach().clone(), b.detach().clone()), right
    return best[0][0].double().numpy(), float(best[1])


#: by the names of `evaluation.PROTOCOLS`
RECIPES = {
    OWN: Recipe(OWN, _regressions, _with_effect, 0.05, np.nan, False, True, False, {}),
    SAEBENCH: Recipe(
        SAEBENCH, _saebench_probes, _largest, 0.001, 0.0, True, False, True,
        {
            "early_stopping_patience": EPOCHS, "probe_epochs": EPOCHS, "probe_lr": LR, "probe_l1_penalty": L1,
            "probe_train_batch_size": BATCH, "probe_test_batch_size": TEST_BATCH,
        },
    ),
}  # fmt: skip


def recipe(name: str) -> Recipe:
    """The recipe of this name. Raises UserError if there is none."""
    check_protocol(name)
    return RECIPES[name]
