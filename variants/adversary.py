"""Reduce what a dictionary encodes of a spurious attribute: an adversarial probe, and penalties on decoder rows."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..engine.config import SAEConfig
from ..engine.parts import BatchView, PartSettings, part
from ..kernels.numerics import sum_by
from .number_types import Factor, Fraction, Weight
from .running_mean import Averaging, RunningMean
from .similarity import sample_indices

TINY = torch.finfo(torch.float32).tiny


def class_shares(attribute: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each token's share of its class [2, N], by attribute, and whether the class occurs [2]. Absent: shares are 0."""
    member = torch.stack([attribute == 0, attribute == 1]).to(dtype)
    count = member.sum(1, keepdim=True)
    return member / count.clamp_min(1), count.flatten() > 0


@part("adversary")
class Adversary(Averaging):
    """A probe learns to predict the attribute y from codes, and the dictionary makes codes orthogonal to its direction
    (E2, E3).

        probe        logit_n = stop_gradient(f_n) . w + b       w [F], b; binary cross-entropy, both classes weighted equally
        dictionary   lambda * D * mean_n |cos(f_n, stop_gradient(w))|
                     lambda = strength * max(A - 0.5, 0.1)

    Both are terms of the loss, and neither's gradient reaches the other's parameters. A is the moving average of the
    probe's balanced accuracy on batches before it learns from them, so 0.5 is chance. Batches with a single class don't
    change it. If f . w = 0 for every token, the probe cannot separate the classes. The logs specify neither what the
    cosine is taken of, nor how the probe learns (here by the dictionary's optimiser, `pace` times as fast), nor the
    decay of A.
    """

    class Settings(PartSettings):
        strength: Weight = Field(default=0.1, description="Weight of the dictionary's term, in units of D.")
        decay: Fraction = Field(default=0.95, description="Decay per step of the mean of the probe's accuracy.")
        pace: Factor = Field(default=10.0, description="Learning rate of the probe as a multiple of the dictionary's.")

    reads = frozenset({"attribute", "f"})

    def build(self, generator: torch.Generator) -> None:
        self.direction, self.bias = nn.Parameter(torch.zeros(self.cfg.d_sae)), nn.Parameter(torch.zeros(()))
        self.paces = {"direction": self.settings.pace, "bias": self.settings.pace}
        self.accuracy = RunningMean(self.settings.decay, start=0.5)
        self.cosine = RunningMean(self.settings.decay)

    @property
    def pressure(self) -> Tensor:
        """lambda"""
        return self.settings.strength * (self.accuracy.value - 0.5).clamp_min(0.1)

    def penalty(self, batch: BatchView) -> Tensor:
        f = batch.f.to(self.direction.dtype)
        share, has_class = class_shares(batch.attribute, f.dtype)
        logit = f.detach() @ self.direction + self.bias
        sign = 1 - 2 * (batch.attribute == 1).to(f.dtype)
        entropy = (share * softplus(sign * logit)).sum() / 2
        with torch.no_grad():
            right = ((logit > 0) == (batch.attribute == 1)).to(f.dtype)
            accuracy = (share @ right).mean()
            w = self.direction / self.direction.norm().clamp_min(TINY)
        cosine = ((f @ w).abs() / f.square().sum(1).clamp_min(TINY).sqrt()).mean()
        self.accuracy.later(accuracy, has_class.all())
        self.cosine.later(cosine)
        return self.pressure * batch.x.shape[1] * cosine + entropy

    def report(self) -> dict[str, Any]:
        """`cosine` is the mean of its magnitude."""
        values = torch.stack([self.accuracy.value, self.pressure, self.cosine.value]).tolist()
        return dict(zip(("accuracy", "lambda", "cosine"), values, strict=True))


