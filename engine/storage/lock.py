"""One process at a time writes to a folder.

The owner holds an advisory lock on FOLDER/.lock, which says host and process. The operating system releases it when the
process ends, however it ends, so that what a killed one left behind is taken over. On a file system whose locks don't reach
other hosts, a file left by another host is refused, since that process can't be looked up from here.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError
from .files import LOCK

_hold_counts: dict[Path, int] = {}  # by this process, how often: who owns a folder may ask again


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """While inside, no other process may own `folder`, which is made, with those above it, if it must be. Of what was made,
    that which is empty at the end goes again.

    Raises UserError where another process owns it or it can't be written.
    """
    key = folder.absolute()
    if key in _hold_counts:
        _hold_counts[key] += 1
        try:
            yield
        finally:
            _hold_counts[key] -= 1
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out: {folder} is not a folder; give a new folder")
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(folder)
    except OSError as error:
        raise UserError(
            f"out: {folder} can't be written ({error.strerror}); give a folder that you may write to"
        ) from None
    _hold_counts[key] = 1
    try:
        yield
    finally:
        del _hold_counts[key]
        with suppress(FileNotFoundError):
            (folder / LOCK).unlink()
        os.close(handle)
        with suppress(OSError):  # not empty: the rule
            for path in new_folders:
                path.rmdir()


def _lock(folder: Path) -> int:
    """A handle of the folder's lock, which is ours."""
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # a link may lead out of the folder
        owner = _owner(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise UserError(
                f"out: {folder} is in use by process {owner['pid']} on {owner['host']}; wait until that ends, or give "
                "another folder"
            ) from None
        if owner["host"] not in ("?", socket.gethostname()):
            os.close(handle)
            raise UserError(
                f"out: {folder} is in use by process {owner['pid']} on {owner['host']}; if that no longer runs, remove "
                f"{path}"
            )
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
                return handle
        os.close(handle)  # the owner has just removed it


def _owner(handle: int) -> dict[str, object]:
    try:
        record = json.loads(os.pread(handle, 4096, 0))
        return {"host": str(record["host"]), "pid": int(record["pid"])}
    except (ValueError, KeyError, TypeError):  # not written yet, or cut
        return {"host": "?", "pid": "?"}
