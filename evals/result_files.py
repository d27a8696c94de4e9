"""An eval's results as a run keeps them: RUN/evals/NAME.json, with a checksum."""

from pathlib import Path
from typing import Any

from ..engine.storage.files import contents
from ..engine.storage.sealed import read_json, write_json


def names(run: Path) -> list[str]:
    """The evals that a run keeps results of."""
    folder = run / "evals"
    return [path.stem for path in contents(folder) if path.suffix == ".json"] if folder.is_dir() else []


def read(run: Path, name: str) -> dict[str, Any] | None:
    """What an eval found; None where it was not measured. Raises UserError for a damaged file."""
    path = run / "evals" / f"{name}.json"
    mend = f"`temposae eval {name} --sae {run}` measures it again"
    return read_json(path, name, mend) if path.is_file() else None


def write(run: Path, name: str, result: dict[str, Any]) -> None:
    """Keep what an eval found. Raises OSError."""
    path = run / "evals" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
