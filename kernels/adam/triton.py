"""adam as Triton kernels: one program per latent sums its row of the gradient and updates the row from it.

A row is held in two pieces of HIGH and LOW columns, as in weight_grad. m and v are exp_avg and exp_avg_sq.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import fp8 as e4m3
from .. import moments as formats
from ..backend import launch_kernel, launch_options
from ..code import LatentMajor
from ..fp8 import Fp8Rows
from ..moments import LATENTS, BiasGradients, Moments, Rates
from ..numerics import pieces
from ..weight_grad.triton import gather_arguments, less_center, load_along, sum_latent, sum_row

# Constants of 8-bit codes, explained in moments.py.
MEAN_ZERO, MEAN_LARGEST = tl.constexpr(formats.MEAN_ZERO), tl.constexpr(formats.MEAN_LARGEST)
SQUARE_ZERO, SQUARE_LARGEST = tl.constexpr(formats.SQUARE_ZERO), tl.constexpr(formats.SQUARE_LARGEST)
LEAST = tl.constexpr(formats.LEAST)
# Constants of e4m3 rows, explained in fp8.py.
FP8_UNIT, FP8_TINY, FP8_COLUMNS = tl.constexpr(1 / e4m3.LARGEST), tl.constexpr(e4m3.TINY), tl.constexpr(e4m3.COLUMNS)


@triton.jit
def step(w, grad, m, v, inside, step_size, correction, factor, beta1, beta2, new1, new2, eps):
    """Return new weights and moments. new = 1 - beta comes from the host: in float32, 1 - 0.999 loses five digits."""
    grad = tl.where(inside, grad * factor, 0.0)
    m = beta1 * m + new1 * grad
    v = beta2 * v + new2 * (grad * grad)
    return w - step_size * m / (tl.sqrt(v) / correction + eps), m, v


@triton.jit
def mix(x):
    """The hash of reference.py, for random bits."""
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * -0x7B935975
    return x ^ (x >> 16 & 0xFFFF)


@triton.jit
def size_of(code, ZERO: tl.constexpr):
    """Decode 8-bit codes to values in units of their scale."""
    return (code + (127 + ZERO << 3) << 20).to(tl.float32, bitcast=True) - 2.0**ZERO


@triton.jit
def code_of(size, inverse, bits, ZERO: tl.constexpr, LARGEST: tl.constexpr):
    """Encode values to 8-bit codes, with 16 random bits and the inverse of their scale."""
    raw = (size * inverse + 2.0**ZERO).to(tl.int32, bitcast=True)
    return tl.minimum((raw + (bits << 4) + 8 >> 20) - (127 + ZERO << 3), LARGEST)


@triton.jit
def rounded(x, bits):
    """Round float32 to one of the two bfloat16 neighbours by 16 random bits. Returns float32."""
    return (x.to(tl.int32, bitcast=True) + bits & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def load_moments(m_ptrs, v_ptrs, m_scale, v_scale, inside, BITS: tl.constexpr):
    """Load moments of BITS bits as float32, in the shape of the pointers."""
    m = tl.load(m_ptrs, mask=inside, other=0)
    v = tl.load(v_ptrs, mask=inside, other=0)
    if BITS == 8:
        size = size_of(tl.abs(m.to(tl.int32)), MEAN_ZERO) * m_scale
        return tl.where(m < 0, -size, size), size_of(v.to(tl.int32), SQUARE_ZERO) * v_scale
    else:
        return m.to(tl.float32), v.to(tl.float32)


@triton.jit
def store_moments(m, v, m_ptrs, v_ptrs, m_inverse, v_inverse, row_hash, columns, inside, BITS: tl.constexpr):
    """Round moments to BITS bits and store them."""
    if BITS < 32:  # one 32-bit hash per element: 16 bits for each moment
        bits = mix(row_hash ^ columns)
    if BITS == 8:
        code = code_of(tl.abs(m), m_inverse, bits & 0xFFFF, MEAN_ZERO, MEAN_LARGEST)
        tl.store(m_ptrs, tl.where(m < 0, -code, code).to(tl.int8), mask=inside)
        code = code_of(v, v_inverse, bits >> 16 & 0xFFFF, SQUARE_ZERO, SQUARE_LARGEST)
        tl.store(v_ptrs, tl.maximum(code, (v > 0).to(tl.int32)).to(tl.uint8), mask=inside)
    elif BITS == 16:
        tl.store(v_ptrs, rounded(v, bits >> 16 & 0xFFFF).to(tl.bfloat16), mask=inside)
        tl.store(m_ptrs, rounded(m, bits & 0xFFFF).to(tl.bfloat16), mask=inside)
    else:
        tl.store(m_ptrs, m, mask=inside)
        tl.store(v_ptrs, v, mask=inside)


@triton.jit
def store_fp8(w_high, w_low, row, high, low, fp8_ptr, fp8_scale_ptr, D):
    """Store a row of weights as `Fp8Rows.of` does."""
    largest = tl.maximum(tl.max(tl.abs(w_high), 0), tl.max(tl.abs(w_low), 0))
    scale = tl.maximum(largest * FP8_UNIT, FP8_TINY)
    tl.store(fp8_scale_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    fp8_ptr += row * ((D + FP8_COLUMNS - 1) // FP8_COLUMNS * FP8_COLUMNS)
    tl.store(fp8_ptr + high, (w_high * inverse).to(fp8_ptr.dtype.element_ty))
    tl.store(fp8_ptr + low, (w_low * inverse).to(fp8_ptr.dtype.element_ty), mask=low < D)


@triton.jit
def update_row(
    row, w_high, w_low, grad_high, grad_low, high, low,
    w_ptr, m_ptr, v_ptr, scales_ptr, shadow_ptr, fp8_ptr, fp8_scale_ptr,
    step_size_ptr, correction_ptr, factor_ptr, seed_ptr, D, RUN, beta1, beta2, new1, new2, eps,
    UNIT_NORM: tl.constexpr, HAS_SHADOW: tl.constexpr, HAS_FP8: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Do Adam's step on one row of weights [F, D]. Each run of RUN rows has its own rates."""
    # scalars: the rates of the row's dictionary and its scales
    dictionary = row.to(tl.int32) // RUN
    step_size = tl.load(step_size_ptr + dictionary)
    correction = tl.load(correction_ptr + dictionary)
    factor = tl.load(factor_ptr + dictionary)
    m_ptr += row * D
    v_ptr += row * D
    m_scale = 1.0
    v_scale = 1.0
    if BITS == 8:
        m_scale = tl.load(scales_ptr + 2 * row)
        v_scale = tl.load(scales_ptr + 2 * row + 1)
    # [HIGH] moments and weights
    inside = tl.full(high.shape, True, tl.int1)
    m_high, v_high = load_moments(m_ptr + high, v_ptr + high, m_scale, v_scale, inside, BITS)
    w_high, m_high, v_high = step(
        w_high, grad_high, m_high, v_high, inside,
        step_size, correction, factor, beta1, beta2, new1, new2, eps,
    )  # fmt: skip
    row_hash = 0
    if BITS < 32:
        row_hash = mix(tl.load(seed_ptr + dictionary) + row.to(tl.int32) % RUN)
    if BITS > 8:  # no scale is needed, so store now to free registers
        store_moments(m_high, v_high, m_ptr + high, v_ptr + high, 1.0, 1.0, row_hash, high, inside, BITS)
    # [LOW] moments and weights
    m_low, v_low = load_moments(m_ptr + low, v_ptr + low, m_scale, v_scale, low < D, BITS)
    w_low, m_low, v_low = step(
        w_low, grad_low, m_low, v_low, low < D,
        step_size, correction, factor, beta1, beta2, new1, new2, eps,
    )  # fmt: skip
    if BITS > 8:
        store_moments(m_low, v_low, m_ptr + low, v_ptr + low, 1.0, 1.0, row_hash, low, low < D, BITS)
    else:  # new scales from the row's largest moments, then codes
        largest = tl.maximum(tl.max(tl.abs(m_high), 0), tl.max(tl.abs(m_low), 0))
        m_scale = tl.maximum(largest, LEAST) / (1.875 - 2.0**MEAN_ZERO)
        largest = tl.maximum(tl.max(v_high, 0), tl.max(v_low, 0))
        v_scale = tl.maximum(largest, LEAST) / (1.875 - 2.0**SQUARE_ZERO)
        tl.store(scales_ptr + 2 * row, m_scale)
        tl.store(scales_ptr + 2 * row + 1, v_scale)
        m_inverse = 1 / m_scale
        v_inverse = 1 / v_scale
        store_moments(m_high, v_high, m_ptr + high, v_ptr + high, m_inverse, v_inverse, row_hash, high, inside, BITS)
        store_moments(m_low, v_low, m_ptr + low, v_ptr + low, m_inverse, v_inverse, row_hash, low, low < D, BITS)
    if UNIT_NORM:  # normalise the row
        norm = tl.sqrt(tl.sum(w_high * w_high, 0) + tl.sum(w_low * w_low, 0))
        w_high = w_high / norm
        w_low = w_low / norm
    tl.store(w_ptr + row * D + high, w_high)
    tl.store(w_ptr + row * D + low, w_low, mask=low < D)
    if HAS_SHADOW:
        shadow_ptr += row * D
        w_high = w_high.to(shadow_ptr.dtype.element_ty)
        w_low = w_low.to(shadow_ptr.dtype.element_ty)
        tl.store(shadow_ptr + high, w_high)
        tl.store(shadow_ptr + low, w_low, mask=low < D)
    if HAS_FP8:
        store_fp8(w_high.to(tl.float32), w_low.to(tl.float32), row, high, low, fp8_ptr, fp8_scale_ptr, D)


