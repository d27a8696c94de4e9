"""What L1 counts."""

from typing import Any

from torch import Tensor

from ..engine.config import SAEConfig
from ..engine.parts import BatchView, Part, part


@part("l1_before_mask")
class L1BeforeMask(Part):
    """L1 counts activations [N, F] as they are before the mask, not the masked f (runs B3 to B5).

        loss = squared error + l1_coefficient * sum_j acts_nj        f = acts * mask[pos]

    So a latent pays for activity at positions where its mask leaves little of it. What comes before it in `parts` at the
    same place, such as `layer_norm`, counts as part of the activations. topk and batchtopk have no L1: it changes nothing
    there.
    """

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        if sae.mask.kind == "none":
            raise ValueError(
                "mask.kind: none is not allowed with l1_before_mask; L1 counts what a mask has not yet cut"
            )

    def does(self, hook: str) -> bool:
        return super().does(hook) and (hook != "acts" or self.cfg.activation == "relu")

    def acts(self, acts: Tensor, batch: BatchView) -> Tensor:
        batch.penalised = acts
        return acts
