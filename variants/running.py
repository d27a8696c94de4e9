"""What parts follow from step to step."""

import torch
from torch import Tensor, nn


class PositionMean(nn.Module):
    """Running mean of something [...] at each of T positions, [T, ...].

        mean[p] <- decay * mean[p] + (1 - decay) * total[p] / count[p]

    A position's first value is taken as it is, and positions that a batch does not have stay as they are. `met` bool [T]:
    which had a value; `mean` holds `start` at the others.
    """

    mean: Tensor
    met: Tensor

    def __init__(self, positions: int, *shape: int, start: float = 1.0, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.full((positions, *shape), start))
        self.register_buffer("met", torch.zeros(positions, dtype=torch.bool))

    @torch.no_grad()
    def follow(self, total: Tensor, count: Tensor) -> None:
        """Go on with a batch's sums at each position: total [T, ...] of count [T]."""
        here = count > 0
        value = (total / self._column(torch.where(here, count, 1))).to(self.mean.dtype)
        pace = self._column(torch.where(self.met, 1 - self.decay, 1.0) * here)
        self.mean.lerp_(value, pace.to(value.dtype))
        self.met |= here

    def relative(self) -> Tensor:
        """mean[p] over its own mean over the positions met; 1 at the others, and everywhere as long as all is 0. For means
        of one number."""
        level = (self.mean * self.met).sum() / self.met.sum()
        return torch.where(self.met & (level > 0), self.mean / level, 1)

    def _column(self, of_position: Tensor) -> Tensor:
        return of_position.reshape(-1, *[1] * (self.mean.ndim - 1))
