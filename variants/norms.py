"""Normalisations of a token's latents, of each latent, and of each dimension of x."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..engine.parts import BatchView, Part, PartSettings, part

EPS = 1e-5
DECAY = 0.99  # per step: a mean over about 100 batches


def step_weight(step: int) -> float:
    """The weight of a step in a running mean: equal to earlier steps', and at least 1 - DECAY."""
    return max(1 - DECAY, 1 / (step + 1))


@part("layer_norm")
class LayerNorm(Part):
    """Layer norm over a token's latents v [N, F], after the ReLU (`acts`, B5) or before it (`pre`, B8).

        y_j = g_j (v_j - mean v) / sqrt(var v + 1e-5) + b_j          g, b [F] learned
        pre:  f = relu(y)                     acts:  f = relu(y) where v > 0, else 0

    Decided here: the log's norm of a ReLU's output would be nowhere 0 and mostly negative. So a second ReLU follows,
    and what was 0 stays 0; an activation must exceed the token's mean. g starts as sqrt(D / F), at which |f| is about
    |x| = sqrt(D) for any F (1 in the logs), b as 0. With a hard mask, mean and variance are over the latents that are
    on at the token's position. Otherwise latents would get gradients from other positions.
    """

    class Settings(PartSettings):
        place: Literal["acts", "pre"] = Field(default="acts", description="acts: after the ReLU. pre: before it.")

    def build(self, generator: torch.Generator) -> None:
        self.scale = nn.Parameter(torch.full((self.cfg.d_sae,), math.sqrt(self.cfg.d_in / self.cfg.d_sae)))
        self.shift = nn.Parameter(torch.zeros(self.cfg.d_sae))

    def does(self, hook: str) -> bool:
        return hook == self.settings.place or (hook not in ("pre", "acts") and super().does(hook))

    def pre(self, pre: Tensor, batch: BatchView) -> Tensor:
        return self._normalised(pre, batch)

    def acts(self, acts: Tensor, batch: BatchView) -> Tensor:
        return torch.relu(self._normalised(acts, batch)) * (acts > 0)

    def _normalised(self, v: Tensor, batch: BatchView) -> Tensor:
        mask = batch.sae.mask
        if mask.fixed is None or mask.blend is not None:
            return nn.functional.layer_norm(v, v.shape[1:], self.scale, self.shift, EPS)
        on = mask.fixed.index_select(0, mask.rows(batch.pos))
        count = on.sum(1, keepdim=True).clamp_min(1)
        centred = (v - (v * on).sum(1, keepdim=True) / count) * on
        size = (centred.square().sum(1, keepdim=True) / count + EPS).sqrt()
        return (centred / size * self.scale + self.shift) * on


@part("feature_norm")
class FeatureNorm(Part):
    """Each latent is divided by its typical size: f_j = exp(s_j) a_j / r_j, s [F] learned, initially 0 (D2).

        r_j^2 = (1 + sum_n a_nj^2) / (1 + number of n with a_nj > 0)

    with sums over the tokens of past batches, weighted 0.99 to the power of the batch's age. r is the root mean square
    where the latent is active; the 1, a token of usual size, stabilises latents that are rarely active. 0 stays 0.
    Decided here: r is a constant to the gradient; decoder rows have norm 1, so exp(s) lets latents differ in size. L1
    counts normalised activations.
    """

    def build(self, generator: torch.Generator) -> None:
        self.log_scale = nn.Parameter(torch.zeros(self.cfg.d_sae))
        self.squares = nn.Buffer(torch.zeros(self.cfg.d_sae))
        self.active = nn.Buffer(torch.zeros(self.cfg.d_sae))

    @property
    def size(self) -> Tensor:
        """r [F]."""
        return ((1 + self.squares) / (1 + self.active)).sqrt()

    def acts(self, acts: Tensor, batch: BatchView) -> Tensor:
        normalised = acts * (self.log_scale.exp() / self.size)
        if batch.training:
            with torch.no_grad():
                self.squares.mul_(DECAY).add_(acts.square().sum(0))
                self.active.mul_(DECAY).add_((acts > 0).sum(0))
        return normalised


@part("batch_norm")
class BatchNorm(Part):
    """Batch norm of the D features of x before the encoder, which sees (x - mean) / sqrt(var + 1e-5) of each (D4).

    Mean and variance [D] are the batch's in training, and running means over about 100 batches otherwise. Decided here:
    there is no learned scale or shift, which W_enc and b_enc are; and b_dec is added, because the encoder subtracts it
    from its input. The decoder still reconstructs x itself.
    """

    def build(self, generator: torch.Generator) -> None:
        self.mean = nn.Buffer(torch.zeros(self.cfg.d_in))
        self.variance = nn.Buffer(torch.ones(self.cfg.d_in))

    def input(self, x: Tensor, batch: BatchView) -> Tensor:
        mean, variance = self.mean, self.variance
        if batch.training:
            variance, mean = torch.var_mean(x, 0, correction=0)
            with torch.no_grad():
                self.mean.lerp_(mean, step_weight(batch.step))
                self.variance.lerp_(variance, step_weight(batch.step))
        return (x - mean) / (variance + EPS).sqrt() + batch.sae.b_dec * batch.sae.unit
