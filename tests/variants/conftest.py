"""Shared by the tests of parts: small dictionaries, batches of rows, and training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from temposae.engine.composed import ComposedAutoencoder, dictionary
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.learner import Learner
from temposae.engine.sae import BatchContext
from temposae.engine.stream import Batch

D, F, T, R = 8, 24, 12, 6  # R rows of T tokens


@pytest.fixture
def rows() -> Callable[..., Batch]:
    """rows(seed=0): a batch of R whole rows, with an attribute and activations at a second hook."""

    def make(seed: int = 0, n_rows: int = R) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        pos = torch.arange(T).repeat(n_rows).int()
        row = torch.arange(n_rows).repeat_interleave(T)
        x = torch.randn(n_rows * T, D, generator=generator) + torch.sin(pos[:, None] * torch.arange(1, D + 1) / T)
        second = 0.7 * x + 0.3 * torch.randn(len(x), D, generator=generator)
        attribute = (torch.rand(n_rows, generator=generator) < 0.5).long()[row]
        return Batch({"x": x, "second": second}, pos, -torch.ones_like(pos), row, row, attribute=attribute)

    return make


@pytest.fixture
def made() -> Callable[..., ComposedAutoencoder]:
    """made("kind", seed=0, **settings of the part, sae={...}): a dictionary with this part alone, or those of `parts`."""

    def make(
        kind: str | None = None, *, seed: int = 0, sae: dict[str, Any] | None = None, parts: Any = None, **settings
    ):
        parts = [{"kind": kind, **settings}] if parts is None else parts
        given = {"d_in": D, "d_sae": F, "activation": "relu", "k": 4, "mask": {"positions": T}} | (sae or {})
        given["mask"] = {"positions": T} | dict(given["mask"])
        return dictionary(SAEConfig(**given, parts=parts), seed=seed)

    return make


@pytest.fixture
def learner() -> Callable[..., Learner]:
    """learner(sae, steps=20, lr=1e-2): in training from the beginning, in units of x."""

    def make(sae: ComposedAutoencoder, steps: int = 20, lr: float = 1e-2, **settings) -> Learner:
        config = TrainConfig(tokens=steps * R * T, batch=R * T, lr=lr, **settings)
        return Learner(sae, config, torch.zeros(D), D**0.5, T)

    return make


@pytest.fixture
def objective() -> Callable[..., Any]:
    """objective(sae, batch): the Objective of a batch in training, everything beside it given."""

    def of(sae: ComposedAutoencoder, batch: Batch, dead: torch.Tensor | None = None):
        batch_context = BatchContext(batch.row, batch.attribute, batch.acts["second"])
        return sae.objective(batch.x, batch.pos, T, dead, batch_context=batch_context)

    return of
