"""Profile a training step: a Chrome trace, and a table of its stages.

A stage is a range that the step opens with `torch.profiler.record_function("temposae::NAME")`. If the step opens none, the
kernels' ops, the optimiser and the work on the decoder are wrapped here. Time outside all stages counts for its autograd
node, if there is one.
"""

import contextlib
import functools
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.profiler import record_function

from ..engine.cohort import Cohort
from ..engine.learner import Learner
from ..engine.process.cpu_memory import tune_host
from ..engine.process.progress import progress_bar
from ..kernels import adam, decode, encode, encode_sparse, loss, select, weight_grad
from ..kernels.code import SparseCode
from ..kernels.torch_modes import default_modes
from .data import DTYPES, Shape, check_settings, tokens
from .floors import Rates, rates_of
from .ops import OPS, work
from .providers import make_learner
from .results import markdown
from .timing import synchronise, traced
from .training_job import TrainingJob

STAGE, STEP = "temposae::", "temposae-bench-step"
OUTSIDE = "outside of stages"
# ranges that torch names itself
NODE, OPTIMIZER = "autograd::engine::evaluate_function: ", "Optimizer.step#"
GPU_WORK, LAUNCHES = ("kernel", "gpu_memcpy", "gpu_memset"), ("cuda_runtime", "cuda_driver")
# the ops of a stage that is not named after its only op
STAGE_OPS = {
    "encode": ("encode_topk",),
    "decode": ("reconstruct",),
    "loss": ("position_loss",),
    "sort": ("transpose",),
    "update": ("row_norms", "row_norms", "adam_rows", "adam_rows"),  # W_enc and W_dec, with clipping
    "weight_grad": ("weight_grad", "weight_grad"),
}
ADAM_BYTES = 28  # per parameter in float32: weight, gradient and two moments read, weight and moments written


@default_modes()
def run(shape: Shape, *, device: str, dtype: str, steps: int, trace: Path) -> dict[str, Any]:
    """Profile `steps` training steps with the defaults of `temposae train`, and write a Chrome trace to `trace`.

    Returns the `summary`. Stages with a known cost also have gb_per_s, gflop_per_s and floor_ms. The profiler slows short
    ops down. Raises UserError for sizes that are not allowed.
    """
    check_settings(dtype, steps=steps)
    tune_host()
    bench_tokens = tokens(shape.check(), device, DTYPES[dtype], count=4)
    learner = make_learner(TrainingJob(shape, device, dtype, 0.0, bench_tokens, own=True))
    cohort = Cohort([learner])
    with progress_bar("profiling", total=steps + 3, unit="steps") as bar:

        def step(i: int) -> None:
            cohort.step(bench_tokens.batches[i % len(bench_tokens.batches)])
            bar.advance(1)

        step(0)
        step(1)
        _, first = traced(lambda: step(2), device)
        named = any(str(e.get("name")).startswith(STAGE) for e in first)

        def all_steps() -> None:
            for i in range(steps):
                with record_function(STEP):
                    step(i)
            synchronise(device)

        with contextlib.nullcontext() if named else _wrapped(learner):
            _, events = traced(all_steps, device, trace)
    result = summary(events)
    rates = rates_of(device, DTYPES[dtype].itemsize)
    parameters = sum(p.numel() for p in learner.sae.parameters() if p.requires_grad)
    for stage in result["stages"]:
        _add_rates(stage, shape, dtype, device, rates, parameters)
    return {"shape": shape._asdict(), "dtype": dtype, "named_by": "the step" if named else "the bench suite"} | result


class Span(NamedTuple):
    """A piece of a trace, in microseconds."""

    name: str
    start: float
    end: float