@part("selective_orthogonality")
class SelectiveOrthogonality(Averaging):
    """Decoder rows of the latents that the loss depends on most are made orthogonal (E2, E3).

    The attribution of latent j is the moving average of sum_n |f_nj dL/df_nj|, L being the whole loss. At most `sample`
    latents above the `percentile` are drawn at random. With c_ij the cosines of their decoder rows:

        penalty = coefficient * D * mean_i sum_{j != i} c_ij^2

    If each had one twin among those drawn, this would be coefficient * D. Latents without attribution never count. The
    logs specify the percentile, but neither the penalty's weight nor the decay of the attribution.
    """

    class Settings(PartSettings):
        coefficient: Weight = Field(default=0.1, description="Weight of the penalty, in units of D.")
        percentile: float = Field(default=85.0, ge=0, lt=100, description="Latents above this percentile are chosen.")
        decay: Fraction = Field(default=0.95, description="Decay per step of the mean of the attribution.")
        sample: int = Field(default=512, ge=2, description="Latents that a step draws and compares, at most.")

    def build(self, generator: torch.Generator) -> None:
        self.attribution = RunningMean(self.settings.decay, self.cfg.d_sae)
        self.cosine = RunningMean(self.settings.decay)  # mean square among the latents drawn

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        if sae.d_sae - int(sae.d_sae * settings.percentile / 100) < 2:
            raise ValueError(
                f"percentile: {settings.percentile:g} is not allowed; it must leave at least 2 of {sae.d_sae} latents"
            )

    def penalty(self, batch: BatchView) -> Tensor:
        self._watch(batch)
        F, D = batch.sae.W_dec.shape
        above = self.attribution.value.topk(F - int(F * self.settings.percentile / 100)).indices
        chosen = above[sample_indices(len(above), self.settings.sample, batch)]
        rows, counts = batch.sae.W_dec[chosen], (self.attribution.value[chosen] > 0).float()
        pair_weights = counts[:, None] * counts - torch.diag(counts)
        squares = ((rows @ rows.T).square() * pair_weights).sum()
        self.cosine.later(squares / pair_weights.sum().clamp_min(1))
        return self.settings.coefficient * D / len(chosen) * squares

    def _watch(self, batch: BatchView) -> None:
        """Record the attribution when the gradient of the codes is computed."""
        code, F = batch.code, batch.sae.cfg.d_sae
        activations = batch.f if code is None else code.values
        if not activations.requires_grad:
            return
        value = activations.detach()  # the graph holds the hook, so the hook must not hold the graph
        code = None if code is None else code.with_values(value)

        def keep_attribution(gradient: Tensor) -> None:
            attribution = (value.float() * gradient.detach().float()).abs()
            if code is None:
                self.attribution.later(attribution.sum(0))
            else:
                latents = code.live(code.indices).flatten().long()
                self.attribution.later(sum_by(latents, code.live(attribution).flatten(), F))

        activations.register_hook(keep_attribution)

    def report(self) -> dict[str, Any]:
        """`share`: share of all attribution above the percentile. `cosine`: mean square among these latents."""
        attribution, F = self.attribution.value, len(self.attribution.value)
        above = attribution.topk(F - int(F * self.settings.percentile / 100)).values
        return {"share": float(above.sum() / attribution.sum().clamp_min(TINY)), "cosine": float(self.cosine.value)}


@part("spurious_contrast")
class SpuriousContrast(Averaging):
    """Decoder rows of latents that correlate with the attribute are pushed away from the others' (E3).

        score_j = |E[f_j | y = 1] - E[f_j | y = 0]| / std f_j

    by moving averages over steps, both classes weighted equally. The `share` of latents with the largest score are the
    spurious ones S, the others O. With at most `sample` of each drawn at random, c_ij the cosine of their decoder rows
    and m = 2 / sqrt(D), two standard deviations of that of random directions:

        penalty = coefficient * D * |O| * mean_{i in S, j in O} relu(|c_ij| - m)^2

    |O| times the mean over pairs is the overlap of one spurious row with all others. Random directions cost about
    coefficient * 0.012 |O|. The logs only say that a contrastive loss separates spuriously correlated features.
    """

    class Settings(PartSettings):
        coefficient: Weight = Field(default=0.3, description="Weight of the penalty, in units of D.")
        share: float = Field(default=0.1, gt=0, lt=1, description="Share of spurious latents, by largest score.")
        decay: Fraction = Field(default=0.99, description="Decay per step of the mean activations and squares.")
        sample: int = Field(default=512, ge=1, description="Latents per group that a step draws and compares, at most.")

    reads = frozenset({"attribute", "f"})
    least_latents = 2

    def build(self, generator: torch.Generator) -> None:
        self.spurious = max(1, int(self.settings.share * self.cfg.d_sae))
        shape = 2, self.cfg.d_sae  # by class
        self.mean, self.square = (RunningMean(self.settings.decay, *shape) for _ in range(2))  # of f and f^2
        self.alike = RunningMean(self.settings.decay)  # mean square of the cosines

    @property
    def score(self) -> Tensor:
        """Score [F], 0 until both classes have occurred."""
        mean_without, mean_with = self.mean.value
        variance = self.square.value.mean(0) - self.mean.value.mean(0).square()
        standardised = (mean_with - mean_without).abs() / variance.clamp_min(0).sqrt().clamp_min(TINY)
        return torch.where(self.mean.known.all(0) & (variance > 0), standardised, 0.0)

    def penalty(self, batch: BatchView) -> Tensor:
        D, score = batch.sae.W_dec.shape[1], self.score
        order = score.argsort(descending=True, stable=True)
        groups = order[: self.spurious], order[self.spurious :]
        inside, outside = (group[sample_indices(len(group), self.settings.sample, batch)] for group in groups)
        cosine = batch.sae.W_dec[inside] @ batch.sae.W_dec[outside].T
        counts = (score[inside] > 0).float()[:, None]
        self.alike.later((cosine.square() * counts).sum() / (counts.sum() * len(outside)).clamp_min(1))
        excess = (cosine.abs() - 2 / D**0.5).clamp_min(0).square() * counts
        return self.settings.coefficient * D * len(groups[1]) * excess.mean()

    def after(self, batch: BatchView) -> None:
        f = batch.f.detach().to(self.mean.value.dtype)
        share, has_class = class_shares(batch.attribute, f.dtype)
        self.mean.add(share @ f, has_class[:, None])
        self.square.add(share @ f.square(), has_class[:, None])
        super().after(batch)

    def report(self) -> dict[str, Any]:
        """`score`: mean over the spurious latents. `cosine`: mean square between them and the others."""
        mean_score = self.score.topk(self.spurious).values.mean()
        return {"score": float(mean_score), "cosine": float(self.alike.value)}
