"""Modes of torch that a caller may have set and that must not change what is computed: autocast, gradients switched off,
inference mode, another default dtype or device, denormal numbers.

`default_modes()` is a block, and a decorator of every public function and method that computes: modes as a new process has
them. `without_autocast()` leaves gradients to the caller, and is for what runs inside a caller's own computation. Both
leave the modes as they found them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICES = ("cpu", "cuda")
_SMALLEST = 5e-324  # a denormal


@contextmanager
def without_autocast() -> Iterator[None]:
    """A block without autocast, in which float32 and the CPU are the defaults: products run in their arguments' dtypes.

    The default dtype belongs to the process: other threads see float32 while the block lasts.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as contexts:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                contexts.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            contexts.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            contexts.callback(torch.set_default_dtype, dtype)
        yield


@contextmanager
def default_modes() -> Iterator[None]:
    """`without_autocast`, with gradients, without inference mode, and with this thread's denormals flushed to zero: they
    make a training step on a CPU several times slower."""
    flushes = flushes_denormals()
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(), ExitStack() as contexts:
        if not flushes and torch.set_flush_denormal(True):
            contexts.callback(torch.set_flush_denormal, False)
        yield


def flushes_denormals() -> bool:
    """Whether this thread's arithmetic takes denormal numbers for zero. torch can set that, but doesn't say it."""
    return _SMALLEST * 1.0 == 0.0
