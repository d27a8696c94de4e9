"""Sparsify codes further: L1 before the mask, latents dropped at random, and only the largest of each group."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..engine.config import SAEConfig
from ..engine.parts import BatchView, Part, PartSettings, part
from .norms import step_weight
from .number_types import Fraction

WEAK = 0.1


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


@part("feature_dropout")
class FeatureDropout(Part):
    """Each latent of each token is dropped with probability p in training, and the others grow by 1 / (1 - p) (D3).

    This acts after the mask and before topk and batchtopk select. The factor 1 / (1 - p) preserves the mean of f and of
    L1.

    A feature's importance, which the log tracks but does not define, is the mean over tokens of |f_j W_dec[j]|, which
    is the mean of f_j because decoder rows have norm 1. It is a running mean over about 100 batches. The report has its
    quantiles over latents, and the share of `weak` latents, below a tenth of the mean.
    """

    class Settings(PartSettings):
        p: Fraction = Field(default=0.2, description="Probability of dropping a latent of a token in training.")

    def build(self, generator: torch.Generator) -> None:
        self.importance = nn.Buffer(torch.zeros(self.cfg.d_sae))

    def latents(self, f: Tensor, batch: BatchView) -> Tensor:
        if not batch.training or self.settings.p == 0:
            return f
        # The N F numbers are drawn on the device of f: on the CPU they would take longer than the step.
        generator = torch.Generator(f.device).manual_seed(batch.generator().initial_seed())
        survives = torch.empty_like(f, dtype=torch.bool).bernoulli_(1 - self.settings.p, generator=generator)
        return f * survives / (1 - self.settings.p)

    def after(self, batch: BatchView) -> None:
        self.importance.lerp_(batch.f.mean(0), step_weight(batch.step))

    def report(self) -> dict[str, Any]:
        shares = torch.tensor([0.1, 0.5, 0.9, 1.0], device=self.importance.device)
        quantiles = torch.quantile(self.importance, shares).tolist()
        names = ("importance_10", "importance_50", "importance_90", "importance_max")
        figures = dict(zip(names, quantiles, strict=True))
        return figures | {"weak": float((self.importance < WEAK * self.importance.mean()).float().mean())}


@part("winner_takes_all")
class WinnerTakesAll(Part):
    """Only the largest of each `group` neighbouring latents of a token stays, the others are 0 (D4).

    This acts after the mask and before topk and batchtopk select. The last group may be smaller.
    """

    class Settings(PartSettings):
        group: int = Field(default=4, ge=2, le=10**15, description="Neighbouring latents of which the largest stays.")

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        if settings.group > sae.d_sae:
            raise ValueError(f"group: {settings.group} is not allowed; it must be at most d_sae ({sae.d_sae})")

    def latents(self, f: Tensor, batch: BatchView) -> Tensor:
        group = self.settings.group
        groups = torch.nn.functional.pad(f, (0, -f.shape[1] % group)).unflatten(1, (-1, group))
        best = groups.detach().argmax(2, keepdim=True)
        won = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, best, True)
        return f * won.flatten(1)[:, : f.shape[1]]
