"""Launch configurations for the GPU at hand: times a small grid of settings for each entry of kernels/configs.py, and writes
the row of this architecture.

One table, `TRIALS`. To add an entry of the configurations, add a row: a call that launches its kernels, and what to try.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from ..engine.errors import UserError, near
from ..engine.process.progress import progress_bar
from ..engine.storage.files import check_writable
from ..kernels import adam, configs, decode, encode_sparse, select
from ..kernels.backend import VARIABLE, config_row
from . import aot
from .data import DTYPES, HEADLINE, Shape
from .ops import OPS, Call, Inputs, resting
from .profile import traced
from .results import markdown
from .step import in_one_line

FILE = Path(configs.__file__)
SHARED_BYTES = 99 * 1024  # a block's, on the GPUs that borrow a row (sm_86, sm_89, sm_120)
FASTER = 0.98  # of the time before, at most: less is noise
REPEATS = 7
ROWS = "CONFIGS: dict[int, dict[str, dict[str, int]]] = {}\n"  # what stands below is written from here

Setting = dict[str, int]
Grid = Mapping[str, tuple[int, ...]]
Timer = Callable[[Call, set[str]], float]


class Trial(NamedTuple):
    """`call(inputs)`: launches the entry's kernels, any number of times; what they update in place is a copy.

    `grid`: values to try, in every combination; what it does not name stays as it is.
    """

    dtype: str
    call: Callable[[Inputs], Call]
    grid: Grid


def _encode_fp8(i: Inputs) -> Call:
    x, w, (b_enc, b_dec), k = i.x, i.W_enc, i.biases, i.shape.K
    return lambda: encode_sparse.encode_topk(x, w, b_enc, k, center=b_dec, fp8=True)[0]


def _select_threshold(i: Inputs) -> Call:
    calls = [OPS[name].call(i) for name in ("select_threshold", "select_batch_topk")]
    return lambda: [call() for call in calls]


def _reconstruct_ragged(i: Inputs) -> Call:
    code = select.select_batch_topk(i.acts, i.shape.N * i.shape.K)
    w, (_, b_dec), x = i.W_dec, i.biases, i.x
    return lambda: decode.reconstruct(code, w, b_dec, x)


def _adam(i: Inputs) -> Call:
    b_enc = i.biases[0].clone()
    moments, rates = resting(b_enc)
    grad = torch.ones_like(b_enc)
    return lambda: adam.adam(b_enc, grad, moments, rates)


def _adam_matrix(i: Inputs) -> Call:
    w = i.sae.W_dec.detach().clone()
    rates = resting(w)[1]._replace(seed=torch.zeros((), dtype=torch.int32, device=w.device))
    moments, grad = adam.Moments.zeros(w, "bfloat16"), torch.ones_like(w)
    return lambda: adam.adam(w, grad, moments, rates)


_ENCODE, _ENCODE_TOPK, _WEIGHT_GRAD = OPS["encode"].call, OPS["encode_topk"].call, OPS["weight_grad"].call
_ADAM_ROWS, _LOSS = OPS["adam_rows"].call, OPS["position_loss"].call
_TILES: Grid = dict(BLOCK_N=(64, 128), BLOCK_D=(32, 64), num_warps=(4, 8), num_stages=(3, 4))
_SMALL_TILES: Grid = dict(BLOCK_N=(64, 128), BLOCK_D=(16, 32), num_warps=(4, 8))
_GATHERS: Grid = dict(BLOCK_D=(256, 512), STAGES=(2, 3), num_warps=(4, 8))

# encode_topk's BLOCK_F and windows' SPLIT stay: packed columns have 7 bits, and results depend on where windows end. So does
# reconstruct's BLOCK_K, up to which a token's rows are held at once.
TRIALS = {
    "encode": Trial("bf16", _ENCODE, {**_TILES, "BLOCK_F": (128, 256)}),
    "encode_topk": Trial("bf16", _ENCODE_TOPK, _TILES),
    "encode_fp8": Trial("bf16", _encode_fp8, {**_TILES, "BLOCK_D": (64, 128)}),
    "merge": Trial("bf16", _ENCODE_TOPK, dict(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8))),
    "above_cut": Trial(
        "bf16", OPS["encode_batch_topk"].call, dict(BLOCK_D=(32, 64, 128), BLOCK=(1024, 2048, 4096), num_warps=(4, 8))
    ),
    "rescan": Trial("bf16", _ENCODE_TOPK, dict(BLOCK_D=(32, 64, 128), BLOCK_T=(512, 1024, 2048), num_warps=(4, 8))),
    "fold": Trial("bf16", _ENCODE_TOPK, dict(BLOCK_F=(4, 8, 16), BLOCK_D=(256, 512), num_warps=(4, 8))),
    "topk": Trial("bf16", OPS["select_topk"].call, dict(BLOCK_F=(1024, 2048, 4096, 8192), num_warps=(4, 8, 16))),
    "threshold": Trial("bf16", _select_threshold, dict(BLOCK_F=(1024, 2048, 4096, 8192), num_warps=(4, 8, 16))),
    "decode": Trial("bf16", OPS["decode"].call, _GATHERS | dict(BLOCK_K=(4, 8, 16))),
    "reconstruct": Trial("bf16", OPS["reconstruct"].call, dict(BLOCK_D=(64, 128, 256, 512), num_warps=(4, 8, 16))),
    "reconstruct_loop": Trial(
        "bf16", _reconstruct_ragged, dict(BLOCK_K=(4, 8, 16), BLOCK_D=(128, 256, 512), num_warps=(4, 8))
    ),
    "values_grad": Trial("bf16", OPS["decode_values_grad"].call, _GATHERS | dict(BLOCK_K=(4, 8, 16))),
    "weight_grad": Trial("bf16", _WEIGHT_GRAD, _GATHERS | dict(BLOCK_E=(4, 8, 16))),
    "windows": Trial("bf16", _WEIGHT_GRAD, _GATHERS | dict(BLOCK_E=(4, 8, 16))),
    "adam_rows": Trial("bf16", _ADAM_ROWS, dict(BLOCK_E=(1, 2, 4), STAGES=(2, 3), num_warps=(4, 8, 16))),
    "adam": Trial("bf16", _adam, dict(BLOCK=(256, 512, 1024, 2048), num_warps=(2, 4, 8))),
    "adam_matrix": Trial("bf16", _adam_matrix, dict(num_warps=(4, 8, 16))),
    "token_loss": Trial("bf16", _LOSS, dict(BLOCK=(64, 256, 1024), num_warps=(1, 2, 4))),
    "position_sum": Trial("bf16", _LOSS, dict(BLOCK_N=(512, 1024, 2048), num_warps=(4, 8))),
    "encode_small": Trial("fp32", _ENCODE, {**_SMALL_TILES, "BLOCK_F": (64, 128)}),
    "encode_topk_small": Trial("fp32", _ENCODE_TOPK, _SMALL_TILES),
    "adam_rows_small": Trial("fp32", _ADAM_ROWS, dict(BLOCK_E=(1, 2), STAGES=(2, 3), num_warps=(4, 8, 16))),
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
