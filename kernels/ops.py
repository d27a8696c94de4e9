"""The ops as plain functions of tensors, for code of any kind: `temposae.ops`.

Each is registered with torch.library as `temposae::NAME`: it has a fake implementation and an autograd formula whose own
parts are registered, too, and goes through torch.compile without a graph break. A code is given as its tensors:

    values  [N, K] or [C], float32 (float64 for float64 activations)
    indices int32, of values' shape: the latent of each entry
    offsets int64 [N + 1] for codes with any number of entries a token, which own values[offsets[n]:offsets[n + 1]]; or None

x [N, D], W_enc [D, F], W_dec [F, D], b_enc [F], b_dec [D], center [D] (what is taken from x: b_dec, mostly), mask [T, F],
bool or floating, not negative, and pos [N], int32 or int64 in [0, T). Products run in x's dtype, within autocast as without;
parameters may be wider, and get gradients of their own dtype, summed in a fixed order. The backend is chosen as everywhere
(`kernels.backend`). None of them can be differentiated twice. Raises ValueError for shapes, dtypes or devices that do not
fit.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .autograd import entry_gradients
from .code import SparseCode
from .decode import decode as decode_op
from .decode import decode_values_grad
from .encode_sparse import encode_threshold as encode_threshold_op
from .encode_sparse import encode_topk as encode_topk_op
from .loss import position_loss as position_loss_op
from .numerics import accumulation_dtype
from .torch_modes import without_autocast
from .weight_grad import weight_grad

__all__ = ["decode", "encode_batch_topk", "encode_threshold", "encode_topk", "position_loss"]


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, center: Tensor | None = None, mask: Tensor | None = None,
    pos: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """values, indices [N, k]: of each token the k largest of relu((x - center) @ W_enc + b_enc) * mask[pos], in no
    particular order; filled up with zeros at other latents where fewer are positive. Gradients for all but pos."""
    return _encode_topk(x, W_enc, b_enc, center, mask, pos, k)


def encode_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, center: Tensor | None = None, mask: Tensor | None = None,
    pos: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """values [N k], indices, offsets: the N k largest of the batch, whichever tokens they fall on (BatchTopK). Entries from
    offsets[N] on are unused: there were no more positive ones. Gradients as in `encode_topk`."""
    return _encode_batch_topk(x, W_enc, b_enc, center, mask, pos, k)


def encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | None = None, *, center: Tensor | None = None,
    mask: Tensor | None = None, pos: Tensor | None = None, expected: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """values [C], indices, offsets: every activation above its latent's threshold [F], or above 0 (JumpReLU, ReLU). About
    `expected` a token; speed depends on it. Gradients as in `encode_topk`; the threshold, what decides, gets none. Waits for
    the device, to know C."""
    return _encode_threshold(x, W_enc, b_enc, threshold, center, mask, pos, expected)


def decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, *, offsets: Tensor | None = None
) -> Tensor:  # fmt: skip
    """x_hat [N, D] = b_dec + sum over a token's entries of value * W_dec[index], in W_dec's dtype. Gradients for values,
    W_dec and b_dec."""
    return _decode(values, indices, W_dec, b_dec, offsets)


def position_loss(residual: Tensor, pos: Tensor, n_positions: int) -> tuple[Tensor, Tensor]:
    """squared_error, count [n_positions]: sums of |residual|^2 over the tokens at each position, and how many there are.
    residual [N, D] gets gradients."""
    return _position_loss(residual, pos, n_positions)


def _code(values: Tensor, indices: Tensor, offsets: Tensor | None, n_latents: int) -> SparseCode:
    return SparseCode(values.detach(), indices, n_latents, offsets)


def _entries(x: Tensor, *shape: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=torch.int32)


@custom_op("temposae::encode_topk", mutates_args=())
@without_autocast()
def _encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None, mask: Tensor | None, pos: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    code, _ = encode_topk_op(x, W_enc.to(x.dtype), b_enc, k, center=center, mask=mask, pos=pos)
    return code.values, code.indices


@_encode_topk.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Any, mask: Any, pos: Any, k: int) -> tuple[Tensor, Tensor]:
    return _entries(x, x.shape[0], k)


@custom_op("temposae::encode_batch_topk", mutates_args=())
@without_autocast()
def _encode_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None, mask: Tensor | None, pos: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    code, _ = encode_topk_op(x, W_enc.to(x.dtype), b_enc, k, center=center, mask=mask, pos=pos, across_batch=True)
    assert code.offsets is not None
    return code.values, code.indices, code.offsets


@_encode_batch_topk.register_fake
def _(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Any, mask: Any, pos: Any, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    return *_entries(x, x.shape[0] * k), x.new_empty(x.shape[0] + 1, dtype=torch.int64)


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


@_encode_threshold.register_fake
def _(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Any, center: Any, mask: Any, pos: Any, expected: int
) -> tuple[Tensor, Tensor, Tensor]:
    entries = torch.library.get_ctx().new_dynamic_size()
    return *_entries(x, entries), x.new_empty(x.shape[0] + 1, dtype=torch.int64)


@custom_op("temposae::encode_backward", mutates_args=())
@without_autocast()
def _encode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, offsets: Tensor | None, x: Tensor, W_enc: Tensor, b_enc: Tensor,
    center: Tensor | None, mask: Tensor | None, pos: Tensor | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, W_enc (as [F, D]), b_enc, center and mask: those that are needed, in this order."""
    code = _code(values, indices, offsets, W_enc.shape[1])
    dx, dw, db, dcenter, dmask = entry_gradients(needs, x, W_enc, b_enc, center, mask, pos, [code], [grad.contiguous()])
    gradients = (dx, None if dw is None else dw.T, db, dcenter, dmask)
    operands = (x, W_enc.T, b_enc, center, mask)
    return [
        torch.zeros_like(operand, memory_format=torch.contiguous_format) if gradient is None else gradient.contiguous()
        for gradient, operand, need in zip(gradients, operands, needs, strict=True)
        if need and operand is not None
    ]


