"""decode as Triton kernels: one program per token (and tile of D) gathers the rows of W_dec of the token's entries."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_kernel, launch_options
from ..code import SparseCode


@triton.jit
def entries_of(token, offsets_ptr, K, RAGGED: tl.constexpr):
    """Return a token's first entry and its number of entries."""
    if RAGGED:
        first = tl.load(offsets_ptr + token)
        count = (tl.load(offsets_ptr + token + 1) - first).to(tl.int32)
    else:
        first = token * K
        count = K
    return first, count


@triton.jit
def gather(values_ptr, indices_ptr, w_ptr, first, slots, count, dims, D, stride_w):
    """Return values [BLOCK_K] and rows of W_dec [BLOCK_K, BLOCK_D] of the token's entries in `slots`."""
    # [BLOCK_K] latents and values, zero past the token's last entry
    latents = tl.load(indices_ptr + first + slots, mask=slots < count, other=0).to(tl.int64)
    values = tl.load(values_ptr + first + slots, mask=slots < count, other=0.0).to(tl.float32)
    w_ptrs = w_ptr + latents[:, None] * stride_w + dims[None, :]
    return values, tl.load(w_ptrs, mask=(slots < count)[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def decode_kernel(
    values_ptr, indices_ptr, offsets_ptr, w_ptr, b_ptr, target_ptr, out_ptr,
    M, RUN, D, K, stride_w, stride_target,
    RAGGED: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x_hat, or target - x_hat with RESIDUAL. One program per token and BLOCK_D columns.

    Tokens are the fast axis of the grid: programs that run together read the same columns of W_dec, and [F, BLOCK_D]
    fits in L2 when all of W_dec would not."""
    # [BLOCK_D] columns of this program; `count` entries of the token
    token = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, count = entries_of(token, offsets_ptr, K, RAGGED)

    # [BLOCK_K, BLOCK_D] values * W_dec, one partial sum per slot; the loads of the next rows overlap the sums
    acc = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    for start in tl.range(0, count, BLOCK_K, num_stages=STAGES):
        slots = start + tl.arange(0, BLOCK_K)
        values, w = gather(values_ptr, indices_ptr, w_ptr, first, slots, count, dims, D, stride_w)
        acc += values[:, None] * w.to(tl.float32)

    # [BLOCK_D] x_hat, then the residual; each RUN of tokens has its own bias, and token n has target n modulo M
    b_ptr += token // RUN * D
    x_hat = tl.sum(acc, 0) + tl.load(b_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)
    if RESIDUAL:
        target = tl.load(target_ptr + token % M * stride_target + dims, mask=dims < D, other=0.0)
        x_hat = target.to(tl.float32) - x_hat
    tl.store(out_ptr + token * D + dims, x_hat.to(out_ptr.dtype.element_ty), mask=dims < D)


@triton.jit
def reconstruct_kernel(
    values_ptr, indices_ptr, offsets_ptr, w_ptr, b_ptr, target_ptr, mean_ptr,
    residual_ptr, error_ptr, projection_ptr, spread_ptr,
    N, M, RUN, D, K, CAPACITY, stride_w, stride_target,
    RAGGED: tl.constexpr, HAS_MEAN: tl.constexpr, ONCE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Residual, its squared norm and its products with the token's rows, over BLOCK_D columns, and with HAS_MEAN the
    squared distance of the target from the mean. One program per token and tile of columns; error and spread [tiles, N]
    and projection [tiles, CAPACITY] hold the parts of each tile."""
    # [BLOCK_D] columns and [BLOCK_K] slots of this program; `count` entries of the token
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    dims = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    first, count = entries_of(token, offsets_ptr, K, RAGGED)
    slots = tl.arange(0, BLOCK_K)

    # [BLOCK_D] x_hat without the bias
    if ONCE:  # [BLOCK_K, BLOCK_D] all rows of the token: gathered for x_hat, they stay for the projection
        values, w = gather(values_ptr, indices_ptr, w_ptr, first, slots, count, dims, D, stride_w)
        x_hat = tl.sum(values[:, None] * w.to(tl.float32), 0)
    else:  # [BLOCK_K, BLOCK_D] one partial sum per slot
        acc = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
        for start in range(0, count, BLOCK_K):
            values, w = gather(values_ptr, indices_ptr, w_ptr, first, start + slots, count, dims, D, stride_w)
            acc += values[:, None] * w.to(tl.float32)
        x_hat = tl.sum(acc, 0)
    # [BLOCK_D] x_hat and residual, zero past D
    x_hat += tl.load(b_ptr + token // RUN * D + dims, mask=dims < D, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + token % M * stride_target + dims, mask=dims < D, other=0.0).to(tl.float32)
    residual = tl.where(dims < D, target - x_hat, 0.0)
    tl.store(residual_ptr + token * D + dims, residual.to(residual_ptr.dtype.element_ty), mask=dims < D)
    tl.store(error_ptr + tile * N + token, tl.sum(residual * residual, 0))
    if HAS_MEAN:
        mean = tl.load(mean_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)  # past D, the target is zero, too
        tl.store(spread_ptr + tile * N + token, tl.sum((target - mean) * (target - mean), 0))

    # [BLOCK_K] products of the residual with the token's rows
    projection_ptr += tile * CAPACITY + first
    if ONCE:
        tl.store(projection_ptr + slots, tl.sum(w.to(tl.float32) * residual[None, :], 1), mask=slots < count)
    else:
        for start in range(0, count, BLOCK_K):
            values, w = gather(values_ptr, indices_ptr, w_ptr, first, start + slots, count, dims, D, stride_w)
            dots = tl.sum(w.to(tl.float32) * residual[None, :], 1)
            tl.store(projection_ptr + start + slots, dots, mask=start + slots < count)


@triton.jit
def values_grad_kernel(
    indices_ptr, offsets_ptr, w_ptr, grad_ptr, out_ptr,
    D, K, stride_w, stride_grad,
    RAGGED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Products of a token's gradient with the rows of W_dec of its entries. One program per token."""
    token = tl.program_id(0).to(tl.int64)
    first, count = entries_of(token, offsets_ptr, K, RAGGED)
    for start in range(0, count, BLOCK_K):
        # [BLOCK_K] latents, and [BLOCK_K, BLOCK_D] products summed over columns at the end
        slots = start + tl.arange(0, BLOCK_K)
        latents = tl.load(indices_ptr + first + slots, mask=slots < count, other=0).to(tl.int64)
        acc = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
        for tile in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            # [BLOCK_D] gradient and [BLOCK_K, BLOCK_D] rows of W_dec
            dims = tile + tl.arange(0, BLOCK_D)
            grad = tl.load(grad_ptr + token * stride_grad + dims, mask=dims < D, other=0.0)
            w_ptrs = w_ptr + latents[:, None] * stride_w + dims[None, :]
            w = tl.load(w_ptrs, mask=(slots < count)[:, None] & (dims < D)[None, :], other=0.0)
            acc += w.to(tl.float32) * grad.to(tl.float32)[None, :]
        tl.store(out_ptr + first + slots, tl.sum(acc, 1).to(out_ptr.dtype.element_ty), mask=slots < count)


def decode(code: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor | None) -> Tensor:
    n, d = code.n_tokens, W_dec.shape[1]
    W_dec = _with_unit_stride(W_dec)
    target = None if target is None else _with_unit_stride(target)
    out = torch.empty((n, d), dtype=(W_dec if target is None else target).dtype, device=W_dec.device)
    options = launch_options("decode", W_dec)
    launch_kernel(
        decode_kernel, (n, triton.cdiv(d, options["BLOCK_D"])),
        code.values.contiguous(), code.indices.contiguous(), code.indices if code.offsets is None else code.offsets,
        W_dec, b_dec.contiguous(), W_dec if target is None else target, out,
        n if target is None else len(target), n // (b_dec.numel() // d), d, 0 if code.ragged else code.values.shape[1],
        W_dec.stride(0), 0 if target is None else target.stride(0),
        RAGGED=code.ragged, RESIDUAL=target is not None,
        **options,
    )  # fmt: skip
    return out


def reconstruct(
    code: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor, mean: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    n, (m, d) = code.n_tokens, target.shape
    W_dec, target = _with_unit_stride(W_dec), _with_unit_stride(target)
    k = 0 if code.ragged else code.values.shape[1]
    options = launch_options("reconstruct", W_dec)
    once = 0 < k <= options["BLOCK_K"]
    if not once:
        options = launch_options("reconstruct_loop", W_dec)
    tiles, capacity = triton.cdiv(d, options["BLOCK_D"]), code.values.numel()
    residual = torch.empty((n, d), dtype=target.dtype, device=target.device)
    errors, spreads = (torch.empty((tiles, n), dtype=torch.float32, device=target.device) for _ in range(2))
    allocate = torch.zeros if code.ragged else torch.empty  # unused entries are not written
    projections = allocate((tiles, *code.values.shape), dtype=torch.float32, device=target.device)
    launch_kernel(
        reconstruct_kernel, (n, tiles),
        code.values.contiguous(), code.indices.contiguous(), code.indices if code.offsets is None else code.offsets,
        W_dec, b_dec.contiguous(), target, b_dec if mean is None else mean.contiguous(),
        residual, errors, projections, spreads,
        n, m, n // (b_dec.numel() // d), d, k, capacity, W_dec.stride(0), target.stride(0),
        RAGGED=code.ragged, HAS_MEAN=mean is not None, ONCE=once,
        **options,
    )  # fmt: skip
    return residual, errors, projections, None if mean is None else spreads


def decode_values_grad(code: SparseCode, W_dec: Tensor, grad: Tensor) -> Tensor:
    W_dec, grad = _with_unit_stride(W_dec), _with_unit_stride(grad)
    allocate = torch.zeros if code.ragged else torch.empty  # unused entries are not written
    out = allocate(code.values.shape, dtype=code.values.dtype, device=W_dec.device)
    launch_kernel(
        values_grad_kernel, (code.n_tokens,),
        code.indices.contiguous(), code.indices if code.offsets is None else code.offsets, W_dec, grad, out,
        W_dec.shape[1], 0 if code.ragged else code.values.shape[1], W_dec.stride(0), grad.stride(0),
        RAGGED=code.ragged,
        **launch_options("values_grad", W_dec),
    )  # fmt: skip
    return out


def _with_unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
