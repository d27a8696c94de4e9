"""Names that become paths, and paths that users give. Each name that settings or manifests hold is checked here."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from ..errors import UserError, shown

LONGEST_NAME = 150  # characters, so that what is written beside its place fits in 255 bytes
#: what a run's folder, or one above several, has of its own
RESERVED = ("checkpoints", "evals", "figures", "runs", "tensorboard", "wandb", "wandb_id", "con", "nul", "aux", "prn")
ENDINGS = (
    ".json",
    ".jsonl",
    ".yaml",
    ".yml",
    ".md",
    ".html",
    ".png",
    ".csv",
    ".parquet",
    ".safetensors",
    ".lock",
    ".tmp",
)
ALLOWED = (
    f"it must do as a folder's name: at most {LONGEST_NAME} letters, digits and any of _ - + . after the first one, and "
    "no name that a run's folder has of its own"
)


def folder_name(name: str) -> str:
    """`name`, if a folder within a run's folder may be called so. Raises ValueError."""
    lower = name.casefold()
    if (
        not re.fullmatch(r"\w[\w.+-]*", name)
        or len(name.encode()) > LONGEST_NAME
        or name.endswith(".")
        or lower in RESERVED
        or lower.endswith(ENDINGS)
    ):
        raise ValueError(f"name: {shown(name)} is not allowed; {ALLOWED}")
    return name


def file_name(name: str) -> str:
    """`name`, if it is that of a file within the folder of the manifest that lists it. Raises ValueError."""
    if not re.fullmatch(r"\w[\w.+-]*", name) or len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"file: {shown(name)} is not allowed; it must be the name of a file in the same folder")
    return name


def check_distinct(names: Iterable[str]) -> None:
    """Refuse names that are one on a disk which doesn't tell upper from lower case. Raises ValueError."""
    names_by_lower: dict[str, str] = {}
    for name in names:
        if (earlier_name := names_by_lower.setdefault(name.casefold(), name)) is not name:
            problem = (
                f"{shown(name)} comes twice"
                if earlier_name == name
                else f"{shown(earlier_name)} and {shown(name)} are one folder"
            )
            raise ValueError(f"name: {problem} on some disks; give names that differ")


FolderName = Annotated[str, AfterValidator(folder_name)]
FileName = Annotated[str, AfterValidator(file_name)]


def expand_path(path: str | Path, field: str) -> Path:
    """A path with ~ for a home folder. `field` is where it was given. Raises UserError for a user that there isn't."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise UserError(
            f"{field}: {shown(str(path))} is not allowed; there is no user {user[1:]}, give a whole path"
        ) from None


def check_links(folder: Path) -> None:
    """Refuse a folder with a link that leads out of it: what is written and deleted in it must be its own. Raises
    UserError."""
    top = folder.resolve()
    for directory, folders, files in os.walk(top):
        for name in (*folders, *files):
            path = Path(directory) / name
            if path.is_symlink() and not path.resolve().is_relative_to(top):
                raise UserError(
                    f"resume: {path} is a link to {path.resolve()}, outside of the run's folder; put there what it is to "
                    "hold, in place of the link"
                )
