"""Gates on groups of latents: attention over the groups, and a mix of global and position latents."""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..engine.config import Count, SAEConfig, Share
from ..engine.parts import BatchView, Part, PartSettings, part
from ..kernels.numerics import sum_by
from .running_mean import RunningMean

LEAST_SHARE = 0.01  # of an equal share; a group without gradients gets ln(0.01) * guidance = -2.3 at guidance 0.5


@part("attention_router")
class AttentionRouter(Part):
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
        guidance: float = Field(
            default=0.5, ge=0, lt=1, description="Weight of the log of each group's gradient share in the routing."
        )
        prior: float = Field(
            default=0.0, ge=0, description="Weight of the preference for near groups. 1: a Gaussian of sigma T / 4."
        )
        free: Share = Field(default=0.0, description="Share of the groups, the first ones, without this preference.")
        decay: float = Field(default=0.99, ge=0, lt=1, description="Decay per step of the mean gradient shares.")

    def __init__(self, settings: Any, sae: SAEConfig, positions: int, generator: torch.Generator):
        super().__init__(settings, sae, positions, generator)
        G, d_k = settings.groups, settings.width
        self.W_q = nn.Parameter(torch.randn(sae.d_in, d_k, generator=generator) / math.sqrt(sae.d_in))
        self.embedding = nn.Parameter(torch.randn(positions, d_k, generator=generator))
        self.keys = nn.Parameter(0.1 * torch.randn(G, d_k, generator=generator))
        self.share = RunningMean(settings.decay, positions, G, start=1 / G)
        n_free = round(settings.free * G)
        place = (torch.arange(positions) + 0.5) / positions
        centre = (torch.arange(G - n_free) + 0.5) / max(1, G - n_free)
        distance = torch.cat([torch.zeros(positions, n_free), place[:, None] - centre], 1)
        self.distance = nn.Buffer(distance)
        self.entropy = nn.Buffer(torch.zeros(()))
        self._gradients: Tensor | None = None

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
                self._gradients = sum_by(mask_position, attribution, self.positions)

            routed.register_hook(keep_gradients)
        return routed

    def after(self, batch: BatchView) -> None:
        gradients, self._gradients = self._gradients, None
        if gradients is not None:
            self.share.add_mean(gradients, gradients.sum(1))

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

    class Settings(PartSettings):
        start: Share = Field(default=0.25, description="Share of the run in which position latents are off.")
        full: Share = Field(
            default=0.5, description="Share of the run after which position latents are fully on, above start."
        )

    def __init__(self, settings: Any, sae: SAEConfig, positions: int, generator: torch.Generator):
        super().__init__(settings, sae, positions, generator)
        self.logits = nn.Parameter(torch.zeros(positions))

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        if settings.full <= settings.start:
            raise ValueError(f"full: {settings.full} is not allowed; it must be above start ({settings.start})")
        if sae.d_sae < 2:
            raise ValueError("d_sae: 1 is not allowed with global_position; it must be at least 2")

    def acts(self, acts: Tensor, batch: BatchView) -> Tensor:
        start, full = self.settings.start, self.settings.full
        ramp = min(1.0, max(0.0, (batch.progress - start) / (full - start)))
        g = torch.sigmoid(self.logits)[batch.sae.mask.rows(batch.pos)][:, None]
        n_global = self.cfg.d_sae // 2
        return torch.cat([acts[:, :n_global] * (2 * g), acts[:, n_global:] * (2 * ramp * (1 - g))], 1)

    def report(self) -> dict[str, Any]:
        return {"global": float(torch.sigmoid(self.logits.detach()).mean())}
