"""encode_topk on a CPU that multiplies bfloat16 in hardware: candidates from a bfloat16 product, values in float32.

With x^ and w^ for a centred token x and a latent's encoder row w rounded to bfloat16, Cauchy-Schwarz says

    |x w - x^ w^| = |(x - x^) w + x^ (w - w^)|  <=  |x - x^| |w| + |x^| |w - w^|

Float32 sums of D products, both the bfloat16 product and the exact value, differ from the real sum by at most about
D 2^-24 (|x| |w| + |b|). `ALLOWANCE` covers both. Five more columns add all this to the product:

    x^:  1, 1, 1                  |x - x^| + allowance |x|    |x| + |x - x^|
    w^:  b + allowance |b|        |w|                         |w - w^|

where b's three columns are bfloat16 numbers that sum to it, and norms are rounded up. So an element of the product
times `OUTPUT`, for its own rounding to bfloat16, is no less than the float32 activation, or both are at most zero.

The candidates of a token are the 2 K latents with the largest bounds. Their activations are computed in float32. If
the K-th largest of these exceeds the bounds of all other latents, none of those is among the K largest, and the token
is certain. For other tokens, all latents whose bounds reach that value are computed. Tokens with many of those take the
float32 path, and so do all if a number is not finite. BatchTopK does the same for the batch.

The selection is that of a float32 encoder, except that subnormal activations may count as zero. It may differ from that
of the float32 path where two activations differ by less than the rounding of float32 sums, and values may differ in their
last bits, because sums have another order. The same inputs give the same bits.
"""

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor

from .code import SparseCode
from .decode.reference import decode_values_grad
from .encode.reference import encode
from .encoder_inputs import EncoderInputs
from .masks import GaussianMask, weights_at, weights_of
from .select.reference import select_batch_topk, select_topk
from .selection import Selection, select_among

ALLOWANCE = 3 * 2.0**-24  # per column of the product, relative to |x| |w| + |b|
OUTPUT = 1.008  # (1 + 2^-8)^2 and a little: a rounding to bfloat16 of the product, and one of its product with a mask
UP = 1 + 2.0**-7  # a positive number times this, rounded to bfloat16, is no less than the number
LARGEST = 1e37  # of |x| |w| + |b|
LEAST = 1e-15  # smaller norms may have lost squares to underflow
CACHED = 16 * 2**20  # bytes of W_enc that stay in cache
ROWS = 256  # rounded at a time, so that they stay in cache

_forced: ContextVar[bool | None] = ContextVar("forced", default=None)


@contextmanager
def bfloat16_candidates(enabled: bool) -> Iterator[None]:
    """Within the context, choose candidates by bfloat16 products, or never, whichever is faster."""
    token = _forced.set(enabled)
    try:
        yield
    finally:
        _forced.reset(token)


def applies(inputs: EncoderInputs, selection: Selection) -> bool:
    """Return whether candidates come from a bfloat16 product: for one dictionary on a CPU, with sums in float32, if that
    is faster.

    What is faster depends on the processor and on sizes alone, so a resumed run has the same bits on the same machine.
    """
    x, W_enc, b_enc, center, _, _ = inputs
    can_apply = (
        x.device.type == "cpu"
        and x.dtype != torch.float64
        and x.numel() > 0
        and (center is None or center.dim() == 1)
        and selection.dictionaries == 1
        and (not selection.aux_k or selection.aux_latents is not None)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, W_enc, b_enc)))
    )
    forced = _forced.get()
    return can_apply and (_is_faster(len(x), W_enc, selection.k) if forced is None else forced)


def _is_faster(n: int, W_enc: Tensor, k: int) -> bool:
    """Compare costs in float32 multiply-adds, fitted to one and two threads of a Zen 5. To round W_enc and take its norms
    costs about 50 per element, and to transpose it 200. The product must save 1.2 times as much."""
    d, f = W_enc.shape
    speedup = bfloat16_speedup() if d >= 64 else 0.0
    rounding = (50 if W_enc.T.is_contiguous() else 250) * f * d
    return speedup > 0 and n * f * d * (1 - 1 / speedup) > 1.2 * (rounding + n * min(2 * k, f) * _candidate_cost(d, f))


def _candidate_cost(d: int, f: int) -> int:
    """Multiply-adds that take as long as to select a candidate and to work it out. Its row of W_enc comes from a cache or
    from memory."""
    return 2500 + (5 if 4 * f * d <= CACHED else 40) * d


