"""Autograd functions over the kernels: the differentiable operations that train a dictionary.

Products run in the dtype of the activations. Parameters may be wider (float32 with bfloat16 activations): they are cast
for the product and receive gradients in their own dtype. All sums have a fixed order, so identical calls give identical
bits. No function can be differentiated twice. `gradients.py` holds the formulas. Errors are those of the ops.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import gradients
from .code import SparseCode
from .decode import decode
from .decode import reconstruct as reconstruct_op
from .encode import encode
from .encode_sparse import encode_threshold
from .encode_sparse import encode_topk as encode_topk_op
from .encoder_inputs import EncoderInputs
from .gradients import Band, gate_of
from .loss import PositionSums
from .loss import position_loss as position_sums
from .masks import Mask
from .torch_modes import without_autocast


def encode_dense(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None = None, mask: Mask | None = None,
    pos: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """acts [N, F] = relu((x - center) @ W_enc + b_enc) * mask[pos], with gradients for all but pos.

    Shapes as in `kernels.encode`. A learned mask must be positive: its gradient is recovered from the activations, and
    is zero where the mask is zero.
    """
    return _EncodeDense.apply(x, W_enc, b_enc, center, mask, pos)


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None = None, mask: Mask | None = None,
    pos: Tensor | None = None, *, k: int, aux_k: int = 0, aux_latents: Tensor | None = None, across_batch: bool = False,
) -> tuple[SparseCode, SparseCode | None]:  # fmt: skip
    """Return the two codes of `kernels.encode_sparse.encode_topk`, with gradients.

    Values carry gradients for x, W_enc, b_enc, center and mask (see `encode_dense` for masks). Zero values carry none.
    The gradient of W_enc is latent-major: the [D, F] view of a contiguous [F, D].
    """
    with torch.no_grad():
        code, aux = encode_topk_op(
            x, W_enc.to(x.dtype), b_enc, center=center, mask=mask, pos=pos,
            k=k, aux_k=aux_k, aux_latents=aux_latents, across_batch=across_batch,
        )  # fmt: skip
    codes = differentiable([code] if aux is None else [code, aux], x, W_enc, b_enc, center, mask, pos)
    return codes[0], None if aux is None else codes[1]


def differentiable(
    codes: list[SparseCode], x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None, mask: Mask | None,
    pos: Tensor | None,
) -> list[SparseCode]:  # fmt: skip
    """Return codes that an encoder made from these operands, with gradients of relu((x - center) @ W_enc + b_enc) *
    mask[pos] at the entries. The selection is constant. Arguments and gradients as in `encode_topk`."""
    values = _Encoded.apply(x, W_enc, b_enc, center, mask, pos, codes)
    return [code.with_values(v) for code, v in zip(codes, values, strict=True)]


def encode_jumprelu(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, center: Tensor | None = None, mask: Mask | None = None,
    pos: Tensor | None = None, *, bandwidth: float, expected: int = 64,
) -> tuple[SparseCode, Tensor]:  # fmt: skip
    """Return f = pre * (pre > threshold) * mask[pos] as a ragged code, and its L0.

    pre = relu((x - center) @ W_enc + b_enc). threshold [F] must not be negative. `expected` as in
    `kernels.encode_sparse.encode_threshold`, other arguments as in `encode_dense`. The values carry gradients for all
    but pos. The L0, a float32 scalar, counts pre > threshold where the mask is not zero and carries a gradient for the
    threshold.

    Gradients for the threshold are straight-through estimates with a rectangle of width `bandwidth` around it, in units
    of x (Rajamanoharan et al., arXiv 2407.14435): df/dthreshold = -threshold / bandwidth and dL0/dthreshold = -1 /
    bandwidth inside, zero outside. Entries inside the rectangle but below the threshold are in the code with value
    zero. Waits for the device.
    """
    codes: list[SparseCode] = []
    settings = dict(bandwidth=bandwidth, expected=expected)
    values, l0 = _EncodeJumpReLU.apply(x, W_enc, b_enc, threshold, center, mask, pos, settings, codes)
    return codes[0].with_values(values), l0


def decode_sparse(code: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor | None = None) -> Tensor:
    """Return x_hat [N, D], or with a target target - x_hat, with gradients for code.values, W_dec and b_dec.

    Shapes as in `kernels.decode`. The product runs in the target's dtype, or in W_dec's without a target. The gradient
    of W_dec has W_dec's strides. For the squared error alone, `reconstruct` is faster.
    """
    return _DecodeSparse.apply(code.values, W_dec, b_dec, target, code.with_values(code.values.detach()))


def reconstruct(code: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return (squared_error [N], residual [N, D]) of the target [N, D], as in `kernels.decode.reconstruct`.

    The squared error carries gradients for code.values, W_dec and b_dec, not for the target. The residual carries none.
    The product runs in the target's dtype. The gradient of W_dec has W_dec's strides.
    """
    return _Reconstruct.apply(code.values, W_dec, b_dec, target, code.with_values(code.values.detach()))


