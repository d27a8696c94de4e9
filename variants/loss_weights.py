"""Loss weights by position."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..engine.config import SAEConfig
from ..engine.parts import BatchView, Part, PartSettings, part
from ..kernels.numerics import sum_by
from .running_mean import RunningMean


@part("linear_weights")
class LinearWeights(Part):
    """The squared error at position p of T has weight w_p = first + (last - first) p / (T - 1) (A5: 1 to 2)."""

    class Settings(PartSettings):
        first: float = Field(default=1.0, gt=0, description="Weight of the squared error at the first position.")
        last: float = Field(default=2.0, gt=0, description="Weight of the squared error at the last position.")

    def __init__(self, settings: Any, sae: SAEConfig, positions: int, generator: torch.Generator):
        super().__init__(settings, sae, positions, generator)
        self.weights = nn.Buffer(torch.linspace(settings.first, settings.last, positions))

    def weigh(self, batch: BatchView) -> tuple[Tensor | None, Tensor | None]:
        everywhere = torch.arange(batch.n_positions, device=batch.pos.device)
        return self.weights[batch.sae.mask.rows(everywhere)], None


@part("adaptive_weights")
class AdaptiveWeights(Part):
    """Positions with a large reconstruction error have a larger loss weight (C5, C6).

    e_p is the moving average of the mean squared error of a token at position p. Over the positions that have had
    tokens

        w_p = floor + (1 - floor) e_p / mean_q e_q

    so that their mean is 1 and none is ignored. A position without tokens so far has weight 1. With `l1` (C6) the L1
    term is weighted, too: v_p = w_p N / sum_q n_q w_q, with n_q of the batch's N tokens at q, so that a token's mean
    weight stays 1 for any distribution of tokens. topk and batchtopk have no L1 term. The logs don't say whether such
    positions gain or lose weight, and give neither the decay nor a floor.
    """

    class Settings(PartSettings):
        decay: float = Field(
            default=0.99, ge=0, lt=1, description="Decay per step of the mean squared error at each position."
        )
        floor: float = Field(default=0.1, ge=0, le=1, description="Least weight of a position.")
        l1: bool = Field(default=False, description="Weight the L1 term by position as well (relu).")

    def __init__(self, settings: Any, sae: SAEConfig, positions: int, generator: torch.Generator):
        super().__init__(settings, sae, positions, generator)
        self.error = RunningMean(settings.decay, positions)

    def _mask_positions(self, batch: BatchView) -> Tensor:
        """The index of each position's average. Positions beyond the mask's are mapped as by the mask."""
        assert batch.count is not None
        return batch.sae.mask.rows(torch.arange(batch.n_positions, device=batch.count.device))

    def weigh(self, batch: BatchView) -> tuple[Tensor | None, Tensor | None]:
        assert batch.count is not None
        mask_position = self._mask_positions(batch)
        known, error = self.error.known[mask_position], self.error.value[mask_position]  # 0 if not known
        mean = error.sum() / known.sum().clamp_min(1)
        share = error / mean.clamp_min(torch.finfo(error.dtype).tiny)
        weights = torch.where(known, self.settings.floor + (1 - self.settings.floor) * share, 1.0)
        if not self.settings.l1:
            return weights, None
        return weights, weights * (batch.count.sum() / (batch.count * weights).sum())

    def after(self, batch: BatchView) -> None:
        assert batch.squared_error is not None
        assert batch.count is not None
        mask_position = self._mask_positions(batch)
        error, count = (
            sum_by(mask_position, sums.detach(), self.positions) for sums in (batch.squared_error, batch.count)
        )
        self.error.add_mean(error, count)
