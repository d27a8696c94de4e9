"""Metrics to where people watch them: TensorBoard and Weights & Biases, where installed. metrics.jsonl is always written."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from .errors import UserError

#: what `train.log` may name: the module to import, and the package that brings it
LOGGERS = {"tensorboard": ("torch.utils.tensorboard", "tensorboard"), "wandb": ("wandb", "wandb")}


class Logger(Protocol):
    def log(self, prefix: str, line: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


def open_loggers(names: tuple[str, ...], folder: Path | None, settings: Mapping[str, Any]) -> list[Logger]:
    """A logger for each of `names`, writing below `folder`. Raises UserError for one whose package isn't installed."""
    makers = {"tensorboard": _TensorBoard, "wandb": _Wandb}
    found: list[Logger] = []
    for name in names:
        module, package = LOGGERS[name]
        try:
            loaded = import_module(module)
        except ImportError:
            raise UserError(f"train.log: {name} is not allowed; it needs pip install {package}") from None
        found.append(makers[name](loaded, folder, settings))
    return found


def scalars(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a line of metrics by name; those of the control and of times as `random/fvu`."""
    for key, value in line.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value


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
        name = folder.name if folder is not None else None
        self._run = module.init(
            project="temposae", name=name, id=name, resume="allow", dir=folder, config=dict(settings)
        )

    def log(self, prefix: str, line: Mapping[str, Any]) -> None:
        self._run.log(dict(scalars(line, prefix)), step=line["step"])

    def close(self) -> None:
        self._run.finish()
