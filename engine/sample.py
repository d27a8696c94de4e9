"""A few thousand of the activations that a run was trained on, spread evenly over it."""

import torch
from torch import Tensor

from .stream import Batch

SIZE = 8192  # tokens at most


class RunSample:
    """Up to `SIZE` tokens of a run of `steps` batches, as many of each batch, with their positions.

    What a dictionary's inference threshold is fitted to: the last batches alone are of a few documents, which may be of
    another kind than the rest.
    """

    def __init__(self, steps: int):
        self._each, self._every = max(1, SIZE // steps), max(1, -(-steps // SIZE))
        self._parts: list[dict[str, Tensor]] = []

    def add(self, step: int, batch: Batch) -> None:
        """Keep some of the batch of this step; from all over it, since it may be in order of position."""
        if step % self._every == 0 and len(batch):
            count = min(self._each, len(batch))
            at = torch.arange(count, device=batch.pos.device) * len(batch) // count
            acts = {f"acts.{hook}": x[at] for hook, x in batch.acts.items()}
            self._parts.append(acts | {"pos": batch.pos[at]})

    def at(self, hook: str) -> tuple[Tensor, Tensor] | None:
        """x [N, D] at a hook and pos [N]; None before the first batch."""
        if not self._parts:
            return None
        if len(self._parts) > 1:
            self._parts = [{key: torch.cat([part[key] for part in self._parts]) for key in self._parts[0]}]
        return self._parts[0][f"acts.{hook}"], self._parts[0]["pos"]

    def state(self) -> dict[str, Tensor]:
        """The tokens that are held, for a checkpoint of the stream."""
        keys = self._parts[0] if self._parts else ()
        return {f"sample.{key}": torch.cat([part[key] for part in self._parts]) for key in keys}

    def load_state(self, state: dict[str, Tensor], device: torch.device) -> None:
        held = {
            key.removeprefix("sample."): value.to(device) for key, value in state.items() if key.startswith("sample.")
        }
        self._parts = [held] if held else []
