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

    A folder has this layout if it has one file each of `settings`, unless there are none, and `weights`. The first ones
    are those that we write. Weights with a * are those of a training step and are only read if the user gives their
    path. With `optional`, the settings file may be missing.

    `read` converts settings, tensors (float32) and the folder's path to a `DictionarySpec`. `write` returns settings
    and tensors, and raises UserError for a dictionary that the library can't represent.
    """

    settings: tuple[str, ...]
    weights: tuple[str, ...]
    read: Callable[[Settings, TrackedTensors, Path], DictionarySpec]
    write: Callable[[DictionarySpec], tuple[dict[str, Any], State]] | None = None
    optional: bool = False


_LLAMASCOPIUM = tuple(
    f"{name}{suffix}"
    for name in ("sae_weights", "checkpoints/pruned", "checkpoints/final")
    for suffix in (".safetensors", ".pt")
)

#: by name in `temposae convert`; layouts with the same settings file differ in the name of the weights
LIBRARIES: Mapping[str, Library] = {
    "saelens": Library(("cfg.json",), ("sae_weights.safetensors",), saelens.read, saelens.write),
    "dictionary_learning": Library(
        ("config.json",), ("ae.pt", "checkpoints/ae_*.pt"), dictionary_learning.read, dictionary_learning.write
    ),
    "sparsify": Library(("cfg.json",), ("sae.safetensors",), sparsify.read, sparsify.write),
    "gemma-scope": Library((), ("params.npz",), gemma_scope.read, gemma_scope.write),
    "gemma-scope-2": Library(("config.json",), ("params.safetensors",), gemma_scope.read_2, optional=True),
    "llamascopium": Library(("config.json", llamascopium.FIRST), _LLAMASCOPIUM, llamascopium.read),
}
