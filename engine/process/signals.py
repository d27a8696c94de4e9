"""Handle Ctrl-C and SIGTERM: one line on what is kept and how to continue, exit status 128 + signal."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_advice = ["stopped"]


@contextmanager
def stop_advice(text: str) -> Iterator[None]:
    """Set the message of `Stopped` within the context."""
    _advice.append(text)
    try:
        yield
    finally:
        if text in _advice:
            _advice.remove(text)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise `Stopped` with the innermost `stop_advice` on SIGINT and SIGTERM within the context. Ignored signals stay
    ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    previous_handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def stop(number: int, frame: object) -> None:
        for stop_signal in previous_handlers:  # a second signal ends the process
            signal.signal(stop_signal, signal.SIG_DFL)
        raise Stopped(number, _advice[-1])

    for number in previous_handlers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
