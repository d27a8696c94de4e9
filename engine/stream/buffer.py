"""The ring buffer: a fixed set of slots, mixed, in which every activation keeps its position, token and document."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Batch:
    """`x` [N, D]; `pos`, `token` [N] int32; `document` [N] int64: row n of x is the activation of `token[n]` at position
    `pos[n]` of a row of text of `document[n]`."""

    x: Tensor
    pos: Tensor
    token: Tensor
    document: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, at: Tensor | slice) -> "Batch":
        return Batch(*(getattr(self, f.name)[at] for f in fields(self)))


class RingBuffer:
    """Serves its slots in random order; when half are served, those are filled again and everything is permuted anew.

    `fill(n)` gives at least n fresh rows. Memory is taken once: capacity * (D * bytes + 24). A batch may not be larger
    than half the capacity, so that a served token is drawn from at least capacity / 2.
    """

    def __init__(self, capacity: int, d: int, dtype: torch.dtype, device: torch.device, fill: Callable[[int], Batch]):
        self.capacity, self._fill = capacity, fill
        integers = {"pos": torch.int32, "token": torch.int32, "document": torch.int64}
        self._slots = Batch(
            torch.empty(capacity, d, dtype=dtype, device=device),
            **{name: torch.empty(capacity, dtype=kind, device=device) for name, kind in integers.items()},
        )
        self._left: Batch | None = None  # fresh rows for which there was no slot
        self._order = torch.arange(capacity, device=device)
        self._at = capacity  # how many of _order are served; all of them: nothing is filled yet

    def next(self, n: int, generator: torch.Generator) -> Batch:
        if self._at >= self.capacity // 2:
            self._refill(generator)
        batch = self._slots[self._order[self._at : self._at + n]]
        self._at += n
        return batch

    def contents(self) -> Batch:
        """Every slot, in slot order. Not a copy."""
        return self._slots

    def _refill(self, generator: torch.Generator) -> None:
        free = self._order[: self._at]
        done = 0
        while done < len(free):
            fresh = self._left if self._left is not None else self._fill(len(free) - done)
            count = min(len(fresh), len(free) - done)
            at = free[done : done + count]
            for f in fields(Batch):
                value = getattr(fresh, f.name)[:count]
                slots = getattr(self._slots, f.name)
                slots.index_copy_(0, at, value.to(slots.dtype))
            self._left = fresh[slice(count, None)] if count < len(fresh) else None
            done += count
        self._order = torch.randperm(self.capacity, generator=generator).to(self._order.device)
        self._at = 0

    def state(self) -> dict[str, Tensor]:
        """Everything that is needed to go on exactly here."""
        found = {f"slots.{f.name}": getattr(self._slots, f.name) for f in fields(Batch)}
        if self._left is not None:
            found |= {f"left.{f.name}": getattr(self._left, f.name).contiguous() for f in fields(Batch)}
        return found | {"order": self._order, "at": torch.tensor(self._at)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for f in fields(Batch):
            getattr(self._slots, f.name).copy_(state[f"slots.{f.name}"])
        device = self._order.device
        left = [state[f"left.{f.name}"].to(device) for f in fields(Batch) if f"left.{f.name}" in state]
        self._left = Batch(*left) if left else None
        self._order = state["order"].to(device)
        self._at = int(state["at"])
