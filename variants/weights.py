"""Weights on the loss by position."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..engine.config import SAEConfig
from ..engine.parts import Part, PartSettings, Seen, part
from ..kernels.numerics import sum_by
from .running import Average


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


@part("adaptive_weights")
class AdaptiveWeights(Part):
    """Positions that are reconstructed badly count more (runs C5 and C6).

    e_p is the moving average of the mean squared error of a token at position p. Over the positions that ever had tokens

        w_p = floor + (1 - floor) e_p / mean_q e_q

    so that their mean is 1 and none is forgotten; a position that never had any keeps 1. With `l1` (C6) the L1 term is
    weighted, too: v_p = w_p N / sum_q n_q w_q, n_q of the batch's N tokens being at q, so that a token's mean weight stays 1
    however tokens are spread over positions. topk and batchtopk have no L1 term. The logs say neither that badly
    reconstructed positions gain (rather than lose) weight, nor the decay, nor a floor.
    """

    class Settings(PartSettings):
        decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
        floor: Annotated[float, Field(ge=0, le=1)] = 0.1
        l1: bool = False

    def __init__(self, settings: Any, sae: SAEConfig, positions: int, generator: torch.Generator):
        super().__init__(settings, sae, positions, generator)
        self.error = Average(settings.decay, positions)

    def _rows(self, seen: Seen) -> Tensor:
        """Where each position's average is: positions beyond the mask's follow it."""
        assert seen.count is not None
        return seen.sae.mask.rows(torch.arange(seen.n_positions, device=seen.count.device))

    def weigh(self, seen: Seen) -> tuple[Tensor | None, Tensor | None]:
        assert seen.count is not None
        rows = self._rows(seen)
        known, error = self.error.known[rows], self.error.value[rows]  # 0 where it is not known
        mean = error.sum() / known.sum().clamp_min(1)
        share = error / mean.clamp_min(torch.finfo(error.dtype).tiny)
        weights = torch.where(known, self.settings.floor + (1 - self.settings.floor) * share, 1.0)
        if not self.settings.l1:
            return weights, None
        return weights, weights * (seen.count.sum() / (seen.count * weights).sum())

    def after(self, seen: Seen) -> None:
        assert seen.squared_error is not None
        assert seen.count is not None
        rows = self._rows(seen)
        error, count = (sum_by(rows, each.detach(), self.positions) for each in (seen.squared_error, seen.count))
        self.error.add_mean(error, count)
