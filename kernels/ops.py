"""`temposae.ops`: the ops as functions of plain tensors, for use in any code.

Each op is registered with torch.library as `temposae::NAME`. It has a fake implementation and an autograd formula (from
`gradients.py`), and torch.compile traces it without a graph break. A code is passed as its tensors:

    values   [N, K] or [C], float32 (float64 for float64 activations)
    indices  int32, of values' shape: the latent of each entry
    offsets  int64 [N + 1] for ragged codes: token n owns values[offsets[n]:offsets[n + 1]]. None for fixed K

Other arguments: x [N, D], W_enc [D, F], W_dec [F, D], b_enc [F], b_dec [D], center [D] (subtracted from x, usually
b_dec), mask [T, F], bool or floating, not negative, and pos [N], int32 or int64 in [0, T).

Products run in x's dtype, also under autocast. Parameters may be wider and receive gradients in their own dtype, summed
in a fixed order. `kernels.backend` chooses the backend. No op can be differentiated twice. All raise ValueError for
shapes, dtypes or devices that do not fit together.

    values, indices = ops.encode_topk(x, W_enc, b_enc, k=64, center=b_dec)
    x_hat = ops.decode(values, indices, W_dec, b_dec)
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import gradients
from .code import SparseCode
from .decode import decode as decode_op
from .encode_sparse import encode_threshold as encode_threshold_op
from .encode_sparse import encode_topk as encode_topk_op
from .loss import position_loss as position_loss_op
from .numerics import accumulation_dtype
from .torch_modes import without_autocast

__all__ = ["decode", "encode_batch_topk", "encode_threshold", "encode_topk", "position_loss"]


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, center: Tensor | None = None, mask: Tensor | None = None,
    pos: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return values, indices [N, k]: per token, the k largest of relu((x - center) @ W_enc + b_enc) * mask[pos],
    unordered and padded with zeros at other latents if fewer are positive. Gradients for all but pos."""
    return _encode_topk(x, W_enc, b_enc, center, mask, pos, k)


def encode_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, center: Tensor | None = None, mask: Tensor | None = None,
    pos: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return values [N k], indices, offsets: the N k largest positive activations of the batch (BatchTopK). If there
    are fewer, entries from offsets[N] on are unused. Gradients as in `encode_topk`."""
    return _encode_batch_topk(x, W_enc, b_enc, center, mask, pos, k)


def encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None = None, *, center: Tensor | None = None,
    mask: Tensor | None = None, pos: Tensor | None = None, expected: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return values [C], indices, offsets: activations above their latent's threshold [F] or above 0 (JumpReLU, ReLU).
    `expected` is about the number per token and only affects speed. Gradients as in `encode_topk`, none for the
    threshold. Waits for the device, to know C."""
    return _encode_threshold(x, W_enc, b_enc, threshold, center, mask, pos, expected)


def decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, *, offsets: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return x_hat [N, D] = b_dec + sum of value * W_dec[index] over a token's entries, in W_dec's dtype. Gradients for
    values, W_dec and b_dec."""
    return _decode(values, indices, W_dec, b_dec, offsets)


def position_loss(residual: Tensor, pos: Tensor, n_positions: int) -> tuple[Tensor, Tensor]:
    """Return squared_error, count [n_positions]: sum of |residual|^2 and number of tokens at each position. Gradients
    for residual [N, D]."""
    return _position_loss(residual, pos, n_positions)


def _code(values: Tensor, indices: Tensor, offsets: Tensor | None, n_latents: int) -> SparseCode:
    return SparseCode(values.detach(), indices, n_latents, offsets)


def _entries(x: Tensor, *shape: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(shape, dtype=accumulation_dtype(x)), x.new_empty(shape, dtype=torch.int32)


def _ragged(x: Tensor, entries: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_entries(x, entries), x.new_empty(x.shape[0] + 1, dtype=torch.int64)


def _needed(computed: Sequence[Tensor | None], needs: list[bool]) -> list[Tensor]:
    """Return the needed gradients, contiguous: an op returns only tensors, with the strides of its fake."""
    return [
        gradient.contiguous() for gradient, need in zip(computed, needs, strict=True) if need and gradient is not None
    ]


def _empty_like(operands: Sequence[Tensor | None], needs: list[bool]) -> list[Tensor]:
    """The fake of `_needed`, for gradients of these operands."""
    return [
        torch.empty_like(operand, memory_format=torch.contiguous_format)
        for operand, need in zip(operands, needs, strict=True)
        if need and operand is not None
    ]


def _in_places(computed: Iterable[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """The inverse of `_needed`, with None for the others."""
    remaining = iter(computed)
    return [next(remaining) if need else None for need in needs]


@custom_op("temposae::encode_topk", mutates_args=())
@without_autocast()
def _encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None, mask: Tensor | None, pos: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    code, _ = encode_topk_op(x, W_enc.to(x.dtype), b_enc, k, center=center, mask=mask, pos=pos)
    return code.values, code.indices


@custom_op("temposae::encode_batch_topk", mutates_args=())
@without_autocast()
def _encode_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None, mask: Tensor | None, pos: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    code, _ = encode_topk_op(x, W_enc.to(x.dtype), b_enc, k, center=center, mask=mask, pos=pos, across_batch=True)
    assert code.offsets is not None
    return code.values, code.indices, code.offsets


@custom_op("temposae::encode_threshold", mutates_args=())
@without_autocast()
def _encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None, center: Tensor | None, mask: Tensor | None,
    pos: Tensor | None, expected: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    W_enc = W_enc.to(x.dtype)
    code = encode_threshold_op(x, W_enc, b_enc, threshold, center=center, mask=mask, pos=pos, expected=expected)
    assert code.offsets is not None
    return code.values, code.indices, code.offsets


_encode_topk.register_fake(lambda x, W_enc, b_enc, center, mask, pos, k: _entries(x, x.shape[0], k))
_encode_batch_topk.register_fake(lambda x, W_enc, b_enc, center, mask, pos, k: _ragged(x, x.shape[0] * k))
_encode_threshold.register_fake(lambda x, *_: _ragged(x, torch.library.get_ctx().new_dynamic_size()))


@custom_op("temposae::encode_backward", mutates_args=())
@without_autocast()
def _encode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None, x: Tensor, W_enc: Tensor,
    center: Tensor | None, mask: Tensor | None, pos: Tensor | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Return the needed gradients of x, W_enc (as [F, D]), b_enc, center and mask, in this order."""
    code = _code(values, indices, offsets, W_enc.shape[1])
    dx, dw, db, dcenter, dmask = gradients.encode_codes(needs, x, W_enc, center, mask, pos, [code], [grad.contiguous()])
    return _needed((dx, None if dw is None else dw.T, db, dcenter, dmask), needs)


