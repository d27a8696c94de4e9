"""Activations of a synthetic world, as a source for a stream."""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ...kernels.code import SparseCode
from ..config import WorldConfig
from ..synthetic.sampling import generator_for, sample
from ..synthetic.world import World
from .arrays import HOOK
from .buffer import Batch

CHUNK, GPU_CHUNK = 1024, 16384  # tokens that are drawn at a time, about: few for a CPU's caches, many for few launches
HELD_OUT = 16384  # tokens that stand for held-out rows
_TRAINING, _HELD_OUT = 0, 1


class WorldSource:
    """An `ActivationSource` over samples of a synthetic world, all at one hook named `x`.

    Chunk n depends on the world's settings, `seed` and n alone, so samples don't depend on the batch, and a stopped run
    resumes exactly. Held-out samples have seeds of their own. The world is made on first use.

        source = WorldSource(WorldConfig(features=1024, width=96, roots=8))
    """

    label = "world"
    modelless = "a world, which has no model"
    name = "the world"

    def __init__(self, config: WorldConfig, *, seed: int = 0, device: str | torch.device | None = None):
        self.config, self.seed = config, seed
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.special = torch.zeros(0, dtype=torch.int64)
        self.positions, self.widths = config.positions, {HOOK: config.width}
        self.has_positions = self.has_rows = config.positions > 1
        self._rows_per_chunk = max(1, (GPU_CHUNK if self.device.type == "cuda" else CHUNK) // config.positions)
        self._chunks = 0

    @cached_property
    def world(self) -> World:
        return World(self.config, self.device)

    @property
    def counts(self) -> dict[str, int]:
        rows = self._chunks * self._rows_per_chunk
        return {"rows": rows, "tokens": rows * self.positions, "epoch": 0}

    def next(self) -> Batch:
        batch, _ = self._chunk(_TRAINING, self._chunks)
        self._chunks += 1
        return batch

    def held_out(self) -> Iterator[Batch]:
        """About `HELD_OUT` tokens that training never sees."""
        return (batch for batch, _ in self.labelled(HELD_OUT))

    def labelled(self, tokens: int) -> Iterator[tuple[Batch, SparseCode]]:
        """At least `tokens` held-out tokens in chunks of whole rows, each with its true coefficients."""
        for number in range(-(-tokens // (self._rows_per_chunk * self.positions))):
            yield self._chunk(_HELD_OUT, number)

    def state(self) -> dict[str, Tensor]:
        return {"world": torch.tensor([self._chunks])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._chunks = int(state["world"])

    def _chunk(self, split: int, number: int) -> tuple[Batch, SparseCode]:
        code = sample(self.world, self._rows_per_chunk, generator_for(self.world, self.seed, split, number))
        tokens = torch.arange(code.n_tokens, device=self.device)
        row = number * self._rows_per_chunk + tokens // self.positions
        unknown = torch.full_like(tokens, -1, dtype=torch.int32)
        x = self.world.activations(code)
        return Batch({HOOK: x}, (tokens % self.positions).int(), unknown, row, row), code
