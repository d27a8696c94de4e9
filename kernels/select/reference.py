"""select in plain torch."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..code import SparseCode
from ..numerics import accumulation_dtype


def select_topk(acts: Tensor, k: int) -> SparseCode:
    with torch.no_grad():
        indices = _topk(acts, k)
    return SparseCode(acts.gather(1, indices), indices.int(), acts.shape[1])


def _topk(acts: Tensor, k: int) -> Tensor:
    """Return latents [N, k] of the k largest values, ascending.

    torch.topk costs more than the encoder's product and does not define ties. Here the k-th largest of the maxima over
    groups of latents bounds the k-th largest value from below. Few more than k values per token reach that bound, and
    only they are ranked.
    """
    n, f = acts.shape
    groups = min(f, -(-4 * k // 64) * 64)  # a multiple of the vector width, or `amax` takes ten times as long
    size = f // groups
    maxima = acts[:, : size * groups].unflatten(1, (size, groups)).amax(1)
    maxima = torch.cat([maxima, acts[:, size * groups :]], 1)
    if maxima.isnan().any():  # a stable sort handles ties and NaN as defined, but is slow
        return acts.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values

    flat = _nonzero(_flags(operator.ge, acts, _kth_largest(maxima, k)))  # sorted by token, then latent
    starts = _offsets(flat, n, f)
    most = int(starts.diff().max())
    if 2 * most > f:  # many values, mostly zeros, equal the bound
        return (_nonzero(_keep(acts, k)) % f).view(n, k)
    entries = starts[:-1, None] + torch.arange(most, device=acts.device)
    passed = flat[entries.clamp(max=len(flat) - 1)]  # [N, most]
    candidates = torch.where(entries < starts[1:, None], acts.flatten()[passed], -torch.inf)
    return (passed[_keep(candidates, k)] % f).view(n, k)


def _keep(x: Tensor, k: int) -> Tensor:
    """Return which elements are the k largest of their row, the first among equals. No NaN allowed."""
    last = _kth_largest(x, k)
    above, equal = x > last, x == last
    room = k - above.sum(1, keepdim=True, dtype=torch.int32)  # an int64 sum would convert all of x first
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))


def _kth_largest(x: Tensor, k: int) -> Tensor:
    """Return the k-th largest value [N, 1] of each row. No NaN allowed."""
    if x.is_cuda:
        return x.topk(k).values[:, -1:]
    wide = x.to(accumulation_dtype(x))  # numpy has no bfloat16
    return -torch.from_numpy(np.partition(-wide.numpy(), k - 1, axis=1)[:, k - 1 : k]).to(x.dtype)


def _nonzero(flags: Tensor) -> Tensor:
    """Return the row-major indices of true elements. numpy finds few among many twice as fast as torch."""
    if flags.is_cuda:
        return flags.flatten().nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(flags.numpy()))


def _flags(compare: Callable[[Any, Any], Any], x: Tensor, limit: Tensor | float) -> Tensor:
    """Return compare(x, limit), bool. numpy takes a third of torch's time on one thread, but has no bfloat16."""
    if x.is_cuda or x.dtype == torch.bfloat16 or torch.get_num_threads() > 2:
        return compare(x, limit)
    return torch.from_numpy(compare(x.detach().numpy(), limit.numpy() if isinstance(limit, Tensor) else limit))


def _offsets(flat: Tensor, n: int, f: int) -> Tensor:
    """Return where each token's entries begin among ascending row-major indices of [N, F], and their number [N + 1]."""
    return torch.searchsorted(flat, f * torch.arange(n + 1, device=flat.device))


def select_batch_topk(acts: Tensor, total: int) -> SparseCode:
    n, f = acts.shape
    with torch.no_grad():
        flat = acts.flatten()
        bound = _bound(flat, total)
        # unlike > 0, what is not <= 0 keeps NaN
        where = _nonzero(_flags(operator.ge, flat, bound) if bound > 0 else ~_flags(operator.le, flat, 0))
        if len(where) > total:
            candidates = flat[where]
            is_nan = candidates.isnan()
            if is_nan.any():  # replace numbers by their ranks, so that NaN can have a rank above infinity
                candidates = candidates.nan_to_num(nan=0).unique(return_inverse=True)[1]
                candidates = torch.where(is_nan, len(flat), candidates).double()
            where = where[_keep(candidates[None], total)[0]]
        offsets = _offsets(where, n, f)
        unused = total - len(where)
        indices = torch.cat([(where % f).int(), where.new_zeros(unused, dtype=torch.int32)])
    return SparseCode(torch.cat([flat[where], flat.new_zeros(unused)]), indices, f, offsets)


def _bound(flat: Tensor, total: int) -> Tensor:
    """Return a lower bound for the `total` largest values, as in `_topk`. Zero with NaN or too few positive values."""
    size = max(1, len(flat) // (4 * total))
    groups = len(flat) // size
    maxima = flat[: size * groups].view(size, groups).amax(0)
    if groups < total or maxima.isnan().any() or flat[size * groups :].isnan().any():
        return flat.new_zeros(())
    return _kth_largest(maxima[None], total)[0]


def select_threshold(acts: Tensor, threshold: float | Tensor, capacity: int | None) -> SparseCode:
    n, f = acts.shape
    if isinstance(threshold, Tensor):
        threshold = threshold.detach().to(accumulation_dtype(threshold))
    wide = acts.detach().to(accumulation_dtype(acts))  # a threshold is not rounded to acts' dtype
    is_active = _flags(operator.le, wide, threshold).logical_not_()  # unlike >, keeps NaN
    if capacity is None:
        where = _nonzero(is_active)
        return SparseCode(acts.flatten()[where], (where % f).int(), f, _offsets(where, n, f))
    running = torch.cat([is_active.new_zeros(1, dtype=torch.int64), is_active.sum(1, dtype=torch.int32)]).cumsum(0)
    ranks = torch.arange(1, capacity + 1, device=acts.device)
    where = torch.searchsorted(is_active.flatten().cumsum(0), ranks)  # N * F beyond the last active one
    is_used = where < n * f
    where = torch.where(is_used, where, 0)
    values = torch.where(is_used, acts.flatten()[where], 0)
    indices = torch.where(is_used, where % f, 0).int()
    return SparseCode(values, indices, f, running.clamp(max=capacity), running[-1] > capacity)
