"""encode: pre-activations of every latent on every token, rectified and masked by position, in one pass."""

from torch import Tensor

from ..backend import choose
from ..checks import check_floating, check_one_device, check_positions, check_shape
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
    center  [D]     any floating dtype; x - center is rounded to x's dtype before the product
    mask    [T, F]  bool or floating: which latents may fire at which position (needs pos)
    pos     [N]     int32 or int64 in [0, T): the position of each token; not looked at without a mask

    Returns acts [N, F] in x's dtype, accumulated in float32 (float64 for float64) and rounded once, except that torch on
    CUDA rounds half precision before the mask. `relu=False` leaves out the rectifier. NaN propagates. Raises ValueError
    for shapes, dtypes or devices that do not fit.
    """
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

    def cost_of(backend: str) -> Cost:
        return cost(n, d, f, itemsize=x.element_size(), masked=mask is not None, backend=backend)

    tensors = [t for t in (x, W_enc, b_enc, center, mask) if t is not None]
    if choose("encode", *tensors, cost=cost_of, backend=backend) == "triton":
        from . import triton

        return triton.encode(x, W_enc, b_enc, center, mask, pos, relu)
    return reference.encode(x, W_enc, b_enc, center, mask, pos, relu)


def cost(n: int, d: int, f: int, *, itemsize: int = 2, masked: bool = False, backend: str = "triton") -> Cost:
    """N*D*F multiply-adds. Triton writes acts once; torch goes over them again for the rectifier and for the mask."""
    again = 0 if backend == "triton" else (2 + 4 * masked) * n * f + 2 * n * d
    return Cost(2.0 * n * d * f, itemsize * (n * d + d * f + n * f + again))


def _matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got {list(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]
