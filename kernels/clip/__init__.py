"""clip: the norm of gradients, and the factor that clips it."""

from collections.abc import Sequence

from torch import Tensor

from ..backend import choose
from ..checks import check_one_device
from ..cost import Cost
from . import reference


def clip(
    squared_norms: Sequence[Tensor], gradients: Sequence[Tensor], clip_norm: float, factor: Tensor, *,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Return the norm [S] of the gradients of S dictionaries, and write factor[s] = min(1, clip_norm / (norm[s] + 1e-6)), as
    torch's clip_grad_norm_ does.

    squared_norms  up to two tensors of S equal runs, such as those of `row_norms`
    gradients      one or more tensors of S equal runs, whose squares are added to the first
    factor         float32 (float64 for float64) [S]

    Raises ValueError for other numbers of tensors, for sizes that S does not divide, and for tensors on several devices.
    """
    tensors = [*squared_norms, *gradients]
    if len(squared_norms) > 2 or not gradients or any(tensor.numel() % factor.numel() for tensor in tensors):
        sizes = [tensor.numel() for tensor in tensors]
        raise ValueError(
            f"needs up to two squared norms, and gradients, of {factor.numel()} equal runs, got sizes {sizes}"
        )
    check_one_device(factor=factor, **{f"tensor {i}": tensor for i, tensor in enumerate(tensors)})
    if choose("clip", factor, *tensors, backend=backend) == "torch":
        return reference.clip(squared_norms, gradients, clip_norm, factor)
    from . import triton

    return triton.clip(squared_norms, gradients, clip_norm, factor)


def cost(f: int, d: int, *, backend: str = "triton") -> Cost:
    """Read squared norms of two weights and the gradients of two biases. Torch also writes and reads the squares."""
    passes = 1 if backend == "triton" else 2
    return Cost(2.0 * (f + d), 4 * (2 * f + passes * (f + d)))
