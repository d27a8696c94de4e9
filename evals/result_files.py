"""Result files of a run: RUN/evals/NAME.json, with a checksum."""

from pathlib import Path
from typing import Any

from ..engine.storage.files import contents
from ..engine.storage.sealed import read_json, write_json


def names(run: Path) -> list[str]:
    """Names of the evals that the run has results of."""
    folder = run / "evals"
    return [path.stem for path in contents(folder) if path.suffix == ".json"] if folder.is_dir() else []


def read(run: Path, name: str) -> dict[str, Any] | None:
    """Read an eval's result; None if there is none. Raises UserError for a damaged file."""
    path = run / "evals" / f"{name}.json"
    mend = f"`temposae eval {name} --sae {run}` measures it again"
    return read_json(path, name, mend) if path.is_file() else None


def write(run: Path, name: str, result: dict[str, Any]) -> None:
    """Write an eval's result. Raises OSError."""
    path = run / "evals" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
