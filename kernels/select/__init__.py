"""select: from dense activations to a SparseCode, by rank (per token or in the batch) or by threshold."""

from typing import Any

from torch import Tensor

from ..backend import twin
from ..checks import check_floating, check_one_device, check_shape
from ..code import SparseCode
from ..cost import Cost


def select_topk(acts: Tensor, k: int, *, backend: str | None = None) -> SparseCode:
    """Select the k largest activations per token, exactly.

    acts [N, F], any floating dtype. Returns a fixed-K code in acts' dtype, each token's entries by ascending latent.
    Among equal values the lower latent wins, NaN counts as the largest value, and -0 equals 0. So the result is unique
    and the same for every backend. The torch backend waits for the device.

    Raises ValueError unless acts is floating [N, F] and 1 <= k <= F.
    """
    _check(acts)
    if not 1 <= k <= acts.shape[1]:
        raise ValueError(f"k must lie in [1, F] = [1, {acts.shape[1]}], got {k}")
    return _twin("select_topk", acts, k, backend).select_topk(acts, k)


def select_batch_topk(acts: Tensor, total: int, *, backend: str | None = None) -> SparseCode:
    """Select the `total` largest positive activations of the batch, exactly (BatchTopK: Bussmann et al., arXiv
    2412.06410, with total = N * K).

    acts [N, F], any floating dtype. Returns a ragged code of capacity `total` in acts' dtype, each token's entries by
    ascending latent. Entries beyond the number of positive activations are unused. Among equal values the lower token,
    then the lower latent wins, and NaN counts as the largest value. Triton does not wait for the device.

    Raises ValueError unless acts is floating [N, F] and 1 <= total <= N * F.
    """
    _check(acts)
    if not 1 <= total <= acts.numel():
        raise ValueError(f"total must lie in [1, N * F] = [1, {acts.numel()}], got {total}")
    return _twin("select_batch_topk", acts, total / len(acts), backend).select_batch_topk(acts, total)


def select_threshold(
    acts: Tensor, threshold: float | Tensor = 0.0, capacity: int | None = None, *, backend: str | None = None
) -> SparseCode:
    """Select every activation above its threshold: acts[n, j] > threshold[j]. NaN is kept, so that it gets noticed.

    acts [N, F], any floating dtype; threshold a number or a floating [F]. Returns a ragged code in acts' dtype, each
    token's entries by ascending latent. Without a capacity, the entries are counted first, which waits for the device.
    With one, the first `capacity` entries are stored without waiting, unused ones are zero, and `overflow` tells on the
    device whether any were dropped.

    Raises ValueError for other shapes or dtypes and for capacity < 0.
    """
    _check(acts)
    if isinstance(threshold, Tensor):
        check_shape("threshold", threshold, F=acts.shape[1])
        check_floating(threshold=threshold)
        check_one_device(acts=acts, threshold=threshold)
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity must be at least 0, got {capacity}")
    tensors = (acts, threshold) if isinstance(threshold, Tensor) else (acts,)
    module = twin(__name__, "select_threshold", *tensors, backend=backend)
    return module.select_threshold(acts, threshold, capacity)


def cost(n: int, f: int, k: float, *, itemsize: int = 2, backend: str = "triton") -> Cost:
    """Passes over acts (one per byte of the key and one to collect; twice that for torch) and k entries per token."""
    passes = (itemsize + 1) * (1 if backend == "triton" else 2)
    return Cost(0.0, passes * itemsize * n * f + n * k * (itemsize + 4))


def _twin(op: str, acts: Tensor, k: float, backend: str | None) -> Any:
    """Return the module that runs `op`."""
    n, f = acts.shape
    cost_of = lambda backend: cost(n, f, k, itemsize=acts.element_size(), backend=backend)
    return twin(__name__, op, acts, cost=cost_of, backend=backend)


def _check(acts: Tensor) -> None:
    if acts.dim() != 2:
        raise ValueError(f"acts must have shape [N, F], got {list(acts.shape)}")
    check_floating(acts=acts)
