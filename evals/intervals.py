"""Intervals of scores by a bootstrap over test items, and the smallest difference from random that the items can show.

A score is a mean over G groups (classes, tasks, letters, splits) of a ratio of sums over n items (documents, rows,
questions, words):

    score = sum_g weight_g (sum_i gained_ig / sum_i counted_ig)     weights sum to 1; accuracy: gained 0 or 1, counted 1
    low, high     2.5th and 97.5th percentile of the score over `DRAWS` resamples of the items with replacement
    difference    score - the random control's, with its percentiles over the same resamples: paired by item
    least         (1.96 + 0.84) s, s = standard deviation of the difference over resamples: a true difference of this size
                  excludes zero in 80% of such tests (a 5% level, two-sided)

Only counts are resampled. Nothing is fitted or run again, so the intervals hold for these probes, settings and ablated
latents. They say nothing about another training seed. If all items have the same outcome, the resamples don't differ. Then
the rule of three applies: with no exception in n items, the rate of exceptions is below 3 / n at 95%.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 1000  # resamples
POWER = 1.96 + 0.84  # quantiles for a two-sided level of 5% and a power of 80%
_AT_ONCE = 2**22  # counts in memory at once


@dataclass
class Outcomes:
    """What n items contribute to a score: `gained` and `counted` [n, G], and `weight` [G] of the groups (default: equal).
    `bounded`: an item's outcome is between 0 and 1, or -1 and 1."""

    gained: np.ndarray
    counted: np.ndarray
    weight: np.ndarray | None = None
    bounded: bool = True

    @classmethod
    def of(cls, gained: np.ndarray, *, bounded: bool = True) -> "Outcomes":
        """One group, in which every item counts once; `gained` [n]."""
        gained = np.asarray(gained, np.float64)[:, None]
        return cls(gained, np.ones_like(gained), bounded=bounded)

    @property
    def items(self) -> int:
        """Number of items that count in some group."""
        return int((self.counted != 0).any(1).sum())

    def scores(self, counts: np.ndarray) -> np.ndarray:
        """The score with each item counted as often as `counts` [draws, n] says, [draws]; NaN where no group is left."""
        gained, counted = counts @ self.gained, counts @ self.counted
        weight = np.ones(counted.shape[1]) if self.weight is None else self.weight
        known = counted != 0  # a resample may lack all items of a group
        ratio = np.divide(gained, counted, out=np.zeros_like(gained), where=known)
        total = (known * weight).sum(1)
        return np.divide((ratio * weight).sum(1), total, out=np.full(len(counts), np.nan), where=total > 0)

    @property
    def score(self) -> float:
        return float(self.scores(np.ones((1, len(self.gained))))[0])


def joined(parts: Iterable[Outcomes]) -> Outcomes:
    """The mean of several scores with items of their own."""
    parts = list(parts)
    shape = sum(len(part.gained) for part in parts), sum(part.gained.shape[1] for part in parts)
    gained, counted, weights, row, column = np.zeros(shape), np.zeros(shape), [], 0, 0
    for part in parts:
        n, G = part.gained.shape
        block = slice(row, row + n), slice(column, column + G)
        gained[block], counted[block] = part.gained, part.counted
        weight = np.ones(G) if part.weight is None else part.weight
        weights.append(weight / weight.sum())
        row, column = row + n, column + G
    return Outcomes(gained, counted, np.concatenate(weights), all(part.bounded for part in parts))


def interval(outcomes: Mapping[str, Outcomes], draw: np.random.Generator) -> dict[str, Any] | None:
    """Interval of the score of `sae`, those of the controls that have the same items, and the difference from `random`.

    Returns `low`, `high`, `items`, `controls` {name: low, high}, and `above_random` {difference, low, high, least}, None
    without a random control. None with fewer than two items.
    """
    n = outcomes["sae"].items
    if n < 2:
        return None
    by_name = _resampled(outcomes, draw)
    values = {name: of_name.score for name, of_name in outcomes.items()}
    bounded = {name: of_name.bounded for name, of_name in outcomes.items()}
    return described(by_name, values, n, bounded)


def described(
    by_name: Mapping[str, np.ndarray], values: Mapping[str, float], n: int, bounded: Mapping[str, bool] | None = None
) -> dict[str, Any]:
    """The interval of `interval` from resampled scores [draws] and scores `values` by name, for n items.

    `bounded` (default: all): whether an item's outcome is between 0 and 1.
    """
    of_sae = bounded is None or bounded["sae"]
    edges = {name: _edges(by_name[name], values[name], n, bounded is None or bounded[name]) for name in values}
    above = difference(by_name, values, n, "random", bounded=of_sae) if "random" in values else None
    return {**edges.pop("sae"), "items": n, "controls": edges, "above_random": above}


def difference(
    by_name: Mapping[str, np.ndarray], values: Mapping[str, float], n: int, other: str, *, bounded: bool = True
) -> dict[str, float]:
    """The score of `sae` minus that of `other`, paired by item: `difference`, `low`, `high` and `least`."""
    resampled, value = by_name["sae"] - by_name[other], values["sae"] - values[other]
    spread = POWER * float(np.nanstd(resampled, ddof=1))
    least = max(spread, 3 / n) if bounded else spread
    return {"difference": value, **_edges(resampled, value, n, bounded, lowest=-1), "least": least}


def resamples(n: int, draw: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each of n items is drawn in `DRAWS` resamples, in parts [draws, n]."""
    size = max(1, min(DRAWS, _AT_ONCE // n))
    for start in range(0, DRAWS, size):
        yield draw.multinomial(n, np.full(n, 1 / n), min(size, DRAWS - start)).astype(np.float64)


def _resampled(outcomes: Mapping[str, Outcomes], draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Scores over `DRAWS` resamples of the items, the same for every name."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in outcomes}
    for counts in resamples(len(outcomes["sae"].gained), draw):
        for name, part in outcomes.items():
            parts[name].append(part.scores(counts))
    return {name: np.concatenate(scores) for name, scores in parts.items()}


def _edges(scores: np.ndarray, value: float, n: int, bounded: bool, *, lowest: float = 0) -> dict[str, float]:
    low, high = (float(edge) for edge in np.nanquantile(scores, (0.025, 0.975)))
    if bounded and high - low < 1e-12:
        return {"low": max(lowest, value - 3 / n), "high": min(1.0, value + 3 / n)}
    return {"low": low, "high": high}
