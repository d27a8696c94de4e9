"""Agreement of two dictionaries: whether they have the same latents, matched by their activations on the same text.

With a_j, b_k the activations of the latents of two dictionaries on the same N tokens (zero where a latent is inactive):

    r_jk      = Pearson correlation of a_j and b_k over the N tokens, at least 0
    match     = the one-to-one assignment k(j) with the largest sum of r_jk (the Hungarian method's), over latents that fire
    agreement = (sum_j m_j r_jk(j) / sum_j m_j + sum_k m_k r_j(k)k / sum_k m_k) / 2
                m = a latent's mass, the sum of its |activations|; a latent without a partner counts as r = 0

`per_latent` is the same with m = 1. The correlation is used because it sees the strength of activations, which the Jaccard
index does not, and because two latents that are active everywhere don't correlate by chance, as they would by cosine. Both
dictionaries count, because a small dictionary that has the strongest latents of a large one would agree fully otherwise.
Decoder rows play no part: near rows at one index can be a common initialisation, and two seeds of a recipe have none.

Beside the score stand `shuffled`, with the dictionary's activations permuted over tokens (what unrelated latents reach,
near 0), `same_recipe`, the reference against a second seed of its recipe (as much as a variant can be expected to reach),
and the random control and the model's neurons under `controls`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array, csc_array, csr_array, dia_array, hstack
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from ..kernels.code import SparseCode
from .evaluation import Autoencoder, Evaluation, TextActivations

CELLS = 2**22  # pairs of latents in memory at once, and candidate pairs of the assignment
CANDIDATES = 16  # partners of a latent among which the assignment chooses, at least
MATCHED = 0.5  # correlation above which `matched` counts a latent as found again


@dataclass
class Activity:
    """Activations of the latents that fire on `tokens` tokens, [tokens, live], in sparse columns, and the mean, standard
    deviation and mass of each, [live]."""

    tokens: int
    values: csc_array
    mean: np.ndarray
    deviation: np.ndarray
    mass: np.ndarray

    @classmethod
    def of(cls, code: SparseCode, order: np.ndarray | None = None) -> "Activity":
        """From a ragged code of N tokens; `order` [N] moves token n to place order[n]."""
        N = code.n_tokens
        used = (code.live(code.values) != 0).flatten().cpu().numpy()
        values = code.values.flatten().cpu().numpy()[used].astype(np.float64)
        latent, token = (t.flatten().cpu().numpy()[used].astype(np.int64) for t in (code.indices, code.rows))
        live, latent = np.unique(latent, return_inverse=True)
        token = token if order is None else order[token]
        mean = np.bincount(latent, values, minlength=len(live)) / N
        variance = np.bincount(latent, values**2, minlength=len(live)) / N - mean**2
        mass = np.bincount(latent, np.abs(values), minlength=len(live))
        matrix = csc_array(coo_array((values, (token, latent)), shape=(N, len(live))))
        return cls(N, matrix, mean, np.sqrt(variance.clip(0)), mass)


def compared(
    evaluation: Evaluation, collected: TextActivations, autoencoders: Mapping[str, Autoencoder], reference: Autoencoder,
    same_recipe: Autoencoder | None,
) -> dict[str, Any]:  # fmt: skip
    """Agreement of the dictionary (`sae` of `autoencoders`) with a reference, beside its nulls and controls.

    Returns `value`, `per_latent` and `matched` of the dictionary, of each of `controls`, of `shuffled` and of `same_recipe`
    (None if no second seed is given).
    """
    code = collected.code(reference)
    order = evaluation.generator("agreement shuffled").permutation(code.n_tokens)
    found = {name: agreement(collected.code(autoencoder), code) for name, autoencoder in autoencoders.items()}
    return {
        **found.pop("sae"),
        "shuffled": agreement(collected.code(autoencoders["sae"]), code, order),
        "same_recipe": None if same_recipe is None else agreement(collected.code(same_recipe), code),
        "controls": found,
    }


def agreement(code: SparseCode, reference: SparseCode, order: np.ndarray | None = None) -> dict[str, float | None]:
    """Agreement of two codes of the same tokens by mass (`value`) and `per_latent`, and the share of the mass in latents
    whose correlation with their partner is above 0.5 (`matched`). None if either never fires. `order` [N] permutes the
    tokens of the first.
    """
    a, b = Activity.of(code, order), Activity.of(reference)
    if not len(a.mass) or not len(b.mass):
        return dict.fromkeys(("value", "per_latent", "matched"))
    row, column, r = matched(a, b)

    def mean(of_pair: np.ndarray) -> float:
        """Mean over both dictionaries of the share of mass that the pairs' figures weigh."""
        shares = ((a.mass[row] * of_pair).sum() / a.mass.sum(), (b.mass[column] * of_pair).sum() / b.mass.sum())
        return float(sum(shares) / 2)

    per_latent = float(r.sum() * (1 / len(a.mass) + 1 / len(b.mass)) / 2)
    return {"value": mean(r), "per_latent": per_latent, "matched": mean(r > MATCHED)}


def matched(a: Activity, b: Activity) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best one-to-one assignment of latents with r > 0: latents of `a`, their partners in `b`, and r, each [pairs].

    A latent's candidates are the partners with the largest r: all of them in dictionaries of up to 2048 latents.
    """
    size, others = len(a.mass), len(b.mass)
    candidates, block = max(CANDIDATES, CELLS // size), max(1, CELLS // others)
    parts = [_candidates(a, b, slice(start, start + block), candidates) for start in range(0, size, block)]
    row, column, r = (np.concatenate(part) for part in zip(*parts, strict=True))
    # a partner costs 2 - r and no partner 2, because a stored zero would count as no edge
    costs = coo_array((2 - r, (row, column)), shape=(size, others))
    without = dia_array((np.full((1, size), 2.0), 0), shape=(size, size))
    _, partner = min_weight_full_bipartite_matching(csr_array(hstack([costs, without], format="csr")))
    chosen = partner[row] == column
    return row[chosen], column[chosen], r[chosen]


def _candidates(a: Activity, b: Activity, block: slice, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and r of the `most` largest positive correlations of each latent in the block of `a`."""
    products = coo_array(csr_array(a.values[:, block].T) @ csr_array(b.values))
    row, column = products.row + block.start, products.col
    spread = a.deviation[row] * b.deviation[column]
    covariance = products.data / a.tokens - a.mean[row] * b.mean[column]
    r = np.divide(
        covariance, spread, out=np.zeros(len(row)), where=spread > 1e-12 * np.abs(a.mean[row] * b.mean[column])
    )
    positive = r > 0
    row, column, r = row[positive], column[positive], r[positive].clip(max=1)
    order = np.lexsort((-r, row))
    row, column, r = row[order], column[order], r[order]
    first = np.searchsorted(row, row)  # of the same latent
    kept = np.arange(len(row)) - first < most
    return row[kept], column[kept], r[kept]
