"""Shapes to measure, and synthetic tokens that a dictionary can learn from."""

import itertools
import math
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.errors import UserError, check_known, shown
from ..engine.stream import Batch
from ..kernels.bench_types import POSITIONS

MOST = 1000  # shapes in one run
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Shape(NamedTuple):
    """N tokens in a batch, width D, F latents, K kept per token."""

    N: int
    D: int
    F: int
    K: int

    def check(self) -> "Shape":
        """Return the shape. Raises UserError for sizes below 1 and for K above F."""
        for name, size in self._asdict().items():
            if not 1 <= size < 2**31:
                raise UserError(f"{name}: {size} is not allowed; it must be at least 1 and less than 2^31")
        if self.K > self.F:
            raise UserError(f"K: {self.K} is not allowed; it must be at most F ({self.F})")
        return self

    def __str__(self) -> str:
        return "-".join(f"{name}{size}" for name, size in self._asdict().items())


HEADLINE = Shape(N=8192, D=2304, F=65536, K=64)  # Gemma-2-2B's width

#: `sweep` changes one size of the headline at a time
PRESETS = {
    "tiny": [Shape(256, 64, 512, 8)],
    "cpu": [Shape(1024, 768, f, 32) for f in (4096, 16384)],
    "gpu": [HEADLINE._replace(F=f) for f in (16384, 65536, 131072)],
    "sweep": [
        *(HEADLINE._replace(F=2**power) for power in range(14, 21)),
        *(HEADLINE._replace(N=n) for n in (1024, 2048, 4096, 16384, 32768)),
        *(HEADLINE._replace(K=k) for k in (16, 32, 128, 256)),
        *(HEADLINE._replace(D=d) for d in (768, 3584, 4096)),
    ],
}


def shapes(preset: str, **sizes: str | None) -> list[Shape]:
    """The shapes of a preset or, with `sizes` (N="1024,8192" and so on), all combinations of those sizes and the other sizes
    of the preset's first shape. Raises UserError for an unknown preset and for sizes that are not allowed."""
    check_known("preset", preset, PRESETS)
    if all(size is None for size in sizes.values()):
        return PRESETS[preset]
    choices = []
    for name, default in PRESETS[preset][0]._asdict().items():
        text = sizes.get(name)
        if text is not None and not re.fullmatch(r"[-+]?[0-9]{1,20}(,[-+]?[0-9]{1,20})*", text, re.ASCII):
            raise UserError(f"{name}: {shown(text)} is not allowed; give whole numbers, separated by commas")
        choices.append([default] if text is None else [int(value) for value in text.split(",")])
    if (many := math.prod(map(len, choices))) > MOST:
        raise UserError(f"N, D, F and K: {many:,} shapes are not allowed; at most {MOST} can be measured")
    return [Shape(*chosen).check() for chosen in itertools.product(*choices)]


def check_settings(dtype: str, dtypes: Iterable[str] = ("fp32", "bf16"), **counts: int) -> None:
    """Raise UserError unless `dtype` is one of `dtypes` and every count is at least 1."""
    check_known("dtype", dtype, dtypes)
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}: {count} is not allowed; it must be at least 1")


def seed_of(name: str, seed: int = 0) -> int:
    """The seed of a named generator, so that "tokens" and "weights" share no random numbers."""
    return zlib.crc32(f"{name} {seed}".encode())


@dataclass(frozen=True)
class Tokens:
    """Batches that all providers train on in the same order, and held-out tokens.

    batches    x [N, D] in the stream's dtype (bfloat16 on a GPU), with positions
    wide       the x of each batch in float32, for providers that need it
    held_out   x [min(N, 1024), D] float32
    mean       [D] float32
    mean_norm  mean of |x|, near sqrt(D)
    """

    batches: list[Batch]
    wide: list[Tensor]
    held_out: Tensor
    mean: Tensor
    mean_norm: float


def tokens(shape: Shape, device: str, dtype: torch.dtype, *, count: int = 8, seed: int = 0) -> Tokens:
    """Make `count` batches of sparse combinations of hidden directions.

        x = offset + sum_j c_j u_{g_j} + noise,  j < 16, scaled so that |x| is near sqrt(D)

    The 2D unit directions u are random, and coefficients c are exponential. Direction g has density ~ 1 / sqrt(g), so some
    are common and most are rare, like features of language models. In white noise there would be nothing to learn, and all
    latents would fire equally often.
    """
    draw = torch.Generator(device=device).manual_seed(seed_of("tokens", seed))
    n_directions, active = 2 * shape.D, 16

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=device)

    directions = torch.nn.functional.normalize(normal(n_directions, shape.D), dim=1)
    offset = torch.nn.functional.normalize(normal(shape.D), dim=0)

    def activations(n: int) -> Tensor:
        direction_indices = (n_directions * torch.rand(n, active, generator=draw, device=device).square()).long()
        strength = torch.empty(n, active, device=device).exponential_(generator=draw)
        x = torch.nn.functional.embedding_bag(direction_indices, directions, per_sample_weights=strength, mode="sum")
        x += offset + 0.3 / shape.D**0.5 * normal(n, shape.D)
        return x * (shape.D / (2 * active + 1)) ** 0.5  # E c^2 = 2

    def positions() -> Tensor:
        return torch.randint(POSITIONS, (shape.N,), generator=draw, device=device)

    batches = [Batch.of(activations(shape.N).to(dtype), positions()) for _ in range(count)]
    wide = [batch.x.float() for batch in batches]
    return Tokens(batches, wide, activations(min(shape.N, 1024)), wide[0].mean(0), float(wide[0].norm(dim=1).mean()))
