"""Running means over steps."""

import torch
from torch import Tensor, nn

from ..engine.parts import BatchView, Part


class RunningMean(nn.Module):
    """Exponential moving average of values of a shape, each initialised by its first value, and `start` before.

        value <- decay * value + (1 - decay) * new        where there is a new one

    `known`, bool of the same shape: where there has been a value. Never waits for the device.
    """

    def __init__(self, decay: float, *shape: int, start: float = 0.0):
        super().__init__()
        self.decay = decay
        self.value = nn.Buffer(torch.full(shape, start))
        self.known = nn.Buffer(torch.zeros(shape, dtype=torch.bool))
        self._waiting: tuple[Tensor, Tensor | None] | None = None

    @torch.no_grad()
    def add(self, new: Tensor, where: Tensor | None = None) -> None:
        """Add `new`, only where `where` (of the value's shape or its first dimensions) is true, if given."""
        new = new.to(self.value.dtype)
        updated = torch.where(self.known, self.decay * self.value + (1 - self.decay) * new, new)
        if where is None:
            self.value.copy_(updated)
            self.known.fill_(True)
        else:
            where = where.reshape(where.shape + (1,) * (self.value.ndim - where.ndim))
            self.value.copy_(torch.where(where, updated, self.value))
            self.known.logical_or_(where)

    def add_mean(self, total: Tensor, count: Tensor) -> None:
        """Add `means` of these, total of the value's shape."""
        self.add(*means(total, count))

    def later(self, new: Tensor, where: Tensor | None = None) -> None:
        """Add these at the next `settle`, in place of what was to be added: a step may be redone."""
        self._waiting = new.detach(), where

    def settle(self) -> None:
        """Add what `later` got, if anything."""
        if self._waiting is not None:
            self.add(*self._waiting)
            self._waiting = None

    def relative(self) -> Tensor:
        """value over the mean of the known ones; 1 for unknown ones, and everywhere while all are 0."""
        level = (self.value * self.known).sum() / self.known.sum()
        return torch.where(self.known & (level > 0), self.value / level, 1)


def means(total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """total / count, and where count > 0. `count` has the first dimensions of `total`."""
    divisor = torch.where(count > 0, count, 1).reshape(count.shape + (1,) * (total.ndim - count.ndim))
    return total / divisor, count > 0


class Averaging(Part):
    """A part with running means, which a finished step settles."""

    def after(self, batch: BatchView) -> None:
        for module in self.children():
            if isinstance(module, RunningMean):
                module.settle()
