"""Lock a folder so that only one process writes to it.

The owner holds an advisory lock on FOLDER/.lock, which names its host and process. The operating system releases the
lock whenever the process ends, so the folder of a killed process can be used again. Locks may not reach other hosts on
a shared file system, so a lock file left by another host is refused.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError
from .files import LOCK, os_errors_named

_owned: set[Path] = set()  # by this process, which may ask for a folder again


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own `folder` within the context. Missing folders are created, and removed at the end if they are still empty.

    Raises UserError if another process owns the folder or it can't be written.
    """
    key = folder.absolute()
    if key in _owned:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out: {folder} is not a folder; give a new folder")
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    with os_errors_named(f"out: {folder}", "give a folder that you may write to"):
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(folder)
    _owned.add(key)
    try:
        yield
    finally:
        _owned.remove(key)
        with suppress(FileNotFoundError):
            (folder / LOCK).unlink()
        os.close(handle)
        with suppress(OSError):  # usually not empty
            for path in new_folders:
                path.rmdir()


def _lock(folder: Path) -> int:
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # a link may lead out of the folder
        owner = _owner(handle)
        problem = f"out: {folder} is in use by process {owner['pid']} on {owner['host']}"
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise UserError(f"{problem}; wait until that ends, or give another folder") from None
        if owner["host"] not in ("?", socket.gethostname()):
            os.close(handle)
            raise UserError(f"{problem}; if that no longer runs, remove {path}")
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
                return handle
        os.close(handle)  # the previous owner has just removed the file


def _owner(handle: int) -> dict[str, object]:
    try:
        record = json.loads(os.pread(handle, 4096, 0))
        return {"host": str(record["host"]), "pid": int(record["pid"])}
    except (ValueError, KeyError, TypeError):  # not written yet, or truncated
        return {"host": "?", "pid": "?"}
