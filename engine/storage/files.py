"""Atomic writes of files and folders, digests, and checks of output paths."""

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

UNFINISHED = ".writing-"  # prefix of files and folders that a kill may leave behind
LOCK = ".lock"  # file in a folder that a process writes to


@contextmanager
def os_errors_named(label: str, remedy: str = "") -> Iterator[None]:
    """Turn an OSError into the UserError "`label` can't be written (reason); `remedy`"."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{label} can't be written ({error.strerror}){'; ' * bool(remedy)}{remedy}") from None


def flush(path: Path) -> None:
    """Flush a file or a folder's list of entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path that then replaces `path`. The file's mode follows the umask.

    Links are followed. Anything but a regular file, such as /dev/stdout, is written in place. An OSError names `path`.

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
        fresh.chmod(mode)  # some libraries create files that only the owner may read
        flush(fresh)
        fresh.replace(path)
        flush(path.parent)
    except OSError as error:
        error.filename = str(path)  # a write to a full disk names no file
        raise
    finally:
        fresh.unlink(missing_ok=True)


def _descriptor(path: Path) -> int | None:
    """Return the file descriptor of a path such as /dev/stdout. It may be a file that the process prints to."""
    streams = {"/dev/stdout": 1, "/dev/stderr": 2}
    match = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", str(path))
    return int(match[1]) if match else streams.get(str(path))


def _is_being_written(unfinished: Path) -> bool:
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
    """List a folder, sorted, without a lock and unfinished files."""
    return sorted(path for path in folder.iterdir() if path.name != LOCK and not path.name.startswith(UNFINISHED))


def remove_folder(folder: Path) -> None:
    """Remove a folder. If the process is killed meanwhile, the rest has the name of an unfinished folder."""
    if not folder.name.startswith(UNFINISHED):
        doomed = folder.with_name(f"{UNFINISHED}removed-{folder.name}-{secrets.token_hex(4)}")
        folder.rename(doomed)
        folder = doomed
    shutil.rmtree(folder)


def absolute(name: str) -> str:
    """Return the absolute path of an existing file or folder, and other names, such as a model's, unchanged."""
    path = Path(name).expanduser()
    try:
        return os.path.abspath(path) if path.exists() else name
    except OSError:  # too long to be a path
        return name


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises OSError."""
    with whole_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Create a folder, and its parents, atomically: yield a temporary folder that then becomes `folder`."""
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
    """Give the files of a folder the mode of a new file. safetensors creates files that only their owner may read."""
    probe = folder / f"{UNFINISHED}mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_folder(path: Path) -> str:
    """Return the SHA-256 of the names, sizes and modification times of a folder's files."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path)} {(stat := file.stat()).st_size} {stat.st_mtime_ns}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(256).lstrip()[:1] in (b"{", b"[")


def check_writable(path: Path | None, option: str = "json", is_kind: Callable[[Path], bool] = _is_json) -> None:
    """Check before a long command that a file can be written at `path`, the value of `option`.

    An existing file may be replaced only if it is empty or `is_kind` accepts it. Raises UserError.
    """
    if path is None or _descriptor(path) is not None:
        return
    with os_errors_named(f"{option}: {path}", "give a file in a folder that exists"):
        is_file, is_new = path.is_file(), not path.exists()
        if not (is_file or is_new or path.is_dir()):  # opening a pipe would wait for its reader
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        if is_file and path.stat().st_size and not is_kind(path):
            raise UserError(f"{option}: {path} exists and is a file of another kind; give the name of a new file")
        path.open("a").close()
        if is_new:
            path.resolve().unlink()


def check_can_make(folder: Path) -> None:
    """Raise OSError if `folder` can't be created or written to. Leaves nothing behind."""
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    tempfile.mkdtemp(prefix=f"{UNFINISHED}probe-", dir=parent)
    for probe in parent.glob(f"{UNFINISHED}probe-*"):  # also those that a kill left behind
        with suppress(OSError):  # another process was faster
            probe.rmdir()


def write_json(path: Path | None, values: Any) -> None:
    """Write `values` as JSON if a path is given. Raises UserError if writing fails."""
    if path is not None:
        with os_errors_named(f"json: {path}"):
            write_text(path, json.dumps(values, indent=1, default=str) + "\n")
