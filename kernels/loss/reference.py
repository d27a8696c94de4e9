"""loss in plain torch."""

import torch
from torch import Tensor

from ..code import SparseCode
from ..numerics import accumulation_dtype, sum_by


def position_loss(residual: Tensor, values: SparseCode | Tensor, pos: Tensor, n_positions: int) -> list[Tensor]:
    wide = accumulation_dtype(residual)
    if isinstance(values, SparseCode) and values.ragged:
        l1 = sum_by(values.rows, values.live(values.values).to(wide).abs(), values.n_tokens)
        l0 = values.l0().to(wide)
    else:
        dense = values.values if isinstance(values, SparseCode) else values
        l1 = dense.to(wide).abs().sum(-1)
        l0 = (dense != 0).sum(-1).to(wide)
    squared_error = residual.to(wide).square().sum(-1) if residual.dim() == 2 else residual.to(wide)
    rows = torch.where((pos >= 0) & (pos < n_positions), pos, n_positions)  # the last row is not returned
    stats = (torch.ones_like(squared_error), squared_error, l1, l0)
    return [sum_by(rows, stat, n_positions + 1)[:n_positions] for stat in stats]
