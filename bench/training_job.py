"""`TrainingJob`, the input of a provider, and `ProviderRun`, its output."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.config import SAEConfig
from .data import Shape, Tokens

LONG_RUN = 100_000  # steps of learning-rate schedules, so that the measured ones are far from the end
ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu")
DEAD = slice(None, None, 4)  # the dead latents, where AuxK is measured


class ProviderUnavailable(Exception):
    """A provider cannot run here. The message says why in one line."""


class TrainingJob(NamedTuple):
    """What to train. `dtype` ("fp32" or "bf16") is the type of matrix products. Parameters and moments are float32.

    `own`: with the provider's own defaults. `clip`: largest gradient norm or None, where a provider has the choice. `auxk`:
    with dead latents and AuxK. `dictionaries`: number of dictionaries that temposae steps together. `accelerated`: another
    library's step after `temposae.accelerate`. `seed`: of the weights.
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
    seed: int = 0

    @property
    def n_dead(self) -> int:
        return len(range(self.shape.F)[DEAD]) if self.auxk else 0

    @property
    def aux_k(self) -> int:
        """Dead latents that AuxK gives to a token: at most D / 2, as in the other libraries."""
        return min(self.shape.D // 2, self.n_dead)

    def __str__(self) -> str:
        is_plain = self.activation == "topk" and not self.auxk
        text = str(self.shape) if is_plain else f"{self.shape}, {self.activation}{' with AuxK' if self.auxk else ''}"
        return text if self.dictionaries == 1 else f"{self.dictionaries} of {text}"


@dataclass
class AnyDictionary:
    """Another library's dictionary as `evals.recovery.Encoder`: x [N, D] to f [N, F], and back; `rows` returns W_dec."""

    to_code: Callable[[Tensor], Tensor]
    to_x: Callable[[Tensor], Tensor]
    rows: Callable[[], Tensor]
    looks_along_rows: bool = False

    @property
    def W_dec(self) -> Tensor:
        return self.rows()

    def encode(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return self.to_code(x)

    def decode(self, f: Tensor) -> Tensor:
        return self.to_x(f)


@dataclass
class ProviderRun:
    """`step(i)` trains on batch i. `reconstruct(x)` returns x_hat [N, D] for x [N, D] float32.

    `aux_k`: dead latents that AuxK gives to a token. `l0(x)`: mean number of active latents per token, if the activation
    does not fix it. `dictionary`: what is trained, for scores of its latents.
    """

    step: Callable[[int], Any]
    reconstruct: Callable[[Tensor], Tensor]
    optimizer: str
    dtype: str
    clip: float | None
    aux_k: int = 0
    l0: Callable[[Tensor], float] | None = None
    dictionary: AnyDictionary | None = None


def sae_config(job: TrainingJob) -> SAEConfig:
    """temposae's dictionary for the job. With `own`, AuxK has `SAEConfig`'s defaults."""
    _, d, f, k = job.shape
    aux = dict(aux_k=job.aux_k) if job.auxk and not job.own else {}
    return SAEConfig(d_in=d, d_sae=f, k=min(k, f), activation=job.activation, **aux)  # pyright: ignore[reportArgumentType]


def fixes_l0(activation: str) -> bool:
    """Whether K latents are active per token, exactly or on average. Only such activations have AuxK."""
    return activation in ("topk", "batchtopk")


def mean_l0(f: Tensor) -> float:
    return int((f > 0).sum()) / len(f)


@torch.no_grad()
def let_die(W_enc: Tensor) -> None:
    """Make the dead latents' encoder rows [F, D] too small to be selected, but nonzero, so that AuxK has work."""
    W_enc[DEAD] *= 0.01


def autocast(job: TrainingJob, enabled: bool = True) -> torch.autocast:
    device = torch.device(job.device).type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=enabled and job.dtype == "bf16")
