"""loss: squared error, L1 and L0, summed over the tokens at each position."""

from typing import NamedTuple

from torch import Tensor

from ..backend import choose
from ..checks import check_floating, check_one_device, check_positions
from ..code import SparseCode
from ..cost import Cost
from . import reference


class PositionSums(NamedTuple):
    """Sums over the tokens at each of T positions, each [T] in float32 (float64 for float64 residuals)."""

    count: Tensor
    squared_error: Tensor
    l1: Tensor
    l0: Tensor


def position_loss(
    residual: Tensor, values: SparseCode | Tensor, pos: Tensor, n_positions: int, *, backend: str | None = None
) -> PositionSums:
    """For each position t, over the tokens n with pos[n] == t:

    count[t]          number of tokens
    squared_error[t]  sum of ||residual[n]||^2
    l1[t]             sum of |values[n, k]|
    l0[t]             number of values[n, k] other than 0

    residual  [N, D]  any floating dtype; or its squared norms [N] if they are already known
    values    a SparseCode of N tokens, or dense activations [N, F]
    pos       [N]     int32 or int64 in [0, T). On a GPU, where it is not checked, tokens elsewhere are in no sum

    Sums run over each token first, then over a position's tokens in order: the same inputs give the same bits.
    Positions without tokens get zero. Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    entries = values.values if isinstance(values, SparseCode) else values
    n_tokens = values.n_tokens if isinstance(values, SparseCode) else values.shape[0]
    if residual.dim() not in (1, 2) or residual.shape[0] != n_tokens:
        raise ValueError(f"residual must have shape [N, D] or [N] with N = {n_tokens}, got {list(residual.shape)}")
    if not isinstance(values, SparseCode) and values.dim() != 2:
        raise ValueError(f"values must be a SparseCode or have shape [N, F], got {list(values.shape)}")
    check_floating(residual=residual, values=entries)
    if n_positions < 1:
        raise ValueError(f"n_positions must be at least 1, got {n_positions}")
    check_positions(pos, n_tokens, n_positions)
    check_one_device(residual=residual, values=entries, pos=pos)
    if choose("position_loss", residual, entries, backend=backend) == "triton":
        from . import triton

        return PositionSums(*triton.position_loss(residual, values, pos, n_positions))
    return PositionSums(*reference.position_loss(residual, values, pos, n_positions))


def cost(n: int, d: int, nnz: int, n_positions: int, *, itemsize: int = 2, backend: str = "triton") -> Cost:
    """Read the residual and the values once. Torch also writes and reads their squares and magnitudes."""
    passes = 1 if backend == "triton" else 3
    return Cost(2.0 * n * d + 2.0 * nnz, passes * itemsize * (n * d + nnz) + 24 * n + 16 * n_positions)
