"""A run's folder: config.yaml (resolved settings with absolute paths), metrics.jsonl (one line per report),
held_out.jsonl (reports on held-out text from step 0, if requested), checkpoints/."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..config import Config, RunConfig, SweepConfig, read_yaml
from ..config.controls import CONTROLS
from ..errors import UserError
from ..stream import model_loading
from .files import absolute, check_can_make, contents, os_errors_named, write_text
from .sealed import check_yaml, sealed_yaml

CONFIG, METRICS, HELD_OUT = "config.yaml", "metrics.jsonl", "held_out.jsonl"
#: numbers in every line of a log; null stands for numbers that are not finite
_NUMBERS = {METRICS: ("loss", "fvu", "l0", "dead_fraction"), HELD_OUT: ("fvu", "l0")}


def begin(folder: Path, settings: Config, name: str = CONFIG) -> None:
    """Create the folder and write its settings, unless a resumed run has them already."""
    if (folder / name).exists():
        return
    with os_errors_named(f"out: {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
        write_text(folder / name, sealed_yaml(text))


def check_free(folder: Path) -> None:
    """Raise UserError for a run folder that is not empty or can't be created. Leaves nothing behind."""
    with os_errors_named(f"out: {folder}", "give a folder that you may write to"):
        if folder.exists() and (not folder.is_dir() or contents(folder)):
            advice = "give a new folder, or --resume to continue that run"
            raise UserError(f"out: {folder} exists and is not empty; {advice}")
        check_can_make(folder)


def read_settings(folder: Path) -> RunConfig | SweepConfig:
    """Read the settings of the run in `folder`, or of several runs that share a stream."""
    path = folder / CONFIG
    values = read_sealed_yaml(path)
    try:
        settings = SweepConfig(**values) if "dictionaries" in values else RunConfig(**values)
    except UserError as error:
        raise UserError(f"{error} (in {path})") from None
    if isinstance(settings, SweepConfig):
        return SweepConfig(dictionaries={name: as_begun(run) for name, run in settings.dictionaries.items()})
    return as_begun(settings)


def as_begun(run: RunConfig) -> RunConfig:
    """Return stored settings with the defaults of the version that wrote them.

    Version 0.1.0 had no `stream.memory_gb`. Its learning rate was Gao et al.'s, and it ignored a missing `text_field`.
    """
    if "memory_gb" in run.stream.model_fields_set:
        return run
    lr = run.train.lr if run.train.lr is not None else 2e-4 * math.sqrt(2**14 / run.sae.d_sae)
    field = None if run.stream.text_field == "text" else run.stream.text_field
    return run.model_copy(
        update={
            "train": run.train.model_copy(update={"lr": lr}),
            "stream": run.stream.model_copy(update={"text_field": field}),
        }
    )


def read_sealed_yaml(path: Path) -> dict[str, Any]:
    """Read the settings that a run or a campaign wrote. Raises UserError if the file has changed since."""
    check_yaml(path, "resume", "undo the change, or start a new run with this file and --out")
    return read_yaml(path)


def with_absolute_paths(run: RunConfig) -> RunConfig:
    """Return the settings with absolute paths, which mean the same from any folder."""
    train = {} if run.train.init is None else {"init": absolute(run.train.init)}
    stream = model_loading.with_absolute_paths(run.stream)
    return run.model_copy(update={"stream": stream, "train": run.train.model_copy(update=train)})


def difference(old: Mapping[str, RunConfig], new: Mapping[str, RunConfig]) -> tuple[str, Any, Any] | None:
    """Return the first setting that differs, with both values, or None."""
    if old.keys() != new.keys():
        return "dictionaries", ", ".join(old), ", ".join(new)

    def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    for name in old:
        first, second = (dict(flat(with_absolute_paths(runs[name]).model_dump(mode="json"))) for runs in (old, new))
        for key in {**first, **second}:
            if first.get(key) != second.get(key):
                return f"{name}: {key}" if name else key, first.get(key), second.get(key)
    return None


def read_metrics(folder: Path, until: int | None = None, name: str = METRICS) -> list[dict[str, Any]]:
    """Read the reports in a run's log up to step `until`. Damaged lines are reported on stderr and skipped."""
    path = folder / name
    reports = []
    *lines, rest = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, raw in enumerate([*lines, rest] if rest else lines, 1):
        line = _report(raw, _NUMBERS.get(name, ()))
        if line is not None:
            if until is None or line["step"] <= until:
                reports.append(line)
        else:
            print(f"{path}: line {number} is damaged and skipped", file=sys.stderr, flush=True)
    return reports


def _report(raw: bytes, numbers: tuple[str, ...]) -> dict[str, Any] | None:
    try:
        line = json.loads(raw.decode())
    except (ValueError, RecursionError):
        return None

    def has_numbers(values: Any) -> bool:
        return isinstance(values, dict) and all(isinstance(values.get(key, ""), int | float | None) for key in numbers)

    if not has_numbers(line) or not all(has_numbers(line[control]) for control in CONTROLS if control in line):
        return None
    return line if all(type(line.get(key)) is int for key in ("step", "tokens")) else None


def rewind(folder: Path, reports: list[dict[str, Any]], name: str = METRICS) -> None:
    """Replace the contents of metrics.jsonl by `reports`."""
    write_text(folder / name, "".join(json.dumps(line) + "\n" for line in reports))


def report(folder: Path, line: dict[str, Any], name: str = METRICS) -> None:
    """Append a line to metrics.jsonl. Numbers that are not finite become null."""
    path = folder / name
    with os_errors_named(f"out: {path}", "the checkpoints are unchanged"), path.open("a") as file:
        file.write(json.dumps(_plain(line), allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
