"""How alike decoder rows may be."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..engine.config import SAEConfig
from ..engine.parts import Part, PartSettings, Seen, part
from .running import Average


def some(n: int, most: int, seen: Seen) -> Tensor:
    """All of 0..n-1, or `most` of them drawn at random."""
    if n <= most:
        return torch.arange(n, device=seen.x.device)
    return torch.randperm(n, generator=seen.generator())[:most].to(seen.x.device)


@part("dynamic_margin")
class DynamicMargin(Part):
    """Decoder rows are pushed apart where they are more alike than is usual among them (runs E1 to E3 and E5).

    In each step, over the pairs i != j of min(F, `sample`) rows drawn at random, with c_ij the cosine:

        margin  = EMA(mean c_ij) + deviations * EMA(std c_ij)
        penalty = coefficient * D * (F - 1) * mean_ij relu(c_ij - margin)^2

    EMAs are those of the steps before, with `decay`; in the first step, that step's own. (F - 1) times the mean over pairs
    is what a row has on average with all others together, whatever the sample: if each row had one twin, and everything
    else were orthogonal, the penalty would be about coefficient * D, as much as reconstructing nothing. Random directions
    cost about coefficient * 0.006 F. The logs give decay and deviations, neither the penalty's form nor its weight.
    """

    class Settings(PartSettings):
        coefficient: Annotated[float, Field(ge=0)] = 1.0
        decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
        deviations: Annotated[float, Field(ge=0)] = 2.0
        sample: Annotated[int, Field(ge=2)] = 512

    def __init__(self, settings: Any, sae: SAEConfig, positions: int, generator: torch.Generator):
        super().__init__(settings, sae, positions, generator)
        self.usual = Average(settings.decay, 3)  # mean, std, share of pairs above the margin
        self._now: Tensor | None = None

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        if sae.d_sae < 2:
            raise ValueError(f"d_sae: {sae.d_sae} is not allowed with dynamic_margin; it compares at least 2 latents")

    def margin(self, usual: Tensor) -> Tensor:
        return usual[0] + self.settings.deviations * usual[1]

    def penalty(self, seen: Seen) -> Tensor:
        F, D = seen.sae.W_dec.shape
        rows = seen.sae.W_dec[some(F, self.settings.sample, seen)]  # of norm 1
        cosine, apart = rows @ rows.T, 1 - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
        pairs = len(rows) * (len(rows) - 1)
        with torch.no_grad():
            mean = (cosine * apart).sum() / pairs
            std = ((cosine - mean).square() * apart).sum().div(pairs).sqrt()
            now = torch.stack([mean, std, torch.zeros_like(mean)])
            margin = self.margin(torch.where(self.usual.known, self.usual.value, now))
            now[2] = ((cosine > margin) * apart).sum() / pairs
        self._now = now
        excess = (cosine - margin).clamp_min(0) * apart
        return self.settings.coefficient * D * (F - 1) / pairs * excess.square().sum()

    def after(self, seen: Seen) -> None:
        if self._now is not None:
            self.usual.add(self._now)
            self._now = None

    def report(self) -> dict[str, Any]:
        mean, std, above = self.usual.value.tolist()
        return {"margin": float(self.margin(self.usual.value)), "mean": mean, "std": std, "above": above}
