"""Clusters of latents by the positions at which they are active, and the stability of these clusters.

A latent's profile is its activity by position: its mean activation over the tokens of each of `BINS` position bins, divided
by the sum of these means. A latent that is equally active everywhere has 1 / `BINS` in each bin. Latents that fire at least
`FIRINGS` times are clustered by average linkage over the Jensen-Shannon distance

    d(p, q) = sqrt((KL(p | m) + KL(q | m)) / (2 ln 2)),  m = (p + q) / 2          0: identical; 1: never in the same bin

Memory and time grow with the square of the latents that are clustered, so at most `MOST` are, drawn at random from those
that fire often enough: 192 MiB and 12.5 CPU seconds at F = 16,384 with controls. The clusters' sizes are then those in the
sample.

The tree is cut where the mean silhouette (Rousseeuw 1987) is largest. Stability is the adjusted Rand index (Hubert and
Arabie 1985) between the clusters of two halves of the rows: 1 is identical, 0 is chance. Position as an axis along which
latents differ: Voita et al., arXiv 2309.04827. The specialization of a profile is 1 - H(p) / log `BINS`: 0 for a uniform
profile, 1 for a single bin.
"""

import math
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist, squareform
from scipy.special import entr
from sklearn.metrics import adjusted_rand_score

from ..engine.errors import UserError
from ..engine.process.progress import progress_bar
from ..kernels.numerics import sum_by
from .evaluation import Autoencoder, Evaluation, TextActivations
from .positions import held_out

BINS = 16
MOST = 2048  # latents that are clustered
FIRINGS = 100  # that a latent needs, or its profile is noise; half as many in one half of the rows
ROWS, HALVES = 1024, 3
COUNTS = range(2, 9)  # numbers of clusters to choose from
SHOWN = 512  # latents whose profiles are kept for figures


@torch.no_grad()
def clusters(evaluation: Evaluation, *, count: int | None = None) -> dict[str, Any]:
    """Cluster the dictionary's latents by position into `count` clusters (default: the count with the best silhouette).

    Returns `count`, `latents` (how many were clustered), `frequent` (how many fire often enough), `silhouette` {count:
    value}, `clusters` (earliest first: size, mean profile [BINS], and the 5th, 25th, 50th, 75th and 95th percentile of
    specialization), the mean distance `within` and `between` clusters, `correlation` (mean Pearson r between profiles of two
    clusters' latents), `stability` (adjusted Rand index over random halves of the rows), `sample` (profile and cluster of up
    to `SHOWN` latents) and `controls`: `random`, `lm_neurons` (absolute values) and `shuffled` (positions permuted within
    each row). If too few latents fire, these are None. Raises UserError for a count below 2.
    """
    if count is not None and count < 2:
        raise UserError(f"count: {count} is not allowed; give at least 2 clusters, or none to choose by silhouette")
    collected = held_out(evaluation, ROWS)
    autoencoders = evaluation.autoencoders(collected, mean=False)
    measured = {name: (autoencoder, collected.pos) for name, autoencoder in autoencoders.items()}
    measured["shuffled"] = evaluation.sae, _shuffled(collected, evaluation.generator("clusters shuffled"))
    results = {}
    with progress_bar("clustering", total=len(measured), unit="dictionaries") as bar:
        for name, (autoencoder, pos) in measured.items():
            results[name] = _measure(evaluation, autoencoder, collected, pos, count)
            bar.advance(1)
    result = results.pop("sae")
    for control in results.values():
        del control["sample"]
    return {
        **result,
        "controls": results,
        "bins": BINS,
        "rows": len(collected),
    }


def _measure(
    evaluation: Evaluation, autoencoder: Autoencoder, collected: TextActivations, pos: torch.Tensor, count: int | None
) -> dict[str, Any]:
    sums, firings, tokens = _activity(autoencoder, collected, pos, torch.zeros(len(collected), dtype=torch.int64))
    frequent = np.flatnonzero(firings[0] >= FIRINGS)
    used = _drawn(frequent, evaluation.generator("clusters latents"))
    if len(used) < max(count or 0, COUNTS[0]) + 1:
        names = ("count", "silhouette", "clusters", "within", "between", "correlation", "stability", "sample")
        return {**dict.fromkeys(names), "latents": len(used), "frequent": len(frequent)}
    profiles = _profiles(sums[0][used], tokens[0])
    distances = _distances(profiles)
    square, merges = squareform(distances), linkage(distances, "average")
    cuts = {n: fcluster(merges, n, "maxclust") for n in ([count] if count else COUNTS) if n < len(used)}
    by_count = {n: _silhouette(square, cut) for n, cut in cuts.items()}
    count = max(by_count, key=lambda n: by_count[n])
    used_labels = cuts[count]
    order = sorted(np.unique(used_labels), key=lambda c: float(profiles[used_labels == c].mean(0) @ np.arange(BINS)))
    groups = [profiles[used_labels == c] for c in order]
    pairs = used_labels[:, None] == used_labels[None]
    upper = np.triu(np.ones_like(pairs), 1)
    shown = np.linspace(0, len(used) - 1, min(len(used), SHOWN)).astype(np.int64)
    return {
        "count": len(groups),
        "latents": len(used),
        "frequent": len(frequent),
        "silhouette": by_count,
        "clusters": [
            {
                "size": len(group),
                "profile": group.mean(0).tolist(),
                "specialization": np.percentile(1 - entr(group).sum(1) / math.log(BINS), (5, 25, 50, 75, 95)).tolist(),
            }
            for group in groups
        ],
        "within": _mean(square[pairs & upper]),
        "between": _mean(square[~pairs & upper]),
        "correlation": _correlation(groups),
        "stability": _stability(evaluation, autoencoder, collected, pos, count),
        "sample": {
            "profiles": profiles[shown].round(4).tolist(),
            "cluster": [order.index(c) for c in used_labels[shown]],
        },
    }


