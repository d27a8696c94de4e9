"""Clocks, counters and stages on a GPU. Run with `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch
from temposae.bench import ops, step, timing, tune
from temposae.bench.data import Shape
from temposae.bench.profile import run
from temposae.bench.step import contenders

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
SHAPE = Shape(N=512, D=256, F=2048, K=16)


def test_time_is_the_devices() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    once = min(timing.samples(lambda: a @ a, "cuda", repeats=5))
    twice = min(timing.samples(lambda: (a @ a) @ a, "cuda", repeats=5))
    assert 1.6 < twice / once < 2.4
    assert min(timing.samples(lambda: a @ a, "cuda", repeats=5, inner=10)) < 1.2 * once


def test_memory_is_the_most_that_was_held_at_a_time() -> None:
    def call() -> torch.Tensor:
        a = torch.ones(3 * 2**20, device="cuda")
        b = a + 1
        del a
        return b[: 2**20].clone()

    kept, found = timing.memory(call, "cuda")
    assert found.peak == pytest.approx(4 * 6 * 2**20, rel=0.05)
    assert found.held == pytest.approx(4 * 2**20, rel=0.05)
    assert float(kept[0]) == 2


def test_steps_and_ops_are_measured() -> None:
    cases, left_out = step.measure(
        [SHAPE], contenders(["temposae", "torch"], own=True), device="cuda", dtype="bf16", rounds=10
    )
    assert left_out == {}
    assert [case["provider"] for case in cases] == ["temposae", "torch", "temposae"]
    assert all(case["loss_falls"] for case in cases)
    assert all(case["ms"] > case["floor_ms"] for case in cases)
    assert all(case["peak_bytes"] > 12 * 2 * SHAPE.D * SHAPE.F for case in cases)  # weights and moments at least
    measured, left_out = ops.measure([SHAPE], device="cuda", dtype="bf16", repeats=3, seconds=1)
    assert left_out == {}
    assert [case["op"] for case in measured] == list(ops.OPS)


def test_tuning_times_an_entrys_kernels_alone() -> None:
    major, minor = torch.cuda.get_device_capability()
    (choice,) = tune.tune(10 * major + minor, ["merge"], SHAPE, "cuda", tune.kernel_ms, lambda entry, arch: "")
    assert choice.tried > 4
    assert 0 < choice.after_ms <= choice.before_ms < 1
    with pytest.raises(RuntimeError, match="none of adam_kernel ran"):
        tune.kernel_ms(tune.TRIALS["merge"].call(tune.Inputs(SHAPE, torch.bfloat16, "cuda")), {"adam_kernel"})


def test_stages_of_a_step_are_its_kernels(tmp_path: Path) -> None:
    found = run(SHAPE, device="cuda", dtype="bf16", steps=2, trace=tmp_path / "trace.json")
    stages = {row["stage"]: row for row in found["stages"]}
    assert sum(row["ms"] for row in stages.values()) <= 1.01 * found["step_ms"]
    assert found["idle_ms"] < found["step_ms"]
    assert {"encode", "encode_topk"} & stages.keys()
