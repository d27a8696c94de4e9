"""adam in plain torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..code import LatentMajor
from ..fp8 import Fp8Rows
from ..moments import LEAST, MEAN_LARGEST, MEAN_ZERO, SQUARE_LARGEST, SQUARE_ZERO, BiasGradients, Moments, Rates
from ..weight_grad.reference import latent_sums, weight_grad


def adam(
    parameter: Tensor, grad: Tensor, moments: Moments, rates: Rates, unit_norm: bool, shadow: Tensor | None,
    fp8: Fp8Rows | None,
) -> None:  # fmt: skip
    if rates.skip is not None and rates.skip:
        return
    grad = _across(grad.to(parameter.dtype), parameter) if unit_norm else grad.to(parameter.dtype)
    step_size, correction, factor = (_rate_per_element(rate, parameter) for rate in rates[:3])
    grad = grad * factor
    mean, square = (moment.to(parameter.dtype) for moment in moments.widened())
    mean = rates.beta1 * mean + (1 - rates.beta1) * grad
    square = rates.beta2 * square + (1 - rates.beta2) * grad.square()
    parameter -= step_size * mean / (square.sqrt() / correction + rates.eps)
    _store(moments, mean, square, rates.seed)
    if unit_norm:
        parameter /= parameter.norm(dim=1, keepdim=True)
    if shadow is not None:
        shadow.copy_(parameter)
    if fp8 is not None:
        fp8.copy_(parameter if shadow is None else shadow)


def adam_each(parameters: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Moments], rates: Rates) -> None:
    for parameter, grad, each in zip(parameters, grads, moments, strict=True):
        adam(parameter, grad, each, rates, False, None, None)


def adam_rows(
    W: Tensor, entries: LatentMajor, values: Tensor, rows: Tensor, moments: Moments, rates: Rates,
    center: Tensor | None, unit_norm: bool, shadow: Tensor | None, fp8: Fp8Rows | None, biases: BiasGradients | None,
    shared: dict[str, Any] | None,
) -> None:  # fmt: skip
    _sum_biases(biases, entries, values, W)
    adam(W, weight_grad(entries, values, rows, center), moments, rates, unit_norm, shadow, fp8)


def row_norms(
    entries: LatentMajor, values: Tensor, rows: Tensor, center: Tensor | None, W: Tensor | None, along: Tensor | None,
    biases: BiasGradients | None, shared: dict[str, Any] | None,
) -> Tensor:  # fmt: skip
    grad = weight_grad(entries, values, rows, center)
    if along is not None:
        return (grad.square().sum(1) - latent_sums(entries, along).square()).clamp_min(0)
    if biases is not None and W is not None:
        _sum_biases(biases, entries, values, W)
    elif W is not None:
        grad = _across(grad, W)
    return grad.square().sum(1)


def _sum_biases(biases: BiasGradients | None, entries: LatentMajor, values: Tensor, W: Tensor) -> None:
    if biases is not None:
        biases.encoder.copy_(latent_sums(entries, values))
        s, W = len(biases.center), W.to(biases.encoder.dtype)
        biases.center.copy_(torch.bmm(biases.encoder.view(s, 1, -1), W.view(s, -1, W.shape[1]))[:, 0])


def _store(moments: Moments, mean: Tensor, square: Tensor, seed: Tensor | None) -> None:
    if seed is None or moments.exp_avg.dtype in (torch.float32, torch.float64):
        moments.exp_avg.copy_(mean)
        moments.exp_avg_sq.copy_(square)
        return
    mean, square = mean.float(), square.float()
    bits = torch.cat([_random_bits(scalar, len(mean) // seed.numel(), mean.shape[1]) for scalar in seed.view(-1)])
    mean_bits, square_bits = bits & 0xFFFF, bits >> 16 & 0xFFFF
    if moments.scales is None:
        for moment, value, random_bits in (
            (moments.exp_avg, mean, mean_bits),
            (moments.exp_avg_sq, square, square_bits),
        ):
            moment.copy_((value.view(torch.int32) + random_bits & -0x10000).view(torch.float32))
        return
    for scale, value, zero in zip(moments.scales.T, (mean, square), (MEAN_ZERO, SQUARE_ZERO), strict=True):
        scale.copy_(value.abs().amax(1).clamp_min(LEAST) / (1.875 - 2.0**zero))
    mean_scale, square_scale = moments.scales.split(1, dim=1)
    code = _code(mean.abs(), mean_scale, mean_bits, MEAN_ZERO, MEAN_LARGEST)
    moments.exp_avg.copy_(torch.where(mean < 0, -code, code))
    code = _code(square, square_scale, square_bits, SQUARE_ZERO, SQUARE_LARGEST)
    moments.exp_avg_sq.copy_(torch.maximum(code, (square > 0).int()))


def _code(size: Tensor, scale: Tensor, bits: Tensor, zero: int, largest: int) -> Tensor:
    """Round size / scale stochastically to one of the two neighbouring codes, int32. 20 bits are dropped but only 16
    are random, so adding 8 centres the other 4."""
    raw = (size * (1 / scale) + 2.0**zero).view(torch.int32)
    return ((raw + (bits << 4) + 8 >> 20) - (127 + zero << 3)).clamp_max(largest)


def _random_bits(seed: Tensor, rows: int, columns: int) -> Tensor:
    """Return int32 [rows, columns]."""
    row, column = (torch.arange(size, dtype=torch.int32, device=seed.device) for size in (rows, columns))
    return _mix(_mix(seed + row)[:, None] ^ column)


def _mix(x: Tensor) -> Tensor:
    """The hash lowbias32 from C. Wellons' hash-prospector, in wrapping int32."""
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * -0x7B935975
    return x ^ (x >> 16 & 0xFFFF)


def _across(grad: Tensor, W: Tensor) -> Tensor:
    """Remove the part of the gradient along each row of W."""
    return grad - (grad * W).sum(1, keepdim=True) * W


def _rate_per_element(rate: Tensor, parameter: Tensor) -> Tensor:
    """Return the rate in a shape that broadcasts: a scalar, or one per row from [S] for S equal runs of rows."""
    if rate.dim() == 0:
        return rate
    return rate.repeat_interleave(len(parameter) // len(rate)).view(-1, *[1] * (parameter.dim() - 1))
