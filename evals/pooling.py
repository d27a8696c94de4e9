"""Mean latents of texts as sparse matrices. In a module of its own, because scipy comes with the extra `evals` only."""

import numpy as np
from scipy.sparse import csr_array, vstack

from ..kernels.code import SparseCode
from .evaluation import Autoencoder, TextActivations


def pooled_latents(collected: TextActivations, autoencoder: Autoencoder) -> csr_array:
    """Mean of each latent over the kept tokens of each row, float32 [R, F].

    A few rows are encoded at a time, because the code of all tokens may be hundreds of times as large.
    """
    means, done = list[csr_array](), 0
    for rows, code in collected.codes_by_rows(autoencoder):
        row = rows.cpu().numpy()
        R, share = int(row[-1]) + 1 - done, 1 / np.bincount(row)[row]
        of_row = csr_array((share, (row - done, np.arange(len(row)))), shape=(R, len(row)))
        means.append(csr_array(of_row @ as_csr(code), dtype=np.float32))
        done += R
    means.append(csr_array((len(collected) - done, len(autoencoder.W_dec)), dtype=np.float32))
    pooled = csr_array(vstack(means, format="csr"))
    pooled.sort_indices()
    return pooled


def as_csr(code: SparseCode) -> csr_array:
    """A ragged code as a matrix, float32 [n, F]."""
    assert code.offsets is not None
    parts = (code.values.float(), code.indices.long(), code.offsets)
    matrix = csr_array(tuple(part.cpu().numpy() for part in parts), shape=(code.n_tokens, code.n_latents))
    matrix.sum_duplicates()
    return matrix
