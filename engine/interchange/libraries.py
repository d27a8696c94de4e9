"""The layouts of other libraries: each reads its own as a `DictionarySpec`, and most write one.

What a library can't hold is refused with the reason. Tensors are float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import dictionary_learning, gemma_scope, llamascopium, saelens, sparsify
from .intermediate import DictionarySpec, State
from .json_settings import Settings
from .tensor_files import TrackedTensors


@dataclass(frozen=True)
class Library:
    """`settings` (None: there are none) and `weights` are the files that we write in a folder. A folder is of this library
    if it has these, or of each the first that there is of those with `other_settings` and `other_weights`. Weights with a *
    are those of a step in training, which are read where they are named. Some do without settings (`optional`).

    `read` makes a `DictionarySpec` of what the files hold, and of the folder they lie in; `write` makes both of a
    `DictionarySpec`, or raises UserError for one that can't be.
    """

    settings: str | None
    weights: str
    read: Callable[[Settings, TrackedTensors, Path], DictionarySpec]
    write: Callable[[DictionarySpec], tuple[dict[str, Any], State]] | None = None
    other_settings: tuple[str, ...] = ()
    other_weights: tuple[str, ...] = ()
    optional: bool = False

    @property
    def all_settings(self) -> tuple[str, ...]:
        return (*(() if self.settings is None else (self.settings,)), *self.other_settings)

    @property
    def all_weights(self) -> tuple[str, ...]:
        return (self.weights, *self.other_weights)


_STAGES = ("checkpoints/pruned", "checkpoints/final")
_LLAMASCOPIUM = ("sae_weights.pt", *(f"{stage}{suffix}" for stage in _STAGES for suffix in (".safetensors", ".pt")))

#: by the name that `convert` has for them; those with the same settings differ in the weights' name
LIBRARIES: Mapping[str, Library] = {
    "saelens": Library("cfg.json", "sae_weights.safetensors", saelens.read, saelens.write),
    "dictionary_learning": Library(
        "config.json", "ae.pt", dictionary_learning.read, dictionary_learning.write,
        other_weights=("checkpoints/ae_*.pt",),
    ),
    "sparsify": Library("cfg.json", "sae.safetensors", sparsify.read, sparsify.write),
    "gemma-scope": Library(None, "params.npz", gemma_scope.read, gemma_scope.write),
    "gemma-scope-2": Library("config.json", "params.safetensors", gemma_scope.read_2, optional=True),
    "llamascopium": Library(
        "config.json", "sae_weights.safetensors", llamascopium.read,
        other_settings=(llamascopium.FIRST,), other_weights=_LLAMASCOPIUM,
    ),
}  # fmt: skip
