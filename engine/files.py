"""Files: written whole or not at all, known by what is in them, and figures that a user asks for."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

UNFINISHED = ".writing-"  # begins the names of files and folders that a kill may leave behind


def flush(path: Path) -> None:
    """See that a file, or what a folder lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which then stands at `path`: all of it, or what was there before. Its mode follows the umask.

    A link is followed. What is not a plain file, such as /dev/stdout, is written as it is.

        with whole_file(folder / "report.md") as fresh:
            fresh.write_text(text)
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        yield path
        return
    fresh = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        fresh.unlink(missing_ok=True)  # a kill may have left it
        fresh.touch()
        mode = fresh.stat().st_mode
        yield fresh
        fresh.chmod(mode)  # some libraries write to a temporary file that is only the owner's
        flush(fresh)
        fresh.replace(path)
        flush(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, all of it or nothing. Raises OSError."""
    with whole_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill with files, which then stands at `folder`, with those above it: all of it or nothing. The files'
    mode follows the umask."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f"{UNFINISHED}{folder.name}-{secrets.token_hex(4)}")
    fresh.mkdir()
    try:
        yield fresh
        follow_umask(fresh)
        for path in fresh.iterdir():
            flush(path)
        os.rename(fresh, folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def follow_umask(folder: Path) -> None:
    """Give the files of a folder the mode of a new file. safetensors writes files that only their owner may read."""
    probe = folder / f"{UNFINISHED}mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_folder(path: Path) -> str:
    """SHA-256 over the names, sizes and times of change of a folder's files: quick for large ones, unlike their contents."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    seen = [f"{file.relative_to(path)} {(stat := file.stat()).st_size} {stat.st_mtime_ns}\n" for file in files]
    return hashlib.sha256("".join(seen).encode()).hexdigest()


def check_writable(path: Path | None, option: str = "json") -> None:
    """Raises UserError if no file can be written at `path`, the value of `option`: before the work, not after it."""
    if path is None:
        return
    new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(
            f"{option}: {path} can't be written ({error.strerror}); give a file in a folder that exists"
        ) from None
    if new:
        path.unlink()


def write_json(path: Path | None, values: Any) -> None:
    """Write `values`, if a path is given. Raises UserError where that fails."""
    if path is not None:
        try:
            write_text(path, json.dumps(values, indent=1, default=str) + "\n")
        except OSError as error:
            raise UserError(f"json: {path} can't be written ({error.strerror})") from None
