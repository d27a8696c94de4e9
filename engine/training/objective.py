"""What a dictionary makes of a batch in training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.code import SparseCode
from ...kernels.loss import PositionSums


@dataclass
class Objective:
    """The loss of a batch, and what is counted of it.

    `loss`: scalar, to be minimised. `sums`: squared error, L1, L0 and count per position. `fired` [F]: which latents were
    active on some token. `aux_loss`: the AuxK part of `loss`, or None. `least_kept`: see `SparseAutoencoder.follow`.
    """

    loss: Tensor
    sums: PositionSums
    fired: Tensor
    aux_loss: Tensor | None = None
    least_kept: Tensor | None = None

    def add(self, other: "Objective") -> "Objective":
        """The objective of two chunks of a batch, whose losses are weighted by their share of it already."""
        aux_loss = None if self.aux_loss is None or other.aux_loss is None else self.aux_loss + other.aux_loss
        least_activation = (
            None if self.least_kept is None or other.least_kept is None else self.least_kept.minimum(other.least_kept)
        )
        sums = PositionSums(*(a + b for a, b in zip(self.sums, other.sums, strict=True)))
        return Objective(self.loss + other.loss, sums, self.fired | other.fired, aux_loss, least_activation)


def least_kept(code: SparseCode, dictionaries: int = 1) -> Tensor:
    """The least positive activation in the ragged code of each of S dictionaries [S]; infinite if there is none."""
    values = code.live(code.values.detach())
    positive = torch.where(values > 0, values, torch.inf)
    if dictionaries == 1 or code.offsets is None:
        return positive.amin().expand(1)
    firsts = code.offsets[:: code.n_tokens // dictionaries].contiguous()
    return torch.segment_reduce(positive, "min", offsets=firsts, unsafe=True)
