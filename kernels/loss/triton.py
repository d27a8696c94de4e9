"""loss as two Triton kernels: sums over each token, then over each position's tokens in a fixed order."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_kernel, launch_options
from ..code import SparseCode
from ..decode.triton import entries_of


@triton.jit
def token_loss_kernel(
    residual_ptr, values_ptr, offsets_ptr, stats_ptr,
    N, D, K, stride_residual,
    RAGGED: tl.constexpr, SQUARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Squared error, L1 and L0 of a token, as rows of `stats` [3, N]. One program per token."""
    token = tl.program_id(0).to(tl.int64)
    first, count = entries_of(token, offsets_ptr, K, RAGGED)
    # [BLOCK] partial sums of squares over columns; `residual` holds squared norms already with SQUARED
    if SQUARED:
        tl.store(stats_ptr + token, tl.load(residual_ptr + token).to(tl.float32))
    else:
        squared_error = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, D, BLOCK):
            dims = start + tl.arange(0, BLOCK)
            residual = tl.load(residual_ptr + token * stride_residual + dims, mask=dims < D, other=0.0).to(tl.float32)
            squared_error += residual * residual
        tl.store(stats_ptr + token, tl.sum(squared_error, 0))
    # [BLOCK] partial sums over the token's entries
    l1 = tl.zeros((BLOCK,), dtype=tl.float32)
    l0 = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + first + slots, mask=slots < count, other=0.0).to(tl.float32)
        l1 += tl.abs(values)
        l0 += (values != 0).to(tl.float32)
    tl.store(stats_ptr + N + token, tl.sum(l1, 0))
    tl.store(stats_ptr + N + N + token, tl.sum(l0, 0))


