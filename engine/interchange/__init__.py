"""Dictionaries of other libraries, read as ours and written as theirs.

saelens              cfg.json, sae_weights.safetensors   standard, topk, jumprelu (batchtopk and Matryoshka, saved),
                                                         transcoder, jumprelu_transcoder
dictionary_learning  config.json, ae.pt                  AutoEncoder, AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE,
                                                         JumpReluAutoEncoder
sparsify             cfg.json, sae.safetensors           topk: autoencoders, and transcoders as wide on both sides
gemma-scope          params.npz                          jumprelu, without b_dec in the encoder
llamascopium         config.json, sae_weights.safetensors  relu, topk, jumprelu; read only

What we write has `temposae.safetensors` beside it, which the libraries don't look at: our settings and what their layout had
to round, for the weights with the SHA-256 that it names. So what was written from ours comes back bit for bit, unless
somebody changed the weights; then they are read like any others.
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
from .plain import Plain, State, of_sae, to_sae

BESIDE = "temposae.safetensors"
WRITTEN = tuple(name for name, library in LIBRARIES.items() if library.write is not None)


@dataclass
class Foreign:
    """A dictionary, the file with its weights, and where it was trained, if model and hook are known."""

    sae: SparseAutoencoder
    weights: Path
    run: RunConfig | None


def read(folder: Path) -> Foreign | None:
    """The dictionary in a folder of one of these libraries; None if it is of none of them.

    Raises UserError for a kind that can't be read, and for files that are damaged or don't fit.
    """
    for library in LIBRARIES.values():
        settings = folder / library.settings if library.settings else None
        if (settings is None or settings.is_file()) and (folder / library.weights).is_file():
            where = f"{library.settings} or {library.weights}" if library.settings else library.weights
            try:
                given = json.loads(settings.read_text()) if settings else {}
                plain = library.read(given, tensors_in(folder / library.weights), folder)
                sae = _restored(plain, folder, folder / library.weights)
            except UserError as error:
                raise UserError(f"sae: {folder}: {error}") from None
            except KeyError as error:
                raise UserError(f"sae: {folder} has no {error} in {where}") from None
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise UserError(f"sae: {folder} can't be read ({type(error).__name__}: {error})") from None
            return Foreign(sae, folder / library.weights, _run(plain, sae.cfg))
    return None


def write(sae: SparseAutoencoder, folder: Path, to: str, run: RunConfig | None = None) -> None:
    """Write a dictionary to `folder`, which must not exist, in the layout of the library `to`: all of it or nothing.

    Raises UserError for a library that is not known, for a dictionary that it can't hold, with the reason, and if the disk
    refuses.
    """
    if to not in WRITTEN:
        raise UserError(f"to: {to} is not allowed; it must be {', '.join((*WRITTEN, 'temposae'))}")
    library = LIBRARIES[to]
    assert library.write is not None
    stream = run.stream if run else None
    own = of_sae(sae, *((stream.model, stream.hook, stream.target) if stream else (None, None, None)))
    settings, tensors = library.write(own)
    if folder.exists():
        raise UserError(f"out: {folder} already exists; nothing is overwritten")
    try:
        with whole_folder(folder) as fresh:
            if library.settings:
                (fresh / library.settings).write_text(json.dumps(settings, indent=1) + "\n")
            _save({name: tensor.contiguous() for name, tensor in tensors.items()}, fresh / library.weights)
            _remember(sae, own, library, settings, fresh)
    except (OSError, SafetensorError) as error:
        raise UserError(f"out: {folder} can't be written ({error})") from None


def _run(plain: Plain, sae: SAEConfig) -> RunConfig | None:
    if plain.model is None or plain.hook is None or (plain.is_transcoder and plain.target is None):
        return None
    return RunConfig(stream=StreamConfig(model=plain.model, hook=plain.hook, target=plain.target), sae=sae)


def _remember(sae: SparseAutoencoder, own: Plain, library: Library, settings: dict[str, Any], folder: Path) -> None:
    """Put beside the weights what reading them would not give back."""
    tensors = {name: torch.as_tensor(value) for name, value in tensors_in(folder / library.weights).items()}
    back = to_sae(library.read(settings, tensors, folder), sae.cfg).state_dict()
    rounded = {name: value for name, value in own.tensors.items() if not torch.equal(back[name], value.float())}
    about = {"sae": sae.cfg.model_dump_json(), "weights": digest(folder / library.weights)}
    save_file({name: value.contiguous() for name, value in rounded.items()}, folder / BESIDE, metadata=about)


def _restored(plain: Plain, folder: Path, weights: Path) -> SparseAutoencoder:
    """As we had it, if we wrote these weights, else as they are."""
    place = folder / BESIDE
    if not place.is_file():
        return to_sae(plain)
    try:
        with safe_open(place, framework="pt") as file:
            about, rounded = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{BESIDE} is damaged ({error}); without it the weights are read as they are") from None
    if about.get("weights") != digest(weights):
        return to_sae(plain)
    sae = to_sae(plain, SAEConfig(**json.loads(about["sae"])))
    sae.load_state_dict({**sae.state_dict(), **rounded})
    return sae


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
