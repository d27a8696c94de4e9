"""Activations in one byte each, with a scale for every row."""

import torch
from torch import Tensor

#: what a row is scaled to: the largest number of the format
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def narrowed(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of x [..., D] as `dtype` (int8 or float8_e4m3fn) and scales [...] in float32: x is about codes * scale, with
    scale = max |x| / the format's largest number. Rounded to nearest; a row of zeros has scale zero."""
    x = x.float()
    scale = x.abs().amax(-1) / LARGEST[dtype]
    codes = x / torch.where(scale > 0, scale, 1.0)[..., None]
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def widen_(out: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """out [..., D] becomes codes * scale."""
    return out.copy_(codes).mul_(scale[..., None])


def raw(codes: Tensor) -> Tensor:
    """The same bytes as int8: torch can't index float8 everywhere."""
    return codes.view(torch.int8) if codes.dtype == torch.float8_e4m3fn else codes
