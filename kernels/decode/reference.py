"""decode in plain torch."""

import torch
from torch import Tensor

from ..code import SparseCode
from ..numerics import accumulation_dtype, weighted_bags


def decode(code: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor | None) -> Tensor:
    wide = accumulation_dtype(W_dec)
    values = code.live(code.values).flatten().to(wide)
    x_hat = weighted_bags(W_dec.to(wide), code.live(code.indices).flatten(), values, _starts(code)) + b_dec.to(wide)
    if target is None:
        return x_hat.to(W_dec.dtype)
    return (target.to(wide) - x_hat).to(target.dtype)


def decode_values_grad(code: SparseCode, W_dec: Tensor, grad: Tensor) -> Tensor:
    wide = accumulation_dtype(W_dec)
    index, rows, starts = code.live(code.indices).flatten(), code.rows.flatten().int(), _starts(code).int()
    # The backward of embedding_bag in its weights, without its forward: a dot product per entry and no [N, K, D] gather.
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad.to(wide), W_dec.to(wide), index, starts, rows, 0
    )
    return code.live(dots.to(code.values.dtype).view(code.values.shape))


def _starts(code: SparseCode) -> Tensor:
    """First entry of each token; the last token takes in the unused entries too, whose values are zero."""
    if code.offsets is None:
        return torch.arange(code.n_tokens, device=code.values.device) * code.values.shape[1]
    return code.offsets[:-1]
