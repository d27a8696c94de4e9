"""clip as a Triton kernel: one program per dictionary adds squares in a fixed order."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import launch_kernel, launch_options

LARGEST = 2**20  # elements of a gradient that one program squares and adds


@triton.jit
def part_of(ptr, dictionary, elements, SIZE):
    """Load elements of the dictionary's run of SIZE, zero past its end."""
    return tl.load(ptr + dictionary * SIZE + elements, mask=elements < SIZE, other=0.0).to(tl.float32)


@triton.jit
def clip_kernel(
    norms_ptr, norms2_ptr, norms3_ptr, grads_ptr, grads2_ptr, grads3_ptr, norm_ptr, factor_ptr,
    NORMS, NORMS2, NORMS3, GRADS, GRADS2, GRADS3, limit, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norm of a dictionary's gradients, from squared norms and from gradients, and the factor that clips it. Sizes are of
    one dictionary, and may be zero. One program per dictionary."""
    dictionary = tl.program_id(0).to(tl.int64)
    # [BLOCK] partial sums of squares
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    longest = tl.maximum(tl.maximum(NORMS, NORMS2), tl.maximum(NORMS3, GRADS))
    longest = tl.maximum(longest, tl.maximum(GRADS2, GRADS3))
    for start in range(0, longest, BLOCK):
        elements = start + tl.arange(0, BLOCK)
        squares += part_of(norms_ptr, dictionary, elements, NORMS)
        squares += part_of(norms2_ptr, dictionary, elements, NORMS2)
        squares += part_of(norms3_ptr, dictionary, elements, NORMS3)
        grads = part_of(grads_ptr, dictionary, elements, GRADS)
        squares += grads * grads
        grads = part_of(grads2_ptr, dictionary, elements, GRADS2)
        squares += grads * grads
        grads = part_of(grads3_ptr, dictionary, elements, GRADS3)
        squares += grads * grads
    norm = tl.sqrt(tl.sum(squares, 0))
    tl.store(norm_ptr + dictionary, norm)
    # NaN stays: the step then makes it visible in the weights
    factor = limit / (norm + 1e-6)
    tl.store(factor_ptr + dictionary, tl.where(factor > 1, 1.0, factor))


def clip(squared_norms: Sequence[Tensor], gradients: Sequence[Tensor], clip_norm: float, factor: Tensor) -> Tensor:
    norm, s = torch.empty_like(factor), factor.numel()
    small = [grad for grad in gradients if grad.numel() <= s * LARGEST][-3:]
    others = [grad for grad in gradients if all(grad is not each for each in small)]
    if others:
        runs = [grad.square().view(s, -1).sum(1) for grad in others]
        squared_norms = [*squared_norms, torch.stack(runs).sum(0)]
    absent = norm[:0]
    summands = [*squared_norms, *[absent] * (3 - len(squared_norms)), *small, *[absent] * (3 - len(small))]
    launch_kernel(
        clip_kernel, (s,),
        *(factor if tensor is absent else tensor.contiguous() for tensor in summands), norm, factor,
        *(tensor.numel() // s for tensor in summands), clip_norm, **launch_options("clip", factor),
    )  # fmt: skip
    return norm
