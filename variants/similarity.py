"""Penalties on decoder rows that are too similar."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..engine.config import SAEConfig
from ..engine.parts import BatchView, Part, PartSettings, part
from .running_mean import RunningMean


def sample_indices(n: int, most: int, batch: BatchView) -> Tensor:
    """0..n-1, or `most` of them drawn at random."""
    if n <= most:
        return torch.arange(n, device=batch.x.device)
    return torch.randperm(n, generator=batch.generator())[:most].to(batch.x.device)


@part("dynamic_margin")
class DynamicMargin(Part):
    """Decoder rows are pushed apart where they are more similar than usual (E1 to E3, E5).

    At each step, over the pairs i != j of min(F, `sample`) rows drawn at random, with c_ij the cosine:

        margin  = EMA(mean c_ij) + deviations * EMA(std c_ij)
        penalty = coefficient * D * (F - 1) * mean_ij relu(c_ij - margin)^2

    EMAs are over earlier steps, with `decay`; in the first step, over itself. (F - 1) times the mean over pairs is the
    average overlap of a row with all others, for any sample size. If each row had one twin and were orthogonal to all
    others, the penalty would be about coefficient * D, as much as reconstructing nothing. Random directions cost about
    coefficient * 0.006 F. The logs give decay and deviations, but neither the penalty's form nor its weight.
    """

    class Settings(PartSettings):
        coefficient: float = Field(default=1.0, ge=0, description="Weight of the penalty, in units of D.")
        decay: float = Field(
            default=0.95, ge=0, lt=1, description="Decay per step of the mean and standard deviation of cosines."
        )
        deviations: float = Field(
            default=2.0, ge=0, description="Margin above the mean cosine, in standard deviations."
        )
        sample: int = Field(
            default=512, ge=2, description="Largest number of decoder rows that a step compares, drawn at random."
        )

    def __init__(self, settings: Any, sae: SAEConfig, positions: int, generator: torch.Generator):
        super().__init__(settings, sae, positions, generator)
        self.usual = RunningMean(settings.decay, 3)  # mean, std, share of pairs above the margin
        self._batch_statistics: Tensor | None = None

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        if sae.d_sae < 2:
            raise ValueError(f"d_sae: {sae.d_sae} is not allowed with dynamic_margin; it must be at least 2")

    def margin(self, statistics: Tensor) -> Tensor:
        return statistics[0] + self.settings.deviations * statistics[1]

    def penalty(self, batch: BatchView) -> Tensor:
        F, D = batch.sae.W_dec.shape
        rows = batch.sae.W_dec[sample_indices(F, self.settings.sample, batch)]  # of norm 1
        cosine, off_diagonal = rows @ rows.T, 1 - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
        pairs = len(rows) * (len(rows) - 1)
        with torch.no_grad():
            mean = (cosine * off_diagonal).sum() / pairs
            std = ((cosine - mean).square() * off_diagonal).sum().div(pairs).sqrt()
            statistics = torch.stack([mean, std, torch.zeros_like(mean)])
            margin = self.margin(torch.where(self.usual.known, self.usual.value, statistics))
            statistics[2] = ((cosine > margin) * off_diagonal).sum() / pairs
        self._batch_statistics = statistics
        excess = (cosine - margin).clamp_min(0) * off_diagonal
        return self.settings.coefficient * D * (F - 1) / pairs * excess.square().sum()

    def after(self, batch: BatchView) -> None:
        if self._batch_statistics is not None:
            self.usual.add(self._batch_statistics)
            self._batch_statistics = None

    def report(self) -> dict[str, Any]:
        mean, std, above = self.usual.value.tolist()
        return {"margin": float(self.margin(self.usual.value)), "mean": mean, "std": std, "above": above}
