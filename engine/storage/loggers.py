"""Send metrics to TensorBoard and Weights & Biases, if installed. metrics.jsonl is always written."""

import re
import secrets
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import write_text

WANDB_ID = "wandb_id"  # in the run folder


def scalars(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line of metrics by name. Nested ones are named like `random/fvu`."""
    for key, value in line.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value


def _id(folder: Path) -> str:
    """Return the run's id for Weights & Biases: random for a new run, the stored one for a resumed run."""
    try:
        run_id = (folder / WANDB_ID).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        run_id = ""
    return run_id if re.fullmatch("[0-9a-f]{16}", run_id) else secrets.token_hex(8)


class _TensorBoard:
    def __init__(self, module: Any, folder: Path | None, settings: Mapping[str, Any]):
        self._writer = module.SummaryWriter(str((folder or Path("runs")) / "tensorboard"))

    def log(self, prefix: str, line: Mapping[str, Any]) -> None:
        for name, value in scalars(line, prefix):
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, module: Any, folder: Path | None, settings: Mapping[str, Any]):
        name, run_id = (None, None) if folder is None else (folder.name, _id(folder))
        try:
            self._run = module.init(
                project="temposae", name=name, id=run_id, resume="allow", dir=folder, config=dict(settings)
            )
        except Exception as error:  # no key, no network, ...
            reason = " ".join(str(error).split())
            raise UserError(f"train.log: wandb is not allowed; it can't start ({reason})") from None
        if folder is not None and run_id is not None:
            write_text(folder / WANDB_ID, run_id + "\n")

    def log(self, prefix: str, line: Mapping[str, Any]) -> None:
        self._run.log(dict(scalars(line, prefix)), step=line["step"])

    def close(self) -> None:
        self._run.finish()


Logger = _TensorBoard | _Wandb
#: values of `train.log`: the module to import, the package that provides it, and our class
LOGGERS = {"tensorboard": ("torch.utils.tensorboard", "tensorboard", _TensorBoard), "wandb": ("wandb", "wandb", _Wandb)}


def open_loggers(names: tuple[str, ...], folder: Path | None, settings: Mapping[str, Any]) -> list[Logger]:
    """Open the named loggers, which write below `folder`. Raises UserError if a package isn't installed."""
    loggers: list[Logger] = []
    for name in names:
        module, package, logger = LOGGERS[name]
        try:
            loggers.append(logger(import_module(module), folder, settings))
        except ImportError:
            raise UserError(f"train.log: {name} is not allowed; it needs pip install {package}") from None
    return loggers
