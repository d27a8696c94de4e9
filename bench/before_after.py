"""Other libraries' own minimal training scripts, and the same after the few lines that `accelerate` takes: bench/peers has
them as scripts and diffs, and here they take turns."""

import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from ..engine.errors import UserError, near
from ..engine.progress import progress_bar
from .data import Shape
from .results import about, markdown

FOLDER = Path(__file__).parent / "peers"
#: the module that a script needs
LIBRARIES = {"saelens": "sae_lens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}
#: how a script is run: dictionary_learning without what only its streams need
RUN = """import sys
from temposae.bench.libraries import skip_init
skip_init("dictionary_learning", unless="nnsight")
exec(compile(sys.stdin.read(), sys.argv[0], "exec"), {"__name__": "__main__"})
"""


def patched(source: str, diff: str) -> str:
    """The source after a unified diff. Raises ValueError where it isn't of this source."""
    lines, found, at = source.splitlines(), [], 0
    for hunk in re.split(r"^(?=@@ )", diff, flags=re.MULTILINE)[1:]:
        head, *changes = hunk.splitlines()
        match = re.match(r"@@ -(\d+)", head)
        begin = int(match[1]) - 1 if match else at
        found += lines[at:begin]
        at = begin
        for change in changes:
            if change[:1] == "+":
                found.append(change[1:])
                continue
            if at >= len(lines) or lines[at] != change[1:]:
                raise ValueError(f"line {at + 1} is not {change[1:]!r}")
            if change[:1] != "-":
                found.append(lines[at])
            at += 1
    return "\n".join([*found, *lines[at:]]) + "\n"


def scripts(library: str) -> tuple[str, str]:
    """A library's script before and after."""
    source = (FOLDER / f"train_{library}.py").read_text()
    return source, patched(source, (FOLDER / f"train_{library}.diff").read_text())


def measure(
    shapes: Sequence[Shape], libraries: Sequence[str], *, device: str, steps: int, rounds: int
) -> dict[str, Any]:
    """Of each library and shape `before_ms` and `after_ms`, medians over `rounds` of a run's median step, and how many
    `times_faster` that is. Before and after take turns, each as a process of its own."""
    for library in libraries:
        if library not in LIBRARIES:
            raise UserError(f"library: {library!r} is not allowed; {near(library, LIBRARIES)}")
    there = [library for library in libraries if find_spec(LIBRARIES[library])]
    left_out = {library: f"{LIBRARIES[library]} is not installed" for library in libraries if library not in there}
    found = []
    with progress_bar("scripts", total=2 * rounds * len(there) * len(shapes), unit="runs") as bar:
        for shape in shapes:
            for library in there:
                times: tuple[list[float], list[float]] = ([], [])
                for _ in range(rounds):
                    for source, kept in zip(scripts(library), times, strict=True):
                        kept.append(_step_ms(library, source, shape, steps))
                        bar.advance(1, now=library)
                before, after = map(median, times)
                case = {"library": library, **shape._asdict(), "before_ms": before, "after_ms": after}
                found.append(case | {"times_faster": before / after})
    return about(device) | {"peers": found, "steps": steps, "rounds": rounds, "left_out": left_out}


def _step_ms(library: str, source: str, shape: Shape, steps: int) -> float:
    command = [sys.executable, "-c", RUN, *map(str, (*shape, steps))]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    match = re.search(r"^step: ([\d.]+) ms$", done.stdout, re.MULTILINE)
    if done.returncode or match is None:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise UserError(f"{library}: its script failed: {lines[-1]}")
    return float(match[1])


def table(found: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    rows: list[tuple[str, ...]] = [("library", "N", "D", "F", "K", "before ms", "after ms", "x faster")]
    for case in found["peers"]:
        sizes = (str(case[name]) for name in "NDFK")
        rows.append((
            case["library"], *sizes, f"{case['before_ms']:.1f}", f"{case['after_ms']:.1f}", f"{case['times_faster']:.2f}",
        ))  # fmt: skip
    lines = [
        f"{found['device']}, {found['threads']} threads; {versions}; commit {found['commit']}",
        "",
        *markdown(rows),
    ]
    lines += [f"\nLeft out: {name} ({reason})" for name, reason in found["left_out"].items()]
    return "\n".join(lines) + "\n"
