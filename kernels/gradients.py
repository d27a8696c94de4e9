"""The gradient of each op, as plain functions of tensors: what `kernels.autograd` and `kernels.ops` do in their backward.

`needs` says which gradients are wanted; the others are None. Every gradient is summed in a fixed order. Those of biases and
of W_dec are float32 (float64 for float64), to be rounded to the parameter's dtype by the caller; all others have the dtype
of what they are for. The gradient of W_enc from codes is latent-major, the [D, F] view of a contiguous [F, D].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .code import SparseCode
from .decode import decode, decode_values_grad
from .masks import Mask, weights_at, weights_of
from .numerics import accumulation_dtype, sum_by
from .weight_grad import weight_grad

Gradients = tuple[Tensor | None, ...]


def encode_dense(
    needs: Sequence[bool], x: Tensor, W_enc: Tensor, center: Tensor | None, mask: Mask | None, pos: Tensor | None,
    acts: Tensor, dacts: Tensor,
) -> Gradients:  # fmt: skip
    """Return those of x, W_enc, b_enc, center and mask from those of acts [N, F]; see `kernels.encode.encode`."""
    need_x, need_w, _, need_center, need_mask, *_ = needs
    dx = dw = dcenter = dmask = None
    dpre = torch.ops.aten.threshold_backward(dacts, acts, 0)  # the backward of relu, in one pass
    if mask is not None and pos is not None:
        gate = weights_at(mask, pos)
        if need_mask and isinstance(mask, Tensor):
            dmask = sum_by(pos, _divide(dpre * acts, gate), mask.shape[0]).to(mask.dtype)
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
    """Return the same from those of the values of codes that an encoder made of these operands, what decided on their
    entries being constant."""
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
    """JumpReLU's entries: those above their threshold, and those below that its gradient needs. All but the code, which
    holds the activations f, have the shape of its values; unused entries don't exist."""

    code: SparseCode
    pre: Tensor
    limit: Tensor  # the threshold
    gate: Tensor | None  # the mask's weight
    is_open: Tensor  # bool
    bandwidth: float

    def gradients(self, dvalues: Tensor, dl0: Tensor | float | None) -> tuple[Tensor, Tensor]:
        """Return those of the pre-activations and, to be summed by latent, of the thresholds."""
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
    """Return those of x, W_enc, b_enc, threshold, center and mask from those of the band's values and of its L0."""
    need_x, need_w, need_b, need_threshold, need_center, need_mask, *_ = needs
    if dvalues is None:
        dvalues = torch.zeros_like(band.pre)
    dpre, dlimit = band.gradients(dvalues, dl0)
    dmask = dthreshold = None
    if need_mask and isinstance(mask, Tensor) and pos is not None:
        dmask = mask_gradient(band.code, dvalues * band.pre * band.is_open, mask, pos)
    if need_threshold:
        dthreshold = _sum_by_latent(band.code, dlimit)
    encoder_needs = need_x, need_w, need_b, need_center
    dx, dw, db, dcenter = _encoder_gradients(encoder_needs, x, W_enc, center, [band.code.with_values(dpre)])
    return dx, dw, db, dthreshold, dcenter, dmask


def decode_code(
    needs: Sequence[bool], code: SparseCode, W_dec: Tensor, dx_hat: Tensor, sign: int = 1
) -> tuple[Tensor | None, Tensor | None]:
    """Return those of the code's values and of W_dec from that of sign * x_hat."""
    dvalues = dw = None
    if needs[0]:
        dvalues = sign * decode_values_grad(code, W_dec, dx_hat)
    if needs[1]:
        dw = weight_grad(code.transpose(), sign * code.values, dx_hat)
    return dvalues, dw


def decode_bias(dx_hat: Tensor, sign: int = 1) -> Tensor:
    """Return that of b_dec from that of sign * x_hat."""
    return sign * dx_hat.sum(0, dtype=accumulation_dtype(dx_hat))


def squared_error(
    needs: Sequence[bool], code: SparseCode, residual: Tensor, projection: Tensor, derror: Tensor
) -> Gradients:
    """Return those of the code's values, W_dec and b_dec from those of each token's squared error, by what
    `kernels.decode.reconstruct` returns."""
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
    """Return that of the residual [N, D], or of its squared norms [N], from those of the sums at each position [T]."""
    dresidual = dsquared_error[pos.long()]
    if residual.dim() == 2:
        dresidual = 2 * dresidual[:, None] * residual
    return dresidual.to(residual.dtype)


def position_l1(values: Tensor, code: SparseCode | None, pos: Tensor, dl1: Tensor) -> Tensor:
    """Return that of the values, a code's or dense activations [N, F], from those of the sums at each position [T]."""
    per_token = dl1[pos.long()]
    if code is not None and code.ragged:
        return code.live(per_token[code.rows] * values.sign()).to(values.dtype)
    return (per_token[:, None] * values.sign()).to(values.dtype)


def gate_of(code: SparseCode, mask: Mask, pos: Tensor) -> Tensor:
    """Look up the mask's weight of each entry."""
    return weights_of(mask, pos[code.rows], code.live(code.indices))


def mask_gradient(code: SparseCode, contributions: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
    """Return that of a mask [T, F] from what each entry contributes to it."""
    elements = pos.long()[code.rows] * mask.shape[1] + code.live(code.indices)
    return sum_by(elements.flatten(), code.live(contributions).flatten(), mask.numel()).view(mask.shape).to(mask.dtype)


def _encoder_gradients(
    needs: Sequence[bool], x: Tensor, W_enc: Tensor, center: Tensor | None, contributions: Sequence[SparseCode]
) -> Gradients:
    """Gradients of x, W_enc, b_enc and center from those of the pre-activations, given as codes."""
    need_x, need_w, _, need_center, *_ = needs
    dx = dw = db = dcenter = None
    for code in contributions:
        db = _add(db, _sum_by_latent(code, code.values))
        if need_w:
            dw = _add(dw, weight_grad(code.transpose(), code.values, x, center=center))
        if need_x:
            dx = _add(dx, decode(code, W_enc.to(x.dtype).T, x.new_zeros(x.shape[1])))
    if need_center and center is not None and db is not None:
        dcenter = _center_gradient(W_enc, db, center)
    return dx, None if dw is None else dw.to(W_enc.dtype).T, db, dcenter


def _center_gradient(W_enc: Tensor, db: Tensor, center: Tensor) -> Tensor:
    return -(W_enc @ db.to(W_enc.dtype)).to(center.dtype)


def _sum_by_latent(code: SparseCode, values: Tensor) -> Tensor:
    """[F]: the sum over each latent's entries."""
    return weight_grad(code.transpose(), values, values.new_ones(1, 1))[:, 0]


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b where b > 0, else zero."""
    return torch.where(b > 0, a / b, 0)


def _add(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total.add_(term)
