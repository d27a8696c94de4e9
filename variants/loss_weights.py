"""Loss weights by position."""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..engine.config import SAEConfig, Share
from ..engine.parts import BatchView, Part, PartSettings, part
from ..engine.sae import SparseAutoencoder
from ..kernels.masks import weights_at
from ..kernels.numerics import sum_by
from .number_types import Factor, Fraction
from .running_mean import RunningMean


def mask_positions(batch: BatchView) -> Tensor:
    """The index in the mask of each of the batch's positions: those beyond the mask are mapped as by the mask."""
    return batch.sae.mask.rows(torch.arange(batch.n_positions, device=batch.pos.device))


@part("linear_weights")
class LinearWeights(Part):
    """The squared error at position p of T has weight w_p = first + (last - first) p / (T - 1) (A5: 1 to 2)."""

    class Settings(PartSettings):
        first: Factor = Field(default=1.0, description="Weight of the squared error at the first position.")
        last: Factor = Field(default=2.0, description="Weight of the squared error at the last position.")

    def build(self, generator: torch.Generator) -> None:
        self.weights = nn.Buffer(torch.linspace(self.settings.first, self.settings.last, self.positions))

    def weigh(self, batch: BatchView) -> tuple[Tensor | None, Tensor | None]:
        return self.weights[mask_positions(batch)], None


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
        decay: Fraction = Field(default=0.99, description="Decay per step of the mean squared error at each position.")
        floor: Share = Field(default=0.1, description="Least weight of a position.")
        l1: bool = Field(default=False, description="Weight the L1 term by position as well (relu).")

    def build(self, generator: torch.Generator) -> None:
        self.error = RunningMean(self.settings.decay, self.positions)

    def weigh(self, batch: BatchView) -> tuple[Tensor | None, Tensor | None]:
        mask_position = mask_positions(batch)
        known, error = self.error.known[mask_position], self.error.value[mask_position]  # 0 if not known
        mean = error.sum() / known.sum().clamp_min(1)
        share = error / mean.clamp_min(torch.finfo(error.dtype).tiny)
        weights = torch.where(known, self.settings.floor + (1 - self.settings.floor) * share, 1.0)
        if not self.settings.l1:
            return weights, None
        return weights, weights * (batch.count.sum() / (batch.count * weights).sum())

    def after(self, batch: BatchView) -> None:
        mask_position = mask_positions(batch)
        error, count = (
            sum_by(mask_position, sums.detach(), self.positions) for sums in (batch.squared_error, batch.count)
        )
        self.error.add_mean(error, count)


def specialization(sae: SparseAutoencoder) -> Tensor:
    """Specialization s [F] in [0, 1]: 1 for a mask that is on at one position only, 0 for an equal mask at all T.

    s_j = 1 - H(m_j) / ln T, H the entropy of the mask's column over its sum. A latent that is off everywhere has 0.
    """
    weights = sae.mask.weights()
    assert weights is not None
    T = sae.cfg.mask.positions
    m = weights_at(weights, torch.arange(T, device=sae.W_dec.device)).to(sae.W_dec.dtype)
    total = m.sum(0)
    m = m / torch.where(total > 0, total, 1)
    return torch.where(total > 0, 1 + torch.special.xlogy(m, m).sum(0) / math.log(T), 0).clamp(0, 1)


@part("specialised_weights")
class SpecialisedWeights(Part):
    """The squared error has more weight at positions that position-specific latents explain (A4).

        share_n = sum_j f_nj s_j / sum_j f_nj     s [F]: `specialization` under the current mask
        w_p     = (1 - beta) + beta * e_p / (mean of e over known positions)     e: running mean of share_n at p

    Decided here: `beta` 0.5, so that every position has weight; tokens without an active latent don't count; shares are
    relative to other positions, because s itself stays small while soft masks are nearly flat.
    """

    class Settings(PartSettings):
        beta: Share = Field(default=0.5, description="Share of a position's weight that follows specialised latents.")
        decay: Fraction = Field(default=0.99, description="Decay per step of the mean share of specialised latents.")

    def build(self, generator: torch.Generator) -> None:
        self.share = RunningMean(self.settings.decay, self.positions)

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        if sae.mask.kind == "none":
            raise ValueError("mask.kind: none is not allowed with specialised_weights; it needs a mask")
        if sae.mask.positions < 2:
            raise ValueError("mask.positions: 1 is not allowed with specialised_weights; it must be at least 2")

    def weigh(self, batch: BatchView) -> tuple[Tensor | None, Tensor | None]:
        weights = 1 - self.settings.beta + self.settings.beta * self.share.relative()
        return weights[mask_positions(batch)], None

    def after(self, batch: BatchView) -> None:
        specializations = specialization(batch.sae)
        total = batch.summed(torch.ones_like(specializations))
        is_active = total > 0
        share = torch.where(is_active, batch.summed(specializations) / total, 0)
        mask_position = batch.sae.mask.rows(batch.pos)
        sums, counts = (sum_by(mask_position, x, self.positions) for x in (share, is_active.to(share.dtype)))
        self.share.add_mean(sums, counts)

    def report(self) -> dict[str, Any]:
        return {"share": float((self.share.value * self.share.known).sum() / self.share.known.sum().clamp_min(1))}
