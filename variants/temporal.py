"""Convolutions along a row of text, before the encoder."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..engine.config import Count, SAEConfig
from ..engine.parts import BatchView, Part, PartSettings, part

SMALL = 0.02  # the token itself has weight 1


@part("dilated_conv")
class DilatedConv(Part):
    """The encoder sees x after causal depth-wise convolutions along the row, one per dilation d, each a residual (D1,
    D2).

        y_t <- y_t + sum_{k < kernel} w_dk * y_{t - k d}              w_d [kernel, D], N(0, 0.02^2) at the start; y = x first

    Tokens before the row's first, and columns without a token, are 0 at every layer. Decided here: causal, so that a
    code doesn't depend on later tokens; in sequence, so that three layers of kernel 3 and dilations 1, 2, 4 look back
    14 tokens; linear, because the logs name no nonlinearity. The reconstruction target is x itself.
    """

    reads = frozenset({"rows"})

    class Settings(PartSettings):
        dilations: tuple[Count, ...] = Field(
            default=(1, 2, 4), min_length=1, description="Dilation of each convolution in positions, in order."
        )
        kernel: int = Field(default=3, ge=2, description="Taps of each convolution, its own token included.")

    def __init__(self, settings: Any, sae: SAEConfig, positions: int, generator: torch.Generator):
        super().__init__(settings, sae, positions, generator)
        taps = len(settings.dilations), settings.kernel, sae.d_in
        self.taps = nn.Parameter(SMALL * torch.randn(taps, generator=generator))

    def input(self, x: Tensor, batch: BatchView) -> Tensor:
        y, kept = batch.rows.spread(x), batch.rows.kept[:, :, None]
        length = y.shape[1]
        for dilation, taps in zip(self.settings.dilations, self.taps, strict=True):
            padding = dilation * (self.settings.kernel - 1)
            padded = nn.functional.pad(y, (0, 0, padding, 0))
            for k, tap in enumerate(taps):
                first = padding - k * dilation
                y = torch.addcmul(y, padded[:, first : first + length], tap)
            y = y * kept
        return batch.rows.gather(y)
