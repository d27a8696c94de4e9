"""Read and write dictionaries of other libraries. docs/exchange.md lists the kinds and releases.

Each library has a module that follows the library's own rules for older releases and missing settings.

Beside the library's files we write `temposae.safetensors`, which the libraries ignore. It has our settings, where the
dictionary was trained, tensors that the library's layout rounds, and the SHA-256 of the weights and settings files. So
a dictionary of ours is restored bit for bit. If one of the two files was changed, `temposae.safetensors` is not used.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..config import RunConfig, SAEConfig, StreamConfig
from ..errors import UserError
from ..sae import SparseAutoencoder
from ..storage.files import digest, whole_folder
from .hook_metadata import Where, metadata_of_stream, stream_settings
from .intermediate import BESIDE, DictionarySpec, State, of_sae, to_sae
from .json_settings import Settings, read_settings
from .libraries import LIBRARIES, Library
from .tensor_files import save as _save
from .tensor_files import tensors_in

_OTHER_WEIGHTS = (".dcp", ".safetensors", ".pt", ".npz", ".bin", ".index.json")
_WITHOUT = "without it the weights are read as they are"
WRITTEN = tuple(name for name, library in LIBRARIES.items() if library.write is not None)


@dataclass(frozen=True)
class ForeignFiles:
    """A folder in a library's layout, and the files to read."""

    library: Library
    folder: Path
    settings: Path | None
    weights: Path

    @property
    def names(self) -> str:
        files = [file for file in (self.settings, self.weights) if file is not None]
        return " or ".join(str(file.relative_to(self.folder)) for file in files)


def read(path: Path) -> tuple[ForeignFiles, SparseAutoencoder, Where, RunConfig | None] | None:
    """Read the dictionary in a folder of another library, given by the path of the folder or of a file in it.

    Returns its files, the dictionary, what the folder says about its training place and text
    (`hook_metadata.SETTINGS`), and the same as settings of a run, or None if the model or a hook is unknown. The run's
    settings of training are only defaults. Returns None if the folder has no known layout.

    Raises UserError for kinds that can't be read and for damaged files.
    """
    files = next(_layouts(path), None)
    if files is None:
        return None
    try:
        spec = _read_spec(files)
        sae, where = _restored(spec, files)
        needed = ("model", "hook", *(("target",) if sae.cfg.d_out is not None else ()))
        run = None
        if all(where.get(name) is not None for name in needed):
            run = RunConfig(stream=StreamConfig(**stream_settings(where)), sae=sae.cfg)
    except UserError as error:
        raise UserError(f"sae: {path}: {error}") from None
    except KeyError as error:
        raise UserError(f"sae: {path} has no {error} in {files.names}") from None
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError, MemoryError) as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(f"sae: {path} can't be read ({type(error).__name__}: {first_line})") from None
    return files, sae, where, run


def unreadable_reason(folder: Path) -> str:
    """Explain why `read` finds no dictionary in a folder, or suggest its subfolders."""
    if not folder.is_dir():
        return ""
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    for library in LIBRARIES.values():
        weights = library.weights[0]
        if weights in files:
            same_weights = [other for other in LIBRARIES.values() if other.weights[0] == weights]
            settings_names = sorted({name for other in same_weights for name in other.settings})
            return f"; it has {weights}, and no {' or '.join(settings_names)} beside it"
    unread = [name for name in files if name.endswith(_OTHER_WEIGHTS)]
    for settings in ("cfg.json", "config.json"):
        weights = sorted({other.weights[0] for other in LIBRARIES.values() if settings in other.settings})
        if settings in files and unread:
            return f"; it has {settings} and {', '.join(unread[:3])}, where {' or '.join(weights)} is read"
    subfolders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    readable = [name for name in subfolders if next(_layouts(folder / name), None) is not None]
    ellipsis = ", ..." if len(readable) > 5 else ""
    return f"; give one of the folders in it: {', '.join(readable[:5])}{ellipsis}" if readable else ""


def _layouts(path: Path) -> Iterator[ForeignFiles]:
    """Yield the layouts of the folder at `path`, or of the folder that a file at `path` belongs to."""
    if path.is_file():
        for library in LIBRARIES.values():
            if path.name in library.settings:
                yield from _layouts(path.parent)
                return
            for pattern in library.weights:
                if path.absolute().match(pattern):
                    deep = pattern.count("/")
                    yield from _in_folder(library, (path.absolute() if deep else path).parents[deep], path)
        return
    for library in LIBRARIES.values():
        candidates = (path / name for name in library.weights if "*" not in name)
        if (weights := next(filter(Path.is_file, candidates), None)) is not None:
            yield from _in_folder(library, path, weights)


