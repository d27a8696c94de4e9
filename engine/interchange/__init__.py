"""Dictionaries of other libraries, read as ours and written as theirs.

saelens              cfg.json, sae_weights.safetensors   standard, topk, jumprelu (batchtopk and Matryoshka, saved),
                                                         transcoder, jumprelu_transcoder
dictionary_learning  config.json, ae.pt                  AutoEncoder, AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE,
                                                         JumpReluAutoEncoder
sparsify             cfg.json, sae.safetensors           topk: autoencoders, and transcoders as wide on both sides
gemma-scope          params.npz                          jumprelu, without b_dec in the encoder
llamascopium         config.json, sae_weights.safetensors  relu, topk, jumprelu; read only

What we write has `temposae.safetensors` beside it, which the libraries don't look at: our settings, where the dictionary was
trained, and what their layout had to round, for the weights and settings with the SHA-256 that it names. So what was written
from ours comes back bit for bit, unless somebody changed one of the two files; then both are read like any others.
"""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import RunConfig, SAEConfig, StreamConfig
from ..errors import UserError
from ..files import digest, whole_folder
from ..sae import SparseAutoencoder
from .libraries import LIBRARIES, Library
from .places import Where, of_stream, stream_settings
from .plain import Plain, State, of_sae, to_sae

BESIDE = "temposae.safetensors"
WRITTEN = tuple(name for name, library in LIBRARIES.items() if library.write is not None)


@dataclass
class Foreign:
    """A dictionary, the file with its weights, and where it was trained, as far as the folder says (`places.SETTINGS`)."""

    sae: SparseAutoencoder
    weights: Path
    where: Where

    @property
    def run(self) -> RunConfig | None:
        """Model, place and text as a run has them, if model and places are known. How it was trained is not."""
        needed = ("model", "hook", *(("target",) if self.sae.cfg.d_out is not None else ()))
        if any(self.where.get(name) is None for name in needed):
            return None
        return RunConfig(stream=StreamConfig(**stream_settings(self.where)), sae=self.sae.cfg)


def read(folder: Path) -> Foreign | None:
    """The dictionary in a folder of one of these libraries; None if it is of none of them.

    Raises UserError for a kind that can't be read, and for files that are damaged or don't fit.
    """
    for library in LIBRARIES.values():
        settings = folder / library.settings if library.settings else None
        if (settings is None or settings.is_file()) and (folder / library.weights).is_file():
            where = f"{library.settings} or {library.weights}" if library.settings else library.weights
            try:
                plain = _plain(library, folder)
                sae, where = _restored(plain, library, folder)
            except UserError as error:
                raise UserError(f"sae: {folder}: {error}") from None
            except KeyError as error:
                raise UserError(f"sae: {folder} has no {error} in {where}") from None
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise UserError(f"sae: {folder} can't be read ({type(error).__name__}: {error})") from None
            return Foreign(sae, folder / library.weights, where)
    return None


def _plain(library: Library, folder: Path) -> Plain:
    """What a library's files hold. A tensor that its reader doesn't look at is part of another function than ours."""
    settings = json.loads((folder / library.settings).read_text()) if library.settings else {}
    tensors = Watched(tensors_in(folder / library.weights))
    plain = library.read(settings, tensors, folder)
    if unread := sorted(tensors.keys() - tensors.read):
        raise UserError(f"{library.weights} holds {', '.join(unread)}, which can't be read")
    return plain


def write(
    sae: SparseAutoencoder, folder: Path, to: str, run: RunConfig | None = None, *,
    where: Where | None = None, tokens: int | None = None,
) -> None:  # fmt: skip
    """Write a dictionary to `folder`, which must not exist, in the layout of the library `to`: all of it or nothing.

    `run` says where it was trained, or `where` as far as that is known (`places.SETTINGS`), and `tokens` on how many.

    Raises UserError for a library that is not known, for a dictionary that it can't hold, with the reason, and if the disk
    refuses.
    """
    if to not in WRITTEN:
        raise UserError(f"to: {to} is not allowed; it must be {', '.join((*WRITTEN, 'temposae'))}")
    library = LIBRARIES[to]
    assert library.write is not None
    if where is None:
        where = of_stream(run.stream) if run else {}
    own = of_sae(sae, where, tokens)
    settings, tensors = library.write(own)
    if folder.exists():
        raise UserError(f"out: {folder} already exists; nothing is overwritten")
    try:
        with whole_folder(folder) as fresh:
            if library.settings:
                (fresh / library.settings).write_text(json.dumps(settings, indent=1) + "\n")
            _save({name: tensor.contiguous() for name, tensor in tensors.items()}, fresh / library.weights)
            _remember(sae, own, library, fresh)
    except (OSError, SafetensorError) as error:
        raise UserError(f"out: {folder} can't be written ({error})") from None


def _remember(sae: SparseAutoencoder, own: Plain, library: Library, folder: Path) -> None:
    """Put beside the weights what reading them would not give back."""
    back = to_sae(_plain(library, folder), sae.cfg).state_dict()
    rounded = {name: value for name, value in own.tensors.items() if not torch.equal(back[name], value.float())}
    about = {"sae": sae.cfg.model_dump_json(), "where": json.dumps(own.where), **_digests(library, folder)}
    save_file({name: value.contiguous() for name, value in rounded.items()}, folder / BESIDE, metadata=about)


def _digests(library: Library, folder: Path) -> dict[str, str]:
    files = {"weights": library.weights, "settings": library.settings}
    return {name: digest(folder / file) for name, file in files.items() if file is not None}


def _restored(plain: Plain, library: Library, folder: Path) -> tuple[SparseAutoencoder, Where]:
    """As we had it, if we wrote these files, else as they are."""
    place = folder / BESIDE
    if not place.is_file():
        return to_sae(plain), plain.where
    try:
        with safe_open(place, framework="pt") as file:
            about, rounded = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{BESIDE} is damaged ({error}); without it the weights are read as they are") from None
    if any(about.get(name) != value for name, value in _digests(library, folder).items()):
        return to_sae(plain), plain.where
    sae = to_sae(plain, SAEConfig(**json.loads(about["sae"])))
    sae.load_state_dict({**sae.state_dict(), **rounded})
    return sae, json.loads(about["where"])


class Watched(dict[str, Tensor]):
    """Tensors by name, which remembers the names that somebody looked at."""

    def __init__(self, tensors: State):
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


def tensors_in(file: Path) -> State:
    """Floating ones in float32. Nothing is run that a file may hold besides tensors."""
    try:
        found = _LOADERS[file.suffix](file)
    except UnpicklingError:  # whose own words advise to load it in another way
        raise UserError(f"{file.name} is damaged, or holds more than tensors, and then it is not read") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file.name} is damaged, or holds more than tensors ({why})") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{file.name} is not allowed; it must hold tensors by name")
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def _load_npz(file: Path) -> State:
    with np.load(file, allow_pickle=False) as held:
        return {name: torch.from_numpy(held[name]) for name in held.files}


_LOADERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": load_file,
    ".pt": lambda file: torch.load(file, map_location="cpu", weights_only=True),
    ".npz": _load_npz,
}


def _save(tensors: State, file: Path) -> None:
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    elif file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})  # pyright: ignore[reportArgumentType]
