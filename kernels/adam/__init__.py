"""adam: Adam's update of a [F, D] weight straight from the entries of a SparseCode, so that its gradient is never stored;
and of any parameter from its gradient."""

import torch
from torch import Tensor

from ..backend import choose
from ..checks import check_one_device, check_shape
from ..code import LatentMajor
from ..cost import Cost
from ..moments import Moments, Rates
from ..weight_grad import check_entries
from . import reference


def adam(
    parameter: Tensor, grad: Tensor, moments: Moments, rates: Rates, *, unit_norm: bool = False,
    shadow: Tensor | None = None, backend: str | None = None,
) -> None:  # fmt: skip
    """One Adam step, in place (Kingma & Ba, arXiv 1412.6980):

    g           = factor * grad
    exp_avg     = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * g^2
    parameter  -= step_size * exp_avg / (sqrt(exp_avg_sq) / correction + eps)

    parameter float32 (or float64), contiguous; grad of its shape, any floating dtype; shadow of its shape, any floating
    dtype, is given the new values. Narrow `Moments` are rounded after the parameter has moved. With `unit_norm`, the rows of
    a parameter [F, D] have norm 1 and keep it: the part of each row's gradient g along the row w, <g, w> w, is taken away
    before the step, and the row is divided by its norm after. Raises ValueError for shapes, dtypes or devices that do not
    fit.
    """
    _check(parameter, moments, rates, shadow, matrix=unit_norm)
    if grad.shape != parameter.shape:
        raise ValueError(f"grad must have the parameter's shape {list(parameter.shape)}, got {list(grad.shape)}")
    if choose("adam", parameter, grad, backend=backend) == "triton":
        from . import triton

        triton.adam(parameter, grad, moments, rates, unit_norm, shadow)
    else:
        reference.adam(parameter, grad, moments, rates, unit_norm, shadow)


def adam_rows(
    W: Tensor, entries: LatentMajor, values: Tensor, rows: Tensor, moments: Moments, rates: Rates, *,
    center: Tensor | None = None, unit_norm: bool = False, shadow: Tensor | None = None, backend: str | None = None,
) -> None:  # fmt: skip
    """`adam` on W [F, D] with the gradient weight_grad(entries, values, rows, center=center), without storing it.

    Latents without entries have a zero gradient; their moments decay and they move on as plain Adam has it.
    """
    _check(W, moments, rates, shadow)
    check_entries(entries, values, rows, center)
    check_shape("W", W, F=entries.latent_offsets.numel() - 1, D=rows.shape[1])
    check_one_device(W=W, rows=rows)
    if choose("adam_rows", W, values, rows, backend=backend) == "triton":
        from . import triton

        triton.adam_rows(W, entries, values, rows, moments, rates, center, unit_norm, shadow)
    else:
        reference.adam_rows(W, entries, values, rows, moments, rates, center, unit_norm, shadow)


def row_norms(
    entries: LatentMajor, values: Tensor, rows: Tensor, *, center: Tensor | None = None, W: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """|g_j|^2 [F], float32 (float64 for float64), of the gradient that `adam_rows` works out: what clipping has to know
    before. With W [F, D] of unit rows, the norm is of what is left without the part along them."""
    check_entries(entries, values, rows, center)
    if W is not None:
        check_shape("W", W, F=entries.latent_offsets.numel() - 1, D=rows.shape[1])
    if choose("row_norms", rows, values, backend=backend) == "triton":
        from . import triton

        return triton.row_norms(entries, values, rows, center, W)
    return reference.row_norms(entries, values, rows, center, W)


def cost(
    m: int, d: int, f: int, nnz: int, *, itemsize: int = 2, moment_itemsize: int = 4, backend: str = "triton"
) -> Cost:
    """A multiply-add and an element of rows for each entry and each of D; weights and moments (of `moment_itemsize` bytes,
    8-bit ones with scales) read and written and a half-precision shadow written. Torch writes the gradient, reads it again,
    and goes over the weights twice more."""
    state = f * d * (8 + 4 * moment_itemsize + 2) + (16 * f if moment_itemsize == 1 else 0)
    extra = 0 if backend == "triton" else f * d * (8 + 16)
    return Cost(2.0 * nnz * d + 12.0 * f * d, nnz * (d * itemsize + 16) + state + extra)


def _check(parameter: Tensor, moments: Moments, rates: Rates, shadow: Tensor | None, matrix: bool = False) -> None:
    tensors = {"exp_avg": moments.exp_avg, "exp_avg_sq": moments.exp_avg_sq, "shadow": shadow}
    dtypes = moments.exp_avg.dtype, moments.exp_avg_sq.dtype
    if dtypes in ((torch.bfloat16, torch.bfloat16), (torch.int8, torch.uint8)):
        _check_narrow(parameter, moments, rates)
        matrix = True
    elif dtypes != (parameter.dtype, parameter.dtype):
        raise ValueError(
            f"moments must be two of the parameter's dtype ({parameter.dtype}), two of torch.bfloat16, or torch.int8 "
            f"and torch.uint8, got {dtypes[0]} and {dtypes[1]}"
        )
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != parameter.shape:
            raise ValueError(
                f"{name} must have the parameter's shape {list(parameter.shape)}, got {list(tensor.shape)}"
            )
    for name, tensor in {"parameter": parameter, **tensors}.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if matrix and parameter.ndim != 2:
        raise ValueError(f"parameter must be [F, D] for unit_norm and for narrow moments, got {list(parameter.shape)}")
    shapes = {rate.shape for rate in (*rates[:3], rates.seed) if rate is not None}
    n_rows = len(parameter) if parameter.ndim else 1
    if len(shapes) > 1 or any(len(shape) > 1 or (shape and (not shape[0] or n_rows % shape[0])) for shape in shapes):
        raise ValueError(
            f"rates must be scalars, or [S] with S a divisor of {n_rows}, got {[list(shape) for shape in shapes]}"
        )
    tensors |= dict(scales=moments.scales, step_size=rates.step_size, seed=rates.seed, skip=rates.skip)
    check_one_device(parameter=parameter, **tensors)


def _check_narrow(parameter: Tensor, moments: Moments, rates: Rates) -> None:
    if rates.seed is None or rates.seed.dtype != torch.int32:
        raise ValueError(f"rates.seed must be int32 for {moments.exp_avg.dtype} moments, got {rates.seed}")
    if (moments.scales is not None) != (moments.exp_avg.dtype == torch.int8):
        raise ValueError("scales must be given for 8-bit moments, and for no others")
    if moments.scales is not None:
        check_shape("scales", moments.scales, F=len(parameter), scales=2)
