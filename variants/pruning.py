"""Pruning of latents over training, and distillation from a teacher that is not pruned."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..engine.config import Count, SAEConfig
from ..engine.metrics import plain
from ..engine.parts import UNSET, BatchView, Part, PartSettings, part
from .number_types import Factor, Fraction, Weight
from .similarity import sample_indices

COMPRESSED_BY = 0.8  # share of the run


@part("pruning")
class Pruning(Part):
    """The least important latents are off, more of them as training goes on, and may return (E9).

        importance_j <- decay * importance_j + (1 - decay) * mean_n f_nj |W_dec_j|
        every `every` steps: off are the floor(fraction * min(1, progress / 0.8) * F) latents of least importance

    f_nj is the activation of latent j on token n. For a pruned latent it is the activation it would have, if the
    selection would have kept that: for topk, if it is at least the token's smallest kept one, or fewer than k are kept;
    for batchtopk the same over the batch; for relu always. A pruned latent whose importance exceeds the least one that
    is on returns in place of another. Pruned latents get no gradient from reconstruction. Decided here: the importance
    of a pruned latent; a number that grows linearly up to `fraction` and is constant after 0.8 of the run, so that the
    other latents can adapt; among equals, the first are pruned first.
    """

    reads = frozenset({"f"})

    class Settings(PartSettings):
        fraction: Fraction = Field(default=0.5, description="Share of the latents that is off from 0.8 of the run on.")
        every: Count = Field(default=10, description="Steps between two decisions about which latents are off.")
        decay: Fraction = Field(default=0.95, description="Decay per step of the mean importance of latents.")

    def build(self, generator: torch.Generator) -> None:
        self.importance = nn.Buffer(torch.zeros(self.cfg.d_sae))
        self.alive = nn.Buffer(torch.ones(self.cfg.d_sae, dtype=torch.bool))
        self.returned = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self._unpruned: Tensor = UNSET  # activations [N, F], from `latents` to `after`

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        remaining = sae.d_sae - int(settings.fraction * sae.d_sae)
        if sae.activation != "relu" and remaining < sae.k:
            raise ValueError(
                f"fraction: {settings.fraction} is not allowed with {sae.activation}; it must leave at least k ({sae.k}) "
                f"latents, not {remaining}"
            )

    def latents(self, f: Tensor, batch: BatchView) -> Tensor:
        if batch.training:
            self._unpruned = f.detach()
        return f * self.alive

    def after(self, batch: BatchView) -> None:
        unpruned, self._unpruned = self._unpruned, UNSET
        if self.cfg.activation != "relu":
            groups = batch.f if self.cfg.activation == "topk" else batch.f.view(1, -1)
            least = torch.where(groups > 0, groups, torch.inf).amin(1)
            has_room = (groups > 0).sum(1) < batch.sae.k * len(batch.f) // len(groups)
            unpruned = unpruned * (unpruned >= torch.where(has_room, 0, least)[:, None])
        importance = unpruned.mean(0) * batch.sae.W_dec.norm(dim=1)
        self.importance.lerp_(importance, 1 - self.settings.decay)
        if batch.step % self.settings.every == 0:
            n = int(self.settings.fraction * min(1.0, batch.progress / COMPRESSED_BY) * self.cfg.d_sae)
            alive = torch.ones_like(self.alive)
            alive[self.importance.argsort(stable=True)[:n]] = False
            self.returned += (alive & ~self.alive).sum()
            self.alive.copy_(alive)

    def report(self) -> dict[str, Any]:
        """`pruned`: share of latents off. `returned`: number of returns. `threshold`: least importance of those on."""
        threshold = torch.where(self.alive, self.importance, torch.inf).min()
        return {
            "pruned": round(1 - float(self.alive.float().mean()), 6),
            "returned": int(self.returned),
            "threshold": plain(threshold),
        }


@part("distillation")
class Distillation(Part):
    """The encoder stays near a moving average of itself, as a student to a teacher (E9).

        penalty = weight D tau^2 mean_n KL(softmax(teacher_nj / tau) || softmax(acts_nj / tau))      tau = `temperature`

    acts = relu((x - b_dec) W_enc + b_enc). The teacher's W_enc and b_enc are means over steps (EMA, constants, the
    first steps weighted equally), one more copy of W_enc. n and j run over `tokens` tokens and `latents` latents, drawn
    anew at each step, so that nothing is larger than tokens x latents. tau^2 makes the gradient's size independent of
    tau. Both see x as changed by earlier parts, and act before mask and pruning: the teacher is never pruned. Decided
    here: the teacher, the sample, the weight. The first step has no teacher.
    """

    class Settings(PartSettings):
        temperature: Factor = Field(default=2.0, description="tau, the divisor of activations in both softmaxes.")
        weight: Weight = Field(default=0.1, description="Weight of the divergence, in units of D tau^2.")
        decay: Fraction = Field(default=0.999, description="Decay per step of the teacher, the mean of past encoders.")
        tokens: Count = Field(default=256, description="Tokens that a step compares, drawn at random.")
        latents: int = Field(default=4096, ge=2, description="Latents that a step compares, drawn at random.")

    def build(self, generator: torch.Generator) -> None:
        self.W_teacher = nn.Buffer(torch.zeros(self.cfg.d_sae, self.cfg.d_in))  # latent-major, as W_enc lies in memory
        self.b_teacher = nn.Buffer(torch.zeros(self.cfg.d_sae))
        self.steps = nn.Buffer(torch.zeros(()))
        self._x: Tensor = UNSET  # the encoder's input, from `input` to `penalty`

    def input(self, x: Tensor, batch: BatchView) -> Tensor:
        if batch.training:
            self._x = x
        return x

    def penalty(self, batch: BatchView) -> Tensor:
        x, self._x = self._x, UNSET
        sae, token = batch.sae, sample_indices(len(x), self.settings.tokens, batch)
        latent = sample_indices(self.cfg.d_sae, self.settings.latents, batch)
        x, tau = x[token] - sae.b_dec.detach(), self.settings.temperature
        acts = torch.relu(x @ sae.W_enc.T[latent].T + sae.b_enc[latent])
        teacher = torch.relu(x.detach() @ self.W_teacher[latent].T + self.b_teacher[latent])
        teacher_log, student_log = torch.log_softmax(teacher / tau, 1), torch.log_softmax(acts / tau, 1)
        divergence = (teacher_log.exp() * (teacher_log - student_log)).sum(1).mean() * (self.steps > 0)
        self.figures = {"divergence": divergence.detach()}
        return self.settings.weight * self.cfg.d_in * tau**2 * divergence

    def after(self, batch: BatchView) -> None:
        self.steps += 1
        pace = (1 / self.steps).clamp_min(1 - self.settings.decay)
        self.W_teacher.lerp_(batch.sae.W_enc.T, pace)
        self.b_teacher.lerp_(batch.sae.b_enc, pace)
