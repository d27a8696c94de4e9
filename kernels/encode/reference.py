"""encode in plain torch."""

import torch
from torch import Tensor

from ..encoder_inputs import EncoderInputs
from ..masks import weights_at
from ..numerics import accumulation_dtype

BLOCK = 1024  # latents per thread


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
    acts = _affine(x, W_enc.to(wide), b_enc.to(wide))
    if relu:
        acts = acts.relu_()  # in place: writing a second [N, F] would double the cost
    if mask is not None and pos is not None:
        acts = acts * weights_at(mask, pos)
    return acts


def _affine(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Return x @ W + b. On a CPU, addmm first fills its output with the bias. Blocks of latents stay in cache after
    that. Sums have the order of one product."""
    if x.is_cuda or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, W, b))):
        return torch.addmm(b, x, W)
    out, size = x.new_empty(len(x), len(b)), BLOCK * torch.get_num_threads()
    for block, weights, bias in zip(out.split(size, 1), W.split(size, 1), b.split(size), strict=True):
        torch.addmm(bias, x, weights, out=block)
    return out
