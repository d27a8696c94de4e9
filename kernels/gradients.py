"""Gradients of the ops as plain functions of tensors. `kernels.autograd` and `kernels.ops` use them in their backward.

`needs` says which gradients to compute; the others are None. All sums have a fixed order. Gradients of biases,
thresholds and W_dec are float32 (float64 for float64), for the caller to round. All others have the dtype of their
operand. The gradient of W_enc from codes is latent-major: the [D, F] view of a contiguous [F, D].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .code import SparseCode
from .decode import decode, decode_values_grad
from .masks import Mask, in_range, weights_at, weights_of
from .numerics import accumulation_dtype, sum_by
from .weight_grad import latent_sums, weight_grad

Gradients = tuple[Tensor | None, ...]


def encode_dense(
    needs: Sequence[bool], x: Tensor, W_enc: Tensor, center: Tensor | None, mask: Mask | None, pos: Tensor | None,
    acts: Tensor, dacts: Tensor,
) -> Gradients:  # fmt: skip
    """Return gradients of x, W_enc, b_enc, center and mask from `dacts`, that of acts [N, F]."""
    need_x, need_w, _, need_center, need_mask, *_ = needs
    dx = dw = dcenter = dmask = None
    dpre = torch.ops.aten.threshold_backward(dacts, acts, 0)  # the backward of relu, in one pass
    if mask is not None and pos is not None:
        gate = weights_at(mask, pos)
        if need_mask and isinstance(mask, Tensor):
            dmask = sum_by(in_range(pos, len(mask)), _divide(dpre * acts, gate), len(mask)).to(mask.dtype)
        dpre = (dpre * gate).to(x.dtype)
    if need_w:
        centered = x if center is None else (x - center).to(x.dtype)
        dw = (dpre.T @ centered).T.to(W_enc.dtype)
    db = dpre.sum(0, dtype=accumulation_dtype(x))
    if need_center and center is not None:
        dcenter = _center_gradient(W_enc, db, center)
    if need_x:
        dx = dpre @ W_enc.to(x.dtype).T
    return dx, dw, db, dcenter, dmask


def encode_codes(
    needs: Sequence[bool], x: Tensor, W_enc: Tensor, center: Tensor | None, mask: Mask | None, pos: Tensor | None,
    codes: Sequence[SparseCode], grads: Sequence[Tensor | None],
) -> Gradients:  # fmt: skip
    """Return gradients of x, W_enc, b_enc, center and mask from `grads`, those of the values of codes that an encoder
    made from these operands. The selection of entries is constant."""
    dmask, contributions = None, []
    for code, grad in zip(codes, grads, strict=True):
        if grad is None:
            continue
        dpre = torch.ops.aten.threshold_backward(grad, code.values, 0)
        if mask is not None and pos is not None:
            gate = gate_of(code, mask, pos)
            if needs[4] and isinstance(mask, Tensor):
                dmask = _add(dmask, mask_gradient(code, _divide(dpre * code.values, gate), mask, pos))
            dpre = dpre * gate
        contributions.append(code.with_values(dpre))
    return *_encoder_gradients(needs, x, W_enc, center, contributions), dmask


class Band(NamedTuple):
    """JumpReLU's entries: those above their threshold, and those below it that the straight-through gradient needs.
    Tensors have the shape of the code's values."""

    code: SparseCode  # activations f
    pre: Tensor  # rectified pre-activations
    limit: Tensor  # thresholds
    gate: Tensor | None  # mask weights
    is_open: Tensor  # bool: above the threshold and not masked
    bandwidth: float

    def gradients(self, dvalues: Tensor, dl0: Tensor | float | None) -> tuple[Tensor, Tensor]:
        """Return per-entry gradients of the pre-activations and of the thresholds."""
        gated = dvalues if self.gate is None else dvalues * self.gate
        dlimit = -self.limit * gated
        if dl0 is not None:
            dlimit = dlimit - (dl0 if self.gate is None else dl0 * (self.gate != 0))
        dlimit = dlimit * ((self.pre - self.limit).abs() < self.bandwidth / 2) / self.bandwidth
        return gated * self.is_open, dlimit


def encode_jumprelu(
    needs: Sequence[bool], x: Tensor, W_enc: Tensor, center: Tensor | None, mask: Mask | None, pos: Tensor | None,
    band: Band, dvalues: Tensor | None, dl0: Tensor | None,
) -> Gradients:  # fmt: skip
    """Return gradients of x, W_enc, b_enc, threshold, center and mask from those of the band's values and L0."""
    need_x, need_w, need_b, need_threshold, need_center, need_mask, *_ = needs
    if dvalues is None:
        dvalues = torch.zeros_like(band.pre)
    dpre, dlimit = band.gradients(dvalues, dl0)
    dmask = dthreshold = None
    if need_mask and isinstance(mask, Tensor) and pos is not None:
        dmask = mask_gradient(band.code, dvalues * band.pre * band.is_open, mask, pos)
    if need_threshold:
        dthreshold = latent_sums(band.code.transpose(), dlimit)
    encoder_needs = need_x, need_w, need_b, need_center
    dx, dw, db, dcenter = _encoder_gradients(encoder_needs, x, W_enc, center, [band.code.with_values(dpre)])
    return dx, dw, db, dthreshold, dcenter, dmask


