"""Choose launch settings for this GPU: time a small grid for each entry of kernels/configs.py, and write its row.

The calls that launch an entry's kernels and the settings to try come from kernels/<op>/bench.py.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest.mock import patch

import torch

from ..engine.errors import UserError, check_known
from ..engine.process.progress import progress_bar
from ..engine.storage.files import check_writable
from ..kernels import configs
from ..kernels.backend import VARIABLE, config_row
from ..kernels.bench_types import Call
from . import aot
from .data import DTYPES, HEADLINE, Shape
from .gpus import SMS
from .op_benches import BENCHES
from .ops import Inputs
from .results import markdown
from .step import in_one_line
from .timing import traced

FILE = Path(configs.__file__)
SHARED_BYTES = 99 * 1024  # limit of a block on GPUs that use a lower row (sm_86, sm_89, sm_120)
FASTER = 0.98  # largest share of the time before that is not noise
REPEATS = 7
ROWS = "CONFIGS: dict[int, dict[str, dict[str, int]]] = {}\n"  # the lines below it are generated

Setting = dict[str, int]
Timer = Callable[[Call, set[str]], float]

_TRIALS = {entry: trial for bench in BENCHES for entry, trial in bench.trials.items()}
# grouped by dtype, so that the inputs of only one dtype are in memory, and within it in the table's order
TRIALS = {
    entry: _TRIALS[entry]
    for dtype in ("bf16", "fp32")
    for entry in configs.CONFIGS[min(configs.CONFIGS)]
    if _TRIALS[entry].dtype == dtype
}


class Choice(NamedTuple):
    """Settings and times of an entry before and after tuning. `refused`: setting -> why it cannot be chosen."""

    entry: str
    before: Setting
    before_ms: float
    after: Setting
    after_ms: float
    tried: int
    refused: dict[str, str]


def run(entries: Iterable[str] | None = None) -> list[Choice]:
    """Tune entries of the table (default: all) on this GPU, and write its row to kernels/configs.py.

    Raises UserError for unknown entries, without a GPU, under Triton's interpreter, and if the file cannot be written.
    """
    names = list(TRIALS if entries is None else dict.fromkeys(entries))
    for name in names:
        check_known("entry", name, TRIALS)
    if not torch.cuda.is_available():
        raise UserError("device: 'cpu' is not allowed; `bench tune` times kernels on a GPU, and torch finds none here")
    if os.environ.get("TRITON_INTERPRET"):
        raise UserError("TRITON_INTERPRET is set, so there are no kernels to time; unset it")
    check_writable(FILE, "configs", lambda _: True)
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    choices = tune(arch, names, HEADLINE, "cuda", kernel_ms, obstacle)
    FILE.write_text(render(FILE.read_text(), configs.CONFIGS | {arch: tuned_row(arch, choices)}))
    return choices


def tune(
    arch: int, entries: Iterable[str], shape: Shape, device: str, timer: Timer, obstacle: Callable[[str, int], str]
) -> list[Choice]:
    """Find the best setting of each entry for sm_`arch`. Entries tuned earlier keep their new settings.

    `timer(call, kernels)` returns the milliseconds of these kernels in a call. Settings for which it raises are refused,
    except for the current one. `obstacle(entry, arch)` says why the active setting cannot be used, or returns "".
    """
    entries = sorted(entries, key=list(TRIALS).index)
    choices: list[Choice] = []
    inputs: Inputs | None = None
    grids = {entry: settings(entry, config_row(arch)[entry]) for entry in entries}
    triton = patch.dict(os.environ, {VARIABLE: "triton"})  # also for ops that would use torch at this size
    with triton, progress_bar("tuning", total=sum(map(len, grids.values())), unit="settings") as bar:
        for entry, grid in grids.items():
            trial, kernels = TRIALS[entry], _kernels(entry)
            if inputs is None or inputs.dtype != DTYPES[trial.dtype]:
                inputs = None  # frees the memory first
                inputs = Inputs(shape, DTYPES[trial.dtype], device)
            call = trial.call(inputs)
            arch_configs, times, refused = tuned_row(arch, choices), [], {}
            for setting_index, setting in enumerate(grid):
                bar.advance(1, now=entry)
                with in_effect(arch, arch_configs | {entry: setting}):
                    try:
                        times.append((timer(call, kernels), setting_index))
                    except Exception as error:
                        if setting_index == 0:
                            raise
                        refused[_text(setting)] = in_one_line(error)
            before_ms, chosen = times[0]
            after_ms = before_ms
            for ms, setting_index in sorted(times):
                if ms > FASTER * before_ms:
                    break
                with in_effect(arch, arch_configs | {entry: grid[setting_index]}):
                    reason = obstacle(entry, arch)
                if not reason:
                    after_ms, chosen = ms, setting_index
                    break
                refused[_text(grid[setting_index])] = reason
            choices.append(Choice(entry, grid[0], before_ms, grid[chosen], after_ms, len(grid), refused))
    return choices


def settings(entry: str, current: Setting) -> list[Setting]:
    """The current setting and then all others of the entry's grid, unless a product's tile needs all registers."""
    grid = TRIALS[entry].grid
    combinations = [current | dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return [current, *(setting for setting in combinations if setting != current and _tile_fits(setting))]


def _tile_fits(setting: Setting) -> bool:
    limit = setting.get("maxnreg")
    return limit is None or setting["BLOCK_N"] * setting["BLOCK_F"] < 32 * setting["num_warps"] * limit


def tuned_row(arch: int, choices: Iterable[Choice]) -> dict[str, Setting]:
    return config_row(arch) | {choice.entry: choice.after for choice in choices}


@contextlib.contextmanager
def in_effect(arch: int, arch_configs: dict[str, Setting]) -> Iterator[None]:
    """Launch kernels on sm_`arch` with these settings."""
    try:
        with patch.dict(configs.CONFIGS, {arch: arch_configs}):
            config_row.cache_clear()
            yield
    finally:
        config_row.cache_clear()


def _kernels(entry: str) -> set[str]:
    """The names of the kernels that the entry launches."""
    own = {spec.kernel.rpartition(".")[2] for spec in aot.SPECS.values() if spec.config == entry}
    return own | {*TRIALS[entry].others}


def kernel_ms(call: Call, kernels: set[str]) -> float:
    """Milliseconds that the GPU spends in these kernels during a call, from medians of the profiler's times."""
    call()  # compiles
    call()
    _, events = traced(lambda: [call() for _ in range(REPEATS)], "cuda")
    total = 0.0
    for name in kernels:
        times = [float(e["dur"]) for e in events if e.get("cat") == "kernel" and e["name"] == name]
        total += median(times) * len(times) / REPEATS / 1e3 if times else 0.0
    if total == 0:
        raise RuntimeError(f"none of {', '.join(sorted(kernels))} ran")
    return total


