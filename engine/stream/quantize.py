"""Store activations with one byte per number and a scale per activation vector."""

import torch
from torch import Tensor

#: largest number of each format
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def narrowed(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise x [..., D] to codes * scale: codes of `dtype` (int8 or float8_e4m3fn) and float32 scales [...].

    scale = max |x| / LARGEST[dtype], zero for a vector of zeros. Codes are rounded to nearest."""
    x = x.float()
    scale = x.abs().amax(-1) / LARGEST[dtype]
    codes = x / torch.where(scale > 0, scale, 1.0)[..., None]
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def widen_(out: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Write codes * scale to out [..., D]."""
    return out.copy_(codes).mul_(scale[..., None])


def raw(codes: Tensor) -> Tensor:
    """View float8 codes as int8, since torch can't index float8 on every device."""
    return codes.view(torch.int8) if codes.dtype == torch.float8_e4m3fn else codes
