"""Masks over positions: f = acts * mask[pos], with mask [T, F].

A hard mask switches latents on and off by position. A soft mask weights them between 0 and 1. Where a hard mask is off,
the latent's weights and bias get no gradient from that position.
"""

import torch
from torch import Tensor, nn

from ..kernels.masks import GaussianMask, Mask, weights_at
from .config import MaskConfig

BLENDED = 6.0  # sigmoid(-6) = 0.0025 and sigmoid(6) = 0.9975: almost absent, and almost fully present
SURE = 2.0  # sigmoid(2) = 0.88: initial weight of a learned mask where the hard mask that it starts from is on


class PositionMask(nn.Module):
    """A mask over positions: stored (hard masks), computed from centres (`gaussian`) or from learned logits (`soft`).

    `weights()` returns the mask: bool [T, F], a GaussianMask, float [T, F] in (0, 1), or None for no mask. `rows(pos)`
    maps positions to rows of the mask and applies `beyond` to positions from T on. Temperature and blending follow
    `progress`, from 0 to 1, which training sets and checkpoints store. `checked_later`: a learner counts positions and
    reports those beyond, so on a GPU `rows` need not wait for the device to refuse them.
    """

    fixed: Tensor | None
    centre: Tensor | None
    logits: Tensor | None
    blend: Tensor | None
    progress: Tensor | None

    def __init__(self, config: MaskConfig, d_sae: int, generator: torch.Generator):
        super().__init__()
        self.config = config
        T, F = config.positions, d_sae
        fixed = centre = logits = None
        if config.kind == "gaussian":
            centre = torch.linspace(0, T - 1, F) if F > 1 else torch.tensor([(T - 1) / 2])
        elif config.kind == "soft" and config.start == "uniform":
            logits = torch.rand(T, F, generator=generator)
        elif config.kind == "soft" and config.start == "normal":
            logits = torch.randn(T, F, generator=generator)
        elif config.kind == "soft":
            logits = torch.where(_hard(config, config.start, F, generator), SURE, -SURE)
        elif config.kind != "none":
            fixed = _hard(config, config.kind, F, generator)
        self.checked_later = False
        has_progress = config.blend or config.temperature_end is not None
        self.register_buffer("fixed", fixed)
        self.register_buffer("centre", centre)
        self.register_parameter("logits", None if logits is None else nn.Parameter(logits))
        self.register_parameter("blend", nn.Parameter(torch.zeros(())) if config.blend else None)
        self.register_buffer("progress", torch.ones(()) if has_progress else None)

    def at(self, progress: float) -> None:
        """Set the progress of the run: 0 is its beginning, 1 its end."""
        if self.progress is not None:
            self.progress.fill_(progress)

    @property
    def temperature(self) -> float | Tensor:
        """tau = temperature * (temperature_end / temperature)^progress"""
        start, end = self.config.temperature, self.config.temperature_end
        return start if end is None or self.progress is None else start * (end / start) ** self.progress

    def weights(self) -> Mask | None:
        mask: Mask | None = self.fixed
        if self.logits is not None:
            mask = torch.sigmoid(self.logits / self.temperature)
        elif self.centre is not None:
            sigma = self.config.sigma
            mask = GaussianMask(self.centre, self.config.positions / 8 if sigma is None else sigma)
        if mask is None or self.blend is None or self.progress is None:
            return mask
        if isinstance(mask, GaussianMask):
            mask = weights_at(mask, torch.arange(self.config.positions, device=mask.centre.device))
        share = torch.sigmoid(self.blend + BLENDED * (2 * self.progress - 1))
        return 1 - share + share * mask

    def rows(self, pos: Tensor) -> Tensor:
        T = self.config.positions
        if self.config.beyond == "wrap":
            return pos % T
        if self.config.beyond == "clamp" or (self.checked_later and pos.is_cuda):
            return pos.clamp(max=T - 1)
        self.config.check_context(int(pos.max()) + 1 if pos.numel() else 0)
        return pos


def _hard(config: MaskConfig, kind: str, F: int, generator: torch.Generator) -> Tensor:
    """bool [T, F]"""
    T = config.positions
    if kind == "random":
        return torch.rand(T, F, generator=generator) < config.fraction
    pos, latent = torch.arange(T), torch.arange(F)
    if kind == "ranges":
        return (pos * config.ranges // T)[:, None] == latent * config.ranges // F
    width = config.width or max(1, T // 4)
    # the first windows start before position 0, so every position has the same number of latents
    start = latent * (T + width - 1) // F - (width - 1)
    return (pos[:, None] >= start) & (pos[:, None] < start + width)
