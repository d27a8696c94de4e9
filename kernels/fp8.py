"""Operands of a product in e4m3."""

from typing import NamedTuple

import torch
from torch import Tensor


class Fp8Rows(NamedTuple):
    """A matrix [M, D] as float8_e4m3fn rows, zero-padded to a multiple of 128 columns, with a scale [M] per row."""

    rows: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Fp8Rows":
        """Scale each row so that its largest magnitude becomes 448, the largest e4m3 number."""
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = x.abs().amax(1).float().clamp_min(torch.finfo(torch.float32).tiny * largest) / largest
        rows = torch.nn.functional.pad(x.float() / scale[:, None], (0, -x.shape[1] % 128))
        return cls(rows.to(torch.float8_e4m3fn), scale)

    def widened(self) -> Tensor:
        """Return rows * scale in float32."""
        return self.rows.float() * self.scale[:, None]
