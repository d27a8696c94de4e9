"""Area under the ROC curve of test items, also with each item counted several times, as a bootstrap needs it.

AUC = sum_ij c_i c_j ([s_i > s_j] + [s_i = s_j] / 2) / (sum_i c_i sum_j c_j)    i positive, j negative, c = counts
"""

import numpy as np


class Ranked:
    """Test items ordered by their score s [n], with labels y [n] bool, to compute the AUC of many resamples."""

    def __init__(self, s: np.ndarray, y: np.ndarray):
        if len(s) != len(y):
            raise ValueError(f"{len(s)} scores and {len(y)} labels")
        order = np.argsort(s, kind="stable")
        ranked = np.asarray(s)[order]
        #: first item of each group of equal scores
        self.starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
        self.order, self.positive = order, np.asarray(y, bool)[order]

    def scores(self, counts: np.ndarray) -> np.ndarray:
        """AUC with each item counted as often as `counts` [draws, n] says, [draws]; NaN where a class has no item."""
        ranked = np.asarray(counts, np.float64)[:, self.order]
        positive = np.add.reduceat(ranked * self.positive, self.starts, axis=1)
        negative = np.add.reduceat(ranked * ~self.positive, self.starts, axis=1)
        below = np.cumsum(negative, axis=1) - negative / 2
        pairs = positive.sum(1) * negative.sum(1)
        return np.divide((positive * below).sum(1), pairs, out=np.full(len(counts), np.nan), where=pairs > 0)

    @property
    def score(self) -> float:
        return float(self.scores(np.ones((1, len(self.order))))[0])
