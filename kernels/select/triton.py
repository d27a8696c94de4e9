"""select as Triton kernels with one program per token: radix select for top-k, count and fill for thresholds.

`encode_sparse` selects among candidates with functions from here. A candidate is an int32: the float's bits rounded to
24 bits, which order like the values because none is negative, above 7 bits for its column, the first column highest. -1
means that a tile has no more latents.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_kernel, launch_options
from ..code import SparseCode

VALUE_BITS = tl.constexpr(-128)  # mask of a candidate's value
LEAST_POSITIVE = tl.constexpr(128)  # the lowest candidate with a positive value
NAN = tl.constexpr(0x7F800080)  # the lowest NaN that rounding keeps


@triton.jit
def sortable_key(value):
    """Map floats to unsigned keys in [0, 2**bits) of the same order. -0 equals 0, NaN is above all."""
    bits: tl.constexpr = value.dtype.primitive_bitwidth
    value = tl.where(value == 0, 0.0, value).to(value.dtype)
    if bits == 16:
        raw = value.to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        raw = value.to(tl.uint32, bitcast=True)
    sign: tl.constexpr = 1 << (bits - 1)
    all_ones: tl.constexpr = (1 << bits) - 1
    key = tl.where((raw & sign) != 0, raw ^ all_ones, raw | sign)
    return tl.where(value != value, all_ones, key).to(tl.uint32)


@triton.jit
def digits_of(key, counted, SHIFT: tl.constexpr):
    """Return the histogram [256] of the 8-bit digit at SHIFT, over the keys that count."""
    # Other keys go to bin 0 and are subtracted again, because histograms have no mask before Triton 3.4.
    counts = tl.histogram(tl.where(counted, (key >> SHIFT) & 255, 0).to(tl.int32), 256)
    return counts - tl.where(tl.arange(0, 256) == 0, tl.sum((counted == 0).to(tl.int32), 0), 0)


@triton.jit
def kth_largest(ptr, LENGTH, K, stride, BLOCK: tl.constexpr):
    """Return the K-th largest key of a row, and how many keys equal to it are among the K largest.

    Proceeds by 8-bit digits: among the keys that agree with `kth` so far, count each value of the next digit, and take
    the largest value that at least `remaining` keys reach.
    """
    bits: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
    digits = tl.arange(0, 256)
    kth = tl.zeros((), dtype=tl.uint32)
    remaining = K
    for shift in tl.static_range(bits - 8, -8, -8):
        # [256] histogram of this digit
        counts = tl.zeros((256,), dtype=tl.int32)
        for start in range(0, LENGTH, BLOCK):
            # [BLOCK] keys, and which of them count
            entries = start + tl.arange(0, BLOCK)
            counted = entries < LENGTH
            key = sortable_key(tl.load(ptr + entries.to(tl.int64) * stride, mask=counted, other=0.0))
            if shift < bits - 8:
                counted = counted & ((key >> (shift + 8)) == (kth >> (shift + 8)))
            counts += digits_of(key, counted, shift)
        # [256] number of keys that reach each digit
        at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digit = tl.max(tl.where(at_least >= remaining, digits, 0), 0)
        remaining -= tl.sum(tl.where(digits > digit, counts, 0), 0)
        kth |= digit.to(tl.uint32) << shift
    return kth, remaining


@triton.jit
def latents_of(entries, packed, first_tile, KEEP: tl.constexpr, BLOCK_F: tl.constexpr):
    """Return the latents of a token's candidates from their indices `entries`."""
    return (first_tile + entries // KEEP) * BLOCK_F + (BLOCK_F - 1 - packed % BLOCK_F)


@triton.jit
def may_have_more(last, least):
    """Return whether a tile may have dropped a key of `least` or more, given its last and lowest candidate. A tile full
    of NaN need not be computed again."""
    return (last >= LEAST_POSITIVE) & (last >> 7 >= least) & (last < NAN)


@triton.jit
def ranked(packed, latents):
    """Return int64 keys that order candidates by value, then by lower latent. -1 for those that are not positive."""
    key = ((packed & VALUE_BITS).to(tl.int64) << 32) | (0x7FFFFFFF - latents).to(tl.int64)
    return tl.where(packed >= LEAST_POSITIVE, key, -1)


# Passes over the positive keys of a batch that are `cut` or more.
DIGITS, COUNT, FILL = (tl.constexpr(mode) for mode in range(3))


@triton.jit
def begin_tally(above_ptr, equal_ptr, token, MODE: tl.constexpr):
    """Return `first`, `second` and `end` of `tally` before the first keys of a token."""
    second = 0
    end = 0
    if MODE == DIGITS:
        first = tl.zeros((256,), dtype=tl.int32)
    elif MODE == COUNT:
        first = 0
    else:
        first = tl.load(above_ptr + token)
        second = tl.load(equal_ptr + token).to(tl.int32)
        end = tl.load(above_ptr + token + 1)
    return first, second, end


@triton.jit
def tally(
    key, positive, value, latents, cut, first, second, end, values_ptr, indices_ptr,
    MODE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Process some keys of a token and return the updated `first` and `second`. DIGITS: `first` [256] is the histogram
    of the digit at SHIFT, over keys that agree with `cut` above it. COUNT: `first` counts keys above the cut, `second`
    those equal to it. FILL: writes both to slots from `first` to `end`, but only `second` of the equal ones."""
    if MODE == DIGITS:
        if SHIFT < 24:
            positive = positive & (key >> (SHIFT + 8) == cut >> (SHIFT + 8))
        first += digits_of(key, positive, SHIFT)
    else:
        above = (positive & (key > cut)).to(tl.int32)
        equal = (positive & (key == cut)).to(tl.int32)
        if MODE == COUNT:
            first += tl.sum(above, 0)
            second += tl.sum(equal, 0)
        else:
            keep = (above != 0) | ((equal != 0) & (tl.cumsum(equal, 0) <= second))
            ones = keep.to(tl.int32)
            slots = first + tl.cumsum(ones, 0) - 1
            inside = keep & (slots < end)
            tl.store(values_ptr + slots, value, mask=inside)
            tl.store(indices_ptr + slots, latents, mask=inside)
            first += tl.sum(ones, 0)
            second -= tl.sum(equal, 0)
    return first, second


@triton.jit
def end_tally(first, second, above_ptr, equal_ptr, token, dictionary, MODE: tl.constexpr):
    """Add a token's histogram to the dictionary's, or write its counts."""
    if MODE == DIGITS:
        counts_ptr = above_ptr + dictionary * 257 + tl.arange(0, 256)
        tl.atomic_add(counts_ptr, first.to(tl.int64), mask=first != 0)
    elif MODE == COUNT:
        tl.store(above_ptr + token, first.to(tl.int64))
        tl.store(equal_ptr + token, second.to(tl.int64))


@triton.jit
def topk_kernel(
    acts_ptr, values_ptr, indices_ptr,
    F, K, stride_n, stride_f,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The K largest activations of a token. One program per token."""
    token = tl.program_id(0).to(tl.int64)
    acts_ptr += token * stride_n
    kth, remaining = kth_largest(acts_ptr, F, K, stride_f, BLOCK_F)

    # Collect, by ascending latent, everything above the K-th key and the first `remaining` entries equal to it.
    n_kept = 0
    for start in range(0, F, BLOCK_F):
        # [BLOCK_F] latents, their values and keys, which to keep, and their slots in the code
        latents = start + tl.arange(0, BLOCK_F)
        inside = latents < F
        value = tl.load(acts_ptr + latents.to(tl.int64) * stride_f, mask=inside, other=0.0)
        key = sortable_key(value)
        equal = (inside & (key == kth)).to(tl.int32)
        keep = (inside & (key > kth)) | ((equal != 0) & (tl.cumsum(equal, 0) <= remaining))
        ones = keep.to(tl.int32)
        slot = token * K + n_kept + tl.cumsum(ones, 0) - 1
        tl.store(values_ptr + slot, value, mask=keep)
        tl.store(indices_ptr + slot, latents, mask=keep)
        remaining -= tl.sum(equal, 0)
        n_kept += tl.sum(ones, 0)


@triton.jit
def batch_kernel(
    acts_ptr, cut_ptr, above_ptr, equal_ptr, values_ptr, indices_ptr,
    F, stride_n, stride_f,
    MODE: tl.constexpr, SHIFT: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Apply `tally` to the positive activations of a token. One program per token."""
    token = tl.program_id(0).to(tl.int64)
    acts_ptr += token * stride_n
    bits: tl.constexpr = acts_ptr.dtype.element_ty.primitive_bitwidth
    cut = tl.load(cut_ptr).to(tl.uint32)
    first, second, end = begin_tally(above_ptr, equal_ptr, token, MODE)
    for start in range(0, F, BLOCK_F):
        # [BLOCK_F] latents, their values and keys, and which are positive or NaN
        latents = start + tl.arange(0, BLOCK_F)
        value = tl.load(acts_ptr + latents.to(tl.int64) * stride_f, mask=latents < F, other=0.0)
        key = sortable_key(value)
        positive = key > (1 << (bits - 1))  # the key of zero
        first, second = tally(
            key, positive, value, latents, cut, first, second, end, values_ptr, indices_ptr, MODE, SHIFT
        )
    end_tally(first, second, above_ptr, equal_ptr, token, 0, MODE)


@triton.jit
def above(acts_ptr, threshold_ptr, threshold, latents, F, stride_f, PER_LATENT: tl.constexpr):
    """Return activations [BLOCK_F] of these latents, and which are above their threshold or NaN."""
    value = tl.load(acts_ptr + latents.to(tl.int64) * stride_f, mask=latents < F, other=0.0)
    if PER_LATENT:
        limit = tl.load(threshold_ptr + latents, mask=latents < F, other=0.0).to(tl.float32)
    else:
        limit = threshold
    at_or_below = value.to(tl.float32) <= limit
    return value, (latents < F) & (at_or_below == 0)


@triton.jit
def count_kernel(
    acts_ptr, threshold_ptr, counts_ptr,
    threshold, F, stride_n, stride_f,
    PER_LATENT: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Count a token's activations above their thresholds. One program per token."""
    token = tl.program_id(0).to(tl.int64)
    acts_ptr += token * stride_n
    # [BLOCK_F] partial counts
    count = tl.zeros((BLOCK_F,), dtype=tl.int32)
    for start in range(0, F, BLOCK_F):
        _, is_active = above(acts_ptr, threshold_ptr, threshold, start + tl.arange(0, BLOCK_F), F, stride_f, PER_LATENT)
        count += is_active.to(tl.int32)
    tl.store(counts_ptr + token, tl.sum(count, 0).to(tl.int64))


@triton.jit
def fill_kernel(
    acts_ptr, threshold_ptr, offsets_ptr, values_ptr, indices_ptr,
    threshold, F, capacity, stride_n, stride_f,
    PER_LATENT: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Write a token's activations above their thresholds, up to the capacity. One program per token."""
    token = tl.program_id(0).to(tl.int64)
    acts_ptr += token * stride_n
    slot = tl.load(offsets_ptr + token)
    for start in range(0, F, BLOCK_F):
        # [BLOCK_F] latents, their values, which to keep, and their slots in the code
        latents = start + tl.arange(0, BLOCK_F)
        value, is_active = above(acts_ptr, threshold_ptr, threshold, latents, F, stride_f, PER_LATENT)
        ones = is_active.to(tl.int32)
        slots = slot + tl.cumsum(ones, 0) - 1
        keep = is_active & (slots < capacity)
        tl.store(values_ptr + slots, value, mask=keep)
        tl.store(indices_ptr + slots, latents, mask=keep)
        slot += tl.sum(ones, 0)


def select_topk(acts: Tensor, k: int) -> SparseCode:
    n, f = acts.shape
    values = torch.empty((n, k), dtype=acts.dtype, device=acts.device)
    indices = torch.empty((n, k), dtype=torch.int32, device=acts.device)
    launch_kernel(topk_kernel, (n,), acts, values, indices, f, k, *acts.stride(), **launch_options("topk", acts))
    return SparseCode(values, indices, f)


def find_cut(
    run: Callable[..., None], total: int, bits: int, dictionaries: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the total-th largest key [S] (0 if fewer are positive), and the number [S] of equal keys to keep.

    `run(cut, above, equal, values, indices, MODE=..., SHIFT=...)` launches a pass of `tally` over keys of `bits` bits.
    """
    cut = torch.zeros(dictionaries, dtype=torch.int64, device=device)
    remaining = torch.full_like(cut, total)
    for shift in range(bits - 8, -8, -8):
        counts = torch.zeros(dictionaries, 257, dtype=torch.int64, device=device)
        run(cut, counts, counts, counts, counts, MODE=DIGITS.value, SHIFT=shift)
        at_least = counts.flip(1).cumsum(1).flip(1)
        digit = ((at_least[:, :256] >= remaining[:, None]).sum(1) - 1).clamp_min(0)
        remaining = remaining - at_least.gather(1, digit[:, None] + 1)[:, 0]
        cut = cut + (digit << shift)
    return cut, remaining


def take_above(
    run: Callable[..., None], cut: Tensor, remaining: Tensor, n_tokens: int, capacity: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values, indices and offsets of all entries above the cut and the first `remaining` equal to it, and how
    many there are. Without a capacity, waits for the device to know that. `run` as in `find_cut`."""
    above, equal = (torch.empty(len(cut), n_tokens, dtype=torch.int64, device=cut.device) for _ in range(2))
    run(cut, above, equal, above, above, MODE=COUNT.value)
    equal_quota = torch.minimum((remaining[:, None] - equal.cumsum(1) + equal).clamp_min(0), equal)
    offsets = torch.cat([equal.new_zeros(1), (above + equal_quota).flatten().cumsum(0)])
    n_entries = offsets[-1].clone()
    size = int(n_entries) if capacity is None else capacity
    offsets.clamp_(max=size)
    values, indices = (torch.zeros(size, dtype=kind, device=cut.device) for kind in (dtype, torch.int32))
    run(cut, offsets, equal_quota, values, indices, MODE=FILL.value)
    return values, indices, offsets, n_entries


def select_batch_topk(acts: Tensor, total: int) -> SparseCode:
    (n, f), options = acts.shape, launch_options("threshold", acts)

    def run(*tensors: Tensor, MODE: int, SHIFT: int = 0) -> None:
        launch_kernel(batch_kernel, (n,), acts, *tensors, f, *acts.stride(), MODE=MODE, SHIFT=SHIFT, **options)

    cut, remaining = find_cut(run, total, 8 * acts.element_size(), 1, acts.device)
    values, indices, offsets, _ = take_above(run, cut, remaining, n, total, acts.dtype)
    return SparseCode(values, indices, f, offsets)


def select_threshold(acts: Tensor, threshold: float | Tensor, capacity: int | None) -> SparseCode:
    n, f = acts.shape
    options = launch_options("threshold", acts)
    per_latent = isinstance(threshold, Tensor)
    limits, limit = (threshold.contiguous(), 0.0) if per_latent else (acts, float(threshold))
    counts = torch.empty(n, dtype=torch.int64, device=acts.device)
    launch_kernel(count_kernel, (n,), acts, limits, counts, limit, f, *acts.stride(), PER_LATENT=per_latent, **options)
    running = torch.cat([counts.new_zeros(1), counts]).cumsum(0)
    size = int(running[-1]) if capacity is None else capacity
    values = torch.zeros(size, dtype=acts.dtype, device=acts.device)
    indices = torch.zeros(size, dtype=torch.int32, device=acts.device)
    launch_kernel(
        fill_kernel, (n,),
        acts, limits, running, values, indices, limit, f, size, *acts.stride(), PER_LATENT=per_latent, **options,
    )  # fmt: skip
    if capacity is None:
        return SparseCode(values, indices, f, running)
    return SparseCode(values, indices, f, running.clamp(max=capacity), running[-1] > capacity)
