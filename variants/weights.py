"""Weights on the loss by position."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..engine.config import SAEConfig
from ..engine.parts import Part, PartSettings, Seen, part


@part("linear_weights")
class LinearWeights(Part):
    """The squared error at position p of T counts w_p = first + (last - first) p / (T - 1) (run A5: 1 to 2)."""

    class Settings(PartSettings):
        first: Annotated[float, Field(gt=0)] = 1.0
        last: Annotated[float, Field(gt=0)] = 2.0

    weights: Tensor

    def __init__(self, settings: Any, sae: SAEConfig, positions: int, generator: torch.Generator):
        super().__init__(settings, sae, positions, generator)
        self.register_buffer("weights", torch.linspace(settings.first, settings.last, positions))

    def weigh(self, seen: Seen) -> tuple[Tensor | None, Tensor | None]:
        everywhere = torch.arange(seen.n_positions, device=seen.pos.device)
        return self.weights[seen.sae.mask.rows(everywhere)], None
