"""weight_grad: the gradient of a weight [F, D] from the entries of a SparseCode."""

from typing import Any

from torch import Tensor

from ..backend import choose
from ..checks import check_centers, check_floating, check_one_device
from ..code import LatentMajor
from ..cost import Cost
from . import reference


def weight_grad(
    entries: LatentMajor, values: Tensor, rows: Tensor, *, center: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """dW[j] = sum of values[e] * (rows[token of e modulo M] - center) over the entries e of latent j

    entries  `code.transpose()`, C entries over F latents
    values   C elements of any shape and floating dtype: the weight of each entry, in the code's order
    rows     [M, D]  any floating dtype
    center   [D], any floating dtype; or [S, D]: one for each of S equal runs of latents

    Returns dW [F, D] in float32 (float64 for float64 rows), zero for latents without entries. Sums have a fixed order,
    so the same inputs give the same bits. Raises ValueError for shapes, dtypes or devices that do not fit together.
    """
    check_entries(entries, values, rows, center)
    (m, d), f, nnz = rows.shape, entries.latent_offsets.numel() - 1, values.numel()
    cost_of = lambda backend: cost(m, d, f, nnz, itemsize=rows.element_size(), backend=backend)
    tensors = [t for t in (rows, values, center) if t is not None]
    if choose("weight_grad", *tensors, cost=cost_of, backend=backend) == "triton":
        from . import triton

        return triton.weight_grad(entries, values, rows, center)
    return reference.weight_grad(entries, values, rows, center)


def latent_sums(entries: LatentMajor, values: Tensor, *, backend: str | None = None) -> Tensor:
    """Return the sum of the values of each latent's entries, [F] in float32 (float64 for float64). See `weight_grad`."""
    if choose("latent_sums", values, backend=backend) == "triton":
        from . import triton

        return triton.latent_sums(entries, values)
    return reference.latent_sums(entries, values)


def sort_entries(
    latents: Tensor, tokens: Tensor | int, n_latents: int, encoder_weights: Tensor, decoder_weights: Tensor,
    along: Tensor, n_rows: tuple[int, int], *, backend: str | None = None,
) -> tuple[LatentMajor, dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Sort entries by latent, as `LatentMajor.of` does, together with what the passes over them read.

    latents          int32 [C] in [0, F], F for unused entries
    tokens           [C]; or K if entry e is of token e // K
    encoder_weights  float32, C elements: the values of `weight_grad` for W_enc, with n_rows[0] rows
    decoder_weights  those for W_dec, with n_rows[1] rows
    along            C elements, of `loss.entry_loss`

    Returns the sorted entries, and for each weight the start of `shared` in `adam_rows` and `row_norms`. Raises ValueError
    if there are not C of each.
    """
    for name, tensor in dict(encoder_weights=encoder_weights, decoder_weights=decoder_weights, along=along).items():
        if tensor.numel() != latents.numel():
            raise ValueError(
                f"{name} must have one element for each of {latents.numel()} entries, got {tensor.numel()}"
            )
    check_one_device(latents=latents, encoder_weights=encoder_weights, decoder_weights=decoder_weights, along=along)
    if choose("sort_entries", encoder_weights, decoder_weights, along, backend=backend) == "triton":
        from . import triton

        return triton.sort_entries(latents, tokens, n_latents, encoder_weights, decoder_weights, along, n_rows)
    return LatentMajor.of(latents, tokens, n_latents), {}, {}


def cost(m: int, d: int, f: int, nnz: int, *, itemsize: int = 2, backend: str = "triton") -> Cost:
    """One multiply-add and one element of rows per entry and column, and dW written. Torch first widens the rows."""
    widened = 0 if backend == "triton" or itemsize >= 4 else m * d * (itemsize + 4)
    element = itemsize if backend == "triton" else max(itemsize, 4)
    return Cost(2.0 * nnz * d, nnz * (d * element + 16) + 4 * f * d + widened)


def check_entries(entries: LatentMajor, values: Tensor, rows: Tensor, center: Tensor | None) -> None:
    """Raise ValueError unless the arguments of `weight_grad` fit together."""
    if values.numel() != entries.order.numel():
        raise ValueError(
            f"values must have one element for each of {entries.order.numel()} entries, got {values.numel()}"
        )
    if rows.dim() != 2:
        raise ValueError(f"rows must have shape [M, D], got {list(rows.shape)}")
    if center is not None:
        check_centers("center", center, rows.shape[1], entries.latent_offsets.numel() - 1)
    check_floating(values=values, rows=rows, center=center)
    check_one_device(entries=entries.order, values=values, rows=rows, center=center)
