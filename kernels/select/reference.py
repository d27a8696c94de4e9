"""select in plain torch."""

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
    size = max(1, f // (4 * k))
    groups = f // size
    maxima = acts[:, : size * groups].unflatten(1, (size, groups)).amax(1)
    maxima = torch.cat([maxima, acts[:, size * groups :]], 1)
    if maxima.isnan().any():  # a stable sort handles ties and NaN as defined, but is slow
        return acts.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values

    flat = _nonzero(acts >= _kth_largest(maxima, k))  # sorted by token, then latent
    starts = torch.searchsorted(flat, f * torch.arange(n + 1, device=acts.device))
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


def select_batch_topk(acts: Tensor, total: int) -> SparseCode:
    n, f = acts.shape
    with torch.no_grad():
        flat = acts.flatten()
        bound = _bound(flat, total)
        where = _nonzero(flat >= bound if bound > 0 else ~(flat <= 0))  # unlike > 0, keeps NaN
        if len(where) > total:
            candidates = flat[where]
            is_nan = candidates.isnan()
            if is_nan.any():  # replace numbers by their ranks, so that NaN can have a rank above infinity
                candidates = candidates.nan_to_num(nan=0).unique(return_inverse=True)[1]
                candidates = torch.where(is_nan, len(flat), candidates).double()
            where = where[_keep(candidates[None], total)[0]]
        offsets = torch.searchsorted(where, f * torch.arange(n + 1, device=acts.device))
        unused = total - len(where)
        indices = torch.cat([(where % f).int(), where.new_zeros(unused, dtype=torch.int32)])
    return SparseCode(torch.cat([flat[where], flat.new_zeros(unused)]), indices, f, offsets)


def _bound(flat: Tensor, total: int) -> float:
    """Return a lower bound for the `total` largest values, as in `_topk`. Zero with NaN or too few positive values."""
    size = max(1, len(flat) // (4 * total))
    groups = len(flat) // size
    if groups < total:
        return 0.0
    maxima = flat[: size * groups].view(size, groups).amax(0)
    return (
        0.0 if maxima.isnan().any() or flat[size * groups :].isnan().any() else float(_kth_largest(maxima[None], total))
    )


def select_threshold(acts: Tensor, threshold: float | Tensor, capacity: int | None) -> SparseCode:
    n, f = acts.shape
    wide = acts.detach().to(accumulation_dtype(acts))  # a threshold is not rounded to acts' dtype
    is_active = ~(wide <= threshold)  # unlike >, keeps NaN
    running = torch.cat([is_active.new_zeros(1, dtype=torch.int64), is_active.sum(1, dtype=torch.int32)]).cumsum(0)
    if capacity is None:
        where = _nonzero(is_active)
        return SparseCode(acts.flatten()[where], (where % f).int(), f, running)
    ranks = torch.arange(1, capacity + 1, device=acts.device)
    where = torch.searchsorted(is_active.flatten().cumsum(0), ranks)  # N * F beyond the last active one
    is_used = where < n * f
    where = torch.where(is_used, where, 0)
    values = torch.where(is_used, acts.flatten()[where], 0)
    indices = torch.where(is_used, where % f, 0).int()
    return SparseCode(values, indices, f, running.clamp(max=capacity), running[-1] > capacity)
