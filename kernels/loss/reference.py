"""loss in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..code import SparseCode
from ..numerics import accumulation_dtype, added, sum_by


def position_loss(residual: Tensor, values: SparseCode | Tensor, pos: Tensor, n_positions: int) -> list[Tensor]:
    wide = accumulation_dtype(residual)
    squared_error = residual.to(wide).square().sum(-1) if residual.dim() == 2 else residual.to(wide)
    stats = squared_error, *_sizes(values, wide)
    return [sums[0] for sums in _by_position(stats, pos, n_positions, 1)]


def entry_loss(
    code: SparseCode, squared_error: Tensor, projection: Tensor, scale: float, spread: Tensor | None, active_only: bool
) -> tuple[Tensor | None, ...]:
    squared_error, projection = added(squared_error), added(projection)
    active = code.live(code.values) > 0
    dvalues, decoder_weights = scale * projection, scale * code.values
    return (
        squared_error, *_sizes(code, accumulation_dtype(code.values)), None if spread is None else added(spread),
        dvalues * active if active_only else dvalues, decoder_weights, decoder_weights * projection, code.fired(),
    )  # fmt: skip


def batch_sums(
    tokens: Sequence[Tensor | None], pos: Tensor, n_positions: int, dictionaries: int
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    squared_error, _, _, spread = tokens
    sums = _by_position([stat for stat in tokens[:3] if stat is not None], pos, n_positions, dictionaries)
    loss, spread = (None if t is None else t.view(dictionaries, -1).sum(1) for t in (squared_error, spread))
    return sums, loss, spread


def count_step(
    idle_tokens: Tensor, sums: Tensor, spread: Tensor, totals: Tensor, n: int, fired: Tensor, batch: Sequence[Tensor],
    batch_spread: Tensor, loss: Tensor, aux_loss: Tensor | None, norm: Tensor, recomputed: Tensor | None,
) -> None:  # fmt: skip
    idle_tokens.add_(n).masked_fill_(fired, 0)
    sums.add_(torch.stack(tuple(batch), 1))
    spread.add_(batch_spread)
    zeros = torch.zeros_like(loss)
    aux, recomputed = (zeros if figure is None else figure for figure in (aux_loss, recomputed))
    totals.add_(torch.stack([loss - aux, aux, norm, n - batch[0].sum(1), recomputed], 1))


def _sizes(values: SparseCode | Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return L1 and L0 per token."""
    if isinstance(values, SparseCode) and values.ragged:
        l1 = sum_by(values.rows, values.live(values.values).to(wide).abs(), values.n_tokens)
        return l1, values.l0().to(wide)
    dense = values.values if isinstance(values, SparseCode) else values
    return dense.to(wide).abs().sum(-1), (dense != 0).sum(-1).to(wide)


def _by_position(stats: Sequence[Tensor], pos: Tensor, n_positions: int, dictionaries: int) -> list[Tensor]:
    """Return the number of tokens and sums of their `stats`, for each of S dictionaries [S, T]."""
    rows = torch.where((pos >= 0) & (pos < n_positions), pos, n_positions)  # the last row is not returned
    if dictionaries > 1:
        rows = rows + torch.arange(dictionaries, device=pos.device)[:, None] * (n_positions + 1)
    sums = (
        sum_by(rows.flatten(), stat, dictionaries * (n_positions + 1)).view(dictionaries, -1)[:, :n_positions]
        for stat in (torch.ones_like(stats[0]), *stats)
    )
    return list(sums)
