"""decode in plain torch."""

import torch
from torch import Tensor

from ..code import SparseCode
from ..numerics import accumulation_dtype, weighted_bags


def decode(code: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor | None) -> Tensor:
    x_hat = _decode(code, W_dec, b_dec)
    if target is None:
        return x_hat.to(W_dec.dtype)
    return (_target_per_token(x_hat, target) - x_hat).to(target.dtype)


def _decode(code: SparseCode, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    wide = accumulation_dtype(W_dec)
    values = code.live(code.values).flatten().to(wide)
    x_hat = weighted_bags(W_dec.to(wide), code.live(code.indices).flatten(), values, _starts(code))
    if b_dec.dim() == 2:
        b_dec = b_dec.repeat_interleave(code.n_tokens // len(b_dec), 0)
    return x_hat + b_dec.to(wide)


def _target_per_token(x_hat: Tensor, target: Tensor) -> Tensor:
    """Return the target of each token, in x_hat's dtype."""
    return target.to(x_hat.dtype).repeat(len(x_hat) // len(target), 1)


def reconstruct(
    code: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor, mean: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x_hat = _decode(code, W_dec, b_dec)
    target_per_token = _target_per_token(x_hat, target)
    residual = target_per_token - x_hat
    spread = None if mean is None else (target_per_token - mean).square().sum(1)[None]
    return residual.to(target.dtype), residual.square().sum(1)[None], _dots(code, W_dec, residual)[None], spread


def decode_values_grad(code: SparseCode, W_dec: Tensor, grad: Tensor) -> Tensor:
    return _dots(code, W_dec, grad).to(code.values.dtype)


def _dots(code: SparseCode, W_dec: Tensor, vectors: Tensor) -> Tensor:
    """Return <vectors[n], W_dec[indices[n, k]]> per entry, in the dtype of accumulation."""
    wide = accumulation_dtype(W_dec)
    index, tokens, starts = code.live(code.indices).flatten(), code.rows.flatten().int(), _starts(code).int()
    # The backward of embedding_bag in its weights: one dot product per entry, and no gathered [N, K, D].
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors.to(wide), W_dec.to(wide), index, starts, tokens, 0
    )
    return code.live(dots.view(code.values.shape))


def _starts(code: SparseCode) -> Tensor:
    """Return each token's first entry. The last token also sums the unused entries, whose values are zero."""
    if code.offsets is None:
        return torch.arange(code.n_tokens, device=code.values.device) * code.values.shape[1]
    return code.offsets[:-1]
