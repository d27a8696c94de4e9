"""weight_grad in plain torch."""

from torch import Tensor

from ..code import SparseCode
from ..numerics import accumulation_dtype, weighted_bags


def weight_grad(code: SparseCode, values: Tensor, rows: Tensor) -> Tensor:
    wide = accumulation_dtype(rows)
    order, tokens, latent_offsets = code.transpose()
    weights = code.live(values).flatten()[order].to(wide)
    return weighted_bags(rows.to(wide), tokens, weights, latent_offsets[:-1])
