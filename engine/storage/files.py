"""Files: written whole or not at all, known by what is in them, and figures that a user asks for."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from ..errors import UserError

UNFINISHED = ".writing-"  # begins the names of files and folders that a kill may leave behind
LOCK = ".lock"  # in a folder that a process writes to


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

    A link is followed. What is not a regular file, such as /dev/stdout or a named pipe, is written to and never replaced.
    An OSError names `path`.

        with whole_file(folder / "report.md") as fresh:
            fresh.write_text(text)
    """
    if (descriptor := _descriptor(path)) is not None:
        with tempfile.TemporaryDirectory() as work:
            fresh = Path(work) / "file"
            yield fresh
            sys.stdout.flush()
            with fresh.open("rb") as file, open(descriptor, "wb", closefd=False) as out:
                shutil.copyfileobj(file, out)
        return
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve() if path.is_symlink() else path
    fresh = path.with_name(f"{UNFINISHED}{path.name}-{os.getpid()}")
    try:
        for leftover in path.parent.glob(f"{UNFINISHED}{escape(path.name)}*"):
            if not _is_being_written(leftover):
                with suppress(FileNotFoundError):
                    leftover.unlink()
        fresh.touch()
        mode = fresh.stat().st_mode
        yield fresh
        fresh.chmod(mode)  # some libraries write to a temporary file that is only the owner's
        flush(fresh)
        fresh.replace(path)
        flush(path.parent)
    except OSError as error:
        error.filename = str(path)  # a write to a full disk names no file
        raise
    finally:
        fresh.unlink(missing_ok=True)


def _descriptor(path: Path) -> int | None:
    """The number of an open file that a path stands for, as /dev/stdout does. Its name may lead to a regular file, which is
    not to be replaced while the process prints to it."""
    streams = {"/dev/stdout": 1, "/dev/stderr": 2}
    match = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", str(path))
    return int(match[1]) if match else streams.get(str(path))


def _is_being_written(unfinished: Path) -> bool:
    """Whether another process on this computer is at work on a file that is not finished."""
    process = unfinished.name.rpartition("-")[2]
    if not process.isdecimal() or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def contents(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without the lock of a process and the files that a kill has left unfinished."""
    return sorted(path for path in folder.iterdir() if path.name != LOCK and not path.name.startswith(UNFINISHED))


def remove_folder(folder: Path) -> None:
    """Remove a folder. If the process is killed meanwhile, what is left has an unfinished folder's name, not `folder`'s."""
    if not folder.name.startswith(UNFINISHED):
        doomed = folder.with_name(f"{UNFINISHED}removed-{folder.name}-{secrets.token_hex(4)}")
        folder.rename(doomed)
        folder = doomed
    shutil.rmtree(folder)


def absolute(name: str) -> str:
    """The absolute path of a file or folder that exists; other names, such as a model's on the hub, as they are."""
    path = Path(name).expanduser()
    try:
        return os.path.abspath(path) if path.exists() else name
    except OSError:  # too long to be a path
        return name


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
    lines = [f"{file.relative_to(path)} {(stat := file.stat()).st_size} {stat.st_mtime_ns}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_writable(path: Path | None, option: str = "json", kind: Callable[[Path], bool] | None = None) -> None:
    """Raises UserError if no file can be written at `path`, the value of `option`: before the work, not after it. An
    existing file is replaced only if it is empty or of the `kind` that is to be written, by default JSON."""
    if path is None or _descriptor(path) is not None:
        return
    is_kind = _is_json if kind is None else kind
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for its reader
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        if path.is_file() and path.stat().st_size and not is_kind(path):
            raise UserError(f"{option}: {path} exists and is a file of another kind; give the name of a new file")
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.resolve().unlink()
    except OSError as error:
        raise UserError(
            f"{option}: {path} can't be written ({error.strerror}); give a file in a folder that exists"
        ) from None


def _is_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(256).lstrip()[:1] in (b"{", b"[")


def check_can_make(folder: Path) -> None:
    """Raise OSError if no folder can be made at `folder`, with those above it, or it can't be written to. Leaves nothing."""
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}probe-", dir=parent)).rmdir()


def write_json(path: Path | None, values: Any) -> None:
    """Write `values`, if a path is given. Raises UserError where that fails."""
    if path is not None:
        try:
            write_text(path, json.dumps(values, indent=1, default=str) + "\n")
        except OSError as error:
            raise UserError(f"json: {path} can't be written ({error.strerror})") from None
