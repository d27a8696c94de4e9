"""Table of the other libraries' layouts, with their functions to read and write a `DictionarySpec`."""

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
    """A library's layout of a folder.

    `settings` (None: no such file) and `weights` are the names of the files that we write. A folder has this layout if
    it has these files, or one each of `other_settings` and `other_weights`. Weights with a * are those of a training
    step and are only read if the user gives their path. With `optional`, the settings file may be missing.

    `read` converts settings, tensors (float32) and the folder's path to a `DictionarySpec`. `write` returns settings
    and tensors, and raises UserError for a dictionary that the library can't represent.
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

#: by name in `temposae convert`; layouts with the same settings file differ in the name of the weights
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
