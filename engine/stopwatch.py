"""Where a run's time goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Time within named sections since the last look. On a GPU, time between events on the stream that a section is on: the
    host doesn't wait, and sections on two streams may overlap."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._began = time.perf_counter()
        self.total: dict[str, float] = defaultdict(float)  # seconds in each section up to the last look

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        if self._on_gpu:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((section, first, last))
        else:
            began = time.perf_counter()
            yield
            self._seconds[section] += time.perf_counter() - began

    def shares(self) -> dict[str, float]:
        """Share of the time since the last look by section, and `wait` for what is in none. Waits for a GPU."""
        for section, first, last in self._events:
            last.synchronize()
            self._seconds[section] += first.elapsed_time(last) / 1000
        for section, seconds in self._seconds.items():
            self.total[section] += seconds
        now = time.perf_counter()
        whole, self._began = max(now - self._began, 1e-9), now
        found = {section: round(seconds / whole, 4) for section, seconds in self._seconds.items()}
        self._seconds.clear()
        self._events.clear()
        return found | {"wait": round(max(0.0, 1 - sum(found.values())), 4)}
