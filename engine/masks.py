"""Masks over positions: f = acts * mask[pos], with mask [T, F].

Each latent may be used at some positions and not at others (hard), or more at some than at others (soft). Gradients
follow: where a hard mask is off, neither the latent's rows nor its bias learn anything from that position.
"""

import torch
from torch import Tensor, nn

from ..kernels.masks import GaussianMask, Mask
from .config import MaskConfig


class PositionMask(nn.Module):
    """A mask that lies in a buffer (hard ones), is worked out from its centres (`gaussian`) or from learned logits (`soft`).

    `weights()` is the mask: bool [T, F], a GaussianMask, float [T, F] in (0, 1), or None for no mask. `rows(pos)` maps
    positions to rows of it, as `beyond` says for positions from T on.
    """

    fixed: Tensor | None
    centre: Tensor | None
    logits: Tensor | None

    def __init__(self, config: MaskConfig, d_sae: int, generator: torch.Generator):
        super().__init__()
        self.config = config
        self.temperature = config.temperature  # tau; a schedule may change it between steps
        T, F = config.positions, d_sae
        fixed = centre = logits = None
        if config.kind == "random":
            fixed = torch.rand(T, F, generator=generator) < config.fraction
        elif config.kind == "ranges":
            of_latent = torch.arange(F) * config.ranges // F
            of_position = torch.arange(T) * config.ranges // T
            fixed = of_position[:, None] == of_latent
        elif config.kind == "gaussian":
            centre = torch.linspace(0, T - 1, F) if F > 1 else torch.tensor([(T - 1) / 2])
        elif config.kind == "soft":
            logits = nn.Parameter(torch.rand(T, F, generator=generator))
        self.register_buffer("fixed", fixed)
        self.register_buffer("centre", centre)
        self.register_parameter("logits", logits)

    def weights(self) -> Mask | None:
        if self.logits is not None:
            return torch.sigmoid(self.logits / self.temperature)
        if self.centre is not None:
            sigma = self.config.sigma
            return GaussianMask(self.centre, self.config.positions / 8 if sigma is None else sigma)
        return self.fixed

    def rows(self, pos: Tensor) -> Tensor:
        T = self.config.positions
        if self.config.beyond == "wrap":
            return pos % T
        if self.config.beyond == "clamp":
            return pos.clamp(max=T - 1)
        self.config.check_context(int(pos.max()) + 1 if pos.numel() else 0)
        return pos
