"""adam: Adam's update of any parameter from its gradient, and of a weight [F, D] from the entries of a SparseCode,
without storing the gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import choose
from ..checks import check_one_device, check_shape
from ..code import LatentMajor
from ..cost import Cost
from ..fp8 import Fp8Rows
from ..moments import BiasGradients, Moments, Rates
from ..weight_grad import check_entries
from . import reference


def adam(
    parameter: Tensor, grad: Tensor, moments: Moments, rates: Rates, *, unit_norm: bool = False,
    shadow: Tensor | None = None, fp8: Fp8Rows | None = None, backend: str | None = None,
) -> None:  # fmt: skip
    """Do one Adam step in place (Kingma & Ba, arXiv 1412.6980):

    g           = factor * grad
    exp_avg     = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * g^2
    parameter  -= step_size * exp_avg / (sqrt(exp_avg_sq) / correction + eps)

    parameter  float32 (or float64), contiguous
    grad       the parameter's shape, any floating dtype
    moments    bfloat16 and 8-bit ones are rounded after the parameter's update
    unit_norm  the rows w of a parameter [F, D] have norm 1 and keep it: their gradient g loses its part along the row,
               <g, w> w, before the step, and the row is normalised afterwards
    shadow     the parameter's shape, any floating dtype: receives the new values
    fp8        for a parameter [F, D]: receives `Fp8Rows.of` the shadow or, without one, of the parameter

    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    _check(parameter, moments, rates, shadow, fp8, matrix=unit_norm)
    _check_grad(parameter, grad)
    twin = _twin(choose("adam", parameter, grad, backend=backend))
    twin.adam(parameter, grad, moments, rates, unit_norm, shadow, fp8)


def adam_each(
    parameters: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Moments], rates: Rates, *,
    backend: str | None = None,
) -> None:  # fmt: skip
    """Do the step of `adam` on each of several small parameters, two in one launch. Moments are float32 (or the parameter's
    dtype). Errors as in `adam`."""
    for parameter, grad, each in zip(parameters, grads, moments, strict=True):
        _check(parameter, each, rates, None, None)
        _check_grad(parameter, grad)
    _twin(choose("adam", *parameters, *grads, backend=backend)).adam_each(parameters, grads, moments, rates)


def adam_rows(
    W: Tensor, entries: LatentMajor, values: Tensor, rows: Tensor, moments: Moments, rates: Rates, *,
    center: Tensor | None = None, unit_norm: bool = False, shadow: Tensor | None = None, fp8: Fp8Rows | None = None,
    biases: BiasGradients | None = None, shared: dict[str, Any] | None = None, backend: str | None = None,
) -> None:  # fmt: skip
    """Do the step of `adam` on W [F, D] with the gradient weight_grad(entries, values, rows, center=center).

    The gradient is not stored. Latents without entries have a zero gradient, and their rows follow plain Adam. `biases`,
    which needs a center, receives the gradients of biases; they are undefined if the step is skipped. `shared`, an
    empty dict at first, keeps what the passes over the same operands have in common. Other arguments and errors as in
    `adam` and `weight_grad`.
    """
    _check(W, moments, rates, shadow, fp8)
    check_entries(entries, values, rows, center)
    check_shape("W", W, F=entries.latent_offsets.numel() - 1, D=rows.shape[1])
    check_one_device(W=W, rows=rows)
    _check_biases(biases, W, center)
    twin = _twin(choose("adam_rows", W, values, rows, backend=backend))
    twin.adam_rows(W, entries, values, rows, moments, rates, center, unit_norm, shadow, fp8, biases, shared)


