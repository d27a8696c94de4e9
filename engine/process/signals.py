"""Handle Ctrl-C and SIGTERM: one line on what is kept and how to continue, exit status 128 + signal."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
def _handling(handle: Callable[[int, Mapping[int, Any]], None]) -> Iterator[None]:
    """Call `handle` on SIGINT and SIGTERM within the context, with the handlers from before. Ignored signals stay ignored,
    and other threads than the main one can't handle any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    previous_handlers: dict[int, Any] = {n: handler for n, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in previous_handlers:
        signal.signal(number, lambda number, frame: handle(number, previous_handlers))
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise `Stopped` with the innermost `stop_advice` on SIGINT and SIGTERM. A second signal ends the process."""

    def stop(number: int, previous_handlers: Mapping[int, Any]) -> None:
        for stop_signal in previous_handlers:
            signal.signal(stop_signal, signal.SIG_DFL)
        raise Stopped(number, _advice[-1])

    with _handling(stop):
        yield


@contextmanager
def collect_signals(*, patient: bool) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list within the context. A second signal stops at once, unless `patient`."""
    signals: list[int] = []

    def note(number: int, previous_handlers: Mapping[int, Any]) -> None:
        signals.append(number)
        for stop_signal, handler in () if patient else previous_handlers.items():
            signal.signal(stop_signal, handler)

    with _handling(note):
        yield signals
