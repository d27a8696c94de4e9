"""The operands of an encoder, with the checks and the backend choice that `encode` and `encode_sparse` share."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .backend import choose
from .checks import check_centers, check_floating, check_one_device, check_positions, check_shape
from .cost import Cost
from .masks import GaussianMask, Mask


class EncoderInputs(NamedTuple):
    """The operands of relu((x - center) @ W_enc + b_enc) * mask[pos]. Shapes and dtypes as in `kernels.encode`."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    center: Tensor | None
    mask: Mask | None
    pos: Tensor | None

    def check(self) -> int:
        """Return F. Raises ValueError for shapes, dtypes or devices that do not fit together."""
        x, W_enc, b_enc, center, mask, pos = self
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
        check_one_device(x=x, W_enc=W_enc, b_enc=b_enc, center=center, mask=self._mask_tensor, pos=pos)
        return f

    def choose_backend(self, op: str, *, cost: Callable[..., Cost], backend: str | None) -> str:
        """Return the backend of `op` for these operands."""
        sizes = dict(itemsize=self.x.element_size(), masked=self.mask is not None)
        cost_of = lambda backend: cost(*self.x.shape, self.W_enc.shape[1], **sizes, backend=backend)
        optional_tensors = [t for t in (self.b_enc, self.center, self._mask_tensor) if t is not None]
        return choose(op, self.x, self.W_enc, *optional_tensors, cost=cost_of, backend=backend)

    @property
    def _mask_tensor(self) -> Tensor | None:
        return self.mask.centre if isinstance(self.mask, GaussianMask) else self.mask


def _matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got {list(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]
