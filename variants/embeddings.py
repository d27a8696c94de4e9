"""What the encoder is told of position."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..engine.config import SAEConfig
from ..engine.parts import Part, PartSettings, Seen, part


@part("position_embedding")
class PositionEmbedding(Part):
    """The encoder sees x + P[pos], P [T, D] learned (runs A5 to A8).

    P starts as N(0, scale^2), small beside x, whose entries are about 1.
    """

    class Settings(PartSettings):
        scale: Annotated[float, Field(ge=0)] = 0.1

    def __init__(self, settings: Any, sae: SAEConfig, positions: int, generator: torch.Generator):
        super().__init__(settings, sae, positions, generator)
        self.embedding = nn.Parameter(settings.scale * torch.randn(positions, sae.d_in, generator=generator))

    def input(self, x: Tensor, seen: Seen) -> Tensor:
        return x + self.embedding[seen.sae.mask.rows(seen.pos)]
