"""Loss weights that favour positions explained by position-specific latents."""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..engine.config import SAEConfig, Share
from ..engine.parts import BatchView, ComposedDictionary, Part, PartSettings, part
from ..engine.sae import SparseAutoencoder
from ..kernels.masks import weights_at
from ..kernels.numerics import sum_by
from .running_mean import RunningMean


def specialization(sae: SparseAutoencoder | ComposedDictionary) -> Tensor:
    """Specialization s [F] in [0, 1]: 1 for a latent whose mask is on at one position only, 0 for an equal mask at all
    T.

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
        beta: Share = Field(
            default=0.5, description="Share of a position's weight that follows the specialised latents."
        )
        decay: float = Field(
            default=0.99, ge=0, lt=1, description="Decay per step of the mean share of specialised latents."
        )

    def __init__(self, settings: Any, sae: SAEConfig, positions: int, generator: torch.Generator):
        super().__init__(settings, sae, positions, generator)
        self.share = RunningMean(settings.decay, positions)

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        if sae.mask.kind == "none":
            raise ValueError("mask.kind: none is not allowed with specialised_weights; it needs a mask")
        if sae.mask.positions < 2:
            raise ValueError("mask.positions: 1 is not allowed with specialised_weights; it must be at least 2")

    def weigh(self, batch: BatchView) -> tuple[Tensor | None, Tensor | None]:
        weights = 1 - self.settings.beta + self.settings.beta * self.share.relative()
        return weights[batch.sae.mask.rows(torch.arange(batch.n_positions, device=batch.pos.device))], None

    def after(self, batch: BatchView) -> None:
        specializations = specialization(batch.sae)
        total = batch.summed(torch.ones_like(specializations))
        is_active = total > 0
        share = torch.where(is_active, batch.summed(specializations) / total, 0)
        mask_position = batch.sae.mask.rows(batch.pos)
        self.share.add_mean(
            sum_by(mask_position, share, self.positions),
            sum_by(mask_position, is_active.to(share.dtype), self.positions),
        )

    def report(self) -> dict[str, Any]:
        return {"share": float((self.share.value * self.share.known).sum() / self.share.known.sum().clamp_min(1))}