@functools.cache
def bfloat16_speedup() -> float:
    """Return how much faster than float32 this processor multiplies bfloat16: 3 with AMX, at least, and 2 with
    AVX512-BF16, by the width of its instructions. 0 with neither, or if a product timed once per process is less than 1.2
    times faster, which is far below what these instructions give, so that noise does not change a decision."""
    features = {"amx_tile": 3.0, "avx512_bf16": 2.0}
    speedup = next((s for name, s in features.items() if getattr(torch.cpu, f"_is_{name}_supported", bool)()), 0.0)
    return speedup if speedup and _measured_speedup() >= 1.2 else 0.0


def _measured_speedup() -> float:
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for _ in range(6):
        for dtype in seconds:
            x, w = (torch.ones(rows, 768, dtype=dtype, device="cpu") for rows in (512, 2048))
            start = time.perf_counter()
            torch.mm(x, w.T)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def encode_topk(inputs: EncoderInputs, selection: Selection) -> tuple[SparseCode, SparseCode | None]:
    """Return the codes of `encode_topk`."""
    x, W_enc, b_enc, center, mask, pos = inputs
    x = x.float() if center is None else x.float() - center
    rows_of_w = W_enc.T.float().contiguous()  # candidates' rows are gathered
    inputs = EncoderInputs(x, rows_of_w.T, b_enc.float(), None, mask, pos)
    code = (_topk_of_batch if selection.across_batch else _topk_of_tokens)(inputs, selection.k)
    latents = selection.aux_latents
    if not selection.aux_k or latents is None:
        return code, None
    acts = encode(_of_latents(inputs, latents.nonzero()[:, 0]))
    return code, select_among(acts, latents, selection.aux_k, select_topk)


def _keys(inputs: EncoderInputs) -> Tensor | None:
    """Return `upper_bounds`, masked, as int16 [N, F], the bits of bfloat16 numbers. They have the order of the numbers,
    except among negative ones."""
    bounds = upper_bounds(*inputs[:3])
    if bounds is not None and inputs.mask is not None and inputs.pos is not None:
        bounds.mul_(weights_at(inputs.mask, inputs.pos))
    return None if bounds is None else bounds.view(torch.int16)


