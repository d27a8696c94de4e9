"""Encoders that differ between R equal ranges of the T positions."""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..engine.config import Count, SAEConfig, Share
from ..engine.parts import BatchView, Part, PartSettings, part
from ..engine.sae import SparseAutoencoder
from .number_types import Factor, Fraction, Weight


def range_of(batch: BatchView, ranges: int, positions: int) -> Tensor:
    """The range of each token [N], as in `ranges` masks."""
    return batch.sae.mask.rows(batch.pos) * ranges // positions


@part("range_encoders")
class RangeEncoders(Part):
    """Each range has its own encoder, with its own input bias: it sees x - c_r, c [R, D] learned (B7, B8).

    The mask `ranges` gives each range the encoder rows and biases of its part of the dictionary, without gradients from
    elsewhere. c_r completes R separate encoders with a shared decoder. c starts as N(0, scale^2), which is 0 by
    default. Decided here: B8's range embedding, a learned vector added to the encoder's input, is -c. Starting from
    random values, so that ranges differ from the beginning, is what distinguishes B8.
    """

    class Settings(PartSettings):
        scale: Weight = Field(default=0.0, description="Initial standard deviation. Entries of x are about 1.")

    def build(self, generator: torch.Generator) -> None:
        self.bias = nn.Parameter(
            self.settings.scale * torch.randn(self.cfg.mask.ranges, self.cfg.d_in, generator=generator)
        )

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        if sae.mask.kind != "ranges":
            raise ValueError(f"mask.kind: {sae.mask.kind} is not allowed with range_encoders; it must be ranges")

    def input(self, x: Tensor, batch: BatchView) -> Tensor:
        return x - self.bias[range_of(batch, self.cfg.mask.ranges, self.positions)]


@part("orthogonal_start")
class OrthogonalStart(Part):
    """W_dec starts as blocks of up to D latents with orthonormal rows, and W_enc as its transpose (B8 to B10).

    A frozen random decoder, the control, keeps its values, and W_enc is their transpose.
    """

    @torch.no_grad()
    def initialise(self, sae: SparseAutoencoder, generator: torch.Generator) -> None:
        if not sae.W_dec.requires_grad:
            return
        for block in sae.W_dec.split(self.cfg.d_in):
            columns, triangle = torch.linalg.qr(torch.randn(self.cfg.d_in, len(block), generator=generator))
            block.copy_((columns * triangle.diagonal().sign()).T)  # the signs make the distribution uniform
        sae.W_enc.copy_(sae.W_dec.T)


@part("range_adapters")
class RangeAdapters(Part):
    """A base encoder for all positions, plus an adapter per range as a gated residual (B9, B10).

        pre' = pre + s sigmoid(g_r) (gelu(n W1_r + b1_r) W2_r + b2_r)     n = (x - mean x) / sqrt(var x + 1e-5), over D

    W1 [R, D, h], b1 [R, h], W2 [R, h, F], b2 [R, F], g [R]; r is the token's range and h `hidden`. W1 starts as N(0, 1
    / D), W2 as N(0, scale^2 / h), the others as 0. The share s is 0 until `start` of the run, so that the base is
    trained alone, and rises to 1 over the next `ramp` of it. The factor on L1 rises from `l1_from` to 1 with s.

    Decided here: the adapters see x, and their layer norm has no scale and shift of its own, which W1 and b1 are. The
    hidden units of all adapters are computed, R h of them besides D, and those of other ranges are set to 0, so that
    tokens need not be sorted by range.
    """

    class Settings(PartSettings):
        ranges: Count = Field(default=4, description="Number of equal ranges of positions, each with an adapter.")
        hidden: Count = Field(default=32, description="Hidden units of an adapter.")
        scale: Factor = Field(default=0.1, description="Initial size of the second layer: N(0, scale^2 / hidden).")
        start: Fraction = Field(default=0.0, description="Share of the run in which the base encoder is trained alone.")
        ramp: Share = Field(default=0.0, description="Share of the run over which the adapters are then added.")
        pace: Factor = Field(default=1.0, description="Adapters' learning rate as a multiple of the dictionary's.")
        l1_from: Share = Field(default=1.0, description="Factor on L1 at first. It rises to 1 with the adapters.")

    def build(self, generator: torch.Generator) -> None:
        R, h, D, F = self.settings.ranges, self.settings.hidden, self.cfg.d_in, self.cfg.d_sae
        self.W1 = nn.Parameter(torch.randn(R, D, h, generator=generator) / math.sqrt(D))
        self.b1 = nn.Parameter(torch.zeros(R, h))
        self.W2 = nn.Parameter(torch.randn(R, h, F, generator=generator) * (self.settings.scale / math.sqrt(h)))
        self.b2 = nn.Parameter(torch.zeros(R, F))
        self.gate = nn.Parameter(torch.zeros(R))
        self.paces = {name: self.settings.pace for name, _ in self.named_parameters()}

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        if settings.ranges > sae.mask.positions:
            allowed = f"it must be at most mask.positions ({sae.mask.positions})"
            raise ValueError(f"ranges: {settings.ranges} is not allowed; {allowed}")
        if settings.start + settings.ramp > 1:
            allowed = f"it must be at most 1 - start ({1 - settings.start:g})"
            raise ValueError(f"ramp: {settings.ramp} is not allowed; {allowed}")

    def share(self, progress: float) -> float:
        """s."""
        since, ramp = progress - self.settings.start, self.settings.ramp
        return float(since >= 0) if ramp == 0 else min(1.0, max(0.0, since / ramp))

    def pre(self, pre: Tensor, batch: BatchView) -> Tensor:
        r = range_of(batch, self.settings.ranges, self.positions)
        n = nn.functional.layer_norm(batch.x.float(), batch.x.shape[1:])
        in_range = r[:, None] == torch.arange(self.settings.ranges, device=r.device)  # [N, R]
        hidden = nn.functional.gelu(torch.addmm(self.b1.flatten(), n, self.W1.transpose(0, 1).flatten(1)))
        hidden = hidden.unflatten(1, self.b1.shape) * in_range[:, :, None]
        gate = self.share(batch.progress) * torch.sigmoid(self.gate)  # a share of 0 makes all that follows exactly 0
        inside = torch.cat([hidden.flatten(1), in_range.to(hidden.dtype)], 1)
        weights = torch.cat([(gate[:, None, None] * self.W2).flatten(0, 1), gate[:, None] * self.b2])
        return torch.addmm(pre, inside, weights)

    def weigh(self, batch: BatchView) -> tuple[Tensor | None, Tensor | None]:
        if self.settings.l1_from == 1:
            return None, None
        factor = self.settings.l1_from + (1 - self.settings.l1_from) * self.share(batch.progress)
        return None, torch.full((batch.n_positions,), factor, device=batch.pos.device)
