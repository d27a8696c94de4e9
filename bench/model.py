"""Predict the time of a training step on a GPU from the compiled kernels and from formulas of their work.

Each op's bench.py describes its launches in a step. Those of torch's kernels are described here. docs/bench.md says what
the model leaves out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..kernels.backend import config_row
from ..kernels.bench_types import Launch, Step
from . import aot
from .data import HEADLINE, Shape
from .floors import card_named, step_floors
from .gpus import GPUS, Gpu
from .op_benches import BENCHES
from .results import activation, markdown

ISSUE_GAP = 3.0  # cycles between two instructions of a warp, which often wait for one another
BARRIER_S = 20e-9  # a barrier of the warps of a CTA
LAUNCH_S = 2e-6  # start and end of a kernel
OVERLAP = 4.0  # of the resources of a kernel: 1 for none, infinite if the busiest hides all others
#: settings of a step whose time is predicted
MODES: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk, clipped": {"clip": True},
    "topk, AuxK": {"aux_k": 64},  # the default of `SAEConfig`
    "batchtopk": {"activation": "batchtopk"},
    "jumprelu": {"activation": "jumprelu"},
}
# the op that is a stage of the step
STAGE_OPS = {"encode": "encode_topk", "decode": "reconstruct", "loss": "entry_loss", "sort": "sort_entries"}


def predict(name: str, settings: Mapping[str, Any] = MODES["topk"], shape: Shape = HEADLINE) -> dict[str, Any]:
    """Predict a step in bfloat16 on a GPU of GPUS. Returns its `stages`, as from `time_launch`, and `ms` and `floor_ms`.

    Raises UserError under Triton's interpreter.
    """
    gpu = GPUS[name]
    step = Step(*shape, config=config_row(gpu.arch), **settings)
    launches = [launch for bench in BENCHES for launch in bench.launches(step)] + _torch_launches(step)
    stages = [time_launch(launch, gpu) for launch in launches]
    floor = step_floors(step.n, step.d, step.f, step.k + step.aux_k, gpu.rates).fused
    return {"stages": stages, "ms": sum(stage["ms"] for stage in stages), "floor_ms": floor}


def time_launch(launch: Launch, gpu: Gpu, settings: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Return the work of a launch and its predicted time:

    stage, name, launches      as in `Launch`
    dram_bytes, l2_bytes       l2 with gathered rows
    tensor_flops
    issue_cycles               for which the instructions occupy the busiest unit of a scheduler
    ctas_per_sm                None for kernels of torch
    bound, ms                  the resource that takes longest, and the time
    unknown_loops              loops without trips, which are counted once

    `settings` are launch settings other than the table's.
    """
    times = {
        "DRAM": launch.dram / gpu.rates.bytes_per_s,
        "L2": launch.l2 / gpu.tile_bytes_per_s + launch.gathered / gpu.rates.l2_bytes_per_s,
        "tensor cores": launch.tensor_flops / gpu.rates.flops[2],
    }
    use = _use(launch, gpu, aot.compiled(launch.name, gpu.arch, settings)) if launch.programs else Use()
    times |= use.times
    overlapped = [time - use.ends.get(resource, 0.0) for resource, time in times.items()]
    seconds = sum(time**OVERLAP for time in overlapped) ** (1 / OVERLAP) + sum(use.ends.values())
    return {
        "stage": launch.stage,
        "name": launch.name,
        "launches": launch.launches,
        "dram_bytes": launch.dram,
        "l2_bytes": launch.l2 + launch.gathered,
        "tensor_flops": launch.tensor_flops,
        "issue_cycles": use.cycles,
        "ctas_per_sm": use.ctas,
        "bound": max(times, key=lambda resource: times[resource]),
        "ms": 1e3 * (use.tail * seconds + LAUNCH_S * launch.launches),
        "unknown_loops": list(use.unknown_loops),
    }


class Use(NamedTuple):
    """How the programs of a launch use the multiprocessors."""

    cycles: float = 0.0  # as issue_cycles
    ctas: int | None = None  # on a multiprocessor
    times: Mapping[str, float] = {}  # seconds of instructions and of latency
    ends: Mapping[str, float] = {}  # seconds of each resource before and after the loop, if they overlap with nothing
    tail: float = 1.0  # a factor on the time: the last programs leave multiprocessors idle
    unknown_loops: Sequence[str] = ()


def _use(launch: Launch, gpu: Gpu, kernel: aot.Compiled) -> Use:
    ctas, warps = kernel.ctas_per_sm(gpu.arch), kernel.warps / 4  # warps of a scheduler
    if launch.groups > 1:
        ctas, warps = ctas * launch.groups, 1.0
    rounds = launch.programs / (gpu.sms * ctas)
    per_sm = max(1.0, launch.programs / gpu.sms)  # programs of the busiest multiprocessor
    executed = kernel.code.executed(launch.trips, gpu.sm.float_cycles)
    barriers = executed.pop("barrier")
    cycles = max(executed.values()) * warps * per_sm * launch.launches
    clock = gpu.tensor_clock if launch.tensor_flops else gpu.clock
    seconds = cycles / clock * max(1.0, ISSUE_GAP / (warps * min(ctas, math.ceil(per_sm))))
    waiting = launch.waits * gpu.latency * max(1.0, rounds)
    chain = max(waiting + barriers * BARRIER_S * max(1.0, rounds), launch.longest * gpu.latency)
    ends = {}
    if launch.tensor_flops and ctas == 1:
        outside = kernel.code.executed({loop.name: 0.0 for loop in kernel.code.loops}, gpu.sm.float_cycles)
        ends = {
            "DRAM": launch.output / gpu.rates.bytes_per_s,
            "instructions": seconds * max(outside.values()) / max(executed.values()),
            "latency": waiting,
        }
    return Use(
        cycles, ctas, {"instructions": seconds, "latency": chain * launch.launches}, ends,
        math.ceil(rounds) / rounds if rounds > 1 and not launch.longest else 1.0,
        sorted({loop.name for loop in kernel.code.loops} - set(launch.trips)),
    )  # fmt: skip