def matryoshka(
    code: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, squared_error [N], residual [N, D]) of a Matryoshka dictionary.

    The loss is the squared error, averaged over tokens and over the prefixes of latents that end at `ends` [G]. It
    carries gradients for code.values, W_dec and b_dec. The other two are those of all latents and carry none. Other
    arguments as in `reconstruct`. Computed in float32. Holds [G, N, D] in memory.
    """
    grouped, order = code.grouped(ends)
    residuals = matryoshka_residuals(
        decode_sparse, grouped.with_values(code.values.flatten()[order]), W_dec, b_dec, target
    )
    squared_errors = residuals.square().sum(-1)
    return squared_errors.sum() / squared_errors.numel(), squared_errors[-1].detach(), residuals[-1].detach()


def matryoshka_residuals(
    decode: Callable[..., Tensor], grouped: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor
) -> Tensor:
    """Return each prefix's residual, [G, N, D], from a code grouped by prefix. Summed in float32 or wider."""
    zeros = target.new_zeros((1, target.shape[1]), dtype=torch.promote_types(target.dtype, torch.float32))
    minus_groups = decode(grouped, W_dec, torch.zeros_like(b_dec), target=zeros.expand(grouped.n_tokens, -1))
    return (target - b_dec) + minus_groups.unflatten(0, (-1, len(target))).cumsum(0)


def position_loss(residual: Tensor, values: SparseCode | Tensor, pos: Tensor, n_positions: int) -> PositionSums:
    """Return sums as in `kernels.loss`. squared_error carries gradients for the residual, l1 for the values."""
    if isinstance(values, SparseCode):
        code = values.with_values(values.values.detach())
        return PositionSums(*_PositionLoss.apply(residual, values.values, pos, n_positions, code))
    return PositionSums(*_PositionLoss.apply(residual, values, pos, n_positions, None))


def _derivative(backward: Callable[..., Any]) -> Any:
    """A function's `backward`, without autocast and without a derivative of its own."""
    return staticmethod(once_differentiable(without_autocast()(backward)))


class _EncodeDense(Function):
    @staticmethod
    def forward(ctx: Any, x, W_enc, b_enc, center, mask, pos):
        acts = encode(x, W_enc.to(x.dtype), b_enc, center=center, mask=mask, pos=pos)
        ctx.b_dtype, ctx.mask = b_enc.dtype, mask
        ctx.save_for_backward(x, W_enc, center, pos, acts)
        return acts

    @_derivative
    def backward(ctx: Any, dacts):
        x, W_enc, center, pos, acts = ctx.saved_tensors
        dx, dw, db, dcenter, dmask = gradients.encode_dense(
            ctx.needs_input_grad, x, W_enc, center, ctx.mask, pos, acts, dacts
        )
        return dx, dw, _rounded(db, ctx.b_dtype), dcenter, dmask, None


class _Encoded(Function):
    @staticmethod
    def forward(ctx: Any, x, W_enc, b_enc, center, mask, pos, codes):
        ctx.set_materialize_grads(False)
        # Detached, because the outputs hold this context: a reference back would be a cycle.
        ctx.codes = [code.with_values(code.values.detach()) for code in codes]
        ctx.b_dtype, ctx.mask = b_enc.dtype, mask
        ctx.save_for_backward(x, W_enc, center, pos)
        return tuple(code.values for code in codes)

    @_derivative
    def backward(ctx: Any, *grads):
        x, W_enc, center, pos = ctx.saved_tensors
        dx, dw, db, dcenter, dmask = gradients.encode_codes(
            ctx.needs_input_grad, x, W_enc, center, ctx.mask, pos, ctx.codes, grads
        )
        return dx, dw, _rounded(db, ctx.b_dtype), dcenter, dmask, None, None


class _EncodeJumpReLU(Function):
    @staticmethod
    def forward(ctx: Any, x, W_enc, b_enc, threshold, center, mask, pos, settings, codes):
        inputs = EncoderInputs(x, W_enc.to(x.dtype), b_enc, center, mask, pos)
        band = jumprelu_band(inputs, threshold, **settings)
        codes.append(band.code)
        ctx.set_materialize_grads(False)
        ctx.band, ctx.mask = band._replace(code=band.code.with_values(band.code.values.detach())), mask
        ctx.b_dtype, ctx.threshold_dtype = b_enc.dtype, threshold.dtype
        ctx.save_for_backward(x, W_enc, center, pos)
        return band.code.values, band.is_open.sum().float()

    @_derivative
    def backward(ctx: Any, dvalues, dl0):
        x, W_enc, center, pos = ctx.saved_tensors
        dx, dw, db, dthreshold, dcenter, dmask = gradients.encode_jumprelu(
            ctx.needs_input_grad, x, W_enc, center, ctx.mask, pos, ctx.band, dvalues, dl0
        )
        db, dthreshold = _rounded(db, ctx.b_dtype), _rounded(dthreshold, ctx.threshold_dtype)
        return dx, dw, db, dthreshold, dcenter, dmask, None, None, None


