"""Recovery of known variables: how much of a variable's effect on the activations a few latents reconstruct.

A variable splits the tokens where it applies into true and false ones. With d the difference of the means (true - false):

    effect        d(x)                                      [D]
    of a latent   d(f_j) W_dec_j                            [D]
    recovered_k   1 - |d(x) - sum over j in S_k of d(f_j) W_dec_j|^2 / |d(x)|^2

S_k are k latents, taken greedily: each one leaves the smallest remainder on the half of the documents used for the choice.
recovered_k is measured on the other half. It is 1 if changing these k latents changes the variable in x_hat as the text
does in x, 0 if they write nothing, and negative if they write something else. All latents together reach the dictionary's
quality of reconstruction.

The question is that of sparse control in Makelov et al. (arXiv 2405.08366): can an attribute be set by a few latents? The
difference of means stands for the attribute's own direction. Unlike F1, it needs both halves of a dictionary. The encoder
has to detect the variable, and the decoder has to write it.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array


def recovered(
    x: np.ndarray,
    acts: csr_array,
    W_dec: np.ndarray,
    variables: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    choosing: np.ndarray,
    ks: Sequence[int],
) -> dict[int, np.ndarray]:
    """recovered_k [V] by k, of all F latents if there are fewer.

    x [n, D] and its code `acts` [n, F]; W_dec [F, D]. Each variable is (applies, learned, true), bool [n] each: the tokens
    it is defined on, the labels for the choice, and those for the score. `choosing` [n] are the tokens for the choice.
    """
    applies, learned, true = (np.stack(labels) for labels in zip(*variables, strict=True))
    chosen_on = _differences(x, acts, applies, learned, choosing)
    effects, changes = _differences(x, acts, applies, true, ~choosing)
    counts = {k: min(k, len(W_dec)) for k in ks}
    scores = {k: np.empty(len(true)) for k in ks}
    for v, (effect, change) in enumerate(zip(*chosen_on, strict=True)):
        latents = greedy(effect, change, W_dec, max(counts.values()))
        for k, count in counts.items():
            remainder = effects[v] - changes[v, latents[:count]] @ W_dec[latents[:count]]
            scores[k][v] = 1 - (remainder**2).sum() / (effects[v] ** 2).sum()
    return scores


def greedy(effect: np.ndarray, change: np.ndarray, W_dec: np.ndarray, count: int) -> list[int]:
    """Latents whose `change` [F] along their rows of W_dec leaves the smallest remainder of `effect` [D], one by one."""
    remainder, latents, free = effect.copy(), [], np.ones(len(W_dec), bool)
    squares = change**2 * (W_dec**2).sum(1)
    for _ in range(count):
        gain = np.where(free, 2 * change * (W_dec @ remainder) - squares, -np.inf)
        latents.append(int(gain.argmax()))
        free[latents[-1]] = False
        remainder -= change[latents[-1]] * W_dec[latents[-1]]
    return latents


def _differences(
    x: np.ndarray, acts: csr_array, applies: np.ndarray, true: np.ndarray, where: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the true tokens minus mean over the false ones, of those in `where`: of x [V, D] and of latents [V, F]."""
    sides = [(side & applies & where).astype(np.float64) for side in (true, ~true)]
    weights = sides[0] / sides[0].sum(1, keepdims=True) - sides[1] / sides[1].sum(1, keepdims=True)
    return weights @ x, (acts.T @ weights.T).T
