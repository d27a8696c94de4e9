"""decode: from a SparseCode back to activations, or to what is missing from them; and its gradient in the values."""

from typing import NamedTuple

from torch import Tensor

from ..backend import choose
from ..checks import check_centers, check_floating, check_one_device, check_shape
from ..code import SparseCode
from ..cost import Cost
from . import reference


def decode(
    code: SparseCode, W_dec: Tensor, b_dec: Tensor, *, target: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """x_hat[n] = b_dec + sum of values[n, k] * W_dec[indices[n, k]] over the entries of token n

    code    fixed K or ragged, over F latents
    W_dec   [F, D]  any floating dtype; read row by row, so fastest when contiguous
    b_dec   [D], any floating dtype; or [S, D]: one for each of S equal runs of tokens
    target  [N, D], any floating dtype; or [M, D], M a divisor of N: token n's is row n modulo M

    Returns x_hat [N, D] in W_dec's dtype, or with a target the residual target - x_hat in the target's dtype. Summed and
    subtracted in float32 (float64 for float64) and rounded once. A token without entries decodes to b_dec. Indices are
    trusted to lie in [0, F). Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    d = _check_decoder(code, W_dec)
    check_centers("b_dec", b_dec, d, code.n_tokens)
    check_floating(b_dec=b_dec, target=target)
    if target is not None:
        _check_target(code, target, d)
    check_one_device(code=code.values, W_dec=W_dec, b_dec=b_dec, target=target)
    tensors = [t for t in (W_dec, code.values, b_dec, target) if t is not None]
    if choose("decode", *tensors, cost=_cost_of(code, W_dec), backend=backend) == "triton":
        from . import triton

        return triton.decode(code, W_dec, b_dec, target)
    return reference.decode(code, W_dec, b_dec, target)


class Reconstruction(NamedTuple):
    """residual [N, D], squared_error [N] and projection (of the code's shape); see `reconstruct`."""

    residual: Tensor
    squared_error: Tensor
    projection: Tensor


def reconstruct(
    code: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor, *, backend: str | None = None
) -> Reconstruction:
    """What training needs of the decoder, with each row of W_dec gathered once where a token has few:

    residual[n]       target[n] - b_dec - sum of values[n, k] * W_dec[indices[n, k]]
    squared_error[n]  |residual[n]|^2
    projection[n, k]  <residual[n], W_dec[indices[n, k]]>; -2 times it is the squared error's gradient in values[n, k]

    Arguments as in `decode`. The residual has the target's dtype; the rest is float32 (float64 for float64), worked out
    from the residual before rounding. Unused entries of a ragged code get zero. Raises ValueError for shapes, dtypes or
    devices that do not fit.
    """
    d = _check_decoder(code, W_dec)
    check_centers("b_dec", b_dec, d, code.n_tokens)
    check_floating(b_dec=b_dec, target=target)
    _check_target(code, target, d)
    check_one_device(code=code.values, W_dec=W_dec, b_dec=b_dec, target=target)
    cost = _cost_of(code, W_dec)
    implementation = reference.reconstruct
    if choose("reconstruct", W_dec, code.values, b_dec, target, cost=cost, backend=backend) == "triton":
        from . import triton

        implementation = triton.reconstruct
    return Reconstruction(*implementation(code, W_dec, b_dec, target))


def decode_values_grad(code: SparseCode, W_dec: Tensor, grad: Tensor, *, backend: str | None = None) -> Tensor:
    """dvalues[n, k] = <grad[n], W_dec[indices[n, k]]>, the gradient of decode in the code's values

    code as in `decode` (its values are not read), W_dec [F, D] and grad [N, D] of any floating dtype. Returns the shape and
    dtype of `code.values`, accumulated in float32 (float64 for float64); unused entries of a ragged code get zero.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    d = _check_decoder(code, W_dec)
    check_shape("grad", grad, N=code.n_tokens, D=d)
    check_floating(grad=grad)
    check_one_device(code=code.values, W_dec=W_dec, grad=grad)
    if choose("decode_values_grad", W_dec, code.values, grad, cost=_cost_of(code, W_dec), backend=backend) == "triton":
        from . import triton

        return triton.decode_values_grad(code, W_dec, grad)
    return reference.decode_values_grad(code, W_dec, grad)


def cost(n: int, d: int, f: int, nnz: int, *, itemsize: int = 2, backend: str = "triton") -> Cost:
    """A multiply-add and an element of W_dec for each entry and each of D. Torch first widens half-precision W_dec."""
    widened = 0 if backend == "triton" or itemsize >= 4 else f * d * (itemsize + 4)
    element = itemsize if backend == "triton" else max(itemsize, 4)
    return Cost(2.0 * nnz * d, nnz * (d * element + 4 + itemsize) + 2 * n * d * itemsize + widened)


def _check_target(code: SparseCode, target: Tensor, d: int) -> None:
    n = code.n_tokens
    if target.dim() != 2 or not len(target) or n % len(target):
        check_shape("target", target, N=n, D=d)
    check_shape("target", target, M=len(target), D=d)


def _cost_of(code: SparseCode, W_dec: Tensor):
    (f, d), nnz, itemsize = W_dec.shape, code.values.numel(), W_dec.element_size()
    return lambda backend: cost(code.n_tokens, d, f, nnz, itemsize=itemsize, backend=backend)


def _check_decoder(code: SparseCode, W_dec: Tensor) -> int:
    check_floating(W_dec=W_dec)
    if W_dec.dim() != 2 or W_dec.shape[0] != code.n_latents:
        raise ValueError(f"W_dec must have shape [F, D] with F = {code.n_latents}, got {list(W_dec.shape)}")
    return W_dec.shape[1]
