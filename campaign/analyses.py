"""The analyses of log C, which look at the weights of another run: C3 and C4 at C2's, C7 to C9 at C6's.

`metrics` are that run's reports (`metrics.jsonl`), trained with `train.log_positions` and a `position_tracker`. `clusters`
is its result of `evals.clusters`. Arrays are [S, T] for S reports and T positions, with NaN for a position without tokens.
Positions count from 0. Errors are per token, where |x|^2 is about D.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..engine.errors import UserError

Metrics = Sequence[Mapping[str, Any]]
Clusters = Mapping[str, Any]
Figures = dict[str, float | None]
CLOSE = 0.05  # a weight has converged once it stays within this share of its final value


def analysis(run: str, metrics: Metrics, clusters: Clusters | None = None) -> Figures:
    """The results of an analysis by name, see `LABELS`.

    Names that end in `_at` are positions, steps or bins, of which a mean over seeds is meaningless. Raises UserError, with
    the reason, if what it reads was not measured.
    """
    return _ANALYSES[run](metrics, clusters)


def distance_to_last(weights: np.ndarray) -> np.ndarray:
    """The mean over positions of |w - w_last| [..., S], of weights [..., S, T]."""
    return np.abs(weights - weights[..., -1:, :]).mean(-1)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's correlation of the entries finite in both. None for fewer than three, or if one side is constant."""
    from scipy.stats import spearmanr

    is_known = np.isfinite(a) & np.isfinite(b)
    if is_known.sum() < 3 or np.ptp(a[is_known]) == 0 or np.ptp(b[is_known]) == 0:
        return None
    return float(spearmanr(a[is_known], b[is_known]).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def early_to_late(profiles: np.ndarray) -> np.ndarray:
    """Profiles [L, BINS] sorted by their mean bin."""
    return profiles[np.argsort(profiles @ np.arange(profiles.shape[1]), kind="stable")]


def _extremes(by_position: np.ndarray) -> Figures:
    """The largest and least of [T], and their positions."""
    return {
        "most": float(np.nanmax(by_position)), "most_at": int(np.nanargmax(by_position)),
        "least": float(np.nanmin(by_position)), "least_at": int(np.nanargmin(by_position)),
    }  # fmt: skip


def _position_losses(metrics: Metrics, _: Clusters | None) -> Figures:
    positions, tracked = _extremes(by_position(metrics, "squared_error")[-1]), _tracked(metrics)[-1]
    mean, most, least = (tracked[name][-1] for name in ("loss_mean", "loss_max", "loss_min"))
    return {**positions, "mean": mean, "most": most, "least": least, "ratio": most / least if least else None}


def _error_over_training(metrics: Metrics, _: Clusters | None) -> Figures:
    error, tracked = by_position(metrics, "squared_error"), _tracked(metrics)
    return {
        "first": float(np.nanmean(error[0])), "last": float(np.nanmean(error[-1])), **_extremes(error[-1] / error[0]),
        "sharpness_first": tracked[0].get("mask_sharpness"), "sharpness_last": tracked[-1].get("mask_sharpness"),
    }  # fmt: skip


def _weight_evolution(metrics: Metrics, _: Clusters | None) -> Figures:
    steps = np.array([line["step"] for line in metrics])
    weights = _numbers([tracked["weights"] for tracked in _tracked(metrics)])
    final = weights[-1]
    is_away = np.abs(weights - final) > CLOSE * np.abs(final)
    settled_from = np.where(
        is_away.any(0), len(is_away) - np.argmax(is_away[::-1], 0), 0
    )  # the report after the last away
    settled = np.sort(steps[settled_from])
    return {
        **_extremes(final),
        "half_settled_at": int(settled[(len(settled) - 1) // 2]), "all_settled_at": int(settled[-1]),
        "correlation": rank_correlation(final, by_position(metrics, "squared_error")[-1]),
    }  # fmt: skip


def _sparsity(metrics: Metrics, clusters: Clusters | None) -> Figures:
    l0 = by_position(metrics, "l0")
    if not np.nansum(l0[-1]):
        raise UserError("metrics: no latent is active in the last report")
    early = late = None
    if clusters is not None and clusters["clusters"]:
        profiles = _sample(clusters)
        bins = profiles.shape[1]
        mean_place = (profiles @ (np.arange(bins) + 0.5)) / bins  # 0: the row's beginning, 1: its end
        early, late = float((mean_place < 1 / 3).mean()), float((mean_place > 2 / 3).mean())
    return {
        **_extremes(l0[-1]),
        "deviation": float(np.nanstd(l0[-1]) / np.nanmean(l0[-1])),
        "deviation_first": float(np.nanstd(l0[0]) / np.nanmean(l0[0])) if np.nansum(l0[0]) else None,
        "early": early, "late": late,
    }  # fmt: skip


def _clustering(_: Metrics, clusters: Clusters | None) -> Figures:
    _sample(clusters)
    assert clusters is not None
    return {
        "count": clusters["count"], "latents": clusters["latents"],
        "largest": max(cluster["size"] for cluster in clusters["clusters"]) / clusters["latents"],
        "within": clusters["within"], "between": clusters["between"],
        "stability": _stability(clusters), "shuffled": _stability(clusters["controls"]["shuffled"]),
        "specialization": max(cluster["specialization"][2] for cluster in clusters["clusters"]),
    }  # fmt: skip


_ANALYSES: dict[str, Callable[[Metrics, Clusters | None], Figures]] = {
    "C3": _position_losses, "C4": _error_over_training, "C7": _weight_evolution, "C8": _sparsity, "C9": _clustering
}  # fmt: skip
#: by run: what each result of its analysis is, in words
LABELS: dict[str, dict[str, str]] = {
    "C3": {
        "mean": "squared error per token in the last step, mean over positions",
        "most": "squared error at the hardest position", "most_at": "the hardest position",
        "least": "squared error at the easiest position", "least_at": "the easiest position",
        "ratio": "squared error at the hardest position over that at the easiest",
    },
    "C4": {
        "first": "squared error per token at the first report", "last": "squared error per token at the last report",
        "least": "last squared error over the first, where it fell most", "least_at": "position where it fell most",
        "most": "last squared error over the first, where it fell least", "most_at": "position where it fell least",
        "sharpness_first": "mask sharpness at the first report (1: a hard mask)",
        "sharpness_last": "mask sharpness at the last report",
    },
    "C7": {
        "least": "least weight at the end", "least_at": "position of the least weight",
        "most": "largest weight at the end", "most_at": "position of the largest weight",
        "half_settled_at": f"step from which half of the weights stay within {CLOSE:.0%} of their final value",
        "all_settled_at": f"step from which all weights stay within {CLOSE:.0%} of their final value",
        "correlation": "rank correlation of weights with squared errors, which they follow by construction",
    },
    "C8": {
        "least": "least L0 of a position", "least_at": "position of the least L0",
        "most": "largest L0 of a position", "most_at": "position of the largest L0",
        "deviation": "standard deviation of L0 over positions, over its mean",
        "deviation_first": "the same at the first report",
        "early": "share of latents whose mean position is in the first third of a row",
        "late": "share of latents whose mean position is in the last third of a row",
    },
    "C9": {
        "latents": "latents that are clustered by where they are active", "count": "clusters",
        "largest": "share of latents in the largest cluster", "within": "distance within clusters (0 to 1)",
        "between": "distance between clusters (0 to 1)",
        "stability": "agreement of clusters of random halves of the text (adjusted Rand index, 0 by chance)",
        "shuffled": "the same with positions shuffled",
        "specialization": "largest median specialization of a cluster (at most 1)",
    },
}  # fmt: skip


def by_position(metrics: Metrics, name: str) -> np.ndarray:
    """`squared_error` or `l0` of every report, [S, T]."""
    if not metrics or any("positions" not in line for line in metrics):
        raise UserError("metrics: they have no values by position; train with train.log_positions")
    return _numbers([line["positions"][name] for line in metrics])


def _tracked(metrics: Metrics) -> list[Mapping[str, Any]]:
    if not metrics or any("position_tracker" not in line.get("parts", {}) for line in metrics):
        raise UserError("metrics: they have no position_tracker; train with that part (runs C2 to C6)")
    return [line["parts"]["position_tracker"] for line in metrics]


def _sample(clusters: Clusters | None) -> np.ndarray:
    """The profiles [L, BINS] of latents that `evals.clusters` keeps."""
    if clusters is None:
        raise UserError("clusters: not among the evals that were measured")
    if not clusters["clusters"]:
        raise UserError(f"clusters: only {clusters['latents']} latents fire often enough")
    return np.array(clusters["sample"]["profiles"])


def _stability(clusters: Clusters) -> float | None:
    return clusters["stability"] and clusters["stability"]["adjusted_rand"]


def _numbers(lines: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.array(lines, float)  # None becomes NaN
