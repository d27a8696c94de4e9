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
        self._tokens_per_batch, self._steps_between = max(1, SIZE // steps), max(1, -(-steps // SIZE))
        self._pieces: list[dict[str, Tensor]] = []

    def add(self, step: int, batch: Batch) -> None:
        """Keep some of the batch of this step; from all over it, since it may be in order of position."""
        if step % self._steps_between == 0 and len(batch):
            count = min(self._tokens_per_batch, len(batch))
            indices = torch.arange(count, device=batch.pos.device) * len(batch) // count
            acts = {f"acts.{hook}": x[indices] for hook, x in batch.acts.items()}
            self._pieces.append(acts | {"pos": batch.pos[indices]})

    def at(self, hook: str) -> tuple[Tensor, Tensor] | None:
        """x [N, D] at a hook and pos [N]; None before the first batch."""
        if not self._pieces:
            return None
        if len(self._pieces) > 1:
            self._pieces = [{key: torch.cat([piece[key] for piece in self._pieces]) for key in self._pieces[0]}]
        return self._pieces[0][f"acts.{hook}"], self._pieces[0]["pos"]

    def state(self) -> dict[str, Tensor]:
        """The tokens that are held, for a checkpoint of the stream."""
        keys = self._pieces[0] if self._pieces else ()
        return {f"sample.{key}": torch.cat([piece[key] for piece in self._pieces]) for key in keys}

    def load_state(self, state: dict[str, Tensor], device: torch.device) -> None:
        tensors = {
            key.removeprefix("sample."): value.to(device) for key, value in state.items() if key.startswith("sample.")
        }
        self._pieces = [tensors] if tensors else []