def summary(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the events of a Chrome trace with steps marked `STEP`.

    step_ms   time per step; on a GPU the time from the first to the last kernel, divided by the steps
    stages    [{stage, ms, calls, share}] per step, longest first. The time of a stage excludes inner stages. GPU work counts
              for the stage that launched it. Work in no stage is `OUTSIDE`.
    idle_ms   time per step in which the GPU (on a CPU, torch) does nothing
    gaps      [{ms, after, before}], the longest idle times per step, with the stages around them

    Raises ValueError for a trace without steps.
    """
    events = [e for e in events if e.get("ph") == "X"]
    labels, calls = defaultdict[Any, list[Span]](list), defaultdict[str, int](int)
    for event in events:
        name = _label(event)
        if name is not None:
            labels[event["tid"]].append(_span(event, name))
    places = {thread: _innermost(spans) for thread, spans in labels.items()}
    steps = [_span(e, STEP) for e in events if e["name"] == STEP and e["cat"] == "user_annotation"]
    if not steps:
        raise ValueError(f"the trace has no range {STEP}")
    for spans in labels.values():
        for span in spans:
            calls[span.name] += any(step.start <= span.start < step.end for step in steps)

    busy = pieces = _gpu_spans(events, places)
    has_gpu = bool(busy)
    if has_gpu:
        window = [Span("", min(s.start for s in busy), max(s.end for s in busy))]
    else:
        busy = [_span(e, _name_at(places.get(e["tid"]), e["ts"])) for e in events if e["cat"] == "cpu_op"]
        window = steps
        pieces = [_clip(piece, step) for step in steps for place in places.values() for piece in place]
    times = defaultdict[str, float](float)
    for piece in pieces:
        times[piece.name] += max(0.0, piece.end - piece.start)
    total = sum(span.end - span.start for span in window)
    between = defaultdict[tuple[str, str], float](float)
    for span in window:
        for after, before, ms in _gaps(busy, span):
            between[after, before] += ms
    idle = sum(between.values())
    if not has_gpu:  # time that no label covers; on a GPU such work is labelled OUTSIDE, and the rest is idle
        times[OUTSIDE] += total - sum(times.values())
    n = len(steps)
    longest_first = sorted((item for item in times.items() if item[1] > 0), key=lambda item: -item[1])
    gaps = sorted(between.items(), key=lambda item: -item[1])[:5]
    return {
        "steps": n,
        "step_ms": total / n / 1e3,
        "stages": [
            {"stage": name, "ms": time / n / 1e3, "calls": calls[name] / n, "share": time / total}
            for name, time in longest_first
        ],
        "idle_ms": idle / n,
        "idle_share": 1e3 * idle / total,
        "gaps": [{"ms": ms / n, "after": after, "before": before} for (after, before), ms in gaps],
    }


def table(result: dict[str, Any]) -> str:
    """The stages as Markdown, then the idle time and its longest gaps."""
    table_lines: list[tuple[str, ...]] = [("stage", "ms a step", "share", "calls", "GB/s", "GFLOP/s", "of floor")]
    for stage in result["stages"]:
        rates = ("-", "-", "-")
        if "floor_ms" in stage:
            of_floor = f"{stage['floor_ms'] / stage['ms']:.0%}"
            rates = (f"{stage['gb_per_s']:.3g}", f"{stage['gflop_per_s']:.3g}", of_floor)
        times = (f"{stage['ms']:.3f}", f"{stage['share']:.1%}", f"{stage['calls']:g}")
        table_lines.append((stage["stage"], *times, *rates))
    idle = f"{result['idle_ms']:.3f} ms ({result['idle_share']:.1%})"
    lines = [*markdown(table_lines), "", f"a step: {result['step_ms']:.3f} ms, of which idle {idle}"]
    lines += [f"idle {gap['ms']:.3f} ms a step after {gap['after']}, before {gap['before']}" for gap in result["gaps"]]
    return "\n".join(lines) + "\n"


def _label(event: dict[str, Any]) -> str | None:
    """The stage, optimizer or autograd node that a host event names."""
    name, kind = event["name"], event["cat"]
    if kind == "user_annotation" and name.startswith((STAGE, OPTIMIZER)):
        return name.removeprefix(STAGE).removeprefix(OPTIMIZER)
    if kind == "cpu_op" and name.startswith(NODE):
        return f"backward: {name.removeprefix(NODE)}"
    return None


def _span(event: dict[str, Any], name: str) -> Span:
    return Span(name, float(event["ts"]), float(event["ts"]) + float(event["dur"]))


def _gpu_spans(events: list[dict[str, Any]], places: dict[Any, list[Span]]) -> list[Span]:
    """Work on the GPU, named after the stage that launched it."""
    launches = {e["args"].get("correlation"): e for e in events if e["cat"] in LAUNCHES}
    launched = [(e, launches.get(e["args"].get("correlation"), e)) for e in events if e["cat"] in GPU_WORK]
    return [_span(e, _name_at(places.get(launch["tid"]), launch["ts"])) for e, launch in launched]


def _innermost(spans: list[Span]) -> list[Span]:
    """Cut nested spans of one thread so that each moment belongs to the innermost span."""
    innermost: list[Span] = []
    open_: list[Span] = []
    position = 0.0

    def cut(end: float) -> None:
        nonlocal position
        if end > position:
            innermost.append(Span(open_[-1].name, position, end))
            position = end

    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        while open_ and open_[-1].end <= span.start:
            cut(open_[-1].end)
            open_.pop()
        if open_:
            cut(span.start)
        open_.append(span)
        position = max(position, span.start)
    while open_:
        cut(open_[-1].end)
        open_.pop()
    return innermost


def _name_at(place: list[Span] | None, moment: float) -> str:
    """The name of the span that covers `moment`. The spans are disjoint and sorted."""
    if not place:
        return OUTSIDE
    i = bisect_right(place, moment, key=lambda span: span.start) - 1
    return place[i].name if i >= 0 and moment <= place[i].end else OUTSIDE


def _clip(piece: Span, to: Span) -> Span:
    return Span(piece.name, max(piece.start, to.start), min(piece.end, to.end))


def _gaps(busy: list[Span], window: Span) -> Iterator[tuple[str, str, float]]:
    """Gaps in the window in which no span of `busy` runs: the names before and after, and milliseconds."""
    idle_from, after = window.start, "the start"
    for span in sorted(busy, key=lambda s: s.start):
        if span.end <= window.start or span.start >= window.end:
            continue
        if span.start > idle_from:
            yield after, span.name, (span.start - idle_from) / 1e3
        if span.end > idle_from:
            idle_from, after = span.end, span.name
    if idle_from < window.end:
        yield after, "the end", (window.end - idle_from) / 1e3


def _add_rates(stage: dict[str, Any], shape: Shape, dtype: str, device: str, rates: Rates, parameters: int) -> None:
    """Add throughput and floor to a stage whose cost is known: that of ops, or of Adam."""
    name = stage["stage"]
    if names := STAGE_OPS.get(name, (name,) if name in OPS else ()):
        costs = [work(op, shape, dtype, device, rates) for op in names]
        flops, traffic, floor = (sum(getattr(cost, key) for cost in costs) for key in ("flops", "bytes", "floor_ms"))
    elif name == "Adam.step":
        flops, traffic = 0.0, float(ADAM_BYTES * parameters)
        floor = 1e3 * traffic / rates.bytes_per_s
    else:
        return
    seconds = stage["ms"] / 1e3
    stage["gb_per_s"], stage["gflop_per_s"] = traffic / seconds / 1e9, flops / seconds / 1e9
    stage["floor_ms"] = floor


@contextlib.contextmanager
def _wrapped(learner: Learner) -> Iterator[None]:
    """Open ranges around all ops that the engine calls, clipping, and the work on the decoder."""
    ops = (
        encode.encode, encode_sparse.encode_topk, encode_sparse.encode_threshold,
        select.select_topk, select.select_batch_topk, select.select_threshold, decode.decode, decode.reconstruct,
        decode.decode_values_grad, loss.position_loss, weight_grad.weight_grad, adam.adam_rows, adam.row_norms,
    )  # fmt: skip
    root = __package__.rpartition(".")[0] if __package__ else ""
    callers = (f"{root}.engine", f"{root}.kernels.autograd", f"{root}.kernels.gradients")
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(callers)]
    targets = [(m, name) for m in modules for name, value in list(vars(m).items()) if any(value is op for op in ops)]
    targets += [(SparseCode, "transpose"), (torch.nn.utils, "clip_grad_norm_")]
    targets += [(learner.sae, name) for name in ("project_decoder_gradient", "constrain")]
    with contextlib.ExitStack() as patches:
        for owner, name in targets:
            patches.enter_context(patch.object(owner, name, _ranged(getattr(owner, name))))
        yield


def _ranged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(STAGE + function.__name__.strip("_")):
            return function(*args, **kwargs)

    return ranged