@triton.jit
def update_block(
    block, w_ptr, grad_ptr, m_ptr, v_ptr, shadow_ptr, step_size_ptr, correction_ptr, factor_ptr,
    SIZE, RUN, beta1, beta2, new1, new2, eps, HAS_SHADOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Do Adam's step on BLOCK elements of a parameter with float32 moments."""
    # [BLOCK] elements: weights, gradients, moments and the rates of their dictionary
    elements = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dictionary = (elements // RUN).to(tl.int32)
    inside = elements < SIZE
    w = tl.load(w_ptr + elements, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + elements, mask=inside, other=0.0).to(tl.float32)
    m, v = load_moments(m_ptr + elements, v_ptr + elements, 1.0, 1.0, inside, 32)
    step_size = tl.load(step_size_ptr + dictionary, mask=inside, other=0.0)
    correction = tl.load(correction_ptr + dictionary, mask=inside, other=1.0)
    factor = tl.load(factor_ptr + dictionary, mask=inside, other=0.0)
    w, m, v = step(w, grad, m, v, inside, step_size, correction, factor, beta1, beta2, new1, new2, eps)
    store_moments(m, v, m_ptr + elements, v_ptr + elements, 1.0, 1.0, 0, elements, inside, 32)
    tl.store(w_ptr + elements, w, mask=inside)
    if HAS_SHADOW:
        tl.store(shadow_ptr + elements, w.to(shadow_ptr.dtype.element_ty), mask=inside)


@triton.jit
def adam_kernel(
    w_ptr, grad_ptr, m_ptr, v_ptr, shadow_ptr, step_size_ptr, correction_ptr, factor_ptr, skip_ptr,
    w2_ptr, grad2_ptr, m2_ptr, v2_ptr,
    SIZE, RUN, SIZE2, RUN2, beta1, beta2, new1, new2, eps,
    HAS_SHADOW: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adam on a parameter of any shape with float32 moments, and on a second one without a shadow. One program per BLOCK
    elements of either."""
    if HAS_SKIP:  # noqa: SIM102 - known when compiling
        if tl.load(skip_ptr) != 0:
            return
    block = tl.program_id(0)
    first_blocks = tl.cdiv(SIZE, BLOCK)
    if block < first_blocks:
        update_block(
            block, w_ptr, grad_ptr, m_ptr, v_ptr, shadow_ptr, step_size_ptr, correction_ptr, factor_ptr,
            SIZE, RUN, beta1, beta2, new1, new2, eps, HAS_SHADOW, BLOCK,
        )  # fmt: skip
    elif HAS_SECOND:
        update_block(
            block - first_blocks, w2_ptr, grad2_ptr, m2_ptr, v2_ptr, w2_ptr, step_size_ptr, correction_ptr, factor_ptr,
            SIZE2, RUN2, beta1, beta2, new1, new2, eps, False, BLOCK,
        )  # fmt: skip


@triton.jit
def adam_matrix_kernel(
    w_ptr, grad_ptr, m_ptr, v_ptr, scales_ptr, shadow_ptr, fp8_ptr, fp8_scale_ptr,
    step_size_ptr, correction_ptr, factor_ptr, seed_ptr, skip_ptr, D, RUN, beta1, beta2, new1, new2, eps,
    UNIT_NORM: tl.constexpr, HAS_SHADOW: tl.constexpr, HAS_FP8: tl.constexpr, HAS_SKIP: tl.constexpr,
    BITS: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Adam on a matrix [F, D] from its gradient, with any moments. One program per row."""
    if HAS_SKIP:  # noqa: SIM102 - known when compiling
        if tl.load(skip_ptr) != 0:
            return
    # [HIGH] and [LOW] weights and gradients of the row
    row = tl.program_id(0).to(tl.int64)
    high = tl.arange(0, HIGH)
    low = HIGH + tl.arange(0, LOW)
    w_high = tl.load(w_ptr + row * D + high)
    w_low = tl.load(w_ptr + row * D + low, mask=low < D, other=0.0)
    grad_high = tl.load(grad_ptr + row * D + high).to(tl.float32)
    grad_low = tl.load(grad_ptr + row * D + low, mask=low < D, other=0.0).to(tl.float32)
    if UNIT_NORM:  # remove the part of the gradient along the row
        along = tl.sum(grad_high * w_high, 0) + tl.sum(grad_low * w_low, 0)
        grad_high -= along * w_high
        grad_low -= along * w_low
    update_row(
        row, w_high, w_low, grad_high, grad_low, high, low,
        w_ptr, m_ptr, v_ptr, scales_ptr, shadow_ptr, fp8_ptr, fp8_scale_ptr,
        step_size_ptr, correction_ptr, factor_ptr, seed_ptr, D, RUN, beta1, beta2, new1, new2, eps,
        UNIT_NORM, HAS_SHADOW, HAS_FP8, BITS,
    )  # fmt: skip


@triton.jit
def adam_rows_kernel(
    packed_ptr, offsets_ptr, rows_ptr, windows_ptr, window_ones_ptr, center_ptr,
    w_ptr, m_ptr, v_ptr, scales_ptr, shadow_ptr, fp8_ptr, fp8_scale_ptr,
    step_size_ptr, correction_ptr, factor_ptr, seed_ptr, skip_ptr, norms_ptr, along_ptr, ones_ptr, products_ptr,
    D: tl.constexpr, stride_row: tl.constexpr, LATENTS_PER_CENTER, RUN, beta1, beta2, new1, new2, eps,
    UNIT_NORM: tl.constexpr, UPDATE: tl.constexpr, HAS_ALONG: tl.constexpr, HAS_SHADOW: tl.constexpr, HAS_FP8: tl.constexpr,
    HAS_SKIP: tl.constexpr, BITS: tl.constexpr, BIASES: tl.constexpr, LATENTS: tl.constexpr,
    HAS_CENTER: tl.constexpr, SPLIT: tl.constexpr, PAIRED: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Sum a latent's gradient from its entries. Then do Adam's step on its row (UPDATE) or store the squared norm of the
    gradient, with HAS_ALONG of its part across the row. BIASES also stores the sum of the latent's values, and this sum
    times the row before the step, added over the latents of the program. One program per LATENTS latents of a run of
    LATENTS_PER_CENTER."""
    if HAS_SKIP:  # noqa: SIM102 - known when compiling
        if tl.load(skip_ptr) != 0:
            return
    high = tl.arange(0, HIGH)
    low = HIGH + tl.arange(0, LOW)
    first = tl.program_id(0) * LATENTS
    count = LATENTS
    if LATENTS > 1:
        count = tl.minimum(LATENTS, LATENTS_PER_CENTER - first)
    if BIASES:  # [HIGH] and [LOW] sum of products
        product_high = tl.zeros((HIGH,), dtype=tl.float32)
        product_low = tl.zeros((LOW,), dtype=tl.float32)
    start = (tl.program_id(1) * LATENTS_PER_CENTER + first).to(tl.int64)
    end = tl.num_programs(1) * LATENTS_PER_CENTER
    entry = tl.load(offsets_ptr + start)
    last = tl.load(offsets_ptr + start + 1)
    for index in tl.range(0, count, num_stages=1, disable_licm=True):  # hoisted addresses would spill
        # the latent's entries entry:last; the end of the next one's is loaded ahead, for which an update lacks registers
        latent = start + index
        if UPDATE:
            entry = tl.load(offsets_ptr + latent)
            last = tl.load(offsets_ptr + latent + 1)
        else:
            next_last = tl.load(offsets_ptr + tl.minimum(latent + 2, end))
        if HAS_ALONG:  # [32] sums over every 32nd entry; the first load overlaps the gather
            alongs = load_along(along_ptr, entry, last)
        # [HIGH] and [LOW] gradient of the latent. An update with biases has no registers for pairs.
        grad_high, grad_low, ones = sum_latent(
            entry, last, packed_ptr, rows_ptr, windows_ptr, window_ones_ptr,
            D, stride_row, SPLIT, PAIRED and not (UPDATE and BIASES), HIGH, LOW,
        )  # fmt: skip
        if HAS_CENTER and not HAS_FP8:
            grad_high, grad_low = less_center(grad_high, grad_low, ones, center_ptr + tl.program_id(1) * D, D)
        if BIASES:
            tl.store(ones_ptr + latent, ones)
        if UPDATE | UNIT_NORM | BIASES:  # [HIGH] and [LOW] weights of the latent
            w_high = tl.load(w_ptr + latent * D + high).to(tl.float32)
            w_low = tl.load(w_ptr + latent * D + low, mask=low < D, other=0.0).to(tl.float32)
        if HAS_CENTER and HAS_FP8:  # behind the weights; with more values to hold, it would spill on sm_100 before them
            grad_high, grad_low = less_center(grad_high, grad_low, ones, center_ptr + tl.program_id(1) * D, D)
        if BIASES:
            product_high += ones * w_high
            product_low += ones * w_low
        if UNIT_NORM:  # remove the part of the gradient along the row
            along = tl.sum(grad_high * w_high, 0) + tl.sum(grad_low * w_low, 0)
            grad_high -= along * w_high
            grad_low -= along * w_low
        if not UPDATE:
            squared_norm = sum_row(grad_high * grad_high, grad_low * grad_low)
            if HAS_ALONG:
                stride = 32 * tl.num_programs(2)  # 32; see sum_latent
                for following in tl.range(entry + 32, last, stride, num_stages=1):
                    alongs += load_along(along_ptr, following, last)
                along = tl.sum(alongs, 0)
                squared_norm -= along * along
                squared_norm = tl.where(squared_norm < 0, 0.0, squared_norm)  # NaN stays
            tl.store(norms_ptr + latent, squared_norm)
        else:
            update_row(
                latent, w_high, w_low, grad_high, grad_low, high, low,
                w_ptr, m_ptr, v_ptr, scales_ptr, shadow_ptr, fp8_ptr, fp8_scale_ptr,
                step_size_ptr, correction_ptr, factor_ptr, seed_ptr, D, RUN, beta1, beta2, new1, new2, eps,
                UNIT_NORM, HAS_SHADOW, HAS_FP8, BITS,
            )  # fmt: skip
        if not UPDATE:
            entry = last
            last = next_last
    if BIASES:
        program = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        tl.store(products_ptr + program * D + high, product_high)
        tl.store(products_ptr + program * D + low, product_low, mask=low < D)


def adam(
    parameter: Tensor, grad: Tensor, moments: Moments, rates: Rates, unit_norm: bool, shadow: Tensor | None,
    fp8: Fp8Rows | None,
) -> None:  # fmt: skip
    if not parameter.numel():
        return
    tensors, numbers, flags = _arguments(parameter, moments, rates, shadow, fp8)
    if unit_norm or fp8 is not None or flags["BITS"] < 32:
        f, d = parameter.shape
        launch_kernel(
            adam_matrix_kernel, (f,),
            parameter, grad.contiguous(), *tensors[1:], d, f // rates.step_size.numel(), *numbers,
            UNIT_NORM=unit_norm, **flags, **pieces(d), **launch_options("adam_matrix", parameter),
        )  # fmt: skip
    else:
        _adam([parameter], [grad], [moments], rates, shadow)


def adam_each(parameters: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Moments], rates: Rates) -> None:
    for i in range(0, len(parameters), 2):
        _adam(parameters[i : i + 2], grads[i : i + 2], moments[i : i + 2], rates, None)


def _adam(
    parameters: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Moments], rates: Rates,
    shadow: Tensor | None,
) -> None:  # fmt: skip
    """Launch adam_kernel on one or two parameters. The first one stands in for an absent second one."""
    options = launch_options("adam", parameters[0])
    _, numbers, flags = _arguments(parameters[0], moments[0], rates, shadow, None)
    pointers = [(w, grad.contiguous(), *each[:2]) for w, grad, each in zip(parameters, grads, moments, strict=True)]
    sizes = [(w.numel(), w.numel() // rates.step_size.numel()) for w in parameters]
    launch_kernel(
        adam_kernel, (sum(triton.cdiv(size, options["BLOCK"]) for size, _ in sizes),),
        *pointers[0], parameters[0] if shadow is None else shadow, *rates[:3],
        parameters[0] if rates.skip is None else rates.skip, *pointers[-1], *sizes[0], *sizes[-1], *numbers,
        HAS_SHADOW=shadow is not None, HAS_SKIP=flags["HAS_SKIP"], HAS_SECOND=len(parameters) > 1, **options,
    )  # fmt: skip


def adam_rows(
    W: Tensor, entries: LatentMajor, values: Tensor, rows: Tensor, moments: Moments, rates: Rates,
    center: Tensor | None, unit_norm: bool, shadow: Tensor | None, fp8: Fp8Rows | None, biases: BiasGradients | None,
    shared: dict[str, Any] | None,
) -> None:  # fmt: skip
    tensors, numbers, flags = _arguments(W, moments, rates, shadow, fp8)
    numbers = (len(W) // rates.step_size.numel(), *numbers)
    operands = entries, values, rows, center
    _launch(
        operands, biases, shared, (*tensors, W, W), numbers, UNIT_NORM=unit_norm, UPDATE=True, HAS_ALONG=False, **flags
    )


def row_norms(
    entries: LatentMajor, values: Tensor, rows: Tensor, center: Tensor | None, W: Tensor | None, along: Tensor | None,
    biases: BiasGradients | None, shared: dict[str, Any] | None,
) -> Tensor:  # fmt: skip
    if along is not None:  # in the order of the sorted entries
        along = shared["along"] if shared and "along" in shared else along.flatten()[entries.order]
    norms = torch.empty(entries.latent_offsets.numel() - 1, dtype=torch.float32, device=rows.device)
    _launch(
        (entries, values, rows, center), biases, shared,
        (rows if W is None else W, *[rows] * 11, norms, norms if along is None else along), (1, *[0.0] * 5),
        UNIT_NORM=W is not None and biases is None, UPDATE=False, HAS_ALONG=along is not None, HAS_SHADOW=False,
        HAS_FP8=False, HAS_SKIP=False, BITS=32,
    )  # fmt: skip
    return norms


def _arguments(
    W: Tensor, moments: Moments, rates: Rates, shadow: Tensor | None, fp8: Fp8Rows | None
) -> tuple[tuple[Tensor, ...], tuple[float, ...], dict[str, int]]:
    """Return the kernels' arguments in their order: pointers, numbers and flags. W stands in for absent tensors."""
    optional = W, *moments, shadow, *(fp8 or (None, None)), *rates[:3], rates.seed, rates.skip
    tensors = tuple(W if tensor is None else tensor for tensor in optional)
    numbers = (rates.beta1, rates.beta2, 1 - rates.beta1, 1 - rates.beta2, rates.eps)
    flags = dict(
        HAS_SHADOW=shadow is not None, HAS_FP8=fp8 is not None, HAS_SKIP=rates.skip is not None,
        BITS=8 * moments.exp_avg.element_size(),
    )  # fmt: skip
    return tensors, numbers, flags


def _launch(
    operands: tuple[LatentMajor, Tensor, Tensor, Tensor | None], biases: BiasGradients | None,
    shared: dict[str, Any] | None, tensors: tuple, numbers: tuple, **flags: int,
) -> None:  # fmt: skip
    """Launch adam_rows_kernel. `operands` are those of `weight_grad`, packed once per `shared`."""
    shared, (entries, _, rows, _) = {} if shared is None else shared, operands
    if "gather" not in shared:
        shared["gather"] = gather_arguments(*operands, shared.get("packed"))
    pointers, integers, constants = shared["gather"]
    d, _, latents_per_center = integers
    latents = 1 if biases is None else LATENTS
    n_centers = (entries.latent_offsets.numel() - 1) // latents_per_center
    grid = (triton.cdiv(latents_per_center, latents), n_centers)
    products = torch.empty((n_centers, 0 if biases is None else grid[0], d), dtype=torch.float32, device=rows.device)
    launch_kernel(
        adam_rows_kernel, grid,
        *pointers, *tensors, products if biases is None else biases.encoder, products, *integers, *numbers,
        BIASES=biases is not None, LATENTS=latents, **constants, **flags,
        **launch_options("adam_rows" if flags["UPDATE"] else "row_norms", rows),
    )  # fmt: skip
    if biases is not None:
        torch.sum(products, 1, out=biases.center)
