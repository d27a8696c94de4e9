"""Files of measured results, and Markdown tables of them."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..engine.errors import UserError
from ..engine.process.cpu_memory import from_proc

FOLDER = Path(__file__).parent / "results"  # one file per run
NEEDED = ("provider", "op", "dtype", "N", "D", "F", "K", "ms", "floor_ms", "peak_bytes")
Column = Callable[[dict[str, Any]], str]
TIMES, PEAK = "ms (p20 to p80)", "peak GiB"
MEASURES: dict[str, Column] = {
    "GB": lambda case: f"{case.get('bytes', 0) / 1e9:.3g}",
    "GFLOP": lambda case: f"{case.get('flops', 0) / 1e9:.3g}",
    "floor ms": lambda case: f"{case['floor_ms']:.3g}",
    "of floor": lambda case: f"{case['floor_ms'] / case['ms']:.0%}",  # 100% is as fast as possible
    PEAK: lambda case: f"{case['peak_bytes'] / 2**30:.3g}",
}


def record(cases: list[dict[str, Any]], left_out: dict[str, str], device: str) -> dict[str, Any]:
    """The contents of a results file: device, versions, commit, when, threads, rates, left_out and cases. Times are in
    milliseconds, memory in bytes."""
    from .data import DTYPES
    from .floors import rates_of

    rates = rates_of(device, *sorted({DTYPES[case["dtype"]].itemsize for case in cases}))
    return about(device) | {"rates": asdict(rates), "left_out": left_out, "cases": cases}


def about(device: str) -> dict[str, Any]:
    """Device, versions, commit, time and threads of a measurement."""
    import torch

    from .providers import versions

    return {
        "device": device_name(device),
        "versions": {"python": platform.python_version()} | versions(),
        "commit": commit(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
    }


def device_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return from_proc("cpuinfo", r"model name\s*:\s*(.+)") or platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the package's clone, with -dirty if files were changed. Without a clone, TEMPOSAE_COMMIT or None."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--match=", "--dirty"]
    try:
        if (root / ".git").exists():  # else git would name the commit of a repository around the package
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return os.environ.get("TEMPOSAE_COMMIT")


def heading(result: dict[str, Any]) -> str:
    """Device, torch's version and commit of a measurement, in a line."""
    commit = (result["commit"] or "unknown")[:8]
    return f"{result['device']}, torch {result['versions']['torch']}, commit {commit}"


def read_unfinished(file: Path | None, command: str, check: Callable[[dict[str, Any]], Any]) -> dict[str, Any] | None:
    """Read the results that a command has written so far, None if there are none. Raises UserError for a file in which
    `check` finds that something is missing."""
    if file is None or not file.is_file():
        return None
    try:
        result = json.loads(file.read_text())
        check(result)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"json: {file} is not allowed; it must hold results of `temposae {command}`") from None
    return result


def read(path: Path) -> dict[str, Any]:
    """Read a results file. Raises UserError if it is not one."""
    try:
        result = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"results: {path} can't be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"results: {path} is not JSON") from None
    if not isinstance(result, dict) or not isinstance(result.get("cases"), list):
        raise UserError(
            f"results: {path} must hold device, versions, commit and cases, as `temposae bench` writes them"
        )
    for case in result["cases"]:
        lacking = [key for key in NEEDED if not isinstance(case, dict) or key not in case]
        if lacking:
            raise UserError(f"results: a case in {path} lacks {', '.join(lacking)}")
    return result


def kept() -> list[Path]:
    """The package's results files, sorted by name."""
    return sorted(FOLDER.glob("*.json"))


def table(result: dict[str, Any]) -> str:
    """Results as Markdown: device, versions and commit, a table of steps per shape and activation, and one of ops."""
    versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items() if version)
    short = re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", str(result.get("commit")))
    lines = [f"{result.get('device')}; {versions}; commit {short}"]
    steps = [case for case in result["cases"] if case["op"] == "train_step"]
    named = any(activation(case) != "topk" for case in steps)
    races: dict[str, list[dict[str, Any]]] = {}
    for case in steps:
        races.setdefault(_heading(case, named), []).append(case)
    for heading, cases in races.items():
        lines += ["", heading, "", *_steps(cases)]
    ops = [case for case in result["cases"] if case["op"] != "train_step"]
    if ops:
        lines += ["", *_ops(ops)]
    lines += [f"\nLeft out: {name} ({reason})" for name, reason in result.get("left_out", {}).items()]
    return "\n".join(lines) + "\n"


