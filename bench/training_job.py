"""What a provider is to train, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.config import SAEConfig
from .data import Shape, Tokens

LONG_RUN = 100_000  # steps that learning-rate schedules are told of: what is measured lies far from their end
ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu")
DEAD = slice(None, None, 4)  # which latents are, where AuxK is to have work


class ProviderUnavailable(Exception):
    """A provider that can't run here; the message says why in one line."""


class TrainingJob(NamedTuple):
    """What a provider is to train: `dtype` "fp32" or "bf16" is that of products; parameters and moments are float32.

    `clip`: largest gradient norm, or None, for the providers that leave the choice. `auxk`: with dead latents, and AuxK.
    `dictionaries`: how many temposae is to train at a time. `accelerated`: other libraries' by `temposae.accelerate`.
    """

    shape: Shape
    device: str
    dtype: str
    lr: float
    tokens: Tokens
    own: bool = False
    clip: float | None = None
    activation: str = "topk"
    auxk: bool = False
    dictionaries: int = 1
    accelerated: bool = False

    @property
    def n_dead(self) -> int:
        return len(range(self.shape.F)[DEAD]) if self.auxk else 0

    @property
    def aux_k(self) -> int:
        """Dead latents that AuxK gives to a token, by the rule that the other libraries share: at most D / 2."""
        return min(self.shape.D // 2, self.n_dead)

    def __str__(self) -> str:
        plain = self.activation == "topk" and not self.auxk
        named = str(self.shape) if plain else f"{self.shape}, {self.activation}{' with AuxK' if self.auxk else ''}"
        return named if self.dictionaries == 1 else f"{self.dictionaries} of {named}"


@dataclass
class ProviderRun:
    """`step(i)` trains on batch i; `reconstruct(x)` gives x_hat [N, D] for x [N, D] float32.

    `aux_k`: how many dead latents AuxK gives to a token in the measured steps. `l0(x)`: active latents a token, on average,
    where the activation does not fix it.
    """

    step: Callable[[int], Any]
    reconstruct: Callable[[Tensor], Tensor]
    optimizer: str
    dtype: str
    clip: float | None
    aux_k: int = 0
    l0: Callable[[Tensor], float] | None = None


def sae_config(job: TrainingJob) -> SAEConfig:
    """temposae's dictionary for the job. Own: `SAEConfig`'s defaults."""
    _, d, f, k = job.shape
    aux = dict(aux_k=job.aux_k) if job.auxk and not job.own else {}
    return SAEConfig(d_in=d, d_sae=f, k=min(k, f), activation=job.activation, **aux)  # pyright: ignore[reportArgumentType]


def fixes_l0(activation: str) -> bool:
    """Whether a token has K active latents, by itself or on average; only then is there AuxK."""
    return activation in ("topk", "batchtopk")


def mean_l0(f: Tensor) -> float:
    return int((f > 0).sum()) / len(f)


@torch.no_grad()
def let_die(W_enc: Tensor) -> None:
    """Make the dead latents' encoder rows [F, D] too small to be kept: positive, so that AuxK has something to work on."""
    W_enc[DEAD] *= 0.01


def autocast(job: TrainingJob, enabled: bool = True) -> torch.autocast:
    device = torch.device(job.device).type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=enabled and job.dtype == "bf16")
