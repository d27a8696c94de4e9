"""Gates on latents: by attention over groups of them, by position, and by statistics of their activations."""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..engine.config import Count, SAEConfig, Share
from ..engine.parts import UNSET, BatchView, Part, PartSettings, part
from ..kernels.numerics import sum_by
from .number_types import Fraction, Weight
from .running_mean import Averaging, RunningMean, means

EPS = 0.01  # standard deviations count as at least 0.1, where activations are of order 1
LEAST_SHARE = 0.01  # of an equal share; a group without gradients gets ln(0.01) * guidance = -2.3 at guidance 0.5


@part("attention_router")
class AttentionRouter(Averaging):
    """Attention from tokens to groups of latents gates the groups (A6, A7).

        q   = x W_q + P[pos]                         W_q [D, d_k], P [T, d_k]
        r   = softmax(q k^T / sqrt(d_k) + guidance * ln(G s[pos]) - 8 prior * distance[pos]^2)     k [G, d_k]
        f_j = acts_j * G r_g(j)

    G groups have F / G consecutive latents each. Uniform routing, which r starts close to, changes nothing, and zeros
    stay 0. s [T, G] is each group's share of sum |f dL/df| at a position, a running mean, at least 1% of an equal
    share. Routing favours the group with the larger gradient share (gradient-guided specialization). `prior` is a fixed
    preference for the groups near a position: group g is centred at its place in the context, and `prior` 1 is a
    Gaussian of sigma T / 4. The first `free` of the groups have none.

    Decided here: x unchanged, because the router has a position embedding of its own, added to the query; `guidance`
    below 1, because shares grow with the gates that they open; G = 8, d_k = 64.
    """

    class Settings(PartSettings):
        groups: Count = Field(default=8, description="G, the number of groups of latents; it must divide F.")
        width: Count = Field(default=64, description="d_k, the width of queries and keys.")
        guidance: Fraction = Field(default=0.5, description="Weight of the log of groups' gradient shares in routing.")
        prior: Weight = Field(default=0.0, description="Preference for near groups. 1: a Gaussian of sigma T / 4.")
        free: Share = Field(default=0.0, description="Share of the groups, the first ones, without this preference.")
        decay: Fraction = Field(default=0.99, description="Decay per step of the mean gradient shares.")

    def build(self, generator: torch.Generator) -> None:
        G, d_k = self.settings.groups, self.settings.width
        self.W_q = nn.Parameter(torch.randn(self.cfg.d_in, d_k, generator=generator) / math.sqrt(self.cfg.d_in))
        self.embedding = nn.Parameter(torch.randn(self.positions, d_k, generator=generator))
        self.keys = nn.Parameter(0.1 * torch.randn(G, d_k, generator=generator))
        self.share = RunningMean(self.settings.decay, self.positions, G, start=1 / G)
        n_free = round(self.settings.free * G)
        place = (torch.arange(self.positions) + 0.5) / self.positions
        centre = (torch.arange(G - n_free) + 0.5) / max(1, G - n_free)
        self.distance = nn.Buffer(torch.cat([torch.zeros(self.positions, n_free), place[:, None] - centre], 1))
        self.entropy = nn.Buffer(torch.zeros(()))

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        if sae.d_sae % settings.groups:
            raise ValueError(f"groups: {settings.groups} is not allowed; it must divide d_sae ({sae.d_sae})")

    def routes(self, x: Tensor, mask_position: Tensor) -> Tensor:
        """r [N, G]."""
        q = x.to(self.W_q.dtype) @ self.W_q + self.embedding[mask_position]
        G, settings = len(self.keys), self.settings
        known = settings.guidance * (G * self.share.value).clamp_min(LEAST_SHARE).log()
        known = known - 8 * settings.prior * self.distance.square()
        return torch.softmax(q @ self.keys.T / math.sqrt(settings.width) + known[mask_position], 1)

    def acts(self, acts: Tensor, batch: BatchView) -> Tensor:
        mask_position = batch.sae.mask.rows(batch.pos)
        r, G = self.routes(batch.x, mask_position), len(self.keys)
        routed = (acts.unflatten(1, (G, -1)) * (G * r)[:, :, None]).flatten(1)
        if batch.training and routed.requires_grad:
            self.entropy.copy_(-torch.special.xlogy(r, r).sum(1).mean().detach())
            values = routed.detach()

            def keep_gradients(gradient: Tensor) -> None:
                attribution = (values * gradient).abs_().unflatten(1, (G, -1)).sum(2)
                by_position = sum_by(mask_position, attribution, self.positions)
                self.share.later(*means(by_position, by_position.sum(1)))

            routed.register_hook(keep_gradients)
        return routed

    def report(self) -> dict[str, Any]:
        return {"entropy": float(self.entropy)}


