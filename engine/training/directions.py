"""Keep rows of a soft-frozen decoder near their random start."""

import torch
from torch import Tensor

LEAST_COSINE = 0.8  # of a row with its start (arXiv 2602.14111)
ROWS = 4096  # at a time, so that no copy of a whole decoder is made


@torch.no_grad()
def hold_directions(rows: Tensor, start: Tensor, shadow: Tensor | None = None, *, skip: Tensor | None = None) -> None:
    """Move unit rows w of `rows` [F, D] whose cosine with their unit row s of `start` [F, D] is below 0.8, in place.

        c = w . s        c >= 0.8: w stays, with the same bits
        u = w - c s      c < 0.8:  w becomes 0.8 s + 0.6 u / |u|

    This is the unit vector v nearest to w among those with v . s = 0.8: they are v = 0.8 s + 0.6 e with a unit vector e
    across s, and w . v = 0.8 c + 0.6 u . e is largest for e = u / |u|. Where w = -s, the row returns to s. `shadow` [F, D],
    a copy in another dtype, follows. A true `skip` (scalar) leaves everything as it is.
    """
    across = (1 - LEAST_COSINE**2) ** 0.5
    shadows = shadow.split(ROWS) if shadow is not None else [None] * len(rows.split(ROWS))
    for w, s, copy in zip(rows.detach().split(ROWS), start.split(ROWS), shadows, strict=True):
        cosine = (w * s).sum(1, keepdim=True)
        u = torch.addcmul(w, cosine, s, value=-1)
        length = u.norm(dim=1, keepdim=True)
        moved = torch.where(length > 0, u.mul_(across / length).add_(s, alpha=LEAST_COSINE), s)
        outside = cosine < LEAST_COSINE
        if skip is not None:
            outside = outside & ~skip
        w.copy_(torch.where(outside, moved, w))
        if copy is not None:
            copy.copy_(w)
