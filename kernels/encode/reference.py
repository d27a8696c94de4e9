"""encode in plain torch."""

import torch
from torch import Tensor

from ..encoder_inputs import EncoderInputs
from ..masks import weights_at
from ..numerics import accumulation_dtype


def encode(inputs: EncoderInputs, relu: bool = True) -> Tensor:
    """Return acts in the dtype of accumulation."""
    x, W_enc, b_enc, center, mask, pos = inputs
    if center is not None and center.dim() == 2:
        blocks = zip(W_enc.chunk(len(center), 1), b_enc.chunk(len(center)), center, strict=True)
        acts = torch.cat([encode(EncoderInputs(x, W, b, c, None, None), relu) for W, b, c in blocks], 1)
        return acts if mask is None or pos is None else acts * weights_at(mask, pos)
    wide = accumulation_dtype(x)
    if x.is_cuda:  # half-precision products on CUDA accumulate in float32 anyway
        wide = x.dtype
    x = x.to(wide) if center is None else (x.to(accumulation_dtype(x)) - center).to(wide)
    acts = torch.addmm(b_enc.to(wide), x, W_enc.to(wide))
    if relu:
        acts = acts.relu_()  # in place: writing a second [N, F] would double the cost
    if mask is not None and pos is not None:
        acts = acts * weights_at(mask, pos)
    return acts
