"""`temposae bench report`: compiled kernels, predicted times, floors and measured results. Needs no GPU."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.errors import UserError, check_known
from ..engine.process.progress import progress_bar
from ..engine.storage.files import write_text
from ..reporting.plots import save_figure
from . import aot, model
from .data import HEADLINE, PRESETS
from .figures import bars, roofline, scaling
from .floors import FLOOR_NAMES, KNOWN, step_floors
from .gpus import GPUS
from .results import kept, markdown, read, record, table


def write(
    out: Path,
    *,
    results: Sequence[Path] | None = None,
    archs: Sequence[int] | None = None,
    kernels: Sequence[str] | None = None,
    gpus: Sequence[str] | None = None,
) -> tuple[dict[str, Any], list[Path]]:
    """Write report.md, report.json, roofline.png, steps.png and scaling.png to the folder `out`.

    `results` are files of measured results. By default they are the package's, plus a short run on a machine with a GPU.
    `archs` and `kernels` limit what is compiled, and `gpus` for which the step is predicted. By default these are the GPUs
    of the architectures, or none if `kernels` are given, and the architectures are those of the GPUs. Returns the contents
    of report.json (`kernels` as from `aot.report`, `prediction` as from `model.headline`, `floors` in ms, and `results`)
    and the paths of the files.

    Raises UserError for unknown kernels, architectures and GPUs, unreadable results, and under Triton's interpreter.
    """
    for field, values, allowed in (("arch", archs, aot.ARCHS), ("gpu", gpus, GPUS), ("kernel", kernels, aot.SPECS)):
        for value in values or ():
            check_known(field, value, allowed)
    measured = [read(path) for path in (kept() if results is None else results)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {out} is not allowed; give a folder that can be created ({error.strerror})") from None
    archs = archs or sorted({GPUS[name].arch for name in gpus or GPUS})
    if gpus is None:
        gpus = [name for name, gpu in GPUS.items() if gpu.arch in archs and not kernels]
    compiled, obstacle = _compile(archs, kernels or tuple(aot.SPECS))
    prediction = {} if obstacle else model.headline(gpus)
    if results is None:
        measured += _measure_here()
    model.add_measured(prediction, measured)
    contents = {"kernels": compiled, "prediction": prediction, "floors": _floors(), "results": measured}
    write_text(out / "report.json", json.dumps(contents, indent=1) + "\n")
    write_text(out / "report.md", _text(contents, obstacle))
    figures = {"roofline": roofline(measured), "steps": bars(measured), "scaling": scaling(measured)}
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.png")
    return contents, [out / name for name in ("report.md", "report.json", *(f"{name}.png" for name in figures))]


def _compile(archs: Sequence[int], names: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """The compiled kernels, and why there are none."""
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return [], "triton is not installed (it needs Linux), so nothing was compiled"
    kernel_reports: list[dict[str, Any]] = []
    with progress_bar("compiling", total=len(archs) * len(names), unit="kernels") as bar:
        for name in sorted(names, key=list(aot.SPECS).index):
            for arch in sorted(archs):
                kernel_reports += aot.report([arch], [name])
                bar.advance(1, now=f"{name}, sm_{arch}")
    return kernel_reports, ""


def _measure_here() -> list[dict[str, Any]]:
    """On a GPU, time the ops and temposae's step at the headline's shape."""
    import torch

    if not torch.cuda.is_available():
        return []
    from . import ops, step

    cases, left_out = step.measure([HEADLINE], [step.Contender("temposae", False)], device="cuda", dtype="bf16")
    op_cases, op_left_out = ops.measure([HEADLINE], device="cuda", dtype="bf16")
    return [record(cases + op_cases, left_out | op_left_out, "cuda")]


def _floors() -> list[dict[str, Any]]:
    """Floors of a bfloat16 step on known cards, at the shapes of the gpu preset."""
    return [
        {"device": card, **shape._asdict(), **step_floors(*shape, rates=rates)._asdict()}
        for card, rates in KNOWN.items()
        for shape in PRESETS["gpu"]
    ]


def _text(contents: dict[str, Any], obstacle: str) -> str:
    floors = [("card", *"NDFK", *FLOOR_NAMES.values())]
    for floor in contents["floors"]:
        floors.append(
            (floor["device"], *(str(floor[n]) for n in "NDFK"), *(f"{floor[key]:.1f}" for key in FLOOR_NAMES))
        )
    kernels = contents["kernels"]
    spilled = [
        f"{kernel['name']} on sm_{kernel['arch']}" for kernel in kernels if kernel["hot"] and kernel["spill_bytes"]
    ]
    sections = [
        "# Bench report",
        "## Compiled ahead of time",
        obstacle or "\n".join(aot.table(kernels)),
        f"Hot kernels that spill: {', '.join(spilled) or 'none'}." if kernels else "",
        "## Predicted time of a step (a model, not measured: docs/bench.md)" if contents["prediction"] else "",
        model.text(contents["prediction"]) if contents["prediction"] else "",
        "## Floors of a training step, ms (arithmetic, not measured)",
        "\n".join(markdown(floors)),
        "![roofline](roofline.png) ![steps](steps.png) ![scaling](scaling.png)",
        "## Measured",
        *(table(result).rstrip() for result in contents["results"]),
        "" if contents["results"] else "Nothing: there is no GPU here, and no results were given.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"
