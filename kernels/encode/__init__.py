"""encode: activations of every latent on every token, rectified and masked by position."""

from collections.abc import Callable

from torch import Tensor

from ..backend import choose
from ..checks import check_centers, check_floating, check_one_device, check_positions, check_shape
from ..cost import Cost
from ..masks import GaussianMask, Mask
from . import reference


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    *,
    center: Tensor | None = None,
    mask: Mask | None = None,
    pos: Tensor | None = None,
    relu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """acts = relu((x - center) @ W_enc + b_enc) * mask[pos]

    x       [N, D]  activations, any floating dtype
    W_enc   [D, F]  of x's dtype; any strides, fastest when latent-major (W_enc.T contiguous)
    b_enc   [F]     any floating dtype, added in float32
    center  [D], any floating dtype; or [S, D]: one for each of S equal runs of latents
    mask    [T, F]  bool or floating: which latents may fire at which position (needs pos); or a `GaussianMask`.
                    A bool one is kept in bits while it isn't changed, and tiles of the product that it empties are left out
    pos     [N]     int32 or int64 in [0, T): the position of each token; not looked at without a mask

    Returns acts [N, F] in x's dtype, accumulated in float32 (float64 for float64) and rounded once, except that torch on
    CUDA rounds half precision after centring and before the mask. `relu=False` leaves out the rectifier. NaN propagates.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    check_encoder(x, W_enc, b_enc, center, mask, pos)
    if choose_encoder("encode", x, W_enc, b_enc, center, mask, cost=cost, backend=backend) == "triton":
        from . import triton

        return triton.encode(x, W_enc, b_enc, center, mask, pos, relu)
    return reference.encode(x, W_enc, b_enc, center, mask, pos, relu).to(x.dtype)


def cost(n: int, d: int, f: int, *, itemsize: int = 2, masked: bool = False, backend: str = "triton") -> Cost:
    """N*D*F multiply-adds. Triton writes acts once; torch goes over them again for the rectifier and for the mask."""
    extra = 0 if backend == "triton" else (2 + 4 * masked) * n * f + 2 * n * d
    return Cost(2.0 * n * d * f, itemsize * (n * d + d * f + n * f + extra))


def check_encoder(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None, mask: Mask | None, pos: Tensor | None
) -> int:
    """Raise unless all fits; gives F."""
    n, d, f = *_matrix("x", x), _matrix("W_enc", W_enc)[1]
    check_shape("W_enc", W_enc, D=d, F=f)
    check_shape("b_enc", b_enc, F=f)
    check_floating(x=x, b_enc=b_enc, center=center)
    if W_enc.dtype != x.dtype:
        raise ValueError(f"W_enc must have x's dtype {x.dtype}, got {W_enc.dtype}")
    if center is not None:
        check_centers("center", center, d, f)
    if mask is not None:
        if pos is None:
            raise ValueError("mask needs pos, the position of each token")
        if isinstance(mask, GaussianMask):
            check_shape("mask.centre", mask.centre, F=f)
            check_positions(pos, n)
        else:
            t = _matrix("mask", mask)[0]
            check_shape("mask", mask, T=t, F=f)
            check_positions(pos, n, t)
    mask_tensor = mask.centre if isinstance(mask, GaussianMask) else mask
    check_one_device(x=x, W_enc=W_enc, b_enc=b_enc, center=center, mask=mask_tensor, pos=pos)
    return f


def choose_encoder(
    op: str, x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None, mask: Mask | None, *,
    cost: Callable[..., Cost], backend: str | None,
) -> str:  # fmt: skip
    """The backend for an op with these operands."""
    (n, d), f, masked = x.shape, W_enc.shape[1], mask is not None

    def cost_of(backend: str) -> Cost:
        return cost(n, d, f, itemsize=x.element_size(), masked=masked, backend=backend)

    optional_tensors = [
        t for t in (b_enc, center, mask.centre if isinstance(mask, GaussianMask) else mask) if t is not None
    ]
    return choose(op, x, W_enc, *optional_tensors, cost=cost_of, backend=backend)


def _matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got {list(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]
