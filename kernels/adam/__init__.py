"""adam: Adam's update of a [F, D] weight straight from the entries of a SparseCode, so that its gradient is never stored;
and of any parameter from its gradient."""

from typing import NamedTuple

from torch import Tensor

from ..backend import choose
from ..checks import check_one_device, check_shape
from ..code import LatentMajor
from ..cost import Cost
from ..weight_grad import check_entries
from . import reference


class Moments(NamedTuple):
    """Adam's running means of the gradient and of its square, each of the parameter's shape, float32 or bfloat16."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


class Rates(NamedTuple):
    """Adam's settings for one step. Those that change from step to step lie on the device, so that a captured graph of the
    step can be replayed.

    step_size   scalar tensor: lr / (1 - beta1^t)
    correction  scalar tensor: sqrt(1 - beta2^t)
    factor      scalar tensor: what the gradient is multiplied by first, for clipping
    """

    step_size: Tensor
    correction: Tensor
    factor: Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


def adam(
    parameter: Tensor,
    grad: Tensor,
    moments: Moments,
    rates: Rates,
    *,
    shadow: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One Adam step, in place (Kingma & Ba, arXiv 1412.6980):

    g           = factor * grad
    exp_avg     = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * g^2
    parameter  -= step_size * exp_avg / (sqrt(exp_avg_sq) / correction + eps)

    parameter float32 (or float64), contiguous; grad of its shape, any floating dtype; shadow of its shape, any floating
    dtype, is given the new values. Raises ValueError for shapes or devices that do not fit.
    """
    _check(parameter, moments, rates, shadow)
    if grad.shape != parameter.shape:
        raise ValueError(f"grad must have the parameter's shape {list(parameter.shape)}, got {list(grad.shape)}")
    if choose("adam", parameter, grad, backend=backend) == "triton":
        from . import triton

        triton.adam(parameter, grad, moments, rates, shadow)
    else:
        reference.adam(parameter, grad, moments, rates, shadow)


def adam_rows(
    W: Tensor,
    entries: LatentMajor,
    values: Tensor,
    rows: Tensor,
    moments: Moments,
    rates: Rates,
    *,
    center: Tensor | None = None,
    unit_norm: bool = False,
    shadow: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`adam` on W [F, D] with the gradient weight_grad(entries, values, rows, center=center), without storing it.

    With `unit_norm`, the rows of W have norm 1 and keep it: the part of each row's gradient g along the row, <g, W[j]> W[j],
    is taken away before the step, and the row is divided by its norm after. Latents without entries have a zero gradient;
    their moments decay and they move on as plain Adam has it. Returns |g_j|^2 [F], as `row_norms`.
    """
    _check(W, moments, rates, shadow)
    check_entries(entries, values, rows, center)
    check_shape("W", W, F=entries.latent_offsets.numel() - 1, D=rows.shape[1])
    check_one_device(W=W, rows=rows)
    if choose("adam_rows", W, values, rows, backend=backend) == "triton":
        from . import triton

        return triton.adam_rows(W, entries, values, rows, moments, rates, center, unit_norm, shadow)
    return reference.adam_rows(W, entries, values, rows, moments, rates, center, unit_norm, shadow)


def row_norms(
    entries: LatentMajor,
    values: Tensor,
    rows: Tensor,
    *,
    center: Tensor | None = None,
    W: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
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
    """A multiply-add and an element of rows for each entry and each of D; weights and moments read and written and a half-
    precision shadow written. Torch writes the gradient, reads it again, and goes over the weights twice more."""
    state = f * d * (8 + 4 * moment_itemsize + 2)
    again = 0 if backend == "triton" else f * d * (8 + 16)
    return Cost(2.0 * nnz * d + 12.0 * f * d, nnz * (d * itemsize + 16) + state + again)


def _check(parameter: Tensor, moments: Moments, rates: Rates, shadow: Tensor | None) -> None:
    tensors = {"exp_avg": moments.exp_avg, "exp_avg_sq": moments.exp_avg_sq, "shadow": shadow}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != parameter.shape:
            raise ValueError(
                f"{name} must have the parameter's shape {list(parameter.shape)}, got {list(tensor.shape)}"
            )
    for name, tensor in {"parameter": parameter, **tensors}.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    check_one_device(parameter=parameter, **tensors, step_size=rates.step_size)
