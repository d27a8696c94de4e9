"""A sparsity penalty on activations before the mask."""

from typing import Any

from torch import Tensor

from ..engine.config import SAEConfig
from ..engine.parts import BatchView, Part, part


@part("l1_before_mask")
class L1BeforeMask(Part):
    """L1 counts activations [N, F] before the mask, not the masked f (B3 to B5).

        loss = squared error + l1_coefficient * sum_j acts_nj        f = acts * mask[pos]

    A latent thus pays for activity at positions where its mask leaves little of it. Earlier parts at the same place,
    such as `layer_norm`, count as part of the activations. It has no effect with topk and batchtopk, which have no L1.
    """

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        if sae.mask.kind == "none":
            raise ValueError("mask.kind: none is not allowed with l1_before_mask; it needs a mask")

    def does(self, hook: str) -> bool:
        return super().does(hook) and (hook != "acts" or self.cfg.activation == "relu")

    def acts(self, acts: Tensor, batch: BatchView) -> Tensor:
        batch.penalised = acts
        return acts