def row_norms(
    entries: LatentMajor, values: Tensor, rows: Tensor, *, center: Tensor | None = None, W: Tensor | None = None,
    along: Tensor | None = None, biases: BiasGradients | None = None, shared: dict[str, Any] | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Return |g_j|^2 [F], float32 (float64 for float64), for the gradient of `adam_rows`, which clipping needs before
    the update. With W [F, D] of unit rows, the part of the gradient along them is removed first. `along` does the same
    without reading W: it has, in the order of `values`, values[e] <rows[token of e], W_j> of each entry e of latent j. Its
    sum over the entries is <g_j, W_j>, and the result |g_j|^2 - <g_j, W_j>^2. With `biases`, W is an encoder in any
    floating dtype, which only their sums need. Errors as in `adam_rows`."""
    check_entries(entries, values, rows, center)
    if along is not None and (W is not None or along.numel() != values.numel()):
        raise ValueError(f"along must have {values.numel()} elements, and W must not be given, got {list(along.shape)}")
    if W is not None:
        check_shape("W", W, F=entries.latent_offsets.numel() - 1, D=rows.shape[1])
    _check_biases(biases, W, center)
    twin = _twin(choose("row_norms", rows, values, backend=backend))
    return twin.row_norms(entries, values, rows, center, W, along, biases, shared)


def cost(
    m: int, d: int, f: int, nnz: int, *, itemsize: int = 2, moment_itemsize: int = 4, backend: str = "triton"
) -> Cost:
    """One multiply-add and one element of rows per entry and column. Weights and moments (of `moment_itemsize` bytes,
    with scales if 8-bit) are read and written, and a half-precision shadow is written. Torch also writes and reads the
    gradient and makes two more passes over the weights."""
    state = f * d * (8 + 4 * moment_itemsize + 2) + (16 * f if moment_itemsize == 1 else 0)
    extra = 0 if backend == "triton" else f * d * (8 + 16)
    return Cost(2.0 * nnz * d + 12.0 * f * d, nnz * (d * itemsize + 16) + state + extra)


def _twin(backend: str) -> Any:
    """Return the backend's module."""
    if backend == "torch":
        return reference
    from . import triton

    return triton


def _check(
    parameter: Tensor, moments: Moments, rates: Rates, shadow: Tensor | None, fp8: Fp8Rows | None, matrix: bool = False
) -> None:
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
    for name, tensor in {"parameter": parameter, **tensors}.items():
        if tensor is None:
            continue
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{name} must have the parameter's shape {list(parameter.shape)}, got {list(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if (matrix or fp8 is not None) and parameter.ndim != 2:
        raise ValueError(f"parameter must be [F, D] for unit_norm, narrow moments and fp8, got {list(parameter.shape)}")
    if fp8 is not None:
        fp8.check("fp8", *parameter.shape)
        tensors |= {"fp8.rows": fp8.rows, "fp8.scale": fp8.scale}
    shapes = {rate.shape for rate in (*rates[:3], rates.seed) if rate is not None}
    n_rows = len(parameter) if parameter.ndim else 1
    if len(shapes) > 1 or any(len(shape) > 1 or (shape and (not shape[0] or n_rows % shape[0])) for shape in shapes):
        raise ValueError(
            f"rates must be scalars, or [S] with S a divisor of {n_rows}, got {[list(shape) for shape in shapes]}"
        )
    tensors |= dict(scales=moments.scales, step_size=rates.step_size, seed=rates.seed, skip=rates.skip)
    check_one_device(parameter=parameter, **tensors)


def _check_grad(parameter: Tensor, grad: Tensor) -> None:
    if grad.shape != parameter.shape:
        raise ValueError(f"grad must have the parameter's shape {list(parameter.shape)}, got {list(grad.shape)}")


def _check_biases(biases: BiasGradients | None, W: Tensor | None, center: Tensor | None) -> None:
    if biases is None:
        return
    if W is None or center is None:
        raise ValueError("biases need W and a center")
    check_shape("biases.encoder", biases.encoder, F=len(W))
    check_shape("biases.center", biases.center, S=center.numel() // W.shape[1], D=W.shape[1])
    check_one_device(W=W, encoder=biases.encoder, center=biases.center)


def _check_narrow(parameter: Tensor, moments: Moments, rates: Rates) -> None:
    if rates.seed is None or rates.seed.dtype != torch.int32:
        raise ValueError(f"rates.seed must be int32 for {moments.exp_avg.dtype} moments, got {rates.seed}")
    if (moments.scales is not None) != (moments.exp_avg.dtype == torch.int8):
        kind = f"{moments.exp_avg.dtype} {'without' if moments.scales is None else 'with'} scales"
        raise ValueError(f"scales must be given for 8-bit moments, and for no others, got {kind}")
    if moments.scales is not None:
        check_shape("scales", moments.scales, F=len(parameter), scales=2)