@part("global_position")
class GlobalPosition(Part):
    """The first F // 2 latents are global, the others position latents, mixed by a gate per position (A7).

        global:   f_j = acts_j * 2 g[pos]                             g = sigmoid(logits [T]), 1/2 at the start
        position: f_j = acts_j * 2 (1 - g[pos]) * ramp(progress)

    ramp is 0 up to `start` of the run, so that global latents are trained first, and rises linearly to 1 at `full`.
    Decided here: a quarter of the run without position latents, and all of them from half of the run on.
    """

    least_latents = 2

    class Settings(PartSettings):
        start: Share = Field(default=0.25, description="Share of the run in which position latents are off.")
        full: Share = Field(default=0.5, description="Share after which position latents are fully on, above start.")

    def build(self, generator: torch.Generator) -> None:
        self.logits = nn.Parameter(torch.zeros(self.positions))

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        if settings.full <= settings.start:
            raise ValueError(f"full: {settings.full} is not allowed; it must be above start ({settings.start})")

    def acts(self, acts: Tensor, batch: BatchView) -> Tensor:
        start, full = self.settings.start, self.settings.full
        ramp = min(1.0, max(0.0, (batch.progress - start) / (full - start)))
        g = torch.sigmoid(self.logits)[batch.sae.mask.rows(batch.pos)][:, None]
        n_global = self.cfg.d_sae // 2
        return torch.cat([acts[:, :n_global] * (2 * g), acts[:, n_global:] * (2 * ramp * (1 - g))], 1)

    def report(self) -> dict[str, Any]:
        return {"global": float(torch.sigmoid(self.logits.detach()).mean())}


@part("residual_gate")
class ResidualGate(Part):
    """Normalised activations pass a per-latent gate, and are added to the activations themselves (E8).

        theta_j = max(0, m_j + offset * s_j),    s_j = sqrt(v_j + 0.01)
        f_j = sigmoid(g_j) [acts_j > theta_j] acts_j / s_j + skip * acts_j        before the mask

    m_j and v_j are the mean and variance of acts_j over tokens, as means over steps (EMA; the first batches are
    weighted equally, so that the start doesn't matter). g_j starts at 0: every gate is 0.5. skip = exp(a) is one
    learned number. 0 stays 0.

    Decided here: skip starts at 0.5, so that with a deviation of 1 the dictionary starts as a plain one. The mean
    shifts the threshold and isn't subtracted, because zeros would not stay 0. offset is -0.5: a rarely active latent
    has a mean that is small compared to its deviation, hence threshold 0, while the weakest activations of a latent
    active on most tokens miss the gate. `skip` still passes them, so that they get a gradient. Statistics carry no
    gradient. Those of latents that no longer fire go to 0, and the 0.01 keeps 1 / s_j below 10.
    """

    class Settings(PartSettings):
        decay: Fraction = Field(default=0.99, description="Decay per step of each latent's mean and variance.")
        offset: float = Field(default=-0.5, description="Gate threshold above the mean, in standard deviations.")

    def build(self, generator: torch.Generator) -> None:
        self.gate = nn.Parameter(torch.zeros(self.cfg.d_sae))
        self.log_skip = nn.Parameter(torch.tensor(math.log(0.5)))
        self.mean = nn.Buffer(torch.zeros(self.cfg.d_sae))
        self.variance = nn.Buffer(torch.ones(self.cfg.d_sae))
        self.batches = nn.Buffer(torch.zeros(()))
        self._batch: tuple[Tensor, Tensor] = UNSET  # mean and variance, from `acts` to `after`
        self._open: Tensor | None = None

    def acts(self, acts: Tensor, batch: BatchView) -> Tensor:
        deviation = (self.variance + EPS).sqrt()
        is_open = acts > (self.mean + self.settings.offset * deviation).clamp_min(0)
        if batch.training:
            variance, mean = torch.var_mean(acts.detach(), 0, correction=0)
            self._batch = mean, variance
            self._open = is_open.sum() / (acts.detach() > 0).sum().clamp_min(1)
        return acts * (is_open * (torch.sigmoid(self.gate) / deviation) + self.log_skip.exp())

    def after(self, batch: BatchView) -> None:
        (mean, variance), self._batch = self._batch, UNSET
        self.batches += 1
        pace = (1 / self.batches).clamp_min(1 - self.settings.decay)
        self.mean.lerp_(mean, pace)
        self.variance.lerp_(variance, pace)

    def report(self) -> dict[str, Any]:
        figures = {"gate": torch.sigmoid(self.gate.detach()).mean(), "skip": self.log_skip.detach().exp()}
        figures |= {} if self._open is None else {"open": self._open}
        return {name: round(float(value), 6) for name, value in figures.items()}