def decode_code(
    needs: Sequence[bool], code: SparseCode, W_dec: Tensor, dx_hat: Tensor, sign: int = 1
) -> tuple[Tensor | None, Tensor | None]:
    """Return gradients of the code's values and W_dec from that of sign * x_hat."""
    dvalues = dw = None
    if needs[0]:
        dvalues = sign * decode_values_grad(code, W_dec, dx_hat)
    if needs[1]:
        dw = weight_grad(code.transpose(), sign * code.values, dx_hat)
    return dvalues, dw


def decode_bias(dx_hat: Tensor, sign: int = 1) -> Tensor:
    """Return the gradient of b_dec from that of sign * x_hat."""
    return sign * dx_hat.sum(0, dtype=accumulation_dtype(dx_hat))


def squared_error(
    needs: Sequence[bool], code: SparseCode, residual: Tensor, projection: Tensor, derror: Tensor
) -> Gradients:
    """Return gradients of the code's values, W_dec and b_dec from `derror` [N], that of the squared errors. `residual`
    and `projection` are from `kernels.decode.reconstruct`."""
    dvalues = dw = db = None
    scale = -2 * derror
    per_entry = scale[code.rows]
    if needs[0]:
        dvalues = (per_entry * projection).to(code.values.dtype)
    if needs[1]:
        dw = weight_grad(code.transpose(), per_entry * code.values, residual)
    if needs[2]:
        db = scale @ residual.to(scale.dtype)
    return dvalues, dw, db


def position_squared_error(residual: Tensor, pos: Tensor, dsquared_error: Tensor) -> Tensor:
    """Return the gradient of the residual [N, D], or of squared norms [N], from that of the sums per position [T]."""
    dresidual = dsquared_error[in_range(pos.long(), len(dsquared_error))]
    if residual.dim() == 2:
        dresidual = 2 * dresidual[:, None] * residual
    return dresidual.to(residual.dtype)


def position_l1(values: Tensor, code: SparseCode | None, pos: Tensor, dl1: Tensor) -> Tensor:
    """Return the gradient of a code's values, or of dense activations [N, F], from that of the L1 per position [T]."""
    per_token = dl1[in_range(pos.long(), len(dl1))]
    if code is not None and code.ragged:
        return code.live(per_token[code.rows] * values.sign()).to(values.dtype)
    return (per_token[:, None] * values.sign()).to(values.dtype)


def gate_of(code: SparseCode, mask: Mask, pos: Tensor) -> Tensor:
    """Return the mask weight of each entry. pos [N]."""
    return weights_of(mask, pos[code.rows], code.live(code.indices))


def mask_gradient(code: SparseCode, contributions: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
    """Return the gradient of a mask [T, F] from the contribution of each entry."""
    elements = in_range(pos.long(), len(mask))[code.rows] * mask.shape[1] + code.live(code.indices)
    return sum_by(elements.flatten(), code.live(contributions).flatten(), mask.numel()).view(mask.shape).to(mask.dtype)


def _encoder_gradients(
    needs: Sequence[bool], x: Tensor, W_enc: Tensor, center: Tensor | None, contributions: Sequence[SparseCode]
) -> Gradients:
    """Return gradients of x, W_enc, b_enc and center from those of the pre-activations, given as codes."""
    need_x, need_w, _, need_center, *_ = needs
    dx = dw = db = dcenter = None
    for code in contributions:
        db = _add(db, latent_sums(code.transpose(), code.values))
        if need_w:
            dw = _add(dw, weight_grad(code.transpose(), code.values, x, center=center))
        if need_x:
            dx = _add(dx, decode(code, W_enc.to(x.dtype).T, x.new_zeros(x.shape[1])))
    if need_center and center is not None and db is not None:
        dcenter = _center_gradient(W_enc, db, center)
    return dx, None if dw is None else dw.to(W_enc.dtype).T, db, dcenter


def _center_gradient(W_enc: Tensor, db: Tensor, center: Tensor) -> Tensor:
    return -(W_enc @ db.to(W_enc.dtype)).to(center.dtype)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b where b > 0, else zero."""
    return torch.where(b > 0, a / b, 0)


def _add(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total.add_(term)