def _in_folder(library: Library, folder: Path, weights: Path) -> Iterator[ForeignFiles]:
    settings = next((folder / name for name in library.settings if (folder / name).is_file()), None)
    if settings is not None or not library.settings or library.optional:
        yield ForeignFiles(library, folder, settings, folder / weights.absolute().relative_to(folder.absolute()))


def _read_spec(files: ForeignFiles) -> DictionarySpec:
    """Read a library's files. A tensor that its reader ignores is refused."""
    settings = read_settings(files.settings) if files.settings is not None else Settings()
    tensors = tensors_in(files.weights)
    spec = files.library.read(settings, tensors, files.folder)
    tensors.check_all_read(files.weights.name)
    return spec


def write(
    sae: SparseAutoencoder, folder: Path, to: str, run: RunConfig | None = None, *,
    where: Where | None = None, tokens: int | None = None,
) -> None:  # fmt: skip
    """Write a dictionary atomically to `folder`, which must not exist, in the layout of the library `to`.

    `run` or `where` (`hook_metadata.SETTINGS`) says where it was trained, and `tokens` on how many tokens. Raises
    UserError for an unknown library, for a dictionary that the library can't represent, and if writing fails.
    """
    if to not in WRITTEN:
        raise UserError(f"to: {to} is not allowed; it must be {', '.join((*WRITTEN, 'temposae'))}")
    library = LIBRARIES[to]
    assert library.write is not None
    if where is None:
        where = metadata_of_stream(run.stream) if run else {}
    spec = of_sae(sae, where, tokens)
    settings, tensors = library.write(spec)
    if folder.exists():
        raise UserError(f"out: {folder} already exists; nothing is overwritten")
    try:
        with whole_folder(folder) as new_folder:
            if library.settings:
                (new_folder / library.settings[0]).write_text(json.dumps(settings, indent=1) + "\n")
            _save({name: tensor.contiguous() for name, tensor in tensors.items()}, new_folder / library.weights[0])
            _remember(sae, spec, next(_layouts(new_folder)))
    except (OSError, SafetensorError) as error:
        raise UserError(f"out: {folder} can't be written ({error})") from None


def _remember(sae: SparseAutoencoder, spec: DictionarySpec, files: ForeignFiles) -> None:
    """Write what reading the library's files would not restore."""
    with warnings.catch_warnings(action="ignore"):  # the temporary folder's name says nothing
        read_back = to_sae(_read_spec(files), sae.cfg).state_dict()
    rounded = {name: value for name, value in spec.tensors.items() if not torch.equal(read_back[name], value.float())}
    rounded = {name: value.contiguous() for name, value in rounded.items()}
    metadata = {"sae": sae.cfg.model_dump_json(), "where": json.dumps(spec.where), **_digests(files)}
    metadata["contents"] = _digest_of(metadata, rounded)
    save_file(rounded, files.folder / BESIDE, metadata=metadata)


def _digests(files: ForeignFiles) -> dict[str, str]:
    return {name: digest(file) for name in ("weights", "settings") if (file := getattr(files, name)) is not None}


def _digest_of(metadata: dict[str, str], tensors: State) -> str:
    """Return the SHA-256 of a file's tensors and of its metadata except `contents`."""
    entries = sorted((name, text) for name, text in metadata.items() if name != "contents")
    sha256 = hashlib.sha256(json.dumps(entries).encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return sha256.hexdigest()


def _restored(spec: DictionarySpec, files: ForeignFiles) -> tuple[SparseAutoencoder, Where]:
    """Build the dictionary, restored from `temposae.safetensors` if that fits the files."""
    beside = files.folder / BESIDE
    if not beside.is_file():
        return to_sae(spec), spec.where
    try:
        with safe_open(beside, framework="pt") as file:
            metadata, rounded = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{BESIDE} is damaged ({error}); {_WITHOUT}") from None
    if metadata.get("contents", "") != _digest_of(metadata, rounded) and "contents" in metadata:  # older ones have none
        raise UserError(f"{BESIDE} is damaged; {_WITHOUT}")
    if any(metadata.get(name) != value for name, value in _digests(files).items()):
        problem = f"{files.names} was changed since it was written"
        warnings.warn(f"{files.folder}: {problem}; {BESIDE} is not used", stacklevel=2)
        return to_sae(spec), spec.where
    sae = to_sae(spec, SAEConfig(**json.loads(metadata["sae"])))
    sae.load_state_dict({**sae.state_dict(), **rounded})
    return sae, json.loads(metadata["where"])
