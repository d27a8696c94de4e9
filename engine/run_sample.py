"""A sample of a run's training activations, spread evenly over the run."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .config import SAEConfig
from .stream import Batch

SIZE = 8192  # tokens at most


def needs_sample(sae: SAEConfig) -> bool:
    """Whether a dictionary's inference threshold is fitted to a sample. A dictionary with parts adjusts its threshold
    on its batches instead, because parts may need whole rows, and a sample has none."""
    return sae.activation == "batchtopk" and not sae.parts


class RunSample:
    """Up to `SIZE` tokens from a run of `steps` batches, equally many per batch, with positions and acts at `hooks`.

    Inference thresholds are fitted to the sample. The last batches alone would cover too few documents.
    """

    def __init__(self, steps: int, hooks: Iterable[str]):
        self._tokens_per_batch, self._steps_between = max(1, SIZE // steps), max(1, -(-steps // SIZE))
        self._capacity = self._tokens_per_batch * -(-steps // self._steps_between)
        self._hooks, self._count = tuple(dict.fromkeys(hooks)), 0
        self._tensors: dict[str, Tensor] = {}  # by name in a checkpoint, [capacity, ...], allocated by the first batch

    def add(self, step: int, batch: Batch) -> None:
        """Keep tokens from this step's batch. They are spread over the batch, which may be in order of position."""
        if not self._hooks or step % self._steps_between or not len(batch):
            return
        size = min(self._tokens_per_batch, len(batch))
        indices = torch.arange(size, device=batch.pos.device) * len(batch) // size
        acts = {f"sample.acts.{hook}": batch.acts[hook][indices] for hook in self._hooks}
        self._put(acts | {"sample.pos": batch.pos[indices]})

    def _put(self, tensors: dict[str, Tensor]) -> None:
        end = self._count + len(tensors["sample.pos"])
        for key, values in tensors.items():
            if key not in self._tensors:
                self._tensors[key] = values.new_empty(max(self._capacity, end), *values.shape[1:])
            self._tensors[key][self._count : end] = values
        self._count = end

    def at(self, hook: str) -> tuple[Tensor, Tensor] | None:
        """Return x [N, D] at a hook and pos [N]. None before the first batch."""
        if not self._count:
            return None
        return self._tensors[f"sample.acts.{hook}"][: self._count], self._tensors["sample.pos"][: self._count]

    def state(self) -> dict[str, Tensor]:
        return {key: values[: self._count] for key, values in self._tensors.items()}

    def load_state(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Restore `state`, which is empty if the run had not taken a step."""
        self._tensors, self._count = {}, 0
        if tensors := {key: value.to(device) for key, value in state.items() if key.startswith("sample.")}:
            self._put(tensors)