def obstacle(entry: str, arch: int) -> str:
    """Why the entry's active setting cannot be used: some variant spills or needs too much shared memory. "" if it can."""
    for kernel in aot.report([arch], [name for name, spec in aot.SPECS.items() if spec.config == entry]):
        limit = SMS[arch].shared_bytes - 1024 if aot.SPECS[kernel["name"]].only else SHARED_BYTES
        if kernel["shared_bytes"] > limit:
            return f"{kernel['name']} needs {kernel['shared_bytes']} bytes of shared memory, more than {limit}"
        if kernel["hot"] and kernel["spill_bytes"]:
            return f"{kernel['name']} spills {kernel['spill_bytes']} bytes"
    return ""


def render(text: str, table: dict[int, dict[str, Setting]]) -> str:
    """The text of configs.py with these rows. A row lists its differences from the most similar lower row.

    Raises UserError if `text` is not the text of that file.
    """
    head, mark, _ = text.partition(ROWS)
    if not mark:
        raise UserError(f"configs: {FILE} must hold the line {ROWS.strip()!r}")
    lines: list[str] = []
    for arch in sorted(table):
        candidates = [("", table[arch])]
        for lower in sorted((other for other in table if other < arch), reverse=True):
            changed = {entry: setting for entry, setting in table[arch].items() if setting != table[lower][entry]}
            candidates.append((f"CONFIGS[{lower}] | ", changed))
        parent, changes = min(candidates, key=lambda candidate: len(candidate[1]))
        entries = [f'    "{entry}": dict({_text(setting)}),' for entry, setting in changes.items()]
        start = f"CONFIGS[{arch}] = {parent}" + "{"
        lines += [start, *entries, "}"] if entries else [start + "}"]
    return head + mark + "\n".join(lines) + "\n"


def _text(setting: Setting) -> str:
    return ", ".join(f"{name}={value}" for name, value in setting.items())


def summary(choices: Iterable[Choice]) -> str:
    """Times before and after, as Markdown."""
    lines = [("entry", "ms before", "ms after", "tried", "refused", "setting")]
    for choice in choices:
        setting_text = "as before" if choice.after == choice.before else _text(choice.after)
        before, after = (f"{ms:.4g}" for ms in (choice.before_ms, choice.after_ms))
        lines.append((choice.entry, before, after, str(choice.tried), str(len(choice.refused)), setting_text))
    return "\n".join(markdown(lines)) + "\n"
