"""Check names from settings and manifests that become paths, and paths that users give."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from ..errors import UserError, shown

LONGEST_NAME = 150  # bytes, so that the name of an unfinished copy fits in 255
#: names of files and folders in the folder of a run or sweep, and device names of Windows
RESERVED = ("checkpoints", "evals", "figures", "runs", "tensorboard", "wandb", "wandb_id", "con", "nul", "aux", "prn")
ENDINGS = (
    ".json", ".jsonl", ".yaml", ".yml", ".md", ".html", ".png", ".csv", ".parquet", ".safetensors", ".lock", ".tmp",
)  # fmt: skip
ALLOWED = (
    f"it must be valid as a folder's name: at most {LONGEST_NAME} letters, digits and any of _ - + . after the first, and "
    "not a name that the run's folder uses"
)


def folder_name(name: str) -> str:
    """Return `name` if it can name a folder in a run's folder. Raises ValueError."""
    lower = name.casefold()
    if not _is_plain(name) or name.endswith(".") or lower in RESERVED or lower.endswith(ENDINGS):
        raise ValueError(f"name: {shown(name)} is not allowed; {ALLOWED}")
    return name


def file_name(name: str) -> str:
    """Return `name` if it can name a file beside the manifest that lists it. Raises ValueError."""
    if not _is_plain(name):
        raise ValueError(f"file: {shown(name)} is not allowed; it must be the name of a file in the same folder")
    return name


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"\w[\w.+-]*", name) is not None and len(name.encode()) <= LONGEST_NAME


def check_distinct(names: Iterable[str]) -> None:
    """Raise ValueError for names that are the same on a file system that ignores case."""
    names_by_lower: dict[str, str] = {}
    for name in names:
        if (earlier_name := names_by_lower.setdefault(name.casefold(), name)) is not name:
            both = f"{shown(earlier_name)} and {shown(name)} are the same folder on some file systems"
            problem = f"{shown(name)} comes twice" if earlier_name == name else both
            raise ValueError(f"name: {problem}; give different names")


FolderName = Annotated[str, AfterValidator(folder_name)]
FileName = Annotated[str, AfterValidator(file_name)]


def expand_path(path: str | Path, field: str) -> Path:
    """Expand ~ in a path given as `field`. Raises UserError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        advice = f"there is no user {user[1:]}, give a full path"
        raise UserError(f"{field}: {shown(str(path))} is not allowed; {advice}") from None


def check_links(folder: Path) -> None:
    """Raise UserError if a folder, whose files are overwritten and deleted, has a link that leads out of it."""
    top = folder.resolve()
    for directory, folders, files in os.walk(top):
        for name in (*folders, *files):
            path = Path(directory) / name
            if path.is_symlink() and not path.resolve().is_relative_to(top):
                problem = f"{path} is a link to {path.resolve()}, outside the run's folder"
                raise UserError(f"resume: {problem}; replace the link by the files themselves")
