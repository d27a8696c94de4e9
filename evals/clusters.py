"""Clusters of latents by where in a text they are active, and whether the same clusters are found again.

The profile of a latent is its activity by position: the mean of its activation over the tokens in each of `BINS` position
bins, as shares that sum to 1 (a latent that is active alike everywhere has 1 / `BINS` in each, however many tokens a bin
has). Latents that fired at least `FIRINGS` times are clustered by average linkage over the Jensen-Shannon distance

    d(p, q) = sqrt((KL(p | m) + KL(q | m)) / (2 ln 2)),  m = (p + q) / 2          0: the same; 1: never in the same bin

The tree is cut where the mean silhouette (Rousseeuw 1987) of the clusters is largest. Stability is the adjusted Rand index
(Hubert and Arabie 1985) of the clusters found on one half of the rows and on the other: 1 is the same, 0 is chance. Position
as an axis along which latents differ: Voita et al., arXiv 2309.04827. Specialization of a profile is 1 - H(p) / log `BINS`:
0 for one that is the same everywhere, 1 for one in a single bin.
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
from ..engine.unit_decoder import Dictionary, UnitDecoder, unit_decoder
from ..kernels.numerics import sum_by
from .evaluation import Autoencoder, Evaluation, TextActivations
from .positions import held_out

BINS = 16
FIRINGS = 100  # of a latent, fewer than which make a profile of noise; in one half of the rows half as many
ROWS, HALVES = 1024, 3
COUNTS = range(2, 9)  # numbers of clusters to choose from
SHOWN = 512  # latents whose own profiles are kept, for figures
SAME = 0.7  # latents of two dictionaries whose decoder rows have this cosine are taken to be the same


@torch.no_grad()
def clusters(evaluation: Evaluation, other: Dictionary | None = None, *, count: int | None = None) -> dict[str, Any]:
    """Cluster the dictionary's latents by position into `count` clusters, or as many as have the largest silhouette.

    Returns `count`, `latents` (how many were clustered), `silhouette` {number: value}, `clusters` (the earliest first: size,
    mean profile [BINS], and of its latents' specialization the 5th, 25th, 50th, 75th and 95th percentile), the mean distance
    `within` and `between` clusters, their `correlation` (mean Pearson r of a latent's profile of the one and one of the
    other, or another of the same), `stability` (adjusted Rand index over random halves of the rows), `seeds` (the same
    against an `other` dictionary, latents matched by decoder cosine), and `controls`: `random`, `lm_neurons` (their absolute
    values), and `shuffled`, where positions are permuted within each row. With too few latents that fire these are None.
    `sample`: of up to `SHOWN` latents, evenly among those clustered, profile and cluster. Raises UserError for a count
    below 2.
    """
    if count is not None and count < 2:
        raise UserError(f"count: {count} is not allowed; give at least 2 clusters, or none to choose by silhouette")
    collected = held_out(evaluation, ROWS)
    of_latents = ("labels", "sample")
    autoencoders = evaluation.autoencoders(collected, mean=False)
    measured = {name: (autoencoder, collected.pos) for name, autoencoder in autoencoders.items()}
    measured["shuffled"] = evaluation.sae, _shuffled(collected, evaluation.generator("clusters shuffled"))
    results = {}
    with progress_bar("clustering", total=len(measured), unit="dictionaries") as bar:
        for name, (autoencoder, pos) in measured.items():
            results[name] = _measure(evaluation, autoencoder, collected, pos, count)
            bar.advance(1)
    result = results.pop("sae")
    labels = result.pop("labels")
    return {
        **result,
        "seeds": None if other is None else _matched(evaluation, unit_decoder(other), collected, labels),
        "controls": {
            name: {k: v for k, v in values.items() if k not in of_latents} for name, values in results.items()
        },
        "bins": BINS,
        "rows": len(collected),
    }


def _measure(
    evaluation: Evaluation, autoencoder: Autoencoder, collected: TextActivations, pos: torch.Tensor, count: int | None
) -> dict[str, Any]:
    sums, firings, tokens = _activity(autoencoder, collected, pos, torch.zeros(len(collected), dtype=torch.int64))
    used = np.flatnonzero(firings[0] >= FIRINGS)
    labels = np.full(firings.shape[1], -1)
    if len(used) < max(count or 0, COUNTS[0]) + 1:
        empty = dict.fromkeys(
            ("count", "silhouette", "clusters", "within", "between", "correlation", "stability", "sample")
        )
        return {**empty, "latents": len(used), "labels": labels}
    profiles = _profiles(sums[0][used], tokens[0])
    distances = _distances(profiles)
    square, merges = squareform(distances), linkage(distances, "average")
    by_count = {n: _silhouette(square, _cut(merges, n)) for n in ([count] if count else COUNTS) if n < len(used)}
    count = max(by_count, key=lambda n: by_count[n])
    labels[used] = _cut(merges, count)
    used_labels = labels[used]
    order = sorted(np.unique(used_labels), key=lambda c: float(profiles[used_labels == c].mean(0) @ np.arange(BINS)))
    groups = [profiles[used_labels == c] for c in order]
    pairs = used_labels[:, None] == used_labels[None]
    upper = np.triu(np.ones_like(pairs), 1)
    return {
        "count": len(groups),
        "latents": len(used),
        "silhouette": by_count,
        "clusters": [
            {
                "size": len(group),
                "profile": group.mean(0).tolist(),
                "specialization": np.percentile(_specialization(group), (5, 25, 50, 75, 95)).tolist(),
            }
            for group in groups
        ],
        "within": _mean(square[pairs & upper]),
        "between": _mean(square[~pairs & upper]),
        "correlation": _correlation(groups),
        "stability": _stability(evaluation, autoencoder, collected, pos, count),
        "sample": _sample(profiles, np.array([order.index(c) for c in used_labels])),
        "labels": labels,
    }


def _stability(
    evaluation: Evaluation, autoencoder: Autoencoder, collected: TextActivations, pos: torch.Tensor, count: int
) -> dict[str, Any] | None:
    """Adjusted Rand index of the clusters of two random halves of the rows, `HALVES` times."""
    draw, scores = evaluation.generator("clusters halves"), []
    for _ in range(HALVES):
        half = torch.from_numpy(draw.permutation(np.arange(len(collected)) % 2))
        sums, firings, tokens = _activity(autoencoder, collected, pos, half)
        used = (firings >= FIRINGS / 2).all(0)
        if used.sum() <= count:
            return None
        sides = (_cut(tree(_profiles(sums[side][used], tokens[side])), count) for side in (0, 1))
        scores.append(float(adjusted_rand_score(*sides)))
    return {"adjusted_rand": float(np.mean(scores)), "spread": float(np.std(scores, ddof=1)), "halves": HALVES}


def _matched(
    evaluation: Evaluation, other: UnitDecoder, collected: TextActivations, labels: np.ndarray
) -> dict[str, Any]:
    """Adjusted Rand index of the two dictionaries' clusters, as many of each, over latents that are each other's nearest by
    decoder cosine."""
    if other.cfg.d_in != evaluation.sae.cfg.d_in:
        raise UserError(f"other: d_in = {other.cfg.d_in} is not allowed; the dictionary has {evaluation.sae.cfg.d_in}")
    other = other.to(collected.x.device)
    latents, count = np.flatnonzero(labels >= 0), len(np.unique(labels[labels >= 0]))
    if not count:
        return {"adjusted_rand": None, "matched": 0}
    other_labels = _measure(evaluation, other, collected, collected.pos, count)["labels"]
    other_latents = np.flatnonzero(other_labels >= 0)
    if not len(other_latents):
        return {"adjusted_rand": None, "matched": 0}
    directions = [
        torch.nn.functional.normalize(d.W_dec[u], dim=1) for d, u in ((evaluation.sae, latents), (other, other_latents))
    ]
    cosine = (directions[0] @ directions[1].T).cpu().numpy()
    best, back = cosine.argmax(1), cosine.argmax(0)
    pair = (back[best] == np.arange(len(latents))) & (cosine.max(1) >= SAME)
    agreed = None
    if pair.sum() > count:
        agreed = float(adjusted_rand_score(labels[latents[pair]], other_labels[other_latents[best[pair]]]))
    return {"adjusted_rand": agreed, "matched": int(pair.sum())}


def _activity(
    autoencoder: Autoencoder, collected: TextActivations, pos: torch.Tensor, group: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each group of the rows, of which `group` [R] gives the number: summed activation [P, F, BINS], firings [P, F] and
    tokens [P, BINS]."""
    code, T = collected.code(autoencoder), collected.kept.shape[1]
    token_group = group.to(pos.device)[collected.row]
    where, F, P = pos * BINS // T, code.n_latents, int(group.max()) + 1
    latent = token_group[code.rows] * F + code.indices
    sums = sum_by(latent * BINS + where[code.rows], code.values.abs().double(), P * F * BINS)
    firings = torch.bincount(latent, minlength=P * F)
    tokens = torch.bincount(token_group * BINS + where, minlength=P * BINS)
    return sums.view(P, F, BINS).cpu().numpy(), firings.view(P, F).cpu().numpy(), tokens.view(P, BINS).cpu().numpy()


def _profiles(sums: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Shares of activity [F, BINS] from its sums, per token of a bin; a bin without tokens has none."""
    rate = sums / np.maximum(tokens, 1)
    return rate / rate.sum(1, keepdims=True)


def _specialization(profiles: np.ndarray) -> np.ndarray:
    return 1 - entr(profiles).sum(1) / math.log(profiles.shape[1])


def _correlation(groups: list[np.ndarray]) -> list[list[float | None]]:
    """Mean r over pairs of latents, one of each of two clusters: of the sums of their standardised profiles, as there is no
    room for all pairs. A profile that is the same everywhere has 0 with any other; a cluster of one latent, None with
    itself."""
    sums, sizes, self_products = [], np.array([len(group) for group in groups]), []
    for group in groups:
        apart = group - group.mean(1, keepdims=True)
        norm = np.linalg.norm(apart, axis=1, keepdims=True)
        unit = np.divide(apart, norm, out=np.zeros_like(apart), where=norm > 1e-12)
        sums.append(unit.sum(0))
        self_products.append(np.square(unit).sum())  # each latent with itself, which does not count
    total = np.stack(sums) @ np.stack(sums).T - np.diag(self_products)
    pairs = np.outer(sizes, sizes) - np.diag(sizes)
    return [
        [float(t / n) if n else None for t, n in zip(*line, strict=True)] for line in zip(total, pairs, strict=True)
    ]


def _sample(profiles: np.ndarray, cluster: np.ndarray) -> dict[str, Any]:
    indices = np.linspace(0, len(profiles) - 1, min(len(profiles), SHOWN)).astype(np.int64)
    return {"profiles": profiles[indices].round(4).tolist(), "cluster": cluster[indices].tolist()}


def tree(profiles: np.ndarray) -> np.ndarray:
    """The merges of average linkage (as `scipy.cluster.hierarchy.linkage` gives them) of latents with these profiles
    [n, BINS]."""
    return linkage(_distances(profiles), "average")


def _distances(profiles: np.ndarray) -> np.ndarray:
    distances = pdist(profiles, "jensenshannon") / math.sqrt(math.log(2))
    return np.where(np.isnan(distances), 0, distances)  # root of a rounding error below 0: two profiles are the same


def _cut(merges: np.ndarray, count: int) -> np.ndarray:
    return fcluster(merges, count, "maxclust")


def _silhouette(square: np.ndarray, labels: np.ndarray) -> float:
    """Mean over latents of (b - a) / max(a, b): a the mean distance to the others of its cluster, b to those of the nearest
    other cluster. A latent alone in its cluster has 0."""
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
    """Positions [n] permuted within each row."""
    order = np.lexsort((draw.random(len(collected.row)), collected.row.cpu().numpy()))
    return collected.pos[torch.from_numpy(order).to(collected.pos.device)]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