def _torch_launches(step: Step) -> list[Launch]:
    """The kernels of torch that the step launches around the ops (engine/cohort.py, fused.py and stacked_weights.py)."""
    n, d, _, *_ = step
    wide, entries = n * d, step.entries
    # the least entry of a batch and the move of the threshold; tokens and weights of the entries of ragged codes
    batch = [Launch("step", "torch: least entry of the batch", dram=30 * entries, launches=12)]
    ragged = [Launch("step", "torch: tokens and weights of entries", dram=100 * entries, launches=12)]
    return [
        Launch("step", "torch: scale x", dram=4 * wide),
        Launch("step", "torch: rates", dram=8),
        *(batch if step.activation == "batchtopk" else []),
        *(ragged if step.ragged else []),
        *([Launch("aux", "torch: weight of AuxK", dram=20 * wide, launches=10)] if step.aux_k else []),
        *([Launch("encode", "torch: band", dram=60 * entries, launches=10)] if step.activation == "jumprelu" else []),
    ]


def headline(names: Iterable[str] = tuple(GPUS)) -> dict[str, dict[str, Any]]:
    """The prediction of the headline step by GPU, as from `predict`, with the other settings of MODES as `modes`."""
    predictions = {}
    for name in names:
        modes = {mode: predict(name, settings) for mode, settings in MODES.items()}
        predictions[name] = modes["topk"] | {"modes": modes}
    return predictions


def add_measured(predictions: dict[str, dict[str, Any]], results: Iterable[dict[str, Any]]) -> None:
    """Add `measured_ms`, and `measured_ratio` to the prediction, to the modes and stages that results measure.

    Stages are measured as ops, one after another, so their sum is not the step.
    """
    for result in results:
        name = card_named(str(result.get("device")), predictions)
        if name is not None:
            modes = predictions[name]["modes"]
            for case in result["cases"]:
                shape = [case[size] for size in "NDFK"]
                if case["provider"] == "temposae" and case["dtype"] == "bf16" and shape == [*HEADLINE]:
                    _add_case(modes, case)
            predictions[name] |= modes["topk"]


def _add_case(modes: dict[str, dict[str, Any]], case: dict[str, Any]) -> None:
    if case["op"] == "train_step" and case.get("settings", "headline") == "headline":
        mode = activation(case).replace(" with", ",") + (", clipped" if case.get("clip") else "")
        if mode in modes and case.get("auxk", 0) == MODES[mode].get("aux_k", 0):
            _add(modes[mode], case["ms"], modes[mode]["ms"])
    for stage, op in STAGE_OPS.items():
        if case["op"] == op:
            measured_stages = modes["topk"].setdefault("measured_stages", {})
            predicted = sum(row["ms"] for row in modes["topk"]["stages"] if row["stage"] == stage)
            _add(measured_stages.setdefault(stage, {}), case["ms"], predicted)


def _add(row: dict[str, Any], measured: float, predicted: float) -> None:
    row |= {"measured_ms": measured, "measured_ratio": measured / predicted}


def text(predictions: Mapping[str, Mapping[str, Any]]) -> str:
    """The predictions as Markdown: a table of all settings, and one of the headline's kernels per GPU."""
    lines: list[tuple[str, ...]] = [
        ("GPU", "step", "launches", "ms", "floor ms", "of floor", "x topk", "measured ms", "measured / predicted")
    ]
    for name, prediction in predictions.items():
        for mode, row in prediction["modes"].items():
            ratios = f"{row['floor_ms'] / row['ms']:.0%}", f"{row['ms'] / prediction['ms']:.2f}"
            measured = [f"{row[key]:.2f}" if key in row else "-" for key in ("measured_ms", "measured_ratio")]
            launches = str(sum(stage["launches"] for stage in row["stages"]))
            lines.append((name, mode, launches, f"{row['ms']:.2f}", f"{row['floor_ms']:.2f}", *ratios, *measured))
    sections = ["\n".join(markdown(lines))]
    for name, prediction in predictions.items():
        sections += [f"### {name}", "\n".join(_kernels(prediction["stages"]))]
        for stage, row in prediction.get("measured_stages", {}).items():
            times = f"measured {row['measured_ms']:.3f} ms, {row['measured_ratio']:.2f} x the prediction"
            sections.append(f"{stage}: {times}")
        if unknown := {loop for row in prediction["stages"] for loop in row["unknown_loops"]}:
            sections.append(f"Loops without a number of trips, counted once: {', '.join(sorted(unknown))}.")
    return "\n\n".join(sections)


def _kernels(stages: Iterable[Mapping[str, Any]]) -> list[str]:
    lines: list[tuple[str, ...]] = [
        ("stage", "kernel", "launches", "DRAM MB", "L2 MB", "tensor GFLOP", "issue kcycles", "CTAs/SM", "bound by", "ms")
    ]  # fmt: skip
    for row in stages:
        work = row["dram_bytes"] / 1e6, row["l2_bytes"] / 1e6, row["tensor_flops"] / 1e9, row["issue_cycles"] / 1e3
        ctas = "-" if row["ctas_per_sm"] is None else str(row["ctas_per_sm"])
        cells = [f"{amount:.0f}" for amount in work]
        lines.append((row["stage"], row["name"], str(row["launches"]), *cells, ctas, row["bound"], f"{row['ms']:.3f}"))
    return markdown(lines)
