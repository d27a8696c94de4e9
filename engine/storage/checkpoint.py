"""Checkpoints: a folder of safetensors and JSON, written beside its place and moved there, so that it is whole or absent.

step_00000500/
  checkpoint.json        format, step, settings, limits of norms, and the size and SHA-256 of every other file
  sae.safetensors        W_enc [D, F], W_dec [F, D], b_enc, b_dec, mask.*; fp32, for activations as the model gives them
  random.safetensors     the random control trained beside it, if any
  state.safetensors      what resuming needs of the learner: moments (of `train.moments`' kind), counters
  stream.safetensors     and of the stream: buffer, random state, place in the text

Of several dictionaries on a stream, each has a checkpoint of its own without stream.safetensors, and the run's folder has
one with that alone, which is written last and names what belongs to it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...kernels.torch_modes import default_modes
from .. import interchange
from ..composed import dictionary
from ..config import RunConfig, SAEConfig
from ..errors import UserError
from ..interchange import hub
from ..interchange.hook_metadata import Where, metadata_of_stream
from ..plugins import UnknownPart
from ..sae import SparseAutoencoder
from .files import UNFINISHED, digest, remove_folder, whole_folder
from .path_names import expand_path
from .run_folder import as_begun
from .sealed import read_json, write_json

FORMAT = "temposae/1"
MANIFEST = "checkpoint.json"
KEYS = {"format": str, "step": int, "dictionaries": dict, "run": dict | None, "status": dict | None, "files": dict}
#: names of dictionaries and of files of tensors; with a suffix they are the names of files in the folder
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_FILE = {"bytes": int, "sha256": str}  # of each file in the manifest
KEEP = 2  # checkpoints of a run that stay on disk


@dataclass
class Checkpoint:
    """A checkpoint on disk: its folder and its manifest. `of_run`: the run folder, if that is what was asked for."""

    folder: Path
    manifest: dict[str, Any]
    of_run: Path | None = field(default=None, kw_only=True)

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def run(self) -> RunConfig | None:
        """Settings of the run that made it; None for a dictionary that was saved by itself."""
        settings = self.manifest.get("run")
        try:
            run = RunConfig(**settings) if settings else None
        except UnknownPart:
            raise
        except UserError as error:
            raise UserError(f"checkpoint: {self.folder / MANIFEST} is damaged: run: {error}") from None
        return None if run is None else as_begun(run)

    @property
    def where(self) -> Where:
        """What is known of the model, the place and the text that it was trained on (`hook_metadata.SETTINGS`)."""
        return metadata_of_stream(self.run.stream) if self.run else {}

    @property
    def tokens(self) -> int | None:
        """How many tokens it was trained on by then; None for a dictionary that was not trained here."""
        return min(self.run.train.tokens, self.step * self.run.train.batch) or None if self.run else None

    @property
    def massive(self) -> dict[str, Any] | None:
        """The limits of norms that training went by (`stream.norms.NormFilter.report`), and what they left out."""
        return self.manifest.get("massive")

    @property
    def dictionaries(self) -> list[str]:
        return list(self.manifest["dictionaries"])

    def expect(self, name: str) -> None:
        """Raise UserError if there is no dictionary `name`."""
        if name not in self.manifest["dictionaries"]:
            names = ", ".join(self.dictionaries) or f"the stream of {', '.join(self.manifest['status'] or {})}"
            raise UserError(f"checkpoint: {self.folder} holds no {name!r}; it holds {names}")

    @default_modes()
    def dictionary(self, name: str = "sae") -> SparseAutoencoder:
        """The dictionary `name`: `sae`, or `random` for the control trained beside it."""
        self.expect(name)
        try:
            cfg = SAEConfig(**self.manifest["dictionaries"][name])
        except UnknownPart as error:
            raise error.of((self.manifest.get("run") or {}).get("plugins") or ()) from None
        except UserError as error:
            raise UserError(f"checkpoint: {self.folder / MANIFEST} is damaged: {name}: {error}") from None
        sae = dictionary(cfg)
        try:
            sae.load_state_dict(self.tensors(name))
        except RuntimeError:
            path = self.folder / f"{name}.safetensors"
            raise UserError(f"checkpoint: {path} does not fit its settings in {MANIFEST}") from None
        return sae

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, after checking that it is the file that was written."""
        path = self.folder / f"{name}.safetensors"
        expected = self.manifest["files"].get(path.name)
        if expected is None:
            raise UserError(
                f"checkpoint: {path.name} is not in {self.folder}; it holds {', '.join(self.manifest['files'])}"
            )
        try:
            if not path.is_file() or path.stat().st_size != expected["bytes"]:
                raise UserError(f"checkpoint: {path} is damaged or missing; it must have {expected['bytes']} bytes")
            if digest(path) != expected["sha256"]:
                raise UserError(f"checkpoint: {path} is damaged; its contents are not what was written")
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"checkpoint: {path} can't be read ({error})") from None
        if name in self.manifest["dictionaries"]:
            for key, tensor in tensors.items():
                is_invalid = ~tensor.isfinite() if tensor.is_floating_point() else tensor.new_zeros(1, dtype=torch.bool)
                if bool(is_invalid.any()):
                    raise UserError(
                        f"checkpoint: {path} is damaged; {int(is_invalid.sum()):,} of {tensor.numel():,} numbers of {key} "
                        "are NaN or infinite"
                    )
        return tensors


