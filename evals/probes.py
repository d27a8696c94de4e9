"""Probes: logistic regression on a few columns, chosen by how far the classes' means are apart.

The protocol of SAEBench's sparse probing (https://github.com/adamkarvonen/SAEBench), written from its description: of the
columns of X [n, F], the k with the largest |mean of class 1 - mean of class 0| on the training rows; scikit-learn's
LogisticRegression (L2, C = 1, at most 1000 iterations, columns as they are) on those; accuracy on the test rows.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ..engine.errors import UserError

TINY = 3e-4  # columns no larger than this leave the regression's coefficients at zero, and accuracy at chance


@dataclass
class Split:
    """Rows X [n, F] float and y [n] bool, for training a probe and for testing it."""

    train_X: np.ndarray
    train_y: np.ndarray
    test_X: np.ndarray
    test_y: np.ndarray

    def shuffled(self, draw: np.random.Generator) -> "Split":
        """The same with labels of the training rows permuted: what chance gives."""
        return Split(self.train_X, draw.permutation(self.train_y), self.test_X, self.test_y)


def balanced(y: np.ndarray, draw: np.random.Generator, *, groups: np.ndarray | None = None) -> np.ndarray:
    """Indices of as many rows with y false as with y true, drawn evenly from the `groups` [n] of the former, in a random
    order. Raises UserError where one side is empty."""
    positive, negative = np.flatnonzero(y), np.flatnonzero(~y)
    if not len(positive) or not len(negative):
        raise UserError(f"labels: {len(positive)} of {len(y)} rows are of the class; a probe needs both sides")
    count = min(len(positive), len(negative))
    kinds = np.zeros(len(y), np.int64) if groups is None else groups
    of_kind = [draw.permutation(negative[kinds[negative] == kind]) for kind in np.unique(kinds[negative])]
    # the first of every kind, then the second of every kind, and so on
    rank = np.concatenate([np.arange(len(rows)) for rows in of_kind])
    evenly = np.concatenate(of_kind)[np.argsort(rank, kind="stable")]
    return draw.permutation(np.concatenate([draw.permutation(positive)[:count], evenly[:count]]))


def halves(X: np.ndarray, y: np.ndarray, rows: np.ndarray, draw: np.random.Generator, *, train: float = 0.5) -> Split:
    """The balanced `rows`, half of each class for training and half for testing, or another share for `train`."""
    of_class = [draw.permutation(rows[y[rows] == side]) for side in (True, False)]
    sides = [np.split(class_rows, [math.ceil(train * len(class_rows))]) for class_rows in of_class]
    for_train, for_test = (np.concatenate(pieces) for pieces in zip(*sides, strict=True))
    if min(len(for_train), len(for_test)) < 2:
        raise UserError(f"labels: {len(rows)} rows are too few to train a probe on one half and test it on the other")
    return Split(X[for_train], y[for_train], X[for_test], y[for_test])


def columns(split: Split, k: int) -> np.ndarray:
    """The k columns whose classes' means are furthest apart on the training rows, the furthest first."""
    if not 1 <= k <= split.train_X.shape[1]:
        raise UserError(f"k: {k} is not allowed; there are {split.train_X.shape[1]} latents")
    means = [split.train_X[split.train_y == side].mean(0, dtype=np.float64) for side in (True, False)]
    return np.argsort(-np.abs(means[0] - means[1]), kind="stable")[:k]


def accuracy(split: Split, chosen: np.ndarray | None = None) -> float:
    """Test accuracy of a logistic regression on the chosen columns, or on all."""
    train, test = (X if chosen is None else X[:, chosen] for X in (split.train_X, split.test_X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe = LogisticRegression(max_iter=1000).fit(train, split.train_y)
    return float(probe.score(test, split.test_y))


def top_k(split: Split, ks: tuple[int, ...]) -> dict[int, float]:
    """Test accuracy by k; all columns where there are no more than k."""
    order = columns(split, min(max(ks), split.train_X.shape[1]))
    return {k: accuracy(split, order[:k]) for k in ks}


def ailing(X: np.ndarray) -> str | None:
    """What is wrong with pooled latents [n, F] that a probe would turn into chance: none active, or all tiny."""
    if not np.any(X):
        return "no latent is active on any text"
    largest = float(np.abs(X).max())
    if largest > TINY:
        return None
    return f"the largest pooled activation is {largest:.1e}, too small for a probe: was the input's scale folded back?"
