"""encode: dense activations of all latents, rectified and masked by position."""

from torch import Tensor

from ..cost import Cost
from ..encoder_inputs import EncoderInputs
from ..masks import Mask
from . import reference


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, *, center: Tensor | None = None, mask: Mask | None = None,
    pos: Tensor | None = None, relu: bool = True, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """acts = relu((x - center) @ W_enc + b_enc) * mask[pos]

    x       [N, D]  activations, any floating dtype
    W_enc   [D, F]  of x's dtype; any strides, fastest when latent-major (W_enc.T contiguous)
    b_enc   [F]     any floating dtype, added in float32
    center  [D], any floating dtype; or [S, D]: one for each of S equal runs of latents
    mask    [T, F]  bool or floating, factors by position and latent (needs pos); or a `GaussianMask`. Triton caches a
                    bool mask as bits until it is modified, and skips tiles of the product that it empties
    pos     [N]     int32 or int64 in [0, T): the position of each token; only read with a mask. On a GPU, where it is
                    not checked, positions outside use the nearest row of the mask

    Returns acts [N, F] in x's dtype, accumulated in float32 (float64 for float64) and rounded once. Exception: torch on
    CUDA rounds half precision after centring and before the mask. `relu=False` omits the rectifier. NaN propagates.
    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    inputs = EncoderInputs(x, W_enc, b_enc, center, mask, pos)
    inputs.check()
    if inputs.choose_backend("encode", cost=cost, backend=backend) == "triton":
        from . import triton

        return triton.encode(inputs, relu)
    return reference.encode(inputs, relu).to(x.dtype)


def cost(n: int, d: int, f: int, *, itemsize: int = 2, masked: bool = False, backend: str = "triton") -> Cost:
    """N*D*F multiply-adds. Triton writes acts once. Torch makes further passes for the rectifier and the mask."""
    extra = 0 if backend == "triton" else (2 + 4 * masked) * n * f + 2 * n * d
    return Cost(2.0 * n * d * f, itemsize * (n * d + d * f + n * f + extra))
