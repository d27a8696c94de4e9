"""Measure the share of a run's time in each section."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Times named sections, on a GPU by events on the section's stream, so sections on two streams may overlap."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._start_time = time.perf_counter()
        self.total: dict[str, float] = defaultdict(float)  # seconds in each section up to the last call of `shares`

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        if self._on_gpu:
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start_event.record()
            yield
            end_event.record()
            self._events.append((section, start_event, end_event))
        else:
            start_time = time.perf_counter()
            yield
            self._seconds[section] += time.perf_counter() - start_time

    def shares(self) -> dict[str, float]:
        """Return each section's share of the time since the last call, and `wait` for the rest. Synchronises."""
        for section, start_event, end_event in self._events:
            end_event.synchronize()
            self._seconds[section] += start_event.elapsed_time(end_event) / 1000
        for section, seconds in self._seconds.items():
            self.total[section] += seconds
        now = time.perf_counter()
        elapsed, self._start_time = max(now - self._start_time, 1e-9), now
        shares = {section: round(seconds / elapsed, 4) for section, seconds in self._seconds.items()}
        self._seconds.clear()
        self._events.clear()
        return shares | {"wait": round(max(0.0, 1 - sum(shares.values())), 4)}
