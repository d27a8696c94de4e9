"""An evaluation of activations that a test has made itself."""

from types import SimpleNamespace
from typing import Any, cast

from temposae.engine.sae import SparseAutoencoder
from temposae.evals.evaluation import Evaluation, TextActivations


class Planted(Evaluation):
    is_testbed = True

    def __init__(self, sae: SparseAutoencoder, collected: TextActivations, random: SparseAutoencoder | None = None):
        super().__init__(cast(Any, SimpleNamespace(model=SimpleNamespace(device="cpu"))), sae, random)
        self.collected = collected

    def labelled(self, rows: int) -> TextActivations:
        return self.collected
