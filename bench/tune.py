"""Launch configurations for the GPU at hand: times a small grid of settings for each entry of kernels/configs.py, and writes
the row of this architecture.

A call that launches an entry's kernels, and what to try, come from kernels/<op>/bench.py.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from ..engine.errors import UserError, near
from ..engine.process.progress import progress_bar
from ..engine.storage.files import check_writable
from ..kernels import configs
from ..kernels.backend import VARIABLE, config_row
from ..kernels.bench_types import Call
from . import aot
from .data import DTYPES, HEADLINE, Shape
from .op_benches import BENCHES
from .ops import Inputs
from .profile import traced
from .results import markdown
from .step import in_one_line

FILE = Path(configs.__file__)
SHARED_BYTES = 99 * 1024  # a block's, on the GPUs that borrow a row (sm_86, sm_89, sm_120)
FASTER = 0.98  # of the time before, at most: less is noise
REPEATS = 7
ROWS = "CONFIGS: dict[int, dict[str, dict[str, int]]] = {}\n"  # what stands below is written from here

Setting = dict[str, int]
Timer = Callable[[Call, set[str]], float]


_TRIALS = {entry: trial for bench in BENCHES for entry, trial in bench.trials.items()}
# in the table's order, by dtype first: the inputs of one are given back before those of the next are made
TRIALS = {
    entry: _TRIALS[entry]
    for dtype in ("bf16", "fp32")
    for entry in configs.CONFIGS[min(configs.CONFIGS)]
    if _TRIALS[entry].dtype == dtype
}


class Choice(NamedTuple):
    """What became of an entry. `refused`: why a setting of the grid is no choice, by setting."""

    entry: str
    before: Setting
    before_ms: float
    after: Setting
    after_ms: float
    tried: int
    refused: dict[str, str]


def run(entries: Iterable[str] | None = None) -> list[Choice]:
    """Tune `entries` of the table, all unless given, on the GPU at hand, and write its row to kernels/configs.py.

    Raises UserError for unknown entries, without a GPU, under Triton's interpreter and where the file can't be written.
    """
    names = list(TRIALS if entries is None else dict.fromkeys(entries))
    for name in names:
        if name not in TRIALS:
            raise UserError(f"entry: {name!r} is not allowed; {near(name, TRIALS)}")
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
    arch: int,
    entries: Iterable[str],
    shape: Shape,
    device: str,
    timer: Timer,
    obstacle: Callable[[str, int], str],
) -> list[Choice]:
    """The best setting of each entry for sm_`arch`, those before it in effect.

    `timer(call, kernels)`: milliseconds of these kernels in a call; settings for which it raises are left out, but for the
    one in the table. `obstacle(entry, arch)`: why the setting that is in effect may not be in the table, or "".
    """
    entries = sorted(entries, key=list(TRIALS).index)
    choices: list[Choice] = []
    inputs: Inputs | None = None
    grids = {entry: settings(entry, config_row(arch)[entry]) for entry in entries}
    with _always_triton(), progress_bar("tuning", total=sum(map(len, grids.values())), unit="settings") as bar:
        for entry, grid in grids.items():
            trial, kernels = TRIALS[entry], _kernels(entry)
            if inputs is None or inputs.dtype != DTYPES[trial.dtype]:
                inputs = None  # gives the memory back first
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
                        refused[_in_words(setting)] = in_one_line(error)
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
                refused[_in_words(grid[setting_index])] = reason
            choices.append(Choice(entry, grid[0], before_ms, grid[chosen], after_ms, len(grid), refused))
    return choices


def settings(entry: str, current: Setting) -> list[Setting]:
    """The current setting, then every other one of the entry's grid."""
    grid = TRIALS[entry].grid
    combinations = [current | dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return [current, *(setting for setting in combinations if setting != current)]


def tuned_row(arch: int, choices: Iterable[Choice]) -> dict[str, Setting]:
    return config_row(arch) | {choice.entry: choice.after for choice in choices}


@contextlib.contextmanager
def in_effect(arch: int, arch_configs: dict[str, Setting]) -> Iterator[None]:
    """Kernels on sm_`arch` are launched by this row."""
    before = configs.CONFIGS.get(arch)
    configs.CONFIGS[arch] = arch_configs
    config_row.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del configs.CONFIGS[arch]
        else:
            configs.CONFIGS[arch] = before
        config_row.cache_clear()


@contextlib.contextmanager
def _always_triton() -> Iterator[None]:
    """Ops that would leave this size to torch launch their kernels, too."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "triton"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def _kernels(entry: str) -> set[str]:
    """The functions that the entry launches."""
    return {spec.kernel.partition(".")[2] for spec in aot.SPECS.values() if spec.config == entry}


def kernel_ms(call: Call, kernels: set[str]) -> float:
    """Milliseconds that a GPU spends in these kernels during a call: medians of each, as the profiler sees them."""
    call()  # compiles
    call()
    events = traced(lambda: [call() for _ in range(REPEATS)], "cuda")
    total = 0.0
    for name in kernels:
        times = [float(e["dur"]) for e in events if e.get("cat") == "kernel" and e["name"] == name]
        total += median(times) * len(times) / REPEATS / 1e3 if times else 0.0
    if total == 0:
        raise RuntimeError(f"none of {', '.join(sorted(kernels))} ran")
    return total


def obstacle(entry: str, arch: int) -> str:
    """Why the entry's setting that is in effect may not be in the table: a kernel of its spills, or needs too much shared
    memory, at a width or in a variant that was not timed."""
    for kernel in aot.report([arch], [name for name, spec in aot.SPECS.items() if spec.config == entry]):
        if kernel["shared_bytes"] > SHARED_BYTES:
            return f"{kernel['name']} needs {kernel['shared_bytes']} bytes of shared memory, more than {SHARED_BYTES}"
        if kernel["hot"] and kernel["spill_bytes"]:
            return f"{kernel['name']} spills {kernel['spill_bytes']} bytes"
    return ""


def render(text: str, table: dict[int, dict[str, Setting]]) -> str:
    """The text of configs.py with these rows. A row names what differs from the lower one that is most like it.

    Raises UserError if `text` is not that file's.
    """
    head, mark, _ = text.partition(ROWS)
    if not mark:
        raise UserError(f"configs: {FILE} must hold the line {ROWS.strip()!r}")
    lines: list[str] = []
    for arch in sorted(table):
        ways = [("", table[arch])]
        for lower in sorted((other for other in table if other < arch), reverse=True):
            changed = {entry: setting for entry, setting in table[arch].items() if setting != table[lower][entry]}
            ways.append((f"CONFIGS[{lower}] | ", changed))
        parent, changes = min(ways, key=lambda way: len(way[1]))
        entries = [f'    "{entry}": dict({_in_words(setting)}),' for entry, setting in changes.items()]
        start = f"CONFIGS[{arch}] = {parent}" + "{"
        lines += [start, *entries, "}"] if entries else [start + "}"]
    return head + mark + "\n".join(lines) + "\n"


def _in_words(setting: Setting) -> str:
    return ", ".join(f"{name}={value}" for name, value in setting.items())


def summary(choices: Iterable[Choice]) -> str:
    """Times before and after, as Markdown."""
    lines = [("entry", "ms before", "ms after", "tried", "refused", "setting")]
    for choice in choices:
        setting_text = "as before" if choice.after == choice.before else _in_words(choice.after)
        before, after = (f"{ms:.4g}" for ms in (choice.before_ms, choice.after_ms))
        lines.append((choice.entry, before, after, str(choice.tried), str(len(choice.refused)), setting_text))
    return "\n".join(markdown(lines)) + "\n"
