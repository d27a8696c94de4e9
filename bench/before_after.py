"""Time other libraries' minimal training scripts before and after `accelerate`. bench/peers has the scripts and diffs."""

import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from ..engine.errors import UserError, check_known
from ..engine.process.progress import progress_bar
from .data import Shape
from .results import about, markdown

FOLDER = Path(__file__).parent / "peers"
#: library -> the module that its script imports
LIBRARIES = {"saelens": "sae_lens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}
#: runs a script; dictionary_learning's is run without nnsight, which only its streams need
RUN = """import sys
from temposae.bench.libraries import skip_init
skip_init("dictionary_learning", unless="nnsight")
exec(compile(sys.stdin.read(), sys.argv[0], "exec"), {"__name__": "__main__"})
"""


def patched(source: str, diff: str) -> str:
    """Apply a unified diff to the source. Raises ValueError unless the old lines of each hunk are there once."""
    for hunk in re.split(r"^@@ .*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
        if source.count(old) != 1:
            raise ValueError(f"these lines are not there once: {old!r}")
        source = source.replace(old, new)
    return source


def scripts(library: str) -> tuple[str, str]:
    """A library's script before and after `accelerate`."""
    source = (FOLDER / f"train_{library}.py").read_text()
    return source, patched(source, (FOLDER / f"train_{library}.diff").read_text())


def measure(
    shapes: Sequence[Shape], libraries: Sequence[str], *, device: str, steps: int, rounds: int
) -> dict[str, Any]:
    """Time each library's script at each shape, before and after in turns, each run in a process of its own.

    `before_ms` and `after_ms` are medians over `rounds` of a run's median step, and `times_faster` is their ratio.
    """
    for library in libraries:
        check_known("library", library, LIBRARIES)
    installed = [library for library in libraries if find_spec(LIBRARIES[library])]
    left_out = {library: f"{LIBRARIES[library]} is not installed" for library in libraries if library not in installed}
    cases = []
    with progress_bar("scripts", total=2 * rounds * len(installed) * len(shapes), unit="runs") as bar:
        for shape in shapes:
            for library in installed:
                times: tuple[list[float], list[float]] = ([], [])
                for _ in range(rounds):
                    for source, script_times in zip(scripts(library), times, strict=True):
                        script_times.append(_step_ms(library, source, shape, steps))
                        bar.advance(1, now=library)
                before, after = map(median, times)
                case = {"library": library, **shape._asdict(), "before_ms": before, "after_ms": after}
                cases.append(case | {"times_faster": before / after})
    return about(device) | {"peers": cases, "steps": steps, "rounds": rounds, "left_out": left_out}


def _step_ms(library: str, source: str, shape: Shape, steps: int) -> float:
    command = [sys.executable, "-c", RUN, *map(str, (*shape, steps))]
    process = subprocess.run(command, input=source, capture_output=True, text=True)
    match = re.search(r"^step: ([\d.]+) ms$", process.stdout, re.MULTILINE)
    if process.returncode or match is None:
        lines = process.stderr.strip().splitlines() or ["no output"]
        raise UserError(f"{library}: its script failed: {lines[-1]}")
    return float(match[1])


def table(result: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    table_lines: list[tuple[str, ...]] = [("library", "N", "D", "F", "K", "before ms", "after ms", "x faster")]
    for case in result["peers"]:
        times = (f"{case['before_ms']:.1f}", f"{case['after_ms']:.1f}", f"{case['times_faster']:.2f}")
        table_lines.append((case["library"], *(str(case[name]) for name in "NDFK"), *times))
    lines = [
        f"{result['device']}, {result['threads']} threads; {versions}; commit {result['commit']}",
        "",
        *markdown(table_lines),
    ]
    lines += [f"\nLeft out: {name} ({reason})" for name, reason in result["left_out"].items()]
    return "\n".join(lines) + "\n"
