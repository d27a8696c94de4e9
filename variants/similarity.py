"""Penalties on decoder rows that are similar or overlap."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..engine.parts import BatchView, Part, PartSettings, part
from .number_types import Fraction, Weight
from .running_mean import Averaging, RunningMean


def sample_indices(n: int, most: int, batch: BatchView) -> Tensor:
    """0..n-1, or `most` of them drawn at random."""
    if n <= most:
        return torch.arange(n, device=batch.x.device)
    return torch.randperm(n, generator=batch.generator())[:most].to(batch.x.device, non_blocking=True)


@part("dynamic_margin")
class DynamicMargin(Averaging):
    """Decoder rows are pushed apart where they are more similar than usual (E1 to E3, E5).

    At each step, over the pairs i != j of min(F, `sample`) rows drawn at random, with c_ij the cosine:

        margin  = EMA(mean c_ij) + deviations * EMA(std c_ij)
        penalty = coefficient * D * (F - 1) * mean_ij relu(c_ij - margin)^2

    EMAs are over earlier steps, with `decay`; in the first step, over itself. (F - 1) times the mean over pairs is the
    average overlap of a row with all others, for any sample size. If each row had one twin and were orthogonal to all
    others, the penalty would be about coefficient * D, as much as reconstructing nothing. Random directions cost about
    coefficient * 0.006 F. The logs give decay and deviations, but neither the penalty's form nor its weight.
    """

    least_latents = 2

    class Settings(PartSettings):
        coefficient: Weight = Field(default=1.0, description="Weight of the penalty, in units of D.")
        decay: Fraction = Field(default=0.95, description="Decay per step of cosines' mean and standard deviation.")
        deviations: Weight = Field(default=2.0, description="Margin above the mean cosine, in standard deviations.")
        sample: int = Field(default=512, ge=2, description="Decoder rows that a step draws and compares, at most.")

    def build(self, generator: torch.Generator) -> None:
        self.usual = RunningMean(self.settings.decay, 3)  # mean, std, share of pairs above the margin

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
        self.usual.later(statistics)
        excess = (cosine - margin).clamp_min(0) * off_diagonal
        return self.settings.coefficient * D * (F - 1) / pairs * excess.square().sum()

    def report(self) -> dict[str, Any]:
        mean, std, above = self.usual.value.tolist()
        return {"margin": float(self.margin(self.usual.value)), "mean": mean, "std": std, "above": above}


class _Overlap(Part):
    """A penalty on the overlap of decoder rows, on a sample of M rows W [M, D] at every step.

        penalty = strength D (D mean_{i != j} c_ij^2)        c = W W^T, cosines, because decoder rows have norm 1

    The mean over pairs of the sample estimates that over all F rows. Decided here: c^2 of random directions is 1 / D on
    average, so the bracket is about 1 before training for any F and M, and `strength` is a share of |x|^2. A frozen
    random decoder, the control, has no penalty. `positive_only`: only positive cosines count.
    """

    positive_only = False

    class Settings(PartSettings):
        strength: Weight = Field(default=0.1, description="Cost of random decoder rows, as a share of |x|^2.")
        rows: int = Field(default=1024, ge=2, description="Decoder rows that a step draws and compares, at most.")

    def penalty(self, batch: BatchView) -> Tensor | None:
        W, settings = batch.sae.W_dec, self.settings
        if not W.requires_grad:
            return None
        W = W.index_select(0, sample_indices(len(W), settings.rows, batch))
        c = (W @ W.T).fill_diagonal_(0)
        c = c.clamp_min(0) if self.positive_only else c
        pairs = max(1, len(c) * (len(c) - 1))
        return settings.strength * batch.sae.cfg.d_in**2 / pairs * c.square().sum()


@part("decoder_separation")
class DecoderSeparation(_Overlap):
    """Decoder rows are pushed apart: only positive c count (D2). Opposite directions may stay."""

    positive_only = True


@part("decoder_orthogonality")
class DecoderOrthogonality(_Overlap):
    """Decoder rows are pulled towards orthogonality, |W W^T - I|^2: c of both signs count (D4)."""
