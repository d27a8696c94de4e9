"""adam as Triton kernels: one program per latent holds its whole row of the gradient, and updates the row from it."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_options
from ..code import LatentMajor
from ..weight_grad.triton import sum_latent, sum_windows
from ..weight_grad.triton import weight_grad as weight_grad_of

if TYPE_CHECKING:
    from . import Moments, Rates


@triton.jit
def step(w, grad, m_ptrs, v_ptrs, inside, step_size, correction, factor, beta1, beta2, eps):
    """The new weights; the moments are written."""
    grad = tl.where(inside, grad * factor, 0.0)
    m = tl.load(m_ptrs, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptrs, mask=inside, other=0.0).to(tl.float32)
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad * grad
    tl.store(m_ptrs, m.to(m_ptrs.dtype.element_ty), mask=inside)
    tl.store(v_ptrs, v.to(v_ptrs.dtype.element_ty), mask=inside)
    return w - step_size * m / (tl.sqrt(v) / correction + eps)


@triton.jit
def adam_kernel(
    w_ptr, grad_ptr, m_ptr, v_ptr, shadow_ptr, step_size_ptr, correction_ptr, factor_ptr,
    SIZE, beta1, beta2, eps,
    HAS_SHADOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    w = tl.load(w_ptr + at, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    w = step(
        w, grad, m_ptr + at, v_ptr + at, inside,
        tl.load(step_size_ptr), tl.load(correction_ptr), tl.load(factor_ptr), beta1, beta2, eps,
    )  # fmt: skip
    tl.store(w_ptr + at, w, mask=inside)
    if HAS_SHADOW:
        tl.store(shadow_ptr + at, w.to(shadow_ptr.dtype.element_ty), mask=inside)


@triton.jit
def adam_rows_kernel(
    values_ptr, order_ptr, tokens_ptr, offsets_ptr, rows_ptr, windows_ptr, center_ptr, ones_ptr,
    w_ptr, m_ptr, v_ptr, shadow_ptr, step_size_ptr, correction_ptr, factor_ptr, norms_ptr,
    M, D, stride_row, beta1, beta2, eps,
    HAS_CENTER: tl.constexpr, UNIT_NORM: tl.constexpr, UPDATE: tl.constexpr, HAS_SHADOW: tl.constexpr,
    HIGH: tl.constexpr, LOW: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A row lies in two pieces, HIGH and LOW wide, both powers of two: 2304 = 2048 + 256 wastes nothing.
    latent = tl.program_id(0).to(tl.int64)
    high = tl.arange(0, HIGH)
    low = HIGH + tl.arange(0, LOW)
    grad_high = sum_latent(
        latent, values_ptr, order_ptr, tokens_ptr, offsets_ptr, rows_ptr, windows_ptr, M, high, D, stride_row,
        SPLIT, BLOCK_E, HIGH, STAGES,
    )  # fmt: skip
    grad_low = sum_latent(
        latent, values_ptr, order_ptr, tokens_ptr, offsets_ptr, rows_ptr, windows_ptr, M, low, D, stride_row,
        SPLIT, BLOCK_E, LOW, STAGES,
    )  # fmt: skip
    if HAS_CENTER:
        ones = tl.load(ones_ptr + latent)
        grad_high -= ones * tl.load(center_ptr + high, mask=high < D, other=0.0).to(tl.float32)
        grad_low -= ones * tl.load(center_ptr + low, mask=low < D, other=0.0).to(tl.float32)
    if UPDATE | UNIT_NORM:
        w_high = tl.load(w_ptr + latent * D + high, mask=high < D, other=0.0)
        w_low = tl.load(w_ptr + latent * D + low, mask=low < D, other=0.0)
    if UNIT_NORM:
        along = tl.sum(grad_high * w_high, 0) + tl.sum(grad_low * w_low, 0)
        grad_high -= along * w_high
        grad_low -= along * w_low
    tl.store(norms_ptr + latent, tl.sum(grad_high * grad_high, 0) + tl.sum(grad_low * grad_low, 0))
    if UPDATE:
        step_size = tl.load(step_size_ptr)
        correction = tl.load(correction_ptr)
        factor = tl.load(factor_ptr)
        m_ptr += latent * D
        v_ptr += latent * D
        w_high = step(
            w_high, grad_high, m_ptr + high, v_ptr + high, high < D, step_size, correction, factor, beta1, beta2, eps
        )
        w_low = step(
            w_low, grad_low, m_ptr + low, v_ptr + low, low < D, step_size, correction, factor, beta1, beta2, eps
        )
        if UNIT_NORM:
            norm = tl.sqrt(tl.sum(w_high * w_high, 0) + tl.sum(w_low * w_low, 0))
            w_high = w_high / norm
            w_low = w_low / norm
        tl.store(w_ptr + latent * D + high, w_high, mask=high < D)
        tl.store(w_ptr + latent * D + low, w_low, mask=low < D)
        if HAS_SHADOW:
            shadow_ptr += latent * D
            tl.store(shadow_ptr + high, w_high.to(shadow_ptr.dtype.element_ty), mask=high < D)
            tl.store(shadow_ptr + low, w_low.to(shadow_ptr.dtype.element_ty), mask=low < D)


def adam(parameter: Tensor, grad: Tensor, moments: "Moments", rates: "Rates", shadow: Tensor | None) -> None:
    options = launch_options("adam", parameter)
    adam_kernel[(triton.cdiv(parameter.numel(), options["BLOCK"]),)](
        parameter, grad.contiguous(), *moments, parameter if shadow is None else shadow,
        rates.step_size, rates.correction, rates.factor,
        parameter.numel(), rates.beta1, rates.beta2, rates.eps,
        HAS_SHADOW=shadow is not None, **options,
    )  # fmt: skip


def adam_rows(
    W: Tensor, entries: LatentMajor, values: Tensor, rows: Tensor, moments: "Moments", rates: "Rates",
    center: Tensor | None, unit_norm: bool, shadow: Tensor | None,
) -> Tensor:  # fmt: skip
    return _launch(
        entries, values, rows, center,
        (W, *moments, W if shadow is None else shadow, rates.step_size, rates.correction, rates.factor),
        (rates.beta1, rates.beta2, rates.eps),
        UNIT_NORM=unit_norm, UPDATE=True, HAS_SHADOW=shadow is not None,
    )  # fmt: skip


def row_norms(entries: LatentMajor, values: Tensor, rows: Tensor, center: Tensor | None, W: Tensor | None) -> Tensor:
    return _launch(
        entries, values, rows, center, (rows if W is None else W, *[rows] * 6), (0.0, 0.0, 0.0),
        UNIT_NORM=W is not None, UPDATE=False, HAS_SHADOW=False,
    )  # fmt: skip


def _launch(
    entries: LatentMajor, values: Tensor, rows: Tensor, center: Tensor | None, tensors: tuple, numbers: tuple, **flags: bool
) -> Tensor:  # fmt: skip
    """Runs adam_rows_kernel; gives the squared norm of each row of the gradient."""
    (m, d), f = rows.shape, entries.latent_offsets.numel() - 1
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    values = values.contiguous()
    sums = rows if center is None else weight_grad_of(entries, values, rows.new_ones(1, 1), None)
    windows, split = sum_windows(entries, values, rows)
    norms = torch.empty(f, dtype=torch.float32, device=rows.device)
    high, low = pieces(d)
    options = launch_options("adam_rows_small" if rows.dtype == torch.float32 else "adam_rows", rows)
    adam_rows_kernel[(f,)](
        values, entries.order, entries.tokens, entries.latent_offsets, rows, windows,
        rows if center is None else center.contiguous(), sums,
        *tensors, norms, m, d, rows.stride(0), *numbers,
        HAS_CENTER=center is not None, HIGH=high, LOW=low, SPLIT=split, **flags, **options,
    )  # fmt: skip
    return norms


def pieces(d: int) -> tuple[int, int]:
    """Two powers of two that cover d, and little more."""
    high = 1 << (d.bit_length() - 1)
    return (high // 2, high // 2) if d == high > 1 else (high, triton.next_power_of_2(max(1, d - high)))
