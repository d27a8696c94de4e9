"""Measured results: what a file of them holds, and the Markdown tables that are made from it."""

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

FOLDER = Path(__file__).parent / "results"  # one file a run
NEEDED = ("provider", "op", "dtype", "N", "D", "F", "K", "ms", "floor_ms", "peak_bytes")


def record(cases: list[dict[str, Any]], left_out: dict[str, str], device: str) -> dict[str, Any]:
    """A run's results as they are written: what was measured, and on what.

    device, versions, commit, rates, cases  and threads, when, left_out; times in milliseconds, memory in bytes.
    """
    from .data import DTYPES
    from .floors import rates_of

    rates = rates_of(device, *sorted({DTYPES[case["dtype"]].itemsize for case in cases}))
    return about(device) | {"rates": asdict(rates), "left_out": left_out, "cases": cases}


def about(device: str) -> dict[str, Any]:
    """What something was measured on: device, versions, commit, when, threads."""
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
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit that the package's files are of, with -dirty where they were changed since. Where there is no clone, what
    TEMPOSAE_COMMIT says, or None."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--match=", "--dirty"]
    try:
        if (root / ".git").exists():  # else git would name the commit of whatever lies around the package
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return os.environ.get("TEMPOSAE_COMMIT")


def read(path: Path) -> dict[str, Any]:
    """The results in a file. Raises UserError for what is not a file of results."""
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
    """The result files that come with the package, in order of their names."""
    return sorted(FOLDER.glob("*.json"))


def table(result: dict[str, Any]) -> str:
    """Markdown: one line that says what was measured on, then a table of steps per shape and activation, then one of ops."""
    versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items() if version)
    short = re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", str(result.get("commit")))
    lines = [f"{result.get('device')}; {versions}; commit {short}"]
    steps = [case for case in result["cases"] if case["op"] == "train_step"]
    races: dict[str, list[dict[str, Any]]] = {}
    for case in steps:
        races.setdefault(_in_words(case, any(activation(other) != "topk" for other in steps)), []).append(case)
    for words, cases in races.items():
        lines += ["", words, "", *_steps(cases)]
    ops = [case for case in result["cases"] if case["op"] != "train_step"]
    if ops:
        lines += ["", *_ops(ops)]
    lines += [f"\nLeft out: {name} ({reason})" for name, reason in result.get("left_out", {}).items()]
    return "\n".join(lines) + "\n"


def _steps(cases: list[dict[str, Any]]) -> list[str]:
    """Fastest first; *x temposae* compares with its fastest headline step. What not every step has gets a column where
    one of these has it."""
    ours = min((c["ms"] for c in cases if c["provider"] == "temposae" and _headline(c)), default=None)
    extra: dict[str, Callable[[dict[str, Any]], str]] = {}
    if any(case.get("auxk") for case in cases):
        extra["AuxK"] = lambda case: str(case.get("auxk", ""))
    if any(case.get("l0") is not None for case in cases):
        extra["L0"] = lambda case: "-" if case.get("l0") is None else _digits(case["l0"])
    if any("flops" in case for case in cases):
        extra["GB"] = lambda case: f"{case.get('bytes', 0) / 1e9:.3g}"
        extra["GFLOP"] = lambda case: f"{case.get('flops', 0) / 1e9:.3g}"
        extra["floor ms"] = lambda case: f"{case['floor_ms']:.3g}"
    lines = [(
        "provider", "optimizer", "dtype", "clip", "ms (p20 to p80)", "x temposae", "peak GiB", *extra, "of floor", "learns",
    )]  # fmt: skip
    for case in sorted(cases, key=lambda c: (not _headline(c), c["ms"])):
        lines.append((
            case["provider"] + ("" if _headline(case) else ", own defaults"),
            str(case.get("optimizer", "")),
            case["dtype"],
            "-" if case.get("clip") is None else f"{case['clip']:g}",
            _times(case),
            "-" if ours is None else f"{case['ms'] / ours:.2f}",
            f"{case['peak_bytes'] / 2**30:.3g}",
            *(column(case) for column in extra.values()),
            _percent(case),
            "yes" if case.get("loss_falls") else "NO",
        ))  # fmt: skip
    return markdown(lines)


def _ops(cases: list[dict[str, Any]]) -> list[str]:
    lines = [(
        "op", "direction", "shape", "dtype", "backend", "ms (p20 to p80)", "GB", "GFLOP", "floor ms", "of floor", "peak GiB",
    )]  # fmt: skip
    for case in cases:
        lines.append((
            case["op"],
            case.get("direction", ""),
            "-".join(f"{name}{case[name]}" for name in "NDFK"),
            case["dtype"],
            case.get("backend", ""),
            _times(case),
            f"{case.get('bytes', 0) / 1e9:.3g}",
            f"{case.get('flops', 0) / 1e9:.3g}",
            f"{case['floor_ms']:.3g}",
            _percent(case),
            f"{case['peak_bytes'] / 2**30:.3g}",
        ))  # fmt: skip
    return markdown(lines)


def markdown(lines: list[tuple[str, ...]]) -> list[str]:
    """A table whose columns also line up on a terminal. The first row is the heading; columns of figures go to the right."""
    widths = [max(len(texts[i]) for texts in lines) for i in range(len(lines[0]))]
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
    """Of a step, with AuxK where that had work; the first results were all of TopK without it."""
    return case.get("activation", "topk") + (" with AuxK" if case.get("auxk") else "")


def _in_words(case: dict[str, Any], name: bool) -> str:
    sizes = ", ".join(f"{n} = {case[n]}" for n in "NDFK")
    count = case.get("dictionaries", 1)
    heading = "A training step" if count == 1 else f"A training step of each of {count} dictionaries"
    return f"{heading}, {f'{activation(case)}, ' if name else ''}{sizes}:"


def _times(case: dict[str, Any]) -> str:
    spread = (
        f" ({_digits(case['ms_p20'])} to {_digits(case['ms_p80'])})" if "ms_p20" in case and "ms_p80" in case else ""
    )
    return f"{_digits(case['ms'])}{spread}"


def _digits(value: float) -> str:
    """Three digits that count, and never an exponent above one."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _percent(case: dict[str, Any]) -> str:
    """Of the floor: 100% is as fast as the arithmetic allows."""
    return f"{case['floor_ms'] / case['ms']:.0%}"
