"""Contrastive terms on codes by position."""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..engine.parts import BatchView, Part, PartSettings, part
from .number_types import Factor, Weight


def pairs_by_position(pos: Tensor, size: int, n_positions: int, generator: torch.Generator) -> Tensor:
    """Draw at most `size` tokens of pos [N]: two at each position, then two more, and so on. Returns their indices."""
    N = len(pos)
    mixed = torch.randperm(N, generator=generator).to(pos.device)
    turn = torch.randperm(n_positions, generator=generator).to(pos.device)
    mixed = mixed[pos[mixed].argsort(stable=True)]  # sorted by position, in random order within a position
    position = pos[mixed].contiguous()
    rank = torch.arange(N, device=pos.device) - torch.searchsorted(position, position)  # within its position
    return mixed[(rank // 2 * n_positions + turn[position]).argsort(stable=True)[:size]]


def info_nce(f: Tensor, label: Tensor, temperature: float) -> Tensor:
    """InfoNCE loss, the mean over anchors i for which another item has their label of

        -ln(sum_{k != i, label_k = label_i} exp(z_i z_k / temperature) / sum_{k != i} exp(z_i z_k / temperature))

    with z = f / |f|, f [M, F] and label [M]. 0 without anchors.
    """
    z = F.normalize(f, dim=1)
    is_self = torch.eye(len(f), dtype=torch.bool, device=f.device)
    absent = torch.finfo(z.dtype).min  # instead of -inf, whose logsumexp over a whole row has no gradient
    similar = (z @ z.T / temperature).masked_fill(is_self, absent)
    positive = (label[:, None] == label) & ~is_self
    is_anchor = positive.any(1)
    anchor_loss = similar.logsumexp(1) - similar.masked_fill(~positive, absent).logsumexp(1)
    return torch.where(is_anchor, anchor_loss, 0).sum() / is_anchor.sum().clamp_min(1)


@part("position_contrast")
class PositionContrast(Part):
    """Codes of tokens at the same position attract, those of different positions repel (A8).

        penalty = coefficient * D * info_nce(f[sample], pos[sample], temperature)

    The sample has at most `sample` tokens, in pairs of one position, so that anchors have positives. Decided here: D
    converts nats to the units of a squared error, and with `coefficient` 0.01 reconstruction stays the larger term.
    """

    reads = frozenset({"f"})

    class Settings(PartSettings):
        coefficient: Weight = Field(default=0.01, description="Weight of the contrastive loss (nats), in units of D.")
        temperature: Factor = Field(default=0.1, description="Divisor of cosines between codes in the softmax.")
        sample: int = Field(default=256, ge=4, description="Largest number of tokens that a step compares.")

    def build(self, generator: torch.Generator) -> None:
        self.contrast = nn.Buffer(torch.zeros(()))

    def penalty(self, batch: BatchView) -> Tensor | None:
        chosen = pairs_by_position(batch.pos, self.settings.sample, batch.n_positions, batch.generator())
        loss = info_nce(batch.f[chosen], batch.pos[chosen], self.settings.temperature)
        self.contrast.copy_(loss.detach())
        return self.settings.coefficient * self.cfg.d_in * loss

    def report(self) -> dict[str, Any]:
        return {"info_nce": float(self.contrast)}
