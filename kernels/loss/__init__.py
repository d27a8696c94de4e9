"""loss: squared error, L1 and L0, summed over the tokens at each position, and gradients in a code's entries."""

from typing import NamedTuple

from torch import Tensor

from ..backend import twin
from ..checks import check_floating, check_one_device, check_positions, check_shape
from ..code import SparseCode
from ..cost import Cost


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
    return PositionSums(
        *twin(__name__, "position_loss", residual, entries, backend=backend).position_loss(
            residual, values, pos, n_positions
        )
    )


class EntryLoss(NamedTuple):
    """What `entry_loss` returns."""

    squared_error: Tensor  # [N]
    l1: Tensor  # [N]
    l0: Tensor  # [N]
    spread: Tensor | None  # [N]
    dvalues: Tensor
    decoder_weights: Tensor
    along: Tensor
    fired: Tensor


def entry_loss(
    code: SparseCode, squared_error: Tensor, projection: Tensor, scale: float, *, spread: Tensor | None = None,
    active_only: bool = True, backend: str | None = None,
) -> EntryLoss:  # fmt: skip
    """Add up the parts of `reconstruct`, and return what gradients and statistics need of each entry and token:

    squared_error[n]       sum over the parts; `spread` likewise
    l1[n], l0[n]           sum of |values[n, k]|, and number of values[n, k] other than 0
    dvalues[n, k]          scale * projection[n, k], the gradient of the loss in the value. With `active_only`, zero for
                           values that are not positive
    decoder_weights[n, k]  scale * values[n, k], the weight of residual[n] in the gradient of W_dec
    along[n, k]            decoder_weights * projection. Its sum over a latent's entries is the component of the gradient
                           along the latent's row of W_dec, if that has norm 1
    fired[j]               bool [F]: whether a value of latent j is positive

    code           N tokens, F latents
    squared_error  [P, N], of the P parts of `reconstruct`
    projection     P parts of the shape of the code's values
    spread         [P, N] or None

    Returns float32 (float64 for float64). Per-entry results have the shape of the code's values and are undefined for unused
    entries. Raises ValueError for shapes or devices that do not fit together.
    """
    parts = len(squared_error)
    for name, sums in {"squared_error": squared_error, "spread": spread}.items():
        if sums is not None:
            check_shape(name, sums, P=parts, N=code.n_tokens)
    if projection.shape != (parts, *code.values.shape):
        raise ValueError(f"projection must have shape {[parts, *code.values.shape]}, got {list(projection.shape)}")
    check_one_device(code=code.values, squared_error=squared_error, projection=projection, spread=spread)
    module = twin(__name__, "entry_loss", squared_error, code.values, backend=backend)
    return EntryLoss(*module.entry_loss(code, squared_error, projection, scale, spread, active_only))


def batch_sums(
    tokens: EntryLoss, pos: Tensor, n_positions: int, dictionaries: int = 1, *, backend: str | None = None
) -> tuple[PositionSums, Tensor, Tensor | None]:
    """Return the sums of `position_loss` for S dictionaries, each [S, T], the squared error [S] and the spread [S].

    `tokens` has S N tokens: token s N + n is that at pos[n] as the s-th dictionary sees it. Tokens at positions outside of
    [0, T) are in the last two sums. The spread is None if the tokens have none. Raises ValueError as `position_loss` does.
    """
    check_positions(pos, len(tokens.squared_error) // dictionaries, n_positions)
    module = twin(__name__, "batch_sums", tokens.squared_error, tokens.l1, backend=backend)
    sums, squared_error, spread = module.batch_sums(tokens[:4], pos, n_positions, dictionaries)
    return PositionSums(*sums), squared_error, spread


def count_step(
    idle_tokens: Tensor, sums: Tensor, spread: Tensor, totals: Tensor, *, n: int, fired: Tensor, batch: PositionSums,
    batch_spread: Tensor, loss: Tensor, aux_loss: Tensor | None, norm: Tensor, recomputed: Tensor | None,
    backend: str | None = None,
) -> None:  # fmt: skip
    """Count a batch of n tokens for S dictionaries, in place.

    idle_tokens  int64 [S, F]  zero for latents that `fired` (bool [S, F]), n more for the others
    sums         [S, 4, T]     `batch` is added, each [S, T]
    spread       [S]           `batch_spread`, a scalar or [S], is added
    totals       [S, 5]        added: loss - aux_loss, aux_loss, norm, n - sum of batch.count, recomputed (each [S] or None)

    Raises ValueError for shapes or devices that do not fit together.
    """
    (s, f), t = idle_tokens.shape, sums.shape[-1]
    check_shape("sums", sums, S=s, rows=4, T=t)
    check_shape("spread", spread, S=s)
    check_shape("totals", totals, S=s, totals=5)
    check_shape("fired", fired, S=s, F=f)
    tensors = dict(loss=loss, aux_loss=aux_loss, norm=norm, recomputed=recomputed)
    for name, tensor in tensors.items():
        if tensor is not None:
            check_shape(name, tensor, S=s)
    for name, tensor in batch._asdict().items():
        check_shape(name, tensor, S=s, T=t)
    check_one_device(idle_tokens=idle_tokens, fired=fired, count=batch.count, batch_spread=batch_spread, **tensors)
    module = twin(__name__, "count_step", totals, loss, backend=backend)
    module.count_step(
        idle_tokens, sums, spread, totals, n, fired, batch, batch_spread, loss, aux_loss, norm, recomputed
    )  # fmt: skip


def cost(n: int, d: int, nnz: int, n_positions: int, *, itemsize: int = 2, backend: str = "triton") -> Cost:
    """Read the residual and the values once. Torch also writes and reads their squares and magnitudes."""
    passes = 1 if backend == "triton" else 3
    return Cost(2.0 * n * d + 2.0 * nnz, passes * itemsize * (n * d + nnz) + 24 * n + 16 * n_positions)