@triton.jit
def entry_loss_kernel(
    errors_ptr, spreads_ptr, projections_ptr, values_ptr, indices_ptr, offsets_ptr,
    stats_ptr, dvalues_ptr, weights_ptr, along_ptr, fired_ptr,
    N, K, CAPACITY, scale,
    RAGGED: tl.constexpr, HAS_SPREAD: tl.constexpr, ACTIVE_ONLY: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Squared error, L1, L0 and spread of a token, as rows of `stats` [4, N], and the weights of its entries. One program
    per token adds up its PARTS of errors and spreads [PARTS, N] and of projections [PARTS, CAPACITY]."""
    token = tl.program_id(0).to(tl.int64)
    first, count = entries_of(token, offsets_ptr, K, RAGGED)
    squared_error = tl.load(errors_ptr + token)
    for part in tl.static_range(1, PARTS):
        squared_error += tl.load(errors_ptr + part * N + token)
    tl.store(stats_ptr + token, squared_error)
    if HAS_SPREAD:
        spread = tl.load(spreads_ptr + token)
        for part in tl.static_range(1, PARTS):
            spread += tl.load(spreads_ptr + part * N + token)
        tl.store(stats_ptr + 3 * N + token, spread)
    # [BLOCK] partial sums over the token's entries
    l1 = tl.zeros((BLOCK,), dtype=tl.float32)
    l0 = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        # [BLOCK] entries, their values and latents, and their projections added up
        inside = start + tl.arange(0, BLOCK) < count
        entries = first + start + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + entries, mask=inside, other=0.0).to(tl.float32)
        latents = tl.load(indices_ptr + entries, mask=inside, other=0)
        projections = tl.load(projections_ptr + entries, mask=inside, other=0.0)
        for part in tl.static_range(1, PARTS):
            projections += tl.load(projections_ptr + part * CAPACITY + entries, mask=inside, other=0.0)
        is_active = values > 0
        dvalues = scale * projections
        if ACTIVE_ONLY:
            dvalues *= is_active.to(tl.float32)  # NaN stays
        weights = scale * values
        tl.store(dvalues_ptr + entries, dvalues, mask=inside)
        tl.store(weights_ptr + entries, weights, mask=inside)
        tl.store(along_ptr + entries, weights * projections, mask=inside)
        tl.store(fired_ptr + latents, tl.full((BLOCK,), 1, tl.uint8), mask=inside & is_active)
        l1 += tl.abs(values)
        l0 += (values != 0).to(tl.float32)
    tl.store(stats_ptr + N + token, tl.sum(l1, 0))
    tl.store(stats_ptr + 2 * N + token, tl.sum(l0, 0))


@triton.jit
def position_sum_kernel(
    squared_error_ptr, l1_ptr, l0_ptr, spread_ptr, pos_ptr, sums_ptr,
    N, T,
    HAS_SPREAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum figures of a dictionary's N tokens by position into its `sums` [5, T + 1]. The last column has the sums of all
    tokens, and the number of those at positions in [0, T). One program per column and dictionary reads every token,
    because N * T comparisons cost less than sorting the tokens by position."""
    # [BLOCK_N] partial sums over tokens
    position = tl.program_id(0)
    first = tl.program_id(1) * N
    sums_ptr += tl.program_id(1) * 5 * (T + 1) + position
    count = tl.zeros((BLOCK_N,), dtype=tl.float32)
    squared_error = tl.zeros((BLOCK_N,), dtype=tl.float32)
    l1 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    l0 = tl.zeros((BLOCK_N,), dtype=tl.float32)
    spread = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        # [BLOCK_N] tokens, and which of them count here
        tokens = start + tl.arange(0, BLOCK_N)
        pos = tl.load(pos_ptr + tokens, mask=tokens < N, other=-1)
        is_here = (pos == position) | ((position == T) & (tokens < N))
        count += (is_here & (pos >= 0) & (pos < T)).to(tl.float32)
        squared_error += tl.load(squared_error_ptr + first + tokens, mask=is_here, other=0.0)
        l1 += tl.load(l1_ptr + first + tokens, mask=is_here, other=0.0)
        l0 += tl.load(l0_ptr + first + tokens, mask=is_here, other=0.0)
        if HAS_SPREAD:
            spread += tl.load(spread_ptr + first + tokens, mask=is_here, other=0.0)
    tl.store(sums_ptr, tl.sum(count, 0))
    tl.store(sums_ptr + T + 1, tl.sum(squared_error, 0))
    tl.store(sums_ptr + 2 * (T + 1), tl.sum(l1, 0))
    tl.store(sums_ptr + 3 * (T + 1), tl.sum(l0, 0))
    tl.store(sums_ptr + 4 * (T + 1), tl.sum(spread, 0))


@triton.jit
def count_kernel(
    idle_ptr, fired_ptr, sums_ptr, spread_ptr, totals_ptr, count_ptr, squared_error_ptr, l1_ptr, l0_ptr,
    batch_spread_ptr, loss_ptr, aux_ptr, norm_ptr, recomputed_ptr,
    N, F, T, stride_batch, stride_spread,
    HAS_AUX: tl.constexpr, HAS_RECOMPUTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count BLOCK latents of a dictionary; the first program also counts its sums, spread and totals."""
    dictionary = tl.program_id(1).to(tl.int64)
    # [BLOCK] latents
    latents = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = latents < F
    idle = tl.load(idle_ptr + dictionary * F + latents, mask=inside, other=0)
    fired = tl.load(fired_ptr + dictionary * F + latents, mask=inside, other=0)
    tl.store(idle_ptr + dictionary * F + latents, tl.where(fired != 0, 0, idle + N), mask=inside)
    if tl.program_id(0) == 0:
        sums_ptr += dictionary * 4 * T
        counted = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, T, BLOCK):
            # [BLOCK] positions
            positions = start + tl.arange(0, BLOCK)
            inside = positions < T
            batch = dictionary * stride_batch + positions
            count = tl.load(count_ptr + batch, mask=inside, other=0.0)
            counted += count
            add(sums_ptr + positions, count, inside)
            add(sums_ptr + T + positions, tl.load(squared_error_ptr + batch, mask=inside, other=0.0), inside)
            add(sums_ptr + 2 * T + positions, tl.load(l1_ptr + batch, mask=inside, other=0.0), inside)
            add(sums_ptr + 3 * T + positions, tl.load(l0_ptr + batch, mask=inside, other=0.0), inside)
        add(spread_ptr + dictionary, tl.load(batch_spread_ptr + dictionary * stride_spread), None)
        loss = tl.load(loss_ptr + dictionary)
        totals_ptr += dictionary * 5
        if HAS_AUX:
            aux = tl.load(aux_ptr + dictionary)
            loss -= aux
            add(totals_ptr + 1, aux, None)
        add(totals_ptr, loss, None)
        add(totals_ptr + 2, tl.load(norm_ptr + dictionary), None)
        add(totals_ptr + 3, N - tl.sum(counted, 0), None)
        if HAS_RECOMPUTED:
            add(totals_ptr + 4, tl.load(recomputed_ptr + dictionary).to(tl.float32), None)


@triton.jit
def add(ptrs, summands, inside):
    tl.store(ptrs, tl.load(ptrs, mask=inside) + summands, mask=inside)


def position_loss(residual: Tensor, values: SparseCode | Tensor, pos: Tensor, n_positions: int) -> list[Tensor]:
    n, squared = residual.shape[0], residual.dim() == 1
    residual = residual if residual.stride(-1) == 1 else residual.contiguous()
    offsets = values.offsets if isinstance(values, SparseCode) else None
    entries = values.values if isinstance(values, SparseCode) else values
    stats = torch.empty((3, n), dtype=torch.float32, device=residual.device)
    launch_kernel(
        token_loss_kernel, (n,),
        residual, entries.contiguous(), pos if offsets is None else offsets, stats,
        n, 0 if squared else residual.shape[1], 0 if offsets is not None else entries.shape[1], residual.stride(0),
        RAGGED=offsets is not None, SQUARED=squared,
        **launch_options("token_loss", residual),
    )  # fmt: skip
    return list(_by_position((*stats, None), pos, n_positions, 1)[0, :4, :n_positions].unbind())


def entry_loss(
    code: SparseCode, squared_error: Tensor, projection: Tensor, scale: float, spread: Tensor | None, active_only: bool
) -> tuple[Tensor | None, ...]:
    n, device = code.n_tokens, code.values.device
    stats = torch.empty((4, n), dtype=torch.float32, device=device)
    weights = [torch.empty(code.values.shape, dtype=torch.float32, device=device) for _ in range(3)]
    fired = torch.zeros(code.n_latents, dtype=torch.uint8, device=device)
    launch_kernel(
        entry_loss_kernel, (n,),
        squared_error, squared_error if spread is None else spread, projection.contiguous(),
        code.values.contiguous(), code.indices.contiguous(), code.indices if code.offsets is None else code.offsets,
        stats, *weights, fired,
        n, 0 if code.ragged else code.values.shape[1], code.values.numel(), scale,
        RAGGED=code.ragged, HAS_SPREAD=spread is not None, ACTIVE_ONLY=active_only, PARTS=len(squared_error),
        **launch_options("entry_loss", code.values),
    )  # fmt: skip
    return *stats[:3], None if spread is None else stats[3], *weights, fired.view(torch.bool)


def batch_sums(
    tokens: Sequence[Tensor | None], pos: Tensor, n_positions: int, dictionaries: int
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    sums = _by_position(tokens, pos, n_positions, dictionaries)
    per_position = [sums[:, row, :n_positions] for row in range(4)]
    return per_position, sums[:, 1, n_positions], None if tokens[3] is None else sums[:, 4, n_positions]


def _by_position(tokens: Sequence[Tensor | None], pos: Tensor, n_positions: int, dictionaries: int) -> Tensor:
    """Return `sums` [S, 5, T + 1] of position_sum_kernel. `tokens` are squared errors, L1, L0 and spreads."""
    squared_error, l1, l0, spread = tokens
    sums = torch.empty((dictionaries, 5, n_positions + 1), dtype=torch.float32, device=pos.device)
    launch_kernel(
        position_sum_kernel, (n_positions + 1, dictionaries),
        squared_error, l1, l0, l0 if spread is None else spread, pos.contiguous(), sums, len(pos), n_positions,
        HAS_SPREAD=spread is not None, **launch_options("position_sum", pos),
    )  # fmt: skip
    return sums


def count_step(
    idle_tokens: Tensor, sums: Tensor, spread: Tensor, totals: Tensor, n: int, fired: Tensor, batch: Sequence[Tensor],
    batch_spread: Tensor, loss: Tensor, aux_loss: Tensor | None, norm: Tensor, recomputed: Tensor | None,
) -> None:  # fmt: skip
    (s, f), t, options = idle_tokens.shape, sums.shape[2], launch_options("count", totals)
    strides = {tensor.stride() for tensor in batch}
    if len(strides) > 1 or batch[0].stride(1) != 1:
        batch = [tensor.contiguous() for tensor in batch]
    launch_kernel(
        count_kernel, (triton.cdiv(f, options["BLOCK"]), s),
        idle_tokens, fired.contiguous(), sums, spread, totals, *batch, batch_spread, loss.contiguous(),
        loss if aux_loss is None else aux_loss.contiguous(), norm.contiguous(),
        loss if recomputed is None else recomputed.contiguous(),
        n, f, t, batch[0].stride(0), batch_spread.stride(0) if batch_spread.dim() else 0,
        HAS_AUX=aux_loss is not None, HAS_RECOMPUTED=recomputed is not None, **options,
    )  # fmt: skip