def _steps(cases: list[dict[str, Any]]) -> list[str]:
    """Steps, fastest first. *x temposae* compares with temposae's fastest headline step. Columns that no case has are left
    out."""
    fastest = min((c["ms"] for c in cases if c["provider"] == "temposae" and _headline(c)), default=None)
    columns: dict[str, Column] = {
        "provider": lambda case: case["provider"] + ("" if _headline(case) else ", own defaults"),
        "optimizer": lambda case: str(case.get("optimizer", "")),
        "dtype": lambda case: case["dtype"],
        "clip": lambda case: "-" if case.get("clip") is None else f"{case['clip']:g}",
        TIMES: _times,
        "x temposae": lambda case: "-" if fastest is None else f"{case['ms'] / fastest:.2f}",
        PEAK: MEASURES[PEAK],
    }
    if any(case.get("auxk") for case in cases):
        columns["AuxK"] = lambda case: str(case.get("auxk", ""))
    if any(case.get("l0") is not None for case in cases):
        columns["L0"] = lambda case: "-" if case.get("l0") is None else _digits(case["l0"])
    if any("flops" in case for case in cases):
        columns |= {name: MEASURES[name] for name in ("GB", "GFLOP", "floor ms")}
    columns |= {"of floor": MEASURES["of floor"], "learns": lambda case: "yes" if case.get("loss_falls") else "NO"}
    return _columns(columns, sorted(cases, key=lambda case: (not _headline(case), case["ms"])))


def _ops(cases: list[dict[str, Any]]) -> list[str]:
    columns: dict[str, Column] = {
        "op": lambda case: case["op"],
        "direction": lambda case: case.get("direction", ""),
        "shape": lambda case: "-".join(f"{name}{case[name]}" for name in "NDFK"),
        "dtype": lambda case: case["dtype"],
        "backend": lambda case: case.get("backend", ""),
        TIMES: _times,
    }
    return _columns(columns | MEASURES, cases)


def _columns(columns: dict[str, Column], cases: list[dict[str, Any]]) -> list[str]:
    return markdown([tuple(columns), *(tuple(text(case) for text in columns.values()) for case in cases)])


def markdown(lines: list[tuple[str, ...]]) -> list[str]:
    """A table with aligned columns. The first line is the heading. Columns of numbers are aligned to the right."""
    widths = [max(2, *(len(texts[i]) for texts in lines)) for i in range(len(lines[0]))]  # 2 for the rule, -:
    right = [all(not texts[i] or texts[i][0] in "0123456789-?" for texts in lines[1:]) for i in range(len(widths))]

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def padded(texts: tuple[str, ...]) -> Iterable[str]:
        return (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(texts, widths, right, strict=True))

    rule = line("-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True))
    return [line(padded(lines[0])), rule, *(line(padded(texts)) for texts in lines[1:])]


def _headline(case: dict[str, Any]) -> bool:
    return case.get("settings", "headline") == "headline"


def activation(case: dict[str, Any]) -> str:
    """A step's activation, with AuxK if it had work. The oldest results name no activation: all were TopK."""
    return case.get("activation", "topk") + (" with AuxK" if case.get("auxk") else "")


def _heading(case: dict[str, Any], named: bool) -> str:
    sizes = ", ".join(f"{name} = {case[name]}" for name in "NDFK")
    count = case.get("dictionaries", 1)
    step = "A training step" if count == 1 else f"A training step of each of {count} dictionaries"
    return f"{step}, {f'{activation(case)}, ' if named else ''}{sizes}:"


def _times(case: dict[str, Any]) -> str:
    has_spread = "ms_p20" in case and "ms_p80" in case
    spread = f" ({_digits(case['ms_p20'])} to {_digits(case['ms_p80'])})" if has_spread else ""
    return f"{_digits(case['ms'])}{spread}"


def _digits(value: float) -> str:
    """Three significant digits, and no exponent from 1000 on."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
