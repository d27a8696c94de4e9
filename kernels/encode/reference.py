"""encode in plain torch."""

import torch
from torch import Tensor

from ..numerics import accumulation_dtype


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, center: Tensor | None, mask: Tensor | None, pos: Tensor | None, relu: bool
) -> Tensor:
    wide = accumulation_dtype(x)
    if center is not None:
        x = (x.to(wide) - center.to(wide)).to(x.dtype)
    if x.dtype == wide or x.is_cuda:  # a half-precision product on CUDA accumulates in float32 by itself
        acts = torch.addmm(b_enc.to(x.dtype), x, W_enc)
    else:
        acts = torch.addmm(b_enc.to(wide), x.to(wide), W_enc.to(wide))
    if relu:
        acts = acts.relu_()  # a second [N, F] costs as much as the rectifier
    if mask is not None and pos is not None:
        acts = acts * mask.index_select(0, pos)
    return acts.to(x.dtype)
