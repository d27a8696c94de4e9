"""Masks over positions: f = acts * mask[pos], with mask [T, F].

Each latent may be used at some positions and not at others (hard), or more at some than at others (soft). Gradients
follow: where a hard mask is off, neither the latent's rows nor its bias learn anything from that position.
"""

import torch
from torch import Tensor, nn

from .config import MaskConfig


class PositionMask(nn.Module):
    """A mask [T, F] that lies in a buffer (fixed) or is computed from learned logits (`soft`).

    `weights()` is the mask: bool for hard ones, float in (0, 1] for soft ones, or None for no mask. `rows(pos)` maps
    positions to rows of it, as `beyond` says for positions from T on.
    """

    fixed: Tensor | None
    logits: Tensor | None

    def __init__(self, config: MaskConfig, d_sae: int, generator: torch.Generator):
        super().__init__()
        self.config = config
        self.temperature = config.temperature  # tau; a schedule may change it between steps
        T, F = config.positions, d_sae
        fixed = logits = None
        if config.kind == "random":
            fixed = torch.rand(T, F, generator=generator) < config.fraction
        elif config.kind == "ranges":
            of_latent = torch.arange(F) * config.ranges // F
            of_position = torch.arange(T) * config.ranges // T
            fixed = of_position[:, None] == of_latent
        elif config.kind == "gaussian":
            sigma = config.sigma if config.sigma is not None else T / 8
            centre = torch.linspace(0, T - 1, F) if F > 1 else torch.tensor([(T - 1) / 2])
            fixed = torch.exp(-((torch.arange(T)[:, None] - centre) ** 2) / (2 * sigma**2))
        elif config.kind == "soft":
            logits = nn.Parameter(torch.rand(T, F, generator=generator))
        self.register_buffer("fixed", fixed)
        self.register_parameter("logits", logits)

    def weights(self) -> Tensor | None:
        if self.logits is not None:
            return torch.sigmoid(self.logits / self.temperature)
        return self.fixed

    def rows(self, pos: Tensor) -> Tensor:
        T = self.config.positions
        if self.config.beyond == "wrap":
            return pos % T
        if self.config.beyond == "clamp":
            return pos.clamp(max=T - 1)
        self.config.check_context(int(pos.max()) + 1 if pos.numel() else 0)
        return pos
