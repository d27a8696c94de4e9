"""Probes: logistic regression on a few columns, selected by the difference of the classes' means.

The protocol is that of SAEBench's sparse probing (https://github.com/adamkarvonen/SAEBench). Select the k columns of
X [n, F] with the largest |mean of class 1 - mean of class 0| on the training rows, fit scikit-learn's LogisticRegression
(L2, C = 1, at most 1000 iterations, columns not scaled) to them, and report the accuracy on the test rows.
"""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ..engine.errors import UserError

Matrix = Any  # np.ndarray or csr_array, float [n, F]
TINY = 3e-4  # with columns no larger than this, coefficients stay near zero and accuracy at chance


@dataclass
class Split:
    """Rows X [n, F] float, dense or sparse, and y [n] bool for training a probe, and for testing it."""

    train_X: Matrix
    train_y: np.ndarray
    test_X: Matrix
    test_y: np.ndarray
    test_rows: np.ndarray | None = None  # numbers of the test rows, if they were drawn from more

    def shuffled(self, draw: np.random.Generator) -> "Split":
        """The same with permuted labels of the training rows: the chance level."""
        return Split(self.train_X, draw.permutation(self.train_y), self.test_X, self.test_y, self.test_rows)


def balanced(y: np.ndarray, draw: np.random.Generator, *, groups: np.ndarray | None = None) -> np.ndarray:
    """Draw equally many rows with y true and y false, the latter evenly from their `groups` [n]; returns indices in random
    order. Raises UserError if one side is empty."""
    positive, negative = np.flatnonzero(y), np.flatnonzero(~y)
    if not len(positive) or not len(negative):
        raise UserError(f"labels: {len(positive)} of {len(y)} rows are in the class; a probe needs rows of both sides")
    count = min(len(positive), len(negative))
    kinds = np.zeros(len(y), np.int64) if groups is None else groups
    by_kind = [draw.permutation(negative[kinds[negative] == kind]) for kind in np.unique(kinds[negative])]
    # the first of every kind, then the second of every kind, and so on
    rank = np.concatenate([np.arange(len(rows)) for rows in by_kind])
    evenly = np.concatenate(by_kind)[np.argsort(rank, kind="stable")]
    return draw.permutation(np.concatenate([draw.permutation(positive)[:count], evenly[:count]]))


def halves(X: Matrix, y: np.ndarray, rows: np.ndarray, draw: np.random.Generator, *, train: float = 0.5) -> Split:
    """Split the balanced `rows`: the share `train` of each class for training, the others for testing."""
    by_class = [draw.permutation(rows[y[rows] == side]) for side in (True, False)]
    sides = [np.split(class_rows, [math.ceil(train * len(class_rows))]) for class_rows in by_class]
    for_train, for_test = (np.concatenate(pieces) for pieces in zip(*sides, strict=True))
    if min(len(for_train), len(for_test)) < 2:
        raise UserError(f"labels: {len(rows)} rows are too few to train and test a probe; each needs at least 2")
    return Split(X[for_train], y[for_train], X[for_test], y[for_test], for_test)


def columns(split: Split, k: int) -> np.ndarray:
    """The k columns with the largest difference of the classes' means on the training rows, largest first."""
    if not 1 <= k <= split.train_X.shape[1]:
        raise UserError(f"k: {k} is not allowed; there are {split.train_X.shape[1]} latents")
    means = [np.asarray(split.train_X[split.train_y == side].mean(0, dtype=np.float64)) for side in (True, False)]
    return np.argsort(-np.abs(means[0] - means[1]), kind="stable")[:k]


def accuracy(split: Split, chosen: np.ndarray | None = None) -> float:
    """Test accuracy of a logistic regression on the chosen columns, or on all."""
    return float(right(split, chosen).mean())


def right(split: Split, chosen: np.ndarray | None = None) -> np.ndarray:
    """Whether a logistic regression on the chosen columns, or on all, is right on each test row."""
    train, test = (dense(X if chosen is None else X[:, chosen]) for X in (split.train_X, split.test_X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe = LogisticRegression(max_iter=1000).fit(train, split.train_y)
    return np.asarray(probe.predict(test)) == split.test_y


def top_k(split: Split, ks: tuple[int, ...]) -> dict[int, float]:
    """Test accuracy by k, of all columns if there are fewer than k."""
    return {k: float(correct.mean()) for k, correct in top_k_right(split, ks).items()}


def top_k_right(split: Split, ks: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Whether the probe is right on each test row, by k, of all columns if there are fewer than k."""
    order = columns(split, min(max(ks), split.train_X.shape[1]))
    best = replace(split, train_X=dense(split.train_X[:, order]), test_X=dense(split.test_X[:, order]))
    return {k: right(best, np.arange(min(k, len(order)))) for k in ks}


def dense(X: Matrix) -> np.ndarray:
    return X.toarray() if issparse(X) else np.asarray(X)


def ailing(X: Matrix) -> str | None:
    """Why a probe on pooled latents [n, F] would score chance: none is active, or all are tiny; None if neither."""
    largest = float(abs(X).max())
    if not largest:
        return "no latent is active on any text"
    if largest > TINY:
        return None
    return f"the largest pooled activation is {largest:.1e}, too small for a probe: was the input's scale folded back?"
