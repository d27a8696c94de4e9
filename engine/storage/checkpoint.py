"""Checkpoints: folders of safetensors and JSON files, written atomically.

step_00000500/
  checkpoint.json        format, step, settings, norm limits, and the size and SHA-256 of every other file
  sae.safetensors        W_enc [D, F], W_dec [F, D], b_enc, b_dec, mask.*; fp32, for unscaled activations of the model
  random.safetensors     the random control trained beside it, if any; other controls likewise (`config.controls`)
  state.safetensors      the learner's state for resuming: moments (in the dtype of `train.moments`), counters
  stream.safetensors     the stream's state: buffer, random state, position in the text

When several dictionaries share a stream, each has its own checkpoint without stream.safetensors. The run's folder has
one with only stream.safetensors, which is written last and names the dictionaries' checkpoints.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...kernels.torch_modes import default_modes
from .. import interchange
from ..composed import dictionary
from ..config import RunConfig, SAEConfig
from ..errors import UserError
from ..interchange import ForeignFiles, hub
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
#: names of dictionaries and of tensor files without their suffix
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_FILE = {"bytes": int, "sha256": str}  # entry of a file in the manifest
KEEP = 2  # number of checkpoints that a run keeps


@dataclass
class Checkpoint:
    """A checkpoint on disk: its folder and its manifest. `of_run` is the run folder if it was found through that."""

    folder: Path
    manifest: dict[str, Any]
    of_run: Path | None = field(default=None, kw_only=True)

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def run(self) -> RunConfig | None:
        """The settings of its run, or None for a dictionary that was saved by `save`."""
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
        """What is known about the model, hook and text that it was trained on (`hook_metadata.SETTINGS`)."""
        return metadata_of_stream(self.run.stream) if self.run else {}

    @property
    def tokens(self) -> int | None:
        """Number of training tokens so far, or None if it was not trained by temposae."""
        return min(self.run.train.tokens, self.step * self.run.train.batch) or None if self.run else None

    @property
    def massive(self) -> dict[str, Any] | None:
        """The norm limits used in training, and what they excluded (`stream.norm_filter.NormFilter.report`)."""
        return self.manifest.get("massive")

    @property
    def dictionaries(self) -> list[str]:
        return list(self.manifest["dictionaries"])

    def expect(self, name: str) -> None:
        """Raise UserError if there is no dictionary `name`."""
        if name not in self.manifest["dictionaries"]:
            names = ", ".join(self.dictionaries) or f"the stream of {', '.join(self.manifest['status'] or {})}"
            raise UserError(f"checkpoint: {self.folder} has no {name!r}; it has {names}")

    @default_modes()
    def dictionary(self, name: str = "sae") -> SparseAutoencoder:
        """Load the dictionary `name`: `sae`, or that of a control trained beside it."""
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
        """Load the tensors of one file. Raises UserError if the file differs from what was written."""
        path = self.folder / f"{name}.safetensors"
        expected = self.manifest["files"].get(path.name)
        if expected is None:
            raise UserError(f"checkpoint: {self.folder} has no {path.name}; it has {', '.join(self.manifest['files'])}")
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
                if invalid := int(tensor.isfinite().logical_not().sum()):
                    problem = f"{invalid:,} of {tensor.numel():,} numbers of {key} are NaN or infinite"
                    raise UserError(f"checkpoint: {path} is damaged; {problem}")
        return tensors


@dataclass
class Loaded(Checkpoint):
    """A dictionary saved by another library, with the interface of a checkpoint."""

    sae: SparseAutoencoder
    stored_where: Where

    @classmethod
    def of(cls, files: ForeignFiles, sae: SparseAutoencoder, where: Where, run: RunConfig | None) -> "Loaded":
        file = {"bytes": files.weights.stat().st_size, "sha256": digest(files.weights)}
        settings = None if run is None else run.model_dump()
        values = (files.weights.name, 0, {"sae": sae.cfg.model_dump()}, settings, None, {"sae.safetensors": file})
        return cls(files.folder, dict(zip(KEYS, values, strict=True)), sae, where)

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
    """Write a checkpoint atomically to `folder`, which must not exist.

    `dictionaries` maps names to settings and `state_dict`, `tensor_files` maps file names to tensors. `status` and
    `massive` are stored in the manifest. Raises UserError if writing fails.
    """
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
        raise UserError(f"out: checkpoint {folder} can't be written ({error}); earlier ones are unchanged") from None


@default_modes()
def find(path: Path, field: str = "sae") -> Checkpoint:
    """Find the checkpoint at `path`, the last checkpoint of the run folder at `path`, or the dictionary in another
    library's folder, each also by its name on the hub (`interchange.hub`). The path of the weights or settings file
    stands for its folder. Errors name the `field` that gave the path."""
    is_name = not path.exists() and hub.is_name(str(path)) and not path.parent.exists()  # else a misspelt path
    if is_name:
        path = hub.fetch(str(path))
    if not path.exists():
        raise UserError(f"{field}: {path} does not exist; give a run folder or a checkpoint folder")
    run_folder = None
    if path.is_file() and (path.parent / MANIFEST).is_file():
        if path.name not in (MANIFEST, "sae.safetensors"):
            advice = f"give its folder {path.parent}, or sae.safetensors in it"
            raise UserError(f"{field}: {path} is not a dictionary's file; {advice}")
        path = path.parent
    folder = path
    if not (path / MANIFEST).is_file():
        steps = all_in(path)
        if not steps:
            if (foreign := interchange.read(path)) is not None:
                return Loaded.of(*foreign)
            why_not = interchange.unreadable_reason(path if path.is_dir() else path.parent)
            raise UserError(
                f"{field}: {path} is neither a checkpoint (no {MANIFEST}), a run (no checkpoints/step_*), nor a folder of "
                f"SAELens, dictionary_learning, sparsify, Gemma Scope or Llamascopium{why_not}"
            )
        folder, run_folder = steps[-1], None if is_name else path
    return Checkpoint(folder, _manifest(folder), of_run=run_folder)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    remedy = f"remove {folder} to continue from an earlier checkpoint, if the run has one"
    manifest = read_json(path, "checkpoint", remedy, form=FORMAT, keys=KEYS)
    names = [*manifest["dictionaries"], *(name.removesuffix(".safetensors") for name in manifest["files"])]
    if bad_names := [name for name in names if not _NAME.fullmatch(name)]:
        raise UserError(f"checkpoint: {path} is damaged: {bad_names[0]!r} is not a valid file name; {remedy}")
    for name, file in manifest["files"].items():
        if not isinstance(file, dict) or {key: type(file.get(key)) for key in ("bytes", "sha256")} != _FILE:
            raise UserError(f"checkpoint: {path} is damaged: files.{name} has no bytes and sha256; {remedy}")
    return {"massive": manifest.get("massive")} | {key: manifest[key] for key in KEYS}


def place(run: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint at `step`."""
    return run / "checkpoints" / f"step_{step:08d}"


def keep_last(run: Path) -> None:
    """Remove all but the last `KEEP` checkpoints of a run, and unfinished or partly removed ones left by a kill."""
    last_folders = all_in(run)[-KEEP:]
    for folder in [*(run / "checkpoints").glob("step_*"), *(run / "checkpoints").glob(f"{UNFINISHED}*")]:
        if folder not in last_folders:
            remove_folder(folder)


def all_in(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
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
    """Load a dictionary in float32 on the CPU.

    `path` is a checkpoint folder, a run folder (its last checkpoint), a folder of SAELens, dictionary_learning,
    sparsify, Gemma Scope or Llamascopium, the path of the weights in one of these, or a name on the hub:
    OWNER/REPOSITORY[/FOLDER][@REVISION]. docs/exchange.md lists the kinds and releases of other libraries.

        sae = load("runs/mine")
        sae = load("saelens/sae_weights.safetensors")
        sae = load("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71")

    Raises UserError if there is no dictionary, if a file is damaged, or if a plugin with its parts is not imported yet.
    """
    return find(expand_path(path, "sae")).dictionary()
