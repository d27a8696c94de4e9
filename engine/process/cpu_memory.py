"""Settings of the process without which training on a CPU can slow down several times, or grow."""

import ctypes
import platform
import re
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

TRIM_SECONDS = 10
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's <malloc.h>
_trimmed = 0.0


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@cache
def tune_host() -> None:
    """Keep freed memory: glibc returns large blocks to the kernel at once, and every step faults them in again, which is a
    third of the time when training the embedded model on 2 cores."""
    if libc := _glibc():
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(option, 1 << 30)


def peak_gb() -> float | None:
    """The most memory that this process has held so far, in 10^9 bytes; None where the system doesn't say."""
    with suppress(OSError):  # of Linux: what getrusage says begins with what the parent process held
        match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if match is not None:
            return round(int(match[1]) * 1024 / 1e9, 2)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def trim_host() -> None:
    """Give back what freed memory has become too scattered to use, at most every ten seconds (it takes some 10 ms): with
    `tune_host` alone a long run's heap goes on growing, by 3% in 50,000 steps."""
    global _trimmed
    if (libc := _glibc()) and time.monotonic() - _trimmed > TRIM_SECONDS:
        libc.malloc_trim(0)
        _trimmed = time.monotonic()
