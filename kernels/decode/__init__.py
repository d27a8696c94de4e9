"""decode: from a SparseCode back to activations or to their residual, and the gradient in the code's values."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..backend import twin
from ..checks import check_centers, check_floating, check_one_device, check_shape
from ..code import SparseCode
from ..cost import Cost
from ..numerics import added


def decode(
    code: SparseCode, W_dec: Tensor, b_dec: Tensor, *, target: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """x_hat[n] = b_dec + sum of values[n, k] * W_dec[indices[n, k]] over the entries of token n

    code    fixed K or ragged, over F latents; its indices are trusted to lie in [0, F)
    W_dec   [F, D]  any floating dtype; read row by row, so fastest when contiguous
    b_dec   [D], any floating dtype; or [S, D]: one for each of S equal runs of tokens
    target  [N, D], any floating dtype; or [M, D] with M a divisor of N: token n has row n modulo M

    Returns x_hat [N, D] in W_dec's dtype, or with a target the residual target - x_hat in the target's dtype. Summed
    and subtracted in float32 (float64 for float64) and rounded once. A token without entries decodes to b_dec. Raises
    ValueError for shapes, dtypes or devices that do not fit together.
    """
    _check(code, W_dec, b_dec, target)
    tensors = [t for t in (W_dec, code.values, b_dec, target) if t is not None]
    return _twin("decode", code, W_dec, tensors, backend).decode(code, W_dec, b_dec, target)


class Reconstruction(NamedTuple):
    """Residual [N, D], squared error [N] and projection (shape of the code's values), and with a mean, spread [N]. See
    `reconstruct`."""

    residual: Tensor
    squared_error: Tensor
    projection: Tensor
    spread: Tensor | None = None


def reconstruct(
    code: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor, *, mean: Tensor | None = None, in_parts: bool = False,
    backend: str | None = None,
) -> Reconstruction:  # fmt: skip
    """Decode for training. Each row of W_dec is gathered only once if tokens have few entries.

    residual[n]       target[n] - b_dec - sum of values[n, k] * W_dec[indices[n, k]]
    squared_error[n]  |residual[n]|^2
    projection[n, k]  <residual[n], W_dec[indices[n, k]]>, -1/2 of the squared error's gradient in values[n, k]
    spread[n]         |target[n] - mean|^2, with a mean [D]

    With `in_parts`, all but the residual have a further dimension in front, of P parts to add up, as `loss.entry_loss` does.
    Other arguments and errors as in `decode`. The residual has the target's dtype. The others are float32 (float64 for
    float64), computed from the residual before rounding. Unused entries of a ragged code get zero.
    """
    _check(code, W_dec, b_dec, target)
    if mean is not None:
        check_shape("mean", mean, D=W_dec.shape[1])
        check_one_device(W_dec=W_dec, mean=mean)
    twin = _twin("reconstruct", code, W_dec, [W_dec, code.values, b_dec, target], backend)
    reconstruction = Reconstruction(*twin.reconstruct(code, W_dec, b_dec, target, mean))
    if in_parts:
        return reconstruction
    residual, squared_error, projection, spread = reconstruction
    spread = None if spread is None else added(spread)
    return Reconstruction(residual, added(squared_error), added(projection), spread)


def decode_values_grad(code: SparseCode, W_dec: Tensor, grad: Tensor, *, backend: str | None = None) -> Tensor:
    """dvalues[n, k] = <grad[n], W_dec[indices[n, k]]>, the gradient of decode in the code's values

    code and W_dec as in `decode` (the code's values are not read), grad [N, D] of any floating dtype. Returns the shape
    and dtype of `code.values`, accumulated in float32 (float64 for float64). Unused entries of a ragged code get zero.
    Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    d = _check_decoder(code, W_dec)
    check_shape("grad", grad, N=code.n_tokens, D=d)
    check_floating(grad=grad)
    check_one_device(code=code.values, W_dec=W_dec, grad=grad)
    twin = _twin("decode_values_grad", code, W_dec, [W_dec, code.values, grad], backend)
    return twin.decode_values_grad(code, W_dec, grad)


def cost(n: int, d: int, f: int, nnz: int, *, itemsize: int = 2, backend: str = "triton") -> Cost:
    """One multiply-add and one element of W_dec per entry and column. Torch first widens a half-precision W_dec."""
    widened = 0 if backend == "triton" or itemsize >= 4 else f * d * (itemsize + 4)
    element = itemsize if backend == "triton" else max(itemsize, 4)
    return Cost(2.0 * nnz * d, nnz * (d * element + 4 + itemsize) + 2 * n * d * itemsize + widened)


def _twin(op: str, code: SparseCode, W_dec: Tensor, tensors: Sequence[Tensor], backend: str | None) -> Any:
    """Return the module that runs `op`."""
    (f, d), nnz, itemsize = W_dec.shape, code.values.numel(), W_dec.element_size()
    cost_of = lambda backend: cost(code.n_tokens, d, f, nnz, itemsize=itemsize, backend=backend)
    return twin(__name__, op, *tensors, cost=cost_of, backend=backend)


def _check(code: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor | None) -> None:
    d, n = _check_decoder(code, W_dec), code.n_tokens
    check_centers("b_dec", b_dec, d, n)
    check_floating(b_dec=b_dec, target=target)
    if target is not None:
        if target.dim() != 2 or not len(target) or n % len(target):
            check_shape("target", target, N=n, D=d)
        check_shape("target", target, M=len(target), D=d)
    check_one_device(code=code.values, W_dec=W_dec, b_dec=b_dec, target=target)


def _check_decoder(code: SparseCode, W_dec: Tensor) -> int:
    check_floating(W_dec=W_dec)
    if W_dec.dim() != 2 or W_dec.shape[0] != code.n_latents:
        raise ValueError(f"W_dec must have shape [F, D] with F = {code.n_latents}, got {list(W_dec.shape)}")
    return W_dec.shape[1]
