"""Time and memory of a call: by events on a GPU, by a clock on a CPU."""

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..engine.process.cpu_memory import from_proc


class Quantiles(NamedTuple):
    """The 20th, 50th and 80th percentile in milliseconds, and the number of samples."""

    ms_p20: float
    ms: float
    ms_p80: float
    samples: int


def quantiles(times: list[float]) -> Quantiles:
    """Raises ValueError without samples."""
    if not times:
        raise ValueError("no samples")
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(times, dtype=torch.float64).quantile(levels).tolist()
    return Quantiles(p20, p50, p80, len(times))


def synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def sample(call: Callable[[], Any], device: str, inner: int = 1) -> float:
    """Milliseconds per call, over `inner` calls in a row.

    The device is only synchronised before and after, so calls are launched ahead of the device, as in training.
    """
    if torch.device(device).type != "cuda":
        began = time.perf_counter()
        for _ in range(inner):
            call()
        return 1e3 * (time.perf_counter() - began) / inner
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(inner):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / inner


def samples(
    call: Callable[[], Any], device: str, *, repeats: int, inner: int = 1, warm: int = 2, seconds: float = 60.0
) -> list[float]:
    """Up to `repeats` samples after `warm` calls. At least one, and no more after `seconds`."""
    for _ in range(warm):
        call()
    times: list[float] = []
    began = time.monotonic()
    while len(times) < repeats and (not times or time.monotonic() - began < seconds):
        times.append(sample(call, device, inner))
    return times


def inner_calls(call: Callable[[], Any], device: str, least_ms: float) -> int:
    """The number of calls in a row that take `least_ms`, at most 100. A single short call is too short to measure."""
    return max(1, min(100, round(least_ms / max(1e-3, sample(call, device)))))


class Memory(NamedTuple):
    """Bytes on the device beyond those before a call: the most during it, and those that remain after it."""

    peak: int
    held: int


def memory(call: Callable[[], Any], device: str) -> tuple[Any, Memory]:
    """The result of a call, and the memory that it took, by the counts of torch's allocator without its cached blocks.

    On a CPU, memory that was allocated before the call and is freed during it does not count as freed.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        peak, allocated = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return result, Memory(peak - before, allocated - before)
    result, events = traced(call, device, profile_memory=True)
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    allocated = list(accumulate((change for _, change in changes), initial=0))
    return result, Memory(max(allocated), allocated[-1])


def traced(
    call: Callable[[], Any], device: str, path: Path | None = None, **options: Any
) -> tuple[Any, list[dict[str, Any]]]:
    """The result of a call, and the events of its Chrome trace, which is saved to `path` if given."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.device(device).type == "cuda" else [])
    with profile(activities=kinds, acc_events=False, **options) as profiler:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        path = path or Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return result, json.loads(path.read_text())["traceEvents"]


def free_bytes(device: str) -> float:
    """Free memory of the device in bytes. Infinite if the system does not report it."""
    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return 1024 * float(from_proc("meminfo", r"MemAvailable:\s*(\d+) kB") or math.inf)
