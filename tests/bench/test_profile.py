"""Stages of a step, on traces whose stages are known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from temposae.bench.data import Shape
from temposae.bench.profile import OUTSIDE, STEP, run, summary, table
from temposae.engine.cohort import Cohort
from temposae.engine.errors import UserError

SHAPE = Shape(N=64, D=16, F=48, K=4)


def event(name: str, kind: str, start: float, end: float, thread: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": kind, "ts": start, "dur": end - start, "tid": thread, "args": args}


def stage(name: str, start: float, end: float, thread: int = 1) -> dict[str, Any]:
    return event(f"temposae::{name}", "user_annotation", start, end, thread)


def times(found: dict[str, Any]) -> dict[str, float]:
    return {row["stage"]: pytest.approx(1e3 * row["ms"]) for row in found["stages"]}  # microseconds


def test_stages_of_a_cpu_trace() -> None:
    """One step of 100 us: a stage inside another is counted once, a gap is idle, another thread's op keeps it busy."""
    trace = [
        event(STEP, "user_annotation", 1000, 1100),
        stage("encode", 1000, 1040),
        stage("select_topk", 1010, 1030),  # inside encode
        event("aten::linear", "cpu_op", 1000, 1040),
        event("aten::mm", "cpu_op", 1001, 1005),  # inside linear
        event("autograd::engine::evaluate_function: MmBackward0", "cpu_op", 1050, 1070),
        event("Optimizer.step#Adam.step", "user_annotation", 1080, 1095),
        event("aten::add_", "cpu_op", 1080, 1090),
        event("aten::copy_", "cpu_op", 1042, 1048, thread=2),
        stage("encode", 2000, 2100),  # outside of any step
        {"ph": "M", "name": "process_name"},
    ]
    found = summary(trace)
    expected = {"encode": 20, "select_topk": 20, "backward: MmBackward0": 20, "Adam.step": 15, OUTSIDE: 25}
    assert times(found) == expected
    assert found["step_ms"] == pytest.approx(0.100)
    assert {row["stage"]: row["share"] for row in found["stages"]}["Adam.step"] == pytest.approx(0.15)
    assert {row["stage"]: row["calls"] for row in found["stages"]}["encode"] == 1
    assert 1e3 * found["idle_ms"] == pytest.approx(2 + 2 + 10 + 10)  # 1040-42, 1048-50, 1070-80, 1090-1100
    longest = found["gaps"][0]
    assert 1e3 * longest["ms"] == pytest.approx(10)
    assert (longest["after"], longest["before"]) in {
        ("backward: MmBackward0", "Adam.step"), ("Adam.step", "the end"),
    }  # fmt: skip


def test_stages_of_a_gpu_trace() -> None:
    """Kernels count for the stage that launched them, whichever thread that was, however late they run."""
    trace = [
        event(STEP, "user_annotation", 0, 50),
        stage("encode", 0, 10),
        event("cudaLaunchKernel", "cuda_runtime", 5, 6, correlation=1),
        event("cudaMemsetAsync", "cuda_runtime", 15, 16, correlation=2),  # in no stage
        stage("weight_grad", 20, 30, thread=2),
        event("cuLaunchKernelEx", "cuda_driver", 25, 26, thread=2, correlation=3),
        event(STEP, "user_annotation", 50, 60),
        stage("encode", 50, 55),
        event("cudaLaunchKernel", "cuda_runtime", 52, 53, correlation=4),
        event("gemm", "kernel", 100, 160, thread=7, correlation=1),
        event("Memset", "gpu_memset", 160, 170, thread=7, correlation=2),
        event("dw", "kernel", 190, 250, thread=7, correlation=3),
        event("gemm", "kernel", 250, 300, thread=7, correlation=4),
    ]
    found = summary(trace)
    assert times(found) == {"encode": 55, "weight_grad": 30, OUTSIDE: 5}  # over two steps
    assert found["step_ms"] == pytest.approx(0.100)
    assert found["idle_ms"] == pytest.approx(0.010)
    assert found["gaps"] == [{"ms": pytest.approx(0.010), "after": OUTSIDE, "before": "weight_grad"}]


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no range"):
        summary([stage("encode", 0, 10)])


def test_a_real_step_is_accounted_for(tmp_path: Path, made_up_rates: Any) -> None:
    original = torch.nn.utils.clip_grad_norm_
    found = run(SHAPE, device="cpu", dtype="fp32", steps=2, trace=tmp_path / "trace.json")
    assert found["steps"] == 2
    assert found["named_by"] == "the bench suite"
    stages = {row["stage"]: row for row in found["stages"]}
    assert sum(row["share"] for row in stages.values()) == pytest.approx(1, abs=1e-6)
    assert sum(row["ms"] for row in stages.values()) == pytest.approx(found["step_ms"])
    assert stages.keys() >= {"encode_topk", "reconstruct", "transpose", "weight_grad", "Adam.step"}
    seconds = stages["encode_topk"]["ms"] / 1e3
    assert stages["encode_topk"]["gflop_per_s"] == pytest.approx(2 * SHAPE.N * SHAPE.D * SHAPE.F / seconds / 1e9)
    parameters = 2 * SHAPE.D * SHAPE.F + SHAPE.F + SHAPE.D
    assert stages["Adam.step"]["gb_per_s"] == pytest.approx(28 * parameters / stages["Adam.step"]["ms"] / 1e6)
    text = table(found)
    assert all(name in text for name in stages)
    assert "idle" in text
    assert '"traceEvents"' in (tmp_path / "trace.json").read_text()
    assert torch.nn.utils.clip_grad_norm_ is original  # what was wrapped is as before


def test_a_step_that_names_its_own_stages_is_not_wrapped(
    tmp_path: Path, made_up_rates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Cohort.step

    def named(self: Cohort, batch: Any) -> None:
        with torch.profiler.record_function("temposae::everything"):
            step(self, batch)

    monkeypatch.setattr(Cohort, "step", named)
    found = run(SHAPE, device="cpu", dtype="fp32", steps=1, trace=tmp_path / "trace.json")
    assert found["named_by"] == "the step"
    stages = {row["stage"] for row in found["stages"]}
    assert "everything" in stages
    assert "encode_topk" not in stages


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(steps=0), ("steps: 0", "at least 1")),
        (dict(dtype="fp16"), ("dtype: 'fp16'", "fp32, bf16")),
        (dict(shape=Shape(4, 4, 4, 5)), ("K: 5", "at most F (4)")),
    ],
)
def test_mistakes(change: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(shape=SHAPE, device="cpu", dtype="fp32", steps=1, trace=tmp_path / "t") | change
    with pytest.raises(UserError) as error:
        run(settings.pop("shape"), **settings)
    assert all(word in str(error.value) for word in words), error.value
