"""The report: what the compiler made of every kernel, and what was measured against the floors. Needs no GPU."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.errors import UserError, near
from ..engine.process.progress import progress_bar
from ..engine.storage.files import write_text
from ..reporting.plots import save_figure
from . import aot
from .data import HEADLINE, PRESETS
from .figures import bars, roofline, scaling
from .floors import FLOOR_NAMES, KNOWN, step_floors
from .results import kept, markdown, read, record, table


def write(
    out: Path,
    *,
    results: Sequence[Path] | None = None,
    archs: Sequence[int] | None = None,
    kernels: Sequence[str] | None = None,
) -> tuple[dict[str, Any], list[Path]]:
    """Write report.md, report.json, roofline.png, steps.png and scaling.png to the folder `out`, which is made if need be.

    `results`: files of measured results; those that come with the package unless given, and on a machine with a GPU a short
    run made now. `archs` and `kernels`: what to compile, everything unless given. Returns what report.json holds (`kernels`
    with a row per kernel and architecture as in `aot.report`, `floors` in ms, `results`) and the paths.

    Raises UserError for unknown kernels and architectures, results that can't be read, and under Triton's interpreter.
    """
    for arch in archs or ():
        if arch not in aot.ARCHS:
            raise UserError(f"arch: {arch} is not allowed; there are {', '.join(map(str, aot.ARCHS))}")
    for name in kernels or ():
        if name not in aot.SPECS:
            raise UserError(f"kernel: {name!r} is not allowed; {near(name, aot.SPECS)}")
    measured = [read(path) for path in (kept() if results is None else results)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {out} can't be made a folder ({error.strerror})") from None
    compiled, obstacle = _compile(archs or aot.ARCHS, kernels or tuple(aot.SPECS))
    if results is None:
        measured += _measure_here()
    contents = {"kernels": compiled, "floors": _floors(), "results": measured}
    write_text(out / "report.json", json.dumps(contents, indent=1) + "\n")
    write_text(out / "report.md", _text(contents, obstacle))
    figures = {"roofline": roofline(measured), "steps": bars(measured), "scaling": scaling(measured)}
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.png")
    return contents, [out / name for name in ("report.md", "report.json", *(f"{name}.png" for name in figures))]


def _compile(archs: Sequence[int], names: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """The compile table, or why there is none."""
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return [], "triton is not installed (it needs Linux), so nothing was compiled"
    kernel_reports: list[dict[str, Any]] = []
    with progress_bar("compiling", total=len(archs) * len(names), unit="kernels") as bar:
        for arch in archs:
            for name in names:
                try:
                    kernel_reports += aot.report([arch], [name])
                except RuntimeError as error:
                    if "TRITON_INTERPRET" not in str(error):
                        raise
                    raise UserError(str(error)) from None
                bar.advance(1, now=f"{name}, sm_{arch}")
    return kernel_reports, ""


def _measure_here() -> list[dict[str, Any]]:
    """On a GPU: the ops and temposae's step at the headline's shape."""
    import torch

    if not torch.cuda.is_available():
        return []
    from . import ops, step

    cases, left_out = step.measure([HEADLINE], [step.Contender("temposae", False)], device="cuda", dtype="bf16")
    op_cases, op_left_out = ops.measure([HEADLINE], device="cuda", dtype="bf16")
    return [record(cases + op_cases, left_out | op_left_out, "cuda")]


def _floors() -> list[dict[str, Any]]:
    """Floors of a bfloat16 step on the cards in the table, at the shapes of the preset for GPUs."""
    return [
        {"device": card, **shape._asdict(), **step_floors(*shape, rates=rates)._asdict()}
        for card, rates in KNOWN.items()
        for shape in PRESETS["gpu"]
    ]


def _text(contents: dict[str, Any], obstacle: str) -> str:
    keys = ("registers", "spill_bytes", "shared_bytes", "tensor_core_instructions")
    compiled = [("kernel", "sm", "hot", *(key.replace("_", " ") for key in keys))]
    for line in contents["kernels"]:
        compiled.append(
            (line["name"], str(line["arch"]), "yes" if line["hot"] else "", *(str(line[key]) for key in keys))
        )
    floors = [("card", *"NDFK", *FLOOR_NAMES.values())]
    for line in contents["floors"]:
        floors.append((line["device"], *(str(line[n]) for n in "NDFK"), *(f"{line[key]:.1f}" for key in FLOOR_NAMES)))
    spilled = [
        f"{line['name']} on sm_{line['arch']}" for line in contents["kernels"] if line["hot"] and line["spill_bytes"]
    ]
    sections = [
        "# Bench report",
        "## Compiled ahead of time",
        obstacle or "\n".join(markdown(compiled)),
        f"Hot kernels that spill: {', '.join(spilled) or 'none'}." if contents["kernels"] else "",
        "## Floors of a training step, ms (arithmetic, not measured)",
        "\n".join(markdown(floors)),
        "![roofline](roofline.png) ![steps](steps.png) ![scaling](scaling.png)",
        "## Measured",
        *(table(result).rstrip() for result in contents["results"]),
        "" if contents["results"] else "Nothing: no GPU here, and no results were given.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"