@_encode_backward.register_fake
def _(
    grad: Any, values: Any, indices: Any, offsets: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None,
    mask: Tensor | None, pos: Any, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    operands = (x, W_enc.T, b_enc, center, mask)
    return [
        torch.empty_like(operand, memory_format=torch.contiguous_format)
        for operand, need in zip(operands, needs, strict=True)
        if need and operand is not None
    ]


def _keep_encode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of all three encoders: x, W_enc, b_enc come first, center, mask and pos before the last."""
    *center_mask_pos, _ = inputs[-4:]
    values, indices, *offsets = output
    ctx.mark_non_differentiable(indices, *offsets)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(values, indices, offsets[0] if offsets else None, *inputs[:3], *center_mask_pos)


def _encode_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    values, indices, offsets, x, W_enc, b_enc, center, mask, pos = ctx.saved_tensors
    n_between = len(ctx.needs_input_grad) - 7  # the threshold
    needs_grad = ctx.needs_input_grad
    needs = [*needs_grad[:3], *(needs_grad[position] for position in (3 + n_between, 4 + n_between))]
    gradients: list[Tensor | None] = [None] * 5
    if grad is not None:
        computed = iter(
            torch.ops.temposae.encode_backward(
                grad, values, indices, offsets, x, W_enc, b_enc, center, mask, pos, needs
            )
        )
        gradients = [next(computed) if need else None for need in needs]
    dx, dw, db, dcenter, dmask = gradients
    return dx, None if dw is None else dw.T, db, *[None] * n_between, dcenter, dmask, None, None


for encoder in (_encode_topk, _encode_batch_topk, _encode_threshold):
    encoder.register_autograd(_encode_gradients, setup_context=_keep_encode)


@custom_op("temposae::decode", mutates_args=())
@without_autocast()
def _decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, offsets: Tensor | None) -> Tensor:
    return decode_op(_code(values, indices, offsets, W_dec.shape[0]), W_dec, b_dec)


@_decode.register_fake
def _(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, offsets: Tensor | None) -> Tensor:
    n = values.shape[0] if offsets is None else offsets.shape[0] - 1
    return W_dec.new_empty(n, W_dec.shape[1])


@custom_op("temposae::decode_backward", mutates_args=())
@without_autocast()
def _decode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, offsets: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    """Gradients of values and W_dec: those that are needed."""
    code, gradients = _code(values, indices, offsets, W_dec.shape[0]), []
    grad = grad.contiguous()
    if needs[0]:
        gradients.append(decode_values_grad(code, W_dec, grad).to(values.dtype))
    if needs[1]:
        gradients.append(weight_grad(code.transpose(), code.values, grad).to(W_dec.dtype))
    return gradients


@_decode_backward.register_fake
def _(grad: Any, values: Tensor, indices: Any, W_dec: Tensor, offsets: Any, needs: list[bool]) -> list[Tensor]:
    operands = (values, W_dec)
    pairs = zip(operands, needs, strict=True)
    return [torch.empty_like(operand, memory_format=torch.contiguous_format) for operand, need in pairs if need]


def _keep_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, W_dec, b_dec, offsets = inputs
    ctx.b_dtype = b_dec.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(values, indices, W_dec, offsets)


def _decode_gradients(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None, None
    values, indices, W_dec, offsets = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    gradients = iter(
        torch.ops.temposae.decode_backward(grad, values, indices, W_dec, offsets, needs) if any(needs) else ()
    )
    dvalues, dw = (next(gradients) if need else None for need in needs)
    db = None
    if ctx.needs_input_grad[3]:
        db = grad.sum(0, dtype=accumulation_dtype(grad)).to(ctx.b_dtype)
    return dvalues, None, dw, db, None


_decode.register_autograd(_decode_gradients, setup_context=_keep_decode)


@custom_op("temposae::position_loss", mutates_args=())
@without_autocast()
def _position_loss(residual: Tensor, pos: Tensor, n_positions: int) -> tuple[Tensor, Tensor]:
    sums = position_loss_op(residual, residual.new_zeros(len(residual), 1), pos, n_positions)
    return sums.squared_error, sums.count


@_position_loss.register_fake
def _(residual: Tensor, pos: Tensor, n_positions: int) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(residual)
    return residual.new_empty(n_positions, dtype=dtype), residual.new_empty(n_positions, dtype=dtype)


def _keep_position_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    residual, pos, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual, pos)


def _position_loss_gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None
    residual, pos = ctx.saved_tensors
    return (2 * grad[pos.long()][:, None] * residual).to(residual.dtype), None, None


_position_loss.register_autograd(_position_loss_gradients, setup_context=_keep_position_loss)
