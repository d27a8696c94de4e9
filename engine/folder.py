"""A run's folder: config.yaml (settings as resolved), metrics.jsonl (a line a report), held_out.jsonl (the same on text held
out, from step 0 on, where it is asked for), checkpoints/."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import yaml

from .config import Config, RunConfig, SweepConfig, read_yaml
from .errors import UserError
from .files import UNFINISHED, write_text

CONFIG, METRICS, HELD_OUT = "config.yaml", "metrics.jsonl", "held_out.jsonl"


def begin(folder: Path, settings: Config, name: str = CONFIG) -> None:
    """Make the folder, with its settings in it; a run that goes on has them."""
    if (folder / name).exists():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / name, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    except OSError as error:
        raise UserError(f"out: {folder} can't be written ({error.strerror})") from None


def check_free(folder: Path) -> None:
    """Refuse a run folder that holds something already, or that can't be made. Leaves nothing behind."""
    try:
        if folder.exists() and (
            not folder.is_dir() or any(not p.name.startswith(UNFINISHED) for p in folder.iterdir())
        ):
            raise UserError(
                f"out: {folder} exists and is not empty; give a new folder, or --resume to go on with that run"
            )
        above = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        Path(tempfile.mkdtemp(prefix=".temposae-", dir=above)).rmdir()
    except OSError as error:
        raise UserError(
            f"out: {folder} can't be written ({error.strerror}); give a folder that you may write to"
        ) from None


def read_settings(folder: Path) -> RunConfig | SweepConfig:
    """The settings of the run in `folder`, or of the several that share a stream."""
    found = read_yaml(folder / CONFIG)
    return SweepConfig(**found) if "dictionaries" in found else RunConfig(**found)


def read_metrics(folder: Path, until: int | None = None, name: str = METRICS) -> list[dict[str, Any]]:
    """The reports in a run's metrics.jsonl up to step `until`; a line cut short by a kill ends them."""
    path = folder / name
    kept = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if until is not None and line["step"] > until:
            break
        kept.append(line)
    return kept


def rewind(folder: Path, kept: list[dict[str, Any]], name: str = METRICS) -> None:
    """Leave in metrics.jsonl what is to be `kept`."""
    write_text(folder / name, "".join(json.dumps(line) + "\n" for line in kept))


def report(folder: Path, line: dict[str, Any], name: str = METRICS) -> None:
    """Add a line to metrics.jsonl; numbers that JSON doesn't have become null."""
    path = folder / name
    try:
        with path.open("a") as file:
            file.write(json.dumps(_plain(line), allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"out: {path} can't be written ({error.strerror}); the checkpoints are untouched") from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
