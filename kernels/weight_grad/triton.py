"""weight_grad as Triton kernels: one program per latent adds the latent's entries in order.

The sorted entries are first packed into int64 words of a row and a value, so the gather reads one word per entry. Two
rows are in flight while two others are added.

Two bfloat16 columns of a wide row are one word, and each takes one instruction to widen. With D and the stride known when
compiling, a row's address takes one, too.

A row of D columns is held in two pieces of HIGH and LOW columns, both powers of two: 2304 = 2048 + 256 wastes nothing.
`high` [HIGH] and `low` [LOW] are their columns. HIGH is at most D, so only `low` needs a mask.

A latent with very many entries would keep one program busy long after all others. So the sorted entries are split into
windows of SPLIT, and each window that lies within one latent is summed by its own program first. The latent's program
then adds its whole windows, the entries before them, and the entries after them, in this order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_kernel, launch_options
from ..code import LatentMajor
from ..numerics import pieces

PAIRED_FROM = 2048  # HIGH from which bfloat16 columns are loaded in pairs: a thread then has several


@triton.jit
def pack(values, rows):
    """Pack values and rows into int64: the value as float32 above the row."""
    return (values.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64) << 32) | rows


@triton.jit
def pack_kernel(values_ptr, order_ptr, tokens_ptr, packed_ptr, C, M, BLOCK: tl.constexpr):
    """Pack the value of each sorted entry and its row, the token modulo M."""
    positions = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = positions < C
    entries = tl.load(order_ptr + positions, mask=inside, other=0)
    values = tl.load(values_ptr + entries, mask=inside, other=0.0)
    rows = tl.load(tokens_ptr + positions, mask=inside, other=0) % M
    tl.store(packed_ptr + positions, pack(values, rows), mask=inside)


@triton.jit
def sorted_kernel(
    latents_ptr, order_ptr, tokens_ptr, encoder_ptr, decoder_ptr, along_ptr,
    sorted_tokens_ptr, packed_encoder_ptr, packed_decoder_ptr, sorted_along_ptr, offsets_ptr,
    C, F, K, ENCODER_ROWS, DECODER_ROWS, STEPS,
    HAS_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From entries sorted by latent: token, packed weights of both matrices, `along`, and the latents' offsets. One program
    per BLOCK entries and latents."""
    # [BLOCK] positions among the sorted entries, entries and tokens
    positions = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = positions < C
    entries = tl.load(order_ptr + positions, mask=inside, other=0)
    tokens = entries.to(tl.int32) // K
    if HAS_TOKENS:
        tokens = tl.load(tokens_ptr + entries, mask=inside, other=0).to(tl.int32)
    tl.store(sorted_tokens_ptr + positions, tokens, mask=inside)
    weights = tl.load(encoder_ptr + entries, mask=inside, other=0.0)
    tl.store(packed_encoder_ptr + positions, pack(weights, tokens % ENCODER_ROWS), mask=inside)
    weights = tl.load(decoder_ptr + entries, mask=inside, other=0.0)
    tl.store(packed_decoder_ptr + positions, pack(weights, tokens % DECODER_ROWS), mask=inside)
    tl.store(sorted_along_ptr + positions, tl.load(along_ptr + entries, mask=inside, other=0.0), mask=inside)
    # [BLOCK] bounds: bisect for the first entry of latent `positions` or a later one
    low = tl.zeros((BLOCK,), dtype=tl.int32)
    high = low + C
    for _ in range(STEPS):
        middle = (low + high) // 2
        is_open = low < high
        is_below = tl.load(latents_ptr + middle, mask=is_open, other=0) < positions
        low = tl.where(is_open & is_below, middle + 1, low)
        high = tl.where(is_open & ~is_below, middle, high)
    tl.store(offsets_ptr + positions, low.to(tl.int64), mask=positions <= F)


