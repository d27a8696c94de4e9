"""Probes with a tuned penalty, and the AUC of resampled items, against scikit-learn's own search and a count of pairs."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit, StratifiedKFold
from temposae.evals.auc import Ranked
from temposae.evals.tuned_probes import GRID, by_difference, fit, scores_of


def planted(n: int, D: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sparse nonnegative columns float32 [n, D], of which number 3 is larger in the class."""
    draw = np.random.default_rng(seed)
    y = draw.permutation(np.arange(n) % 2 == 1)
    X = np.maximum(draw.normal(size=(n, D)) - 0.5, 0)
    X[:, 3] += 0.8 * y * draw.random(n)
    return X.astype(np.float32), y


def pairs(s: np.ndarray, y: np.ndarray) -> float:
    """AUC by counting pairs."""
    return float(np.mean([(a > b) + (a == b) / 2 for a in s[y] for b in s[~y]]))


@pytest.mark.parametrize("levels", [3, 1000])  # many ties, and few
def test_auc_is_the_share_of_pairs_in_order(levels):
    draw = np.random.default_rng(levels)
    y = draw.random(60) < 0.4
    s = draw.integers(0, levels, size=60) + 0.3 * levels * y
    items = Ranked(s, y)
    assert items.score == pytest.approx(pairs(s, y), abs=1e-12)
    assert items.score == pytest.approx(roc_auc_score(y, s), abs=1e-12)
    counts = draw.multinomial(60, np.full(60, 1 / 60), 5)
    drawn = [np.repeat(np.arange(60), row) for row in counts]
    assert items.scores(counts) == pytest.approx([pairs(s[rows], y[rows]) for rows in drawn], abs=1e-12)


def test_auc_without_a_class_is_not_a_number():
    assert np.isnan(Ranked(np.arange(3), np.array([False, False, True])).scores(np.array([[1, 2, 0]])))
    with pytest.raises(ValueError, match="2 scores and 3 labels"):
        Ranked(np.zeros(2), np.zeros(3))


def test_latents_are_selected_by_their_difference_in_units_of_their_activity():
    """Latent 1 differs by 1 and is 10 when active, latent 2 differs by 0.5 and is 1 when active."""
    y = np.arange(40) < 20
    X = np.zeros((40, 4))
    X[:3, 1], X[20:21, 1] = 10, 10
    X[:15, 2], X[20:25, 2] = 1, 1
    X[:, 3] = 100
    assert by_difference(csr_array(X), y).tolist() == [2, 1, 0, 3]
    dense = np.random.default_rng(0).normal(size=(40, 30)) * (np.random.default_rng(1).random((40, 30)) < 0.3)
    active = (dense != 0).sum(0)
    scaled = dense / (np.abs(dense).sum(0) / (active + 1e-6) + 1e-6)
    difference = np.abs(scaled[y].mean(0) - scaled[~y].mean(0))
    assert by_difference(csr_array(dense), y).tolist() == np.argsort(-difference).tolist()


@pytest.mark.parametrize("penalty", ["l1", "l2"])
@pytest.mark.parametrize("n", [100, 300])  # six folds, and one
def test_the_penalty_is_the_best_of_scikit_learn_s_own_search(n, penalty):
    X, y = planted(n + 80, D=30)
    held_out = min(n // 5, 100)
    folds = (
        PredefinedSplit([-1] * (n - held_out) + [0] * held_out)
        if n > 128
        else StratifiedKFold(6, shuffle=True, random_state=7)
    )
    kind = {"solver": "saga", "l1_ratio": 1.0} if penalty == "l1" else {}
    probe = LogisticRegression(max_iter=1000, random_state=7, **kind)
    search = GridSearchCV(probe, {"C": GRID}, scoring="roc_auc", cv=folds, refit=False)
    search.fit(X[:n].astype(np.float64), y[:n])
    fitted = fit(X[:n], y[:n], X[n:], penalty, 7)
    assert search.best_params_["C"] == fitted.C
    assert 1e-5 < fitted.C < 1e5
    rows = np.random.RandomState(7).permutation(n)
    probe.set_params(C=fitted.C).fit(X[:n].astype(np.float64)[rows], y[:n][rows])
    exact = probe.predict_proba(X[n:].astype(np.float64))[:, 1]
    assert fitted.probability == pytest.approx(exact, abs=2e-3)
    scores = scores_of(fitted, y[n:])
    assert scores.auc == pytest.approx(pairs(fitted.probability, y[n:]), abs=1e-12)
    assert scores.accuracy == np.mean((fitted.probability > 0.5) == y[n:])
    assert scores.auc > 0.65