def jumprelu_band(
    inputs: EncoderInputs, threshold: Tensor, *, bandwidth: float, expected: int, capacity: int | None = None,
    dictionaries: int = 1,
) -> Band:  # fmt: skip
    """Return the entries of `encode_jumprelu`. `expected`, `capacity` and `dictionaries` as in
    `kernels.encode_sparse.encode_threshold`."""
    x, W_enc, b_enc, center, mask, pos = inputs
    is_hard = isinstance(mask, Tensor) and mask.dtype == torch.bool  # applied by the encoder
    code = encode_threshold(
        x, W_enc, b_enc, (threshold - bandwidth / 2).clamp_min(0), center=center, mask=mask if is_hard else None,
        pos=pos, expected=expected, capacity=capacity, dictionaries=dictionaries,
    )  # fmt: skip
    pre, limit = code.values, threshold.to(code.values.dtype)[code.indices]
    is_open, gate = pre > limit, None
    values = pre * is_open
    if mask is not None and pos is not None and not is_hard:
        gate = gate_of(code, mask, pos.repeat(dictionaries))
        values, is_open = values * gate, is_open & (gate != 0)
    return Band(code.with_values(values), pre, limit, gate, is_open, bandwidth)


class _DecodeSparse(Function):
    @staticmethod
    def forward(ctx: Any, values, W_dec, b_dec, target, code):
        operand = W_dec if target is None else W_dec.to(target.dtype)
        ctx.code, ctx.sign = code, 1 if target is None else -1
        ctx.w_stride, ctx.w_dtype, ctx.b_dtype = W_dec.stride(), W_dec.dtype, b_dec.dtype
        ctx.save_for_backward(operand)
        return decode(code, operand, b_dec, target=target)

    @_derivative
    def backward(ctx: Any, dout):
        (W_dec,), needs = ctx.saved_tensors, ctx.needs_input_grad
        dvalues, dw = gradients.decode_code(needs, ctx.code, W_dec, dout, ctx.sign)
        db = gradients.decode_bias(dout, ctx.sign) if needs[2] else None
        return dvalues, _strided(_rounded(dw, ctx.w_dtype), ctx.w_stride), _rounded(db, ctx.b_dtype), None, None


class _Reconstruct(Function):
    @staticmethod
    def forward(ctx: Any, values, W_dec, b_dec, target, code):
        reconstruction = reconstruct_op(code, W_dec.to(target.dtype), b_dec, target)
        ctx.code = code
        ctx.w_stride, ctx.w_dtype, ctx.b_dtype = W_dec.stride(), W_dec.dtype, b_dec.dtype
        ctx.mark_non_differentiable(reconstruction.residual)
        ctx.save_for_backward(reconstruction.residual, reconstruction.projection)
        return reconstruction.squared_error, reconstruction.residual

    @_derivative
    def backward(ctx: Any, derror, _):
        residual, projection = ctx.saved_tensors
        dvalues, dw, db = gradients.squared_error(ctx.needs_input_grad, ctx.code, residual, projection, derror)
        return dvalues, _strided(_rounded(dw, ctx.w_dtype), ctx.w_stride), _rounded(db, ctx.b_dtype), None, None


class _PositionLoss(Function):
    @staticmethod
    def forward(ctx: Any, residual, values, pos, n_positions, code):
        sums = position_sums(residual, values if code is None else code, pos, n_positions)
        ctx.code = code
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sums.count, sums.l0)
        ctx.save_for_backward(residual, values, pos)
        return tuple(sums)

    @_derivative
    def backward(ctx: Any, _, dsquared_error, dl1, __):
        residual, values, pos = ctx.saved_tensors
        dresidual = dvalues = None
        if ctx.needs_input_grad[0] and dsquared_error is not None:
            dresidual = gradients.position_squared_error(residual, pos, dsquared_error)
        if ctx.needs_input_grad[1] and dl1 is not None:
            dvalues = gradients.position_l1(values, ctx.code, pos, dl1)
        return dresidual, dvalues, None, None, None


def _rounded(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(dtype)


def _strided(gradient: Tensor | None, stride: tuple[int, ...]) -> Tensor | None:
    """Return the gradient with these strides, copied only if they differ."""
    if gradient is None or gradient.stride() == stride:
        return gradient
    return gradient.new_empty_strided(gradient.shape, stride).copy_(gradient)
