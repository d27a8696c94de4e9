"""Per-latent gates from statistics of activations."""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..engine.config import SAEConfig
from ..engine.parts import BatchView, Part, PartSettings, part

EPS = 0.01  # standard deviations count as at least 0.1, where activations are of order 1


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
        decay: float = Field(default=0.99, ge=0, lt=1, description="Decay per step of each latent's mean and variance.")
        offset: float = Field(
            default=-0.5, description="Gate threshold above the latent's mean activation, in standard deviations."
        )

    def __init__(self, settings: Any, sae: SAEConfig, positions: int, generator: torch.Generator):
        super().__init__(settings, sae, positions, generator)
        self.gate = nn.Parameter(torch.zeros(sae.d_sae))
        self.log_skip = nn.Parameter(torch.tensor(math.log(0.5)))
        self.mean = nn.Buffer(torch.zeros(sae.d_sae))
        self.variance = nn.Buffer(torch.ones(sae.d_sae))
        self.batches = nn.Buffer(torch.zeros(()))
        self._batch: tuple[Tensor, Tensor] | None = None  # mean and variance, from `acts` to `after`
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
        assert self._batch is not None
        (mean, variance), self._batch = self._batch, None
        self.batches += 1
        pace = (1 / self.batches).clamp_min(1 - self.settings.decay)
        self.mean.lerp_(mean, pace)
        self.variance.lerp_(variance, pace)

    def report(self) -> dict[str, Any]:
        figures = {"gate": torch.sigmoid(self.gate.detach()).mean(), "skip": self.log_skip.detach().exp()}
        figures |= {} if self._open is None else {"open": self._open}
        return {name: round(float(value), 6) for name, value in figures.items()}
