"""Probes of the paper on sparse probing (arXiv 2502.16681), as the package sae-probes 0.4.2 fits them.

Split      half of each class: min(n - 100, 1024) rows for training, and all but one of the others for testing
Selection  latents with the largest |mean of class 1 - mean of class 0| on the training rows, each latent divided by the
           mean of its nonzero absolute values
Probe      logistic regression with an L1 penalty (scikit-learn's saga) or L2 (lbfgs), at most 1000 iterations, columns not
           scaled. C is the one of ten, 1e5 to 1e-5, with the best AUC on the last 100 training rows (at most a fifth; with
           fewer than 128 rows, in six folds). The probe is then fitted to all training rows.

With seed 42, the package's default, rows and folds are the package's.
"""

import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold

from ..engine.errors import UserError

Penalty = Literal["l1", "l2"]
Latents = Any  # scipy.sparse.csr_array [n, F], whose stubs lack most of it
GRID = np.logspace(5, -5, 10)  # values of C, the inverse strength of the penalty
MOST, TEST = 1024, 100  # training rows at most, and test rows at least
ITERATIONS = 1000
_SMALL = 1e-6  # added to divisors in the selection
_NEW = tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8)  # from then on, l1_ratio says which penalty
_SAGA: dict[str, Any] = {"l1_ratio": 1.0} if _NEW else {"penalty": "l1"}


class Fitted(NamedTuple):
    """A probe's probability of class 1 and its prediction for each test row [n], and the value of C."""

    probability: np.ndarray
    predicted: np.ndarray
    C: float


class Scores(NamedTuple):
    """Figures of a probe on the test rows; F1 is averaged over the classes by their number of rows."""

    auc: float
    accuracy: float
    f1: float


def split_rows(y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows for training and for testing, half of each class, in random order; y [n] bool.

    Raises UserError if a class has too few rows.
    """
    draw = np.random.RandomState(seed % 2**32)  # its draws are the package's
    train = min(len(y) - TEST, MOST)
    test = len(y) - train - 1
    halves = [(-(-size // 2), size // 2) for size in (train, test)]  # rows with y true and y false
    rest = [np.flatnonzero(y), np.flatnonzero(~y)]
    for side, name in enumerate(("second", "first")):
        if len(rest[side]) < sum(half[side] for half in halves):
            raise UserError(f"labels: {len(rest[side])} of {len(y)} rows are in the {name} class; half of them must be")
    chosen: list[np.ndarray] = []
    for half in halves:
        drawn = [draw.choice(rows, size=size, replace=False) for rows, size in zip(rest, half, strict=True)]
        rest = [np.setdiff1d(rows, taken) for rows, taken in zip(rest, drawn, strict=True)]
        chosen.append(np.concatenate(drawn))
    return draw.permutation(chosen[0]), draw.permutation(chosen[1])


def by_difference(latents: Latents, y: np.ndarray) -> np.ndarray:
    """Latents by the difference of the classes' means in multiples of their mean active value, largest first.

    `latents` [n, F] and y [n] bool of the training rows.
    """
    exact = latents.astype(np.float64)
    active = np.bincount(exact.indices[exact.data != 0], minlength=exact.shape[1])
    mean_active = np.asarray(abs(exact).sum(0)).ravel() / (active + _SMALL)
    means = [np.asarray(exact[side].sum(0)).ravel() / max(1, side.sum()) for side in (y, ~y)]
    return np.argsort(-np.abs(means[0] - means[1]) / (mean_active + _SMALL), kind="stable")


def fit(train_X: np.ndarray, train_y: np.ndarray, test_X: np.ndarray, penalty: Penalty, seed: int) -> Fitted:
    """Choose C on held-out training rows, fit to all training rows, and predict the test rows."""
    seed %= 2**32
    folds = _folds(train_X, train_y, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        validation = [np.mean([_validate(train_X, train_y, *fold, C, penalty, seed) for fold in folds]) for C in GRID]
        C = float(GRID[int(np.argmax(validation))])
        rows = np.random.RandomState(seed).permutation(len(train_y))
        probe = _probe(C, penalty, seed).fit(train_X[rows], train_y[rows])
    return Fitted(probe.predict_proba(test_X)[:, 1], np.asarray(probe.predict(test_X)), C)


def scores_of(fitted: Fitted, y: np.ndarray) -> Scores:
    """Figures of a fitted probe on the test rows with labels y [n] bool."""
    return Scores(
        float(roc_auc_score(y, fitted.probability)),
        float((fitted.predicted == y).mean()),
        float(f1_score(y, fitted.predicted, average="weighted")),
    )


def _folds(X: np.ndarray, y: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    n = len(y)
    if n < 128:
        return list(StratifiedKFold(6, shuffle=True, random_state=seed).split(X, y))
    held_out = min(int(0.2 * n), 100)
    return [(np.arange(n - held_out), np.arange(n - held_out, n))]


def _validate(
    X: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, C: float, penalty: Penalty, seed: int
) -> float:
    """AUC on the held-out rows; 0.5 if either side has one class."""
    if min(len(np.unique(y[rows])) for rows in (train, test)) < 2:
        return 0.5
    probe = _probe(C, penalty, seed).fit(X[train], y[train])
    return float(roc_auc_score(y[test], probe.predict_proba(X[test])[:, 1]))


def _probe(C: float, penalty: Penalty, seed: int) -> LogisticRegression:
    settings = {"solver": "saga", **_SAGA} if penalty == "l1" else {}
    return LogisticRegression(C=C, max_iter=ITERATIONS, random_state=seed, **settings)
