"""adam in plain torch."""

from typing import TYPE_CHECKING

from torch import Tensor

from ..code import LatentMajor
from ..weight_grad.reference import weight_grad

if TYPE_CHECKING:
    from . import Moments, Rates


def adam(parameter: Tensor, grad: Tensor, moments: "Moments", rates: "Rates", shadow: Tensor | None) -> None:
    grad = grad.to(parameter.dtype) * rates.factor
    mean, square = (moment.to(parameter.dtype) for moment in moments)
    mean = rates.beta1 * mean + (1 - rates.beta1) * grad
    square = rates.beta2 * square + (1 - rates.beta2) * grad.square()
    parameter -= rates.step_size * mean / (square.sqrt() / rates.correction + rates.eps)
    moments.exp_avg.copy_(mean)
    moments.exp_avg_sq.copy_(square)
    if shadow is not None:
        shadow.copy_(parameter)


def adam_rows(
    W: Tensor, entries: LatentMajor, values: Tensor, rows: Tensor, moments: "Moments", rates: "Rates",
    center: Tensor | None, unit_norm: bool, shadow: Tensor | None,
) -> Tensor:  # fmt: skip
    grad = _gradient(entries, values, rows, center, W if unit_norm else None)
    adam(W, grad, moments, rates, None)
    if unit_norm:
        W /= W.norm(dim=1, keepdim=True)
    if shadow is not None:
        shadow.copy_(W)
    return grad.square().sum(1)


def row_norms(entries: LatentMajor, values: Tensor, rows: Tensor, center: Tensor | None, W: Tensor | None) -> Tensor:
    return _gradient(entries, values, rows, center, W).square().sum(1)


def _gradient(entries: LatentMajor, values: Tensor, rows: Tensor, center: Tensor | None, W: Tensor | None) -> Tensor:
    grad = weight_grad(entries, values, rows, center)
    if W is None:
        return grad
    return grad - (grad * W).sum(1, keepdim=True) * W
