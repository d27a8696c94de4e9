"""Operands of a product in e4m3."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_shape

LARGEST = torch.finfo(torch.float8_e4m3fn).max
TINY = torch.finfo(torch.float32).tiny
COLUMNS = 128  # rows are padded to a multiple


class Fp8Rows(NamedTuple):
    """A matrix [M, D] as float8_e4m3fn rows, zero-padded to a multiple of 128 columns, with a scale [M] per row."""

    rows: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Fp8Rows":
        """Scale each row so that its largest magnitude becomes 448, the largest e4m3 number."""
        scale = (x.abs().amax(1).float() * (1 / LARGEST)).clamp_min(TINY)
        rows = torch.nn.functional.pad(x.float() * (1 / scale)[:, None], (0, -x.shape[1] % COLUMNS))
        return cls(rows.to(torch.float8_e4m3fn), scale)

    def check(self, name: str, f: int, d: int) -> None:
        """Raise ValueError unless these are the rows of a matrix [F, D]."""
        check_shape(f"{name}.rows", self.rows, F=f, columns=d + -d % COLUMNS)
        check_shape(f"{name}.scale", self.scale, F=f)
        if (self.rows.dtype, self.scale.dtype) != (torch.float8_e4m3fn, torch.float32):
            raise ValueError(f"{name} must be e4m3 with float32 scales, got {self.rows.dtype} with {self.scale.dtype}")

    def copy_(self, x: Tensor) -> None:
        """Replace the rows and scales by those of x."""
        for tensor, new in zip(self, Fp8Rows.of(x), strict=True):
            tensor.copy_(new)

    def widened(self) -> Tensor:
        """Return rows * scale in float32."""
        return self.rows.float() * self.scale[:, None]