@triton.jit
def load_row(packed, rows_ptr, high, low, D: tl.constexpr, stride_row: tl.constexpr):
    """Return the value of a packed entry, and its row as [HIGH] and [LOW] in the dtype of the pointer."""
    rows_ptr += (packed & 0xFFFFFFFF) * stride_row
    value = (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return value, tl.load(rows_ptr + high), tl.load(rows_ptr + low, mask=low < D, other=0)


@triton.jit
def halves(sums, PAIRED: tl.constexpr):
    """Return sums of even and of odd columns if PAIRED, else the sums and nothing."""
    if PAIRED:
        return tl.split(tl.reshape(sums, (sums.shape[0] // 2, 2)))
    else:
        return sums, 0.0


@triton.jit
def add_row(first, second, value, row, PAIRED: tl.constexpr):
    """Add value * row to the sums of `halves`. A bfloat16 is the upper half of the float32 of the same value."""
    if PAIRED:
        first += value * (row << 16).to(tl.float32, bitcast=True)
        second += value * (row & -0x10000).to(tl.float32, bitcast=True)
    else:
        first += value * row.to(tl.float32)
    return first, second


@triton.jit
def add_entries(
    sum_high, sum_low, ones, first, last, packed_ptr, rows_ptr,
    D: tl.constexpr, stride_row: tl.constexpr, PAIRED: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Add value * row over the packed entries first:last to the sums, and their values to `ones`. With PAIRED, two bfloat16
    columns are a word."""
    WIDTH: tl.constexpr = 2 if PAIRED else 1
    if PAIRED:
        rows_ptr = rows_ptr.to(tl.pointer_type(tl.int32))
    high = tl.arange(0, HIGH // WIDTH)
    low = HIGH // WIDTH + tl.arange(0, LOW // WIDTH)
    COLUMNS: tl.constexpr = D // WIDTH
    STRIDE: tl.constexpr = stride_row // WIDTH
    packed_ptr += first
    count = (last - first).to(tl.int32)
    if count > 0:
        even_high, odd_high = halves(sum_high, PAIRED)
        even_low, odd_low = halves(sum_low, PAIRED)
        end = count - 1
        # rows of entries a and b, and the two packed entries after them. Past the end, the last one is read again.
        value_a, high_a, low_a = load_row(tl.load(packed_ptr), rows_ptr, high, low, COLUMNS, STRIDE)
        packed_b = tl.load(packed_ptr + tl.minimum(1, end))
        value_b, high_b, low_b = load_row(packed_b, rows_ptr, high, low, COLUMNS, STRIDE)
        next_a = tl.load(packed_ptr + tl.minimum(2, end))
        next_b = tl.load(packed_ptr + tl.minimum(3, end))
        for index in tl.range(0, count, 2, num_stages=1):
            even_high, odd_high = add_row(even_high, odd_high, value_a, high_a, PAIRED)
            even_low, odd_low = add_row(even_low, odd_low, value_a, low_a, PAIRED)
            ones += value_a
            value_a, high_a, low_a = load_row(next_a, rows_ptr, high, low, COLUMNS, STRIDE)
            next_a = tl.load(packed_ptr + tl.minimum(index + 4, end))
            value_b = tl.where(index < end, value_b, 0.0)
            even_high, odd_high = add_row(even_high, odd_high, value_b, high_b, PAIRED)
            even_low, odd_low = add_row(even_low, odd_low, value_b, low_b, PAIRED)
            ones += value_b
            value_b, high_b, low_b = load_row(next_b, rows_ptr, high, low, COLUMNS, STRIDE)
            next_b = tl.load(packed_ptr + tl.minimum(index + 5, end))
        if PAIRED:
            sum_high = tl.interleave(even_high, odd_high)
            sum_low = tl.interleave(even_low, odd_low)
        else:
            sum_high = even_high
            sum_low = even_low
    return sum_high, sum_low, ones


@triton.jit
def sum_latent(
    first, last, packed_ptr, rows_ptr, windows_ptr, window_ones_ptr, D: tl.constexpr, stride_row: tl.constexpr,
    SPLIT: tl.constexpr, PAIRED: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Return the sum of values * rows over a latent's entries first:last as [HIGH] and [LOW], and the sum of its values."""
    high = tl.arange(0, HIGH)
    low = HIGH + tl.arange(0, LOW)
    sum_high = tl.zeros((HIGH,), dtype=tl.float32)
    sum_low = tl.zeros((LOW,), dtype=tl.float32)
    ones = tl.full((), 0.0, tl.float32)
    # its whole windows window:end
    window = (first + SPLIT - 1) // SPLIT
    end = last // SPLIT
    # few latents have windows: with a step that the compiler does not know (1), it leaves the loop small
    windows_ptr += window * D
    for index in tl.range(0, (end - window).to(tl.int32), tl.num_programs(2), num_stages=1):
        sum_high += tl.load(windows_ptr + index * D + high)
        sum_low += tl.load(windows_ptr + index * D + low, mask=low < D, other=0.0)
        ones += tl.load(window_ones_ptr + window + index)
    # the entries before and after the windows: one run of entries if there are none
    has_windows = window < end
    stop = tl.where(has_windows, window * SPLIT, last)
    for _ in tl.range(0, 1 + has_windows.to(tl.int32), num_stages=1):
        sum_high, sum_low, ones = add_entries(
            sum_high, sum_low, ones, first, stop, packed_ptr, rows_ptr, D, stride_row, PAIRED, HIGH, LOW
        )
        first = end * SPLIT
        stop = last
    return sum_high, sum_low, ones


@triton.jit
def less_center(sum_high, sum_low, ones, center_ptr, D: tl.constexpr):
    """Return the sum of values * (rows - center) = sum of values * rows - (sum of values) * center."""
    high = tl.arange(0, sum_high.shape[0])
    low = sum_high.shape[0] + tl.arange(0, sum_low.shape[0])
    sum_high -= ones * tl.load(center_ptr + high).to(tl.float32)
    sum_low -= ones * tl.load(center_ptr + low, mask=low < D, other=0.0).to(tl.float32)
    return sum_high, sum_low


@triton.jit
def sum_row(high, low):
    """Sum the two pieces of a row in one reduction."""
    parts = tl.reshape(high, (low.shape[0], high.shape[0] // low.shape[0]))
    return tl.sum(tl.sum(parts, 1) + low, 0)


@triton.jit
def load_along(along_ptr, start, last):
    """Load `along` of the first 32 of the sorted entries start:last."""
    positions = start + tl.arange(0, 32)
    return tl.load(along_ptr + positions, mask=positions < last, other=0.0)


@triton.jit
def windows_kernel(
    packed_ptr, latents_ptr, rows_ptr, windows_ptr, window_ones_ptr,
    D: tl.constexpr, F, stride_row: tl.constexpr,
    SPLIT: tl.constexpr, PAIRED: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Sum the windows that lie within one latent, and no others. One program per window."""
    window = tl.program_id(0).to(tl.int64)
    first = window * SPLIT
    latent = tl.load(latents_ptr + first)
    if (latent == tl.load(latents_ptr + first + SPLIT - 1)) & (latent < F):
        high = tl.arange(0, HIGH)
        low = HIGH + tl.arange(0, LOW)
        last = first + SPLIT
        if not PAIRED:
            last = first + SPLIT * tl.num_programs(2)  # the same: the compiler would unroll a loop of known length
        sum_high, sum_low, ones = add_entries(
            tl.zeros((HIGH,), dtype=tl.float32), tl.zeros((LOW,), dtype=tl.float32), tl.full((), 0.0, tl.float32),
            first, last, packed_ptr, rows_ptr, D, stride_row, PAIRED, HIGH, LOW,
        )  # fmt: skip
        tl.store(windows_ptr + window * D + high, sum_high)
        tl.store(windows_ptr + window * D + low, sum_low, mask=low < D)
        tl.store(window_ones_ptr + window, ones)


@triton.jit
def weight_grad_kernel(
    packed_ptr, offsets_ptr, rows_ptr, windows_ptr, window_ones_ptr, center_ptr, out_ptr,
    D: tl.constexpr, stride_row: tl.constexpr, LATENTS_PER_CENTER, HAS_CENTER: tl.constexpr,
    SPLIT: tl.constexpr, PAIRED: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """dW, in one program per latent."""
    latent = tl.program_id(0).to(tl.int64)
    grad_high, grad_low, ones = sum_latent(
        tl.load(offsets_ptr + latent), tl.load(offsets_ptr + latent + 1), packed_ptr, rows_ptr, windows_ptr, window_ones_ptr,
        D, stride_row, SPLIT, PAIRED, HIGH, LOW,
    )  # fmt: skip
    if HAS_CENTER:
        center_ptr += latent.to(tl.int32) // LATENTS_PER_CENTER * D
        grad_high, grad_low = less_center(grad_high, grad_low, ones, center_ptr, D)
    low = HIGH + tl.arange(0, LOW)
    tl.store(out_ptr + latent * D + tl.arange(0, HIGH), grad_high)
    tl.store(out_ptr + latent * D + low, grad_low, mask=low < D)


@triton.jit
def latent_sums_kernel(values_ptr, order_ptr, offsets_ptr, out_ptr, BLOCK: tl.constexpr):
    """Sum the values of each latent, in one program per latent."""
    latent = tl.program_id(0)
    last = tl.load(offsets_ptr + latent + 1)
    # [BLOCK] sums over every BLOCK-th entry
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in tl.range(tl.load(offsets_ptr + latent), last, BLOCK, num_stages=1):
        positions = start + tl.arange(0, BLOCK)
        entries = tl.load(order_ptr + positions, mask=positions < last, other=0)
        sums += tl.load(values_ptr + entries, mask=positions < last, other=0.0).to(tl.float32)
    tl.store(out_ptr + latent, tl.sum(sums, 0))


def sort_entries(
    latents: Tensor, tokens: Tensor | int, n_latents: int, encoder_weights: Tensor, decoder_weights: Tensor,
    along: Tensor, n_rows: tuple[int, int],
) -> tuple[LatentMajor, dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    c, device, options = latents.numel(), latents.device, launch_options("sorted", latents)
    latents, order = latents.sort(stable=True)
    sorted_tokens = torch.empty(c, dtype=torch.int32, device=device)
    packed = [torch.empty(c, dtype=torch.int64, device=device) for _ in range(2)]
    sorted_along = torch.empty(c, dtype=torch.float32, device=device)
    offsets = torch.empty(n_latents + 1, dtype=torch.int64, device=device)
    has_tokens = isinstance(tokens, Tensor)
    launch_kernel(
        sorted_kernel, (triton.cdiv(max(c, n_latents + 1), options["BLOCK"]),),
        latents, order, tokens.contiguous() if has_tokens else order,
        encoder_weights.contiguous(), decoder_weights.contiguous(), along.contiguous(),
        sorted_tokens, *packed, sorted_along, offsets,
        c, n_latents, 1 if has_tokens else tokens, *n_rows, c.bit_length(), HAS_TOKENS=has_tokens, **options,
    )  # fmt: skip
    entries = LatentMajor(order, latents, sorted_tokens, offsets)
    return entries, dict(packed=packed[0]), dict(packed=packed[1], along=sorted_along)


def gather_arguments(
    entries: LatentMajor, values: Tensor, rows: Tensor, center: Tensor | None, packed: Tensor | None = None
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, int]]:
    """Return what `sum_latent` takes: pointers, integers and constants. Packs the entries, unless that is done, and sums
    the windows."""
    (m, d), f, c = rows.shape, entries.latent_offsets.numel() - 1, values.numel()
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    columns = pieces(d)
    is_even = d % 2 == rows.stride(0) % 2 == rows.data_ptr() % 4 == 0
    columns["PAIRED"] = rows.dtype == torch.bfloat16 and is_even and columns["HIGH"] >= PAIRED_FROM
    if packed is None:
        packed, options = torch.empty(c, dtype=torch.int64, device=rows.device), launch_options("pack", rows)
        if c:
            launch_kernel(
                pack_kernel, (triton.cdiv(c, options["BLOCK"]),),
                values.contiguous(), entries.order, entries.tokens, packed, c, m, **options,
            )  # fmt: skip
    options = launch_options("windows", rows)
    split = options["SPLIT"]
    windows = torch.empty((c // split, d), dtype=torch.float32, device=rows.device)
    window_ones = windows.new_empty(len(windows))
    if len(windows):
        launch_kernel(
            windows_kernel, (len(windows),),
            packed, entries.latents, rows, windows, window_ones, d, f, rows.stride(0), **columns, **options,
        )  # fmt: skip
    pointers = (packed, entries.latent_offsets, rows, windows, window_ones)
    latents_per_center = f // (1 if center is None else center.numel() // d)
    return (
        (*pointers, rows if center is None else center.contiguous()), (d, rows.stride(0), latents_per_center),
        dict(HAS_CENTER=center is not None, SPLIT=split, **columns),
    )  # fmt: skip


def weight_grad(entries: LatentMajor, values: Tensor, rows: Tensor, center: Tensor | None) -> Tensor:
    pointers, integers, constants = gather_arguments(entries, values, rows, center)
    out = torch.empty((entries.latent_offsets.numel() - 1, rows.shape[1]), dtype=torch.float32, device=rows.device)
    launch_kernel(
        weight_grad_kernel, (len(out),), *pointers, out, *integers, **constants, **launch_options("weight_grad", rows)
    )
    return out


def latent_sums(entries: LatentMajor, values: Tensor) -> Tensor:
    out = torch.empty(entries.latent_offsets.numel() - 1, dtype=torch.float32, device=values.device)
    launch_kernel(
        latent_sums_kernel, (len(out),), values.contiguous(), entries.order, entries.latent_offsets, out,
        **launch_options("latent_sums", values),
    )  # fmt: skip
    return out