def upper_bounds(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor | None:
    """Return bfloat16 [N, F] that, times `OUTPUT`, is no less than relu(x @ W_enc + b_enc), or not positive where that
    is zero. Arguments are float32. Return None if some are not finite, or so large that sums may overflow."""
    operands = bound_operands(x, W_enc, b_enc)
    return None if operands is None else operands[0] @ operands[1].T


def bound_operands(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return x^ [N, C] and w^ [F, C] with their further columns, in bfloat16, or None as `upper_bounds` does. C is a
    multiple of 32, for the instructions that multiply them."""
    d = x.shape[1]
    rows, x_norm, x_error = _rounded(x)
    latents, w_norm, w_error = _rounded(W_enc.T)
    if not x_norm.amax() * w_norm.amax() + b_enc.abs().amax() < LARGEST:
        return None
    allowance = ALLOWANCE * latents.shape[1]
    rows[:, d : d + 3] = 1
    rows[:, d + 3] = (x_error + allowance * x_norm) * UP
    rows[:, d + 4] = (x_norm + x_error) * UP
    bias = b_enc + allowance * b_enc.abs()
    for column in latents[:, d : d + 3].T:
        column.copy_(bias)
        bias = bias - column
    latents[:, d + 3] = w_norm * UP
    latents[:, d + 4] = w_error * UP
    return rows, latents


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows [M, D] in bfloat16, with five more columns and zeros up to a multiple of 32, and the norms of the rows
    and of their rounding errors [M]."""
    m, d = rows.shape
    narrow = rows.new_empty(m, -(-(d + 5) // 32) * 32, dtype=torch.bfloat16)
    narrow[:, d:] = 0
    norms = rows.new_empty(2, m)
    for block, rounded, (norm, error) in zip(
        rows.split(ROWS), narrow[:, :d].split(ROWS), norms.split(ROWS, 1), strict=True
    ):
        rounded.copy_(block)
        torch.linalg.vector_norm(block, dim=1, out=norm)
        torch.linalg.vector_norm(block - rounded, dim=1, out=error)
    norms.clamp_(min=LEAST)
    return narrow, norms[0], norms[1]


def _topk_of_tokens(inputs: EncoderInputs, k: int) -> SparseCode:
    keys, (d, f) = _keys(inputs), inputs.W_enc.shape
    if keys is None:
        return select_topk(encode(inputs), k)
    candidates = select_topk(keys, min(2 * k, f))
    best = select_topk(_activations(inputs, candidates), k)
    code = SparseCode(best.values, candidates.indices.gather(1, best.indices.long()), f)
    if 2 * k < f:
        cut, least = candidates.values.amin(1).view(torch.bfloat16).float(), code.values.amin(1)
        uncertain = ~((cut <= 0) | (cut * OUTPUT < least))
        tokens = uncertain.nonzero()[:, 0]
        reaching = _reaching(keys[tokens], least[tokens, None])
        has_few = reaching.sum(1, dtype=torch.int32) * _candidate_cost(d, f) <= f * d
        for again, among in ((tokens[has_few], reaching[has_few]), (tokens[~has_few], None)):
            if len(again):
                pos = None if inputs.pos is None else inputs.pos[again]
                exact = _topk_among(inputs._replace(x=inputs.x[again], pos=pos), among, k)
                code.values[again], code.indices[again] = exact.values, exact.indices
    return code


def _topk_among(inputs: EncoderInputs, latents: Tensor | None, k: int) -> SparseCode:
    """Return the code computed in float32 for `latents`, bool [N, F] with at least k per token, or for all."""
    if latents is None:
        return select_topk(encode(inputs), k)
    candidates = _ragged(latents)
    assert candidates.offsets is not None
    acts, starts = _activations(inputs, candidates), candidates.offsets[:-1, None]
    entries = starts + torch.arange(int(candidates.offsets.diff().max()))
    is_own = entries < candidates.offsets[1:, None]
    best = select_topk(torch.where(is_own, acts[entries.clamp(max=len(acts) - 1)], 0), k)
    return SparseCode(best.values, candidates.indices[starts + best.indices], candidates.n_latents)


def _topk_of_batch(inputs: EncoderInputs, k: int) -> SparseCode:
    keys, (n, d), f = _keys(inputs), inputs.x.shape, inputs.W_enc.shape[1]
    if keys is None:
        return select_batch_topk(encode(inputs), n * k)
    candidates = select_batch_topk(keys, min(2 * n * k, n * f))
    assert candidates.offsets is not None
    code = _best_of_batch(inputs, candidates, n * k)
    assert code.offsets is not None
    is_full = int(candidates.offsets[-1]) == len(candidates.values)
    cut = float(candidates.values.amin().view(torch.bfloat16)) if is_full and 2 * k < f else 0.0
    least = code.values.amin()  # zero with unused entries
    if cut <= 0 or cut * OUTPUT < least:
        return code
    reaching = _reaching(keys, least)
    if int(reaching.count_nonzero()) * _candidate_cost(d, f) <= n * f * d:
        return _best_of_batch(inputs, _ragged(reaching), n * k)
    return select_batch_topk(encode(inputs), n * k)


def _best_of_batch(inputs: EncoderInputs, candidates: SparseCode, total: int) -> SparseCode:
    """Return the `total` largest of the activations of candidates."""
    best = select_batch_topk(_activations(inputs, candidates)[None], total)
    assert best.offsets is not None
    entries = best.indices.long()
    owners = candidates.rows[entries[: int(best.offsets[-1])]]
    offsets = torch.searchsorted(owners, torch.arange(candidates.n_tokens + 1))
    return SparseCode(best.values, candidates.indices[entries], candidates.n_latents, offsets)


def _reaching(keys: Tensor, least: Tensor) -> Tensor:
    """Return whether the bound of `_keys` is no less than a number >= 0, and positive."""
    limit = (least / OUTPUT).view(torch.int32).bitwise_right_shift(16).to(torch.int16)  # rounded down to bfloat16
    return keys >= limit.clamp(min=1)


def _ragged(chosen: Tensor) -> SparseCode:
    """Return a code of zeros at the true elements of bool [N, F]."""
    (n, f), where = chosen.shape, torch.from_numpy(np.flatnonzero(chosen.numpy()))
    offsets = torch.searchsorted(where, f * torch.arange(n + 1))
    return SparseCode(torch.zeros(len(where)), (where % f).int(), f, offsets)


def _activations(inputs: EncoderInputs, code: SparseCode) -> Tensor:
    """Return the float32 activation of each entry of a code, zero for unused entries."""
    x, W_enc, b_enc, _, mask, pos = inputs
    latents = code.live(code.indices)
    acts = decode_values_grad(code.with_values(code.values.float()), W_enc.T, x)
    acts = acts.add_(b_enc[latents]).relu_()
    if mask is not None and pos is not None:
        acts = acts * weights_of(mask, pos[code.rows], latents)
    return code.live(acts)


def _of_latents(inputs: EncoderInputs, latents: Tensor) -> EncoderInputs:
    mask = inputs.mask
    if isinstance(mask, GaussianMask):
        mask = mask._replace(centre=mask.centre[latents])
    elif mask is not None:
        mask = mask[:, latents]
    return inputs._replace(W_enc=inputs.W_enc.T[latents].T, b_enc=inputs.b_enc[latents], mask=mask)
