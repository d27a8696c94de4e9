"""What runs C3 to C8 look at, worked out of the metrics of a finished run: losses, weights and sparsity by position.

`metrics` are the reports of a run trained with `train.log_positions` and a `position_tracker`, as `metrics.jsonl` holds
them (`engine.folder.read_metrics`). S reports, T positions; NaN where a position had no tokens. C9's clusters are those of
`evals.clusters`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine.errors import UserError

Metrics = Sequence[Mapping[str, Any]]
CLOSE = 0.05  # a weight has converged where it stays within this share of its last value


@dataclass(frozen=True)
class PositionLosses:
    """`steps` [S] and the mean squared error of a token by position at each [S, T], `final` the last [T], `hardest` the
    positions from the largest down. `of_step`: mean, max and min over positions of every step [steps, 3]."""

    steps: np.ndarray
    loss: np.ndarray
    final: np.ndarray
    hardest: np.ndarray
    of_step: np.ndarray


@dataclass(frozen=True)
class WeightEvolution:
    """`weights` [S, T] at `steps` [S]. `converged` [T]: the first step reported from which on a position's weight is within
    5% of its last. `correlation`: Spearman's, of the last weights with the last losses, over positions that have both; None
    if either is the same everywhere. Adaptive weights follow the losses, so that it says how well they keep up."""

    steps: np.ndarray
    weights: np.ndarray
    converged: np.ndarray
    correlation: float | None


@dataclass(frozen=True)
class SparsityByPosition:
    """L0 by position `l0` [S, T] at `steps` [S], and the last, `final` [T]. With activity: `share` [L, T], how a latent's
    activity is spread over positions (rows sum to 1), of the `latents` [L] that are the most particular about position (the
    least entropy), in order of their mean position."""

    steps: np.ndarray
    l0: np.ndarray
    final: np.ndarray
    latents: np.ndarray
    share: np.ndarray


def position_losses(metrics: Metrics) -> PositionLosses:
    """C3 and C4."""
    loss = _by_position(metrics, "positions", "squared_error")
    tracked = [_tracked(line) for line in metrics]
    columns = [[value for line in tracked for value in line[name]] for name in ("loss_mean", "loss_max", "loss_min")]
    order = np.argsort(-np.where(np.isnan(loss[-1]), -np.inf, loss[-1]), kind="stable")
    hardest = order[: int(np.isfinite(loss[-1]).sum())]
    return PositionLosses(_steps(metrics), loss, loss[-1], hardest, _numbers(columns).T)


def weight_evolution(metrics: Metrics) -> WeightEvolution:
    """C7."""
    weights = _numbers([_tracked(line)["weights"] for line in metrics])
    steps, final = _steps(metrics), weights[-1]
    away = np.abs(weights - final) > CLOSE * np.abs(final)
    first = np.where(away.any(0), len(away) - np.argmax(away[::-1], 0), 0)  # the report after the last that is away
    return WeightEvolution(
        steps, weights, steps[first], spearman(final, _by_position(metrics, "positions", "squared_error")[-1])
    )


def sparsity_by_position(metrics: Metrics, activity: np.ndarray | None = None, most: int = 64) -> SparsityByPosition:
    """C8. `activity` [F, T]: of each latent at each position, as in the rate at which it is active there; at most `most`
    latents are given back. Raises UserError for another number of positions than the metrics have."""
    l0 = _by_position(metrics, "positions", "l0")
    if activity is None:
        activity = np.zeros((0, l0.shape[1]))
    if activity.ndim != 2 or activity.shape[1] != l0.shape[1]:
        raise UserError(f"activity: shape {list(activity.shape)} is not allowed; it must be [F, {l0.shape[1]}]")
    used = np.flatnonzero(activity.sum(1) > 0)
    share = activity[used] / activity[used].sum(1, keepdims=True)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1)
    chosen = np.argsort(entropy, kind="stable")[:most]
    chosen = chosen[np.argsort(share[chosen] @ np.arange(l0.shape[1]), kind="stable")]
    return SparsityByPosition(_steps(metrics), l0, l0[-1], used[chosen], share[chosen])


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation over where both are finite; ties have the mean of their ranks. None if it is not defined."""
    both = np.isfinite(a) & np.isfinite(b)
    first, second = (_ranks(values[both]) for values in (a, b))
    if not both.any() or first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def _steps(metrics: Metrics) -> np.ndarray:
    return np.array([line["step"] for line in metrics])


def _tracked(line: Mapping[str, Any]) -> Mapping[str, Any]:
    if "position_tracker" not in line.get("parts", {}):
        raise UserError("metrics: no position_tracker in them; train with that part (runs C2 to C6)")
    return line["parts"]["position_tracker"]


def _by_position(metrics: Metrics, section: str, name: str) -> np.ndarray:
    if not metrics or any(section not in line for line in metrics):
        raise UserError("metrics: nothing by position in them; train with train.log_positions")
    return _numbers([line[section][name] for line in metrics])


def _numbers(values: Sequence[Sequence[float | None]]) -> np.ndarray:
    """With NaN for None."""
    return np.array([[np.nan if value is None else value for value in of] for of in values], float)
