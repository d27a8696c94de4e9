"""Penalties on decoder rows that overlap, on a sample of M rows W [M, D] at every step.

    penalty = strength D (D mean_{i != j} c_ij^2)        c = W W^T, cosines, because decoder rows have norm 1

The mean over pairs of the sample estimates that over all F rows. Decided here: c^2 of random directions is 1 / D on
average, so the bracket is about 1 before training for any F and M, and `strength` is a share of |x|^2. A frozen random
decoder, the control, has no penalty.
"""

import torch
from pydantic import Field
from torch import Tensor

from ..engine.parts import BatchView, Part, PartSettings, part


class OverlapSettings(PartSettings):
    strength: float = Field(
        default=0.1, ge=0, description="Weight of the penalty, as the share of |x|^2 that random decoder rows cost."
    )
    rows: int = Field(
        default=1024, ge=2, description="Largest number of decoder rows that a step compares, drawn at random."
    )


class _Overlap(Part):
    """The penalty on the cosines of rows drawn anew at every step, or on the positive ones alone."""

    Settings = OverlapSettings
    positive_only = False

    def penalty(self, batch: BatchView) -> Tensor | None:
        W, settings = batch.sae.W_dec, self.settings
        if not W.requires_grad:
            return None
        if settings.rows < len(W):
            chosen = torch.randperm(len(W), generator=batch.generator())[: settings.rows]
            W = W.index_select(0, chosen.to(W.device, non_blocking=True))
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
