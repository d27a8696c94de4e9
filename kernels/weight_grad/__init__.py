"""weight_grad: the gradient of a [F, D] weight from the entries of a SparseCode, summed latent by latent."""

from torch import Tensor

from ..backend import choose
from ..checks import check_floating, check_one_device
from ..code import SparseCode
from ..cost import Cost
from . import reference


def weight_grad(code: SparseCode, values: Tensor, rows: Tensor, *, backend: str | None = None) -> Tensor:
    """dW[j] = sum of values[n, k] * rows[n] over the entries with indices[n, k] == j

    code    fixed K or ragged, over F latents; gives the indices, its own values are not read
    values  the shape of code.values, any floating dtype: what weighs each entry
    rows    [N, D]  any floating dtype

    Returns dW [F, D] in float32, or float64 if rows are float64; zero for latents that never fired. Each latent's entries
    are added in the order of their tokens, so the same inputs give the same bits; that order is cached on the code.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    if values.shape != code.values.shape:
        raise ValueError(f"values must have the code's shape {list(code.values.shape)}, got {list(values.shape)}")
    if rows.dim() != 2 or rows.shape[0] != code.n_tokens:
        raise ValueError(f"rows must have shape [N, D] with N = {code.n_tokens}, got {list(rows.shape)}")
    check_floating(values=values, rows=rows)
    check_one_device(code=code.indices, values=values, rows=rows)
    (n, d), nnz = rows.shape, values.numel()

    def cost_of(backend: str) -> Cost:
        return cost(n, d, code.n_latents, nnz, itemsize=rows.element_size(), backend=backend)

    if choose("weight_grad", rows, values, cost=cost_of, backend=backend) == "triton":
        from . import triton

        return triton.weight_grad(code, values, rows)
    return reference.weight_grad(code, values, rows)


def cost(n: int, d: int, f: int, nnz: int, *, itemsize: int = 2, backend: str = "triton") -> Cost:
    """A multiply-add and an element of rows for each entry and each of D, and dW written. Torch first widens the rows."""
    widened = 0 if backend == "triton" or itemsize >= 4 else n * d * (itemsize + 4)
    element = itemsize if backend == "triton" else max(itemsize, 4)
    return Cost(2.0 * nnz * d, nnz * (d * element + 16) + 4 * f * d + widened)
