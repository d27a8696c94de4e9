"""Two settings without which training on a CPU can slow down several times; both are for the whole process."""

import ctypes
import platform
from functools import cache

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's <malloc.h>


@cache
def tune_host() -> None:
    """Keep freed memory (glibc returns large blocks to the kernel at once, and every step faults them in again: a third
    of the time when training the embedded model on 2 cores), and flush denormals to zero."""
    torch.set_flush_denormal(True)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(option, 1 << 30)