def _drawn(latents: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """At most `MOST` of these latents, ascending."""
    return latents if len(latents) <= MOST else np.sort(draw.choice(latents, MOST, replace=False))


def _stability(
    evaluation: Evaluation, autoencoder: Autoencoder, collected: TextActivations, pos: torch.Tensor, count: int
) -> dict[str, Any] | None:
    """Adjusted Rand index between the clusters of two random halves of the rows, mean of `HALVES` draws."""
    draw, draw_latents, scores = evaluation.generator("clusters halves"), evaluation.generator("clusters latents"), []
    for _ in range(HALVES):
        half = torch.from_numpy(draw.permutation(np.arange(len(collected)) % 2))
        sums, firings, tokens = _activity(autoencoder, collected, pos, half)
        used = _drawn(np.flatnonzero((firings >= FIRINGS / 2).all(0)), draw_latents)
        if len(used) <= count:
            return None
        trees = (tree(_profiles(sums[side][used], tokens[side])) for side in (0, 1))
        scores.append(float(adjusted_rand_score(*(fcluster(merges, count, "maxclust") for merges in trees))))
    return {"adjusted_rand": float(np.mean(scores)), "spread": float(np.std(scores, ddof=1)), "halves": HALVES}


def _activity(
    autoencoder: Autoencoder, collected: TextActivations, pos: torch.Tensor, group: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Summed activation [P, F, BINS], firings [P, F] and tokens [P, BINS] of P groups of rows; `group` [R] numbers them."""
    code, T = collected.code(autoencoder), collected.kept.shape[1]
    token_group = group.to(pos.device)[collected.row]
    where, F, P = pos * BINS // T, code.n_latents, int(group.max()) + 1
    latent = token_group[code.rows] * F + code.indices
    sums = sum_by(latent * BINS + where[code.rows], code.values.abs().double(), P * F * BINS)
    firings = torch.bincount(latent, minlength=P * F)
    tokens = torch.bincount(token_group * BINS + where, minlength=P * BINS)
    return sums.view(P, F, BINS).cpu().numpy(), firings.view(P, F).cpu().numpy(), tokens.view(P, BINS).cpu().numpy()


def _profiles(sums: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Profiles [F, BINS] from summed activation [F, BINS] and tokens [BINS]; 0 in a bin without tokens."""
    rate = sums / np.maximum(tokens, 1)
    return rate / rate.sum(1, keepdims=True)


def _correlation(groups: list[np.ndarray]) -> list[list[float | None]]:
    """Mean r over pairs of latents from two clusters, or from one; computed from sums, because all pairs don't fit memory.
    A uniform profile has r = 0 with any other. A cluster of one latent has None with itself."""
    sums, sizes, self_products = [], np.array([len(group) for group in groups]), []
    for group in groups:
        centered = group - group.mean(1, keepdims=True)
        norm = np.linalg.norm(centered, axis=1, keepdims=True)
        unit = np.divide(centered, norm, out=np.zeros_like(centered), where=norm > 1e-12)
        sums.append(unit.sum(0))
        self_products.append(np.square(unit).sum())  # pairs of a latent with itself are left out
    total = np.stack(sums) @ np.stack(sums).T - np.diag(self_products)
    pairs = np.outer(sizes, sizes) - np.diag(sizes)
    return [
        [float(t / n) if n else None for t, n in zip(*line, strict=True)] for line in zip(total, pairs, strict=True)
    ]


def tree(profiles: np.ndarray) -> np.ndarray:
    """Average linkage of profiles [n, BINS], in the format of `scipy.cluster.hierarchy.linkage`."""
    return linkage(_distances(profiles), "average")


def _distances(profiles: np.ndarray) -> np.ndarray:
    distances = pdist(profiles, "jensenshannon") / math.sqrt(math.log(2))
    return np.where(np.isnan(distances), 0, distances)  # NaN: root of a rounding error below 0, for identical profiles


def _silhouette(square: np.ndarray, labels: np.ndarray) -> float:
    """Mean over latents of (b - a) / max(a, b), from distances [n, n]. a is the mean distance to the latent's own cluster,
    b to the nearest other cluster. A latent alone in its cluster counts 0."""
    kinds, member = np.unique(labels, return_inverse=True)
    if len(kinds) < 2:
        return 0.0
    inside = np.eye(len(kinds))[member]
    sizes, sums = inside.sum(0), square @ inside
    within = sums[np.arange(len(member)), member] / np.maximum(sizes[member] - 1, 1)
    means = np.where(inside > 0, np.inf, sums / sizes)
    nearest = means.min(1)
    values = (nearest - within) / np.maximum(np.maximum(nearest, within), 1e-300)
    return float(np.where(sizes[member] > 1, values, 0).mean())


def _shuffled(collected: TextActivations, draw: np.random.Generator) -> torch.Tensor:
    """Permute positions [n] within each row."""
    order = np.lexsort((draw.random(len(collected.row)), collected.row.cpu().numpy()))
    return collected.pos[torch.from_numpy(order).to(collected.pos.device)]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