@dataclass
class Loaded(Checkpoint):
    """A dictionary that another library saved, as a checkpoint of that alone."""

    sae: SparseAutoencoder
    stored_where: Where

    @classmethod
    def of(cls, foreign: interchange.ForeignDictionary) -> "Loaded":
        file = {"bytes": foreign.weights.stat().st_size, "sha256": digest(foreign.weights)}
        run = None if foreign.run is None else foreign.run.model_dump()
        values = (foreign.weights.name, 0, {"sae": foreign.sae.cfg.model_dump()}, run, None, {"sae.safetensors": file})
        return cls(foreign.folder, dict(zip(KEYS, values, strict=True)), foreign.sae, foreign.where)

    @property
    def where(self) -> Where:
        return self.stored_where

    def dictionary(self, name: str = "sae") -> SparseAutoencoder:
        self.expect(name)
        return self.sae

    def tensors(self, name: str) -> dict[str, Tensor]:
        return self.dictionary(name).state_dict()


def write(
    folder: Path,
    step: int,
    dictionaries: dict[str, tuple[SAEConfig, dict[str, Tensor]]],
    run: RunConfig | None = None,
    tensor_files: dict[str, dict[str, Tensor]] | None = None,
    status: dict[str, Any] | None = None,
    massive: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint to `folder`, which must not exist: all of it or nothing. `dictionaries` are settings and
    `state_dict`, `tensor_files` tensors by name of the file; `status` and `massive` are kept in the manifest. Raises
    UserError if the disk refuses."""
    try:
        if folder.exists():
            raise UserError(f"checkpoint: {folder} already exists; nothing is overwritten")
        with whole_folder(folder) as fresh:
            files = {f"{name}.safetensors": weights for name, (_, weights) in dictionaries.items()}
            files |= {f"{name}.safetensors": tensors for name, tensors in (tensor_files or {}).items()}
            for name, tensors in files.items():
                save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, fresh / name)
            manifest = {
                "format": FORMAT,
                "step": step,
                "dictionaries": {name: cfg.model_dump() for name, (cfg, _) in dictionaries.items()},
                "run": run.model_dump() if run else None,
                "status": status,
                "massive": massive,
                "files": {n: {"bytes": (fresh / n).stat().st_size, "sha256": digest(fresh / n)} for n in files},
            }
            write_json(fresh / MANIFEST, manifest)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"out: the checkpoint {folder} can't be written ({error}); what was saved before is untouched"
        ) from None


@default_modes()
def find(path: Path) -> Checkpoint:
    """The checkpoint at `path`, the last one of the run folder at `path`, or the dictionary in another library's folder; all
    of them also on the hub, by name (`interchange.hub`). The path of the weights, or of the settings beside them, stands for
    their folder."""
    is_name = not path.exists() and hub.is_name(str(path)) and not path.parent.exists()  # else it is a slip of the pen
    if is_name:
        path = hub.fetch(str(path))
    if not path.exists():
        raise UserError(f"sae: {path} does not exist; give a run folder or a checkpoint folder")
    run_folder = None
    if path.is_file() and (path.parent / MANIFEST).is_file():
        if path.name not in (MANIFEST, "sae.safetensors"):
            raise UserError(
                f"sae: {path} is not the dictionary; give its folder {path.parent}, or sae.safetensors in it"
            )
        path = path.parent
    folder = path
    if not (path / MANIFEST).is_file():
        steps = all_in(path)
        if not steps:
            if (foreign := interchange.read(path)) is not None:
                return Loaded.of(foreign)
            why_not = interchange.unreadable_reason(path if path.is_dir() else path.parent)
            raise UserError(
                f"sae: {path} is neither a checkpoint (no {MANIFEST}) nor a run (no checkpoints/step_*), nor a folder of "
                f"SAELens, dictionary_learning, sparsify, Gemma Scope or Llamascopium{why_not}"
            )
        folder, run_folder = steps[-1], None if is_name else path
    return Checkpoint(folder, _manifest(folder), of_run=run_folder)


def _manifest(folder: Path) -> dict[str, Any]:
    """What checkpoint.json holds, once it is what was written and of the right shape: its names become paths."""
    path = folder / MANIFEST
    remedy = f"remove {folder} to go on from an earlier checkpoint, if the run has one"
    manifest = read_json(path, "checkpoint", remedy, form=FORMAT, keys=KEYS)
    names = [*manifest["dictionaries"], *(name.removesuffix(".safetensors") for name in manifest["files"])]
    if bad_names := [name for name in names if not _NAME.fullmatch(name)]:
        raise UserError(f"checkpoint: {path} is damaged: {bad_names[0]!r} is no name of a file in it; {remedy}")
    for name, file in manifest["files"].items():
        if not isinstance(file, dict) or {key: type(file.get(key)) for key in ("bytes", "sha256")} != _FILE:
            raise UserError(f"checkpoint: {path} is damaged: files.{name} has no bytes and sha256; {remedy}")
    return {"massive": manifest.get("massive")} | {key: manifest[key] for key in KEYS}


def place(run: Path, step: int) -> Path:
    """Where a run's checkpoint at `step` is."""
    return run / "checkpoints" / f"step_{step:08d}"


def keep_last(run: Path) -> None:
    """Remove all but the last `KEEP` checkpoints of a run, and what a kill left unfinished or half removed."""
    last_folders = all_in(run)[-KEEP:]
    for folder in [*(run / "checkpoints").glob("step_*"), *(run / "checkpoints").glob(f"{UNFINISHED}*")]:
        if folder not in last_folders:
            remove_folder(folder)


def all_in(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step_*") if (p / MANIFEST).is_file())


@default_modes()
def save(sae: SparseAutoencoder, folder: str | Path) -> None:
    """Save one dictionary as a checkpoint folder, which must not exist yet.

    save(sae, "mine")
    load("mine")  # the same, bit for bit
    """
    write(Path(folder), 0, {"sae": (sae.cfg, sae.state_dict())})


@default_modes()
def load(path: str | Path) -> SparseAutoencoder:
    """Load the dictionary in a checkpoint folder, in the last checkpoint of a run folder, or in a folder of SAELens,
    dictionary_learning, sparsify, Gemma Scope or Llamascopium; here, or on the hub
    as `OWNER/REPOSITORY[/FOLDER][@REVISION]`. The path of the weights stands for their folder. float32, on the CPU.
    docs/exchange.md says which kinds and releases of other libraries are read.

        sae = load("runs/mine")
        sae = load("theirs/sae_weights.safetensors")
        sae = load("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")

    Raises UserError for what is no dictionary or is damaged, and for parts of one's own that are not imported yet.
    """
    return find(expand_path(path, "sae")).dictionary()