_encode_backward.register_fake(
    lambda grad, values, indices, offsets, x, W_enc, center, mask, pos, needs: _empty_like(
        (x, W_enc.T, x.new_empty(W_enc.shape[1], dtype=accumulation_dtype(x)), center, mask), needs
    )
)


def _keep_encode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save for all three encoders: inputs start with x, W_enc, b_enc and end with center, mask, pos, a number."""
    x, W_enc, b_enc, *_ = inputs
    *center_mask_pos, _ = inputs[-4:]
    values, indices, *offsets = output
    ctx.b_dtype = b_enc.dtype
    ctx.mark_non_differentiable(indices, *offsets)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(values, indices, offsets[0] if offsets else None, x, W_enc, *center_mask_pos)


def _encode_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    n_between = len(ctx.needs_input_grad) - 7  # 1 for encode_threshold, whose threshold has no gradient
    dx = dw = db = dcenter = dmask = None
    if grad is not None:
        need_x, need_w, need_b, *need_others = ctx.needs_input_grad
        needs = [need_x, need_w, need_b, *need_others[n_between : n_between + 2]]
        computed = torch.ops.temposae.encode_backward(grad, *ctx.saved_tensors, needs)
        dx, dw, db, dcenter, dmask = _in_places(computed, needs)
        dw, db = None if dw is None else dw.T, None if db is None else db.to(ctx.b_dtype)
    return dx, dw, db, *[None] * n_between, dcenter, dmask, None, None


for encoder in (_encode_topk, _encode_batch_topk, _encode_threshold):
    encoder.register_autograd(_encode_gradients, setup_context=_keep_encode)


@custom_op("temposae::decode", mutates_args=())
@without_autocast()
def _decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, offsets: Tensor | None) -> Tensor:
    return decode_op(_code(values, indices, offsets, W_dec.shape[0]), W_dec, b_dec)


_decode.register_fake(
    lambda values, indices, W_dec, b_dec, offsets: W_dec.new_empty(
        values.shape[0] if offsets is None else offsets.shape[0] - 1, W_dec.shape[1]
    )
)


@custom_op("temposae::decode_backward", mutates_args=())
@without_autocast()
def _decode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, offsets: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    """Return the needed gradients of values and W_dec."""
    code = _code(values, indices, offsets, W_dec.shape[0])
    dvalues, dw = gradients.decode_code(needs, code, W_dec, grad.contiguous())
    return _needed((dvalues, None if dw is None else dw.to(W_dec.dtype)), needs)


_decode_backward.register_fake(lambda grad, values, indices, W_dec, offsets, needs: _empty_like((values, W_dec), needs))


def _keep_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, W_dec, b_dec, offsets = inputs
    ctx.b_dtype = b_dec.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(values, indices, W_dec, offsets)


def _decode_gradients(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None, None
    values, indices, W_dec, offsets = ctx.saved_tensors
    need_values, _, need_w, need_b, _ = ctx.needs_input_grad
    needs = [need_values, need_w]
    dvalues, dw = _in_places(
        torch.ops.temposae.decode_backward(grad, values, indices, W_dec, offsets, needs) if any(needs) else (), needs
    )
    return dvalues, None, dw, gradients.decode_bias(grad).to(ctx.b_dtype) if need_b else None, None


_decode.register_autograd(_decode_gradients, setup_context=_keep_decode)


@custom_op("temposae::position_loss", mutates_args=())
@without_autocast()
def _position_loss(residual: Tensor, pos: Tensor, n_positions: int) -> tuple[Tensor, Tensor]:
    sums = position_loss_op(residual, residual.new_zeros(len(residual), 1), pos, n_positions)
    return sums.squared_error.clone(), sums.count.clone()  # they may be views of one tensor


_position_loss.register_fake(
    lambda residual, pos, n: tuple(residual.new_empty(n, dtype=accumulation_dtype(residual)) for _ in range(2))
)


def _keep_position_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    residual, pos, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual, pos)


def _position_loss_gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None
    residual, pos = ctx.saved_tensors
    return gradients.position_squared_error(residual, pos, grad), None, None


_position_loss.register_autograd(_position_loss_gradients, setup_context=_keep_position_loss)
