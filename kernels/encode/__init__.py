"""encode: activations of every latent on every token, rectified and masked by position; all of them, or the largest."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..backend import choose
from ..checks import check_floating, check_one_device, check_positions, check_shape
from ..code import SparseCode
from ..cost import Cost
from . import reference


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    *,
    center: Tensor | None = None,
    mask: Tensor | None = None,
    pos: Tensor | None = None,
    relu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """acts = relu((x - center) @ W_enc + b_enc) * mask[pos]

    x       [N, D]  activations, any floating dtype
    W_enc   [D, F]  of x's dtype; any strides, fastest when latent-major (W_enc.T contiguous)
    b_enc   [F]     any floating dtype, added in float32
    center  [D]     any floating dtype
    mask    [T, F]  bool or floating: which latents may fire at which position (needs pos)
    pos     [N]     int32 or int64 in [0, T): the position of each token; not looked at without a mask

    Returns acts [N, F] in x's dtype, accumulated in float32 (float64 for float64) and rounded once, except that torch on
    CUDA rounds half precision after centring and before the mask. `relu=False` leaves out the rectifier. NaN propagates.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    _check(x, W_enc, b_enc, center, mask, pos)
    if _choose("encode", x, W_enc, b_enc, center, mask, cost=cost, backend=backend) == "triton":
        from . import triton

        return triton.encode(x, W_enc, b_enc, center, mask, pos, relu)
    return reference.encode(x, W_enc, b_enc, center, mask, pos, relu)


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    center: Tensor | None = None,
    mask: Tensor | None = None,
    pos: Tensor | None = None,
    aux_k: int = 0,
    aux_latents: Tensor | None = None,
    across_batch: bool = False,
    exact: bool = True,
    backend: str | None = None,
) -> tuple[SparseCode, SparseCode | None]:
    """The k largest of acts = relu((x - center) @ W_enc + b_enc) * mask[pos] for each token, and from the same product the
    aux_k largest among `aux_latents`.

    x, W_enc, b_enc, center, mask, pos  as in `encode`; a mask must not be negative
    k, aux_k     in [1, F]; aux_k = 0 for no second code
    aux_latents  bool [F]; None for all
    across_batch the N * k largest positive of the batch instead of k of each token (BatchTopK)

    Returns (code, aux code or None), their values in float32 (float64 for float64), the entries of a token in no particular
    order; both of fixed K, or with `across_batch` the first one ragged, as `select_batch_topk` has it. A token with fewer
    positive activations than k is filled up with zeros at other latents; which ones is left open. Equal values go to the
    lower latent, NaN counts as the largest.

    Triton never holds [N, F] where F is large beside k and each token is on its own: each tile of latents keeps its few
    largest, their values rounded to 17 significant bits, and the largest of those are exact unless a tile had more among
    them than it kept. `exact` looks for such tiles and computes them again, on the device, for the tokens that need it;
    `exact=False` doesn't, and may miss entries where many of a token's largest activations lie in one tile (about one token
    in a hundred misses one when latents are in random order).

    Raises ValueError for shapes, dtypes or devices that do not fit and for k or aux_k out of range.
    """
    f = _check(x, W_enc, b_enc, center, mask, pos)
    if not 1 <= k <= f:
        raise ValueError(f"k must lie in [1, F] = [1, {f}], got {k}")
    if not 0 <= aux_k <= f:
        raise ValueError(f"aux_k must lie in [0, F] = [0, {f}], got {aux_k}")
    if aux_latents is not None:
        check_shape("aux_latents", aux_latents, F=f)
        check_one_device(x=x, aux_latents=aux_latents)
        if aux_latents.dtype != torch.bool:
            raise ValueError(f"aux_latents must be bool, got {aux_latents.dtype}")
    if _choose("encode_topk", x, W_enc, b_enc, center, mask, cost=cost_topk, backend=backend) == "triton":
        from . import triton

        return triton.encode_topk(x, W_enc, b_enc, k, center, mask, pos, aux_k, aux_latents, across_batch, exact)
    return reference.encode_topk(x, W_enc, b_enc, k, center, mask, pos, aux_k, aux_latents, across_batch)


def cost(n: int, d: int, f: int, *, itemsize: int = 2, masked: bool = False, backend: str = "triton") -> Cost:
    """N*D*F multiply-adds. Triton writes acts once; torch goes over them again for the rectifier and for the mask."""
    again = 0 if backend == "triton" else (2 + 4 * masked) * n * f + 2 * n * d
    return Cost(2.0 * n * d * f, itemsize * (n * d + d * f + n * f + again))


def cost_topk(n: int, d: int, f: int, *, itemsize: int = 2, masked: bool = False, backend: str = "triton") -> Cost:
    """The product, and where triton writes and reads 4 candidates of 4 bytes for every 128 activations, torch writes the
    activations and selects from them in about 6 passes."""
    flops, bytes = cost(n, d, f, itemsize=itemsize, masked=masked, backend=backend)
    return Cost(flops, bytes + (n * f / 4 - itemsize * n * f if backend == "triton" else 6 * itemsize * n * f))


def _check(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None, mask: Tensor | None, pos: Tensor | None
) -> int:
    """Raise unless all fits; gives F."""
    n, d, f = *_matrix("x", x), _matrix("W_enc", W_enc)[1]
    check_shape("W_enc", W_enc, D=d, F=f)
    check_shape("b_enc", b_enc, F=f)
    check_floating(x=x, b_enc=b_enc, center=center)
    if W_enc.dtype != x.dtype:
        raise ValueError(f"W_enc must have x's dtype {x.dtype}, got {W_enc.dtype}")
    if center is not None:
        check_shape("center", center, D=d)
    if mask is not None:
        t = _matrix("mask", mask)[0]
        check_shape("mask", mask, T=t, F=f)
        if pos is None:
            raise ValueError("mask needs pos, the position of each token")
        check_positions(pos, n, t)
    check_one_device(x=x, W_enc=W_enc, b_enc=b_enc, center=center, mask=mask, pos=pos)
    return f


def _choose(
    op: str, x: Tensor, W_enc: Tensor, *others: Tensor | None, cost: Callable[..., Cost], backend: str | None
) -> str:
    (n, d), f, masked = x.shape, W_enc.shape[1], others[-1] is not None

    def cost_of(backend: str) -> Cost:
        return cost(n, d, f, itemsize=x.element_size(), masked=masked, backend=backend)

    return choose(op, x, W_enc, *(t for t in others if t is not None), cost=cost_of, backend=backend)


def _matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got {list(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]
