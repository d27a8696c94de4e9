"""Every op of the table runs, does what it is named after, and is set beside the right amount of work.

With pytest-benchmark: `pytest tests/bench/test_ops.py --benchmark-only`; on a GPU add `-m gpu`.
"""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from temposae.bench.data import DTYPES, HEADLINE, Shape
from temposae.bench.floors import KNOWN, rates_of
from temposae.bench.ops import OPS, Inputs, measure, work
from temposae.bench.timing import synchronise
from temposae.engine.errors import UserError
from temposae.kernels.code import SparseCode
from temposae.kernels.decode import cost as decode_cost

SHAPE = Shape(N=40, D=24, F=56, K=5)
every_op = pytest.mark.parametrize("name", OPS)
benchmarked = pytest.mark.skipif(find_spec("pytest_benchmark") is None, reason="needs pytest-benchmark")


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs(SHAPE, torch.float32, "cpu")


def dense(inputs: Inputs) -> torch.Tensor:
    """The K largest activations of each token, worked out without any op."""
    sae, x = inputs.sae, inputs.x
    acts = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()
    return acts * (acts >= acts.topk(SHAPE.K, dim=1).values[:, -1:])


def test_ops_do_what_they_are_named_after(inputs: Inputs, assert_close: Any) -> None:
    f, W_dec = dense(inputs), inputs.sae.W_dec.detach().clone()
    results = {name: op.call(inputs)() for name, op in OPS.items()}
    residual = inputs.x - f @ W_dec - inputs.sae.b_dec.detach()
    assert_close((results["encode"] * (f > 0)), f)
    assert_close(results["encode_topk"].to_dense(), f)
    assert_close(results["select_topk"].to_dense(), f)
    acts = results["encode"]
    assert_close(
        results["select_batch_topk"].to_dense(), acts * (acts >= acts.flatten().topk(SHAPE.K * SHAPE.N).values[-1])
    )
    assert torch.equal(results["encode_batch_topk"].to_dense() > 0, results["select_batch_topk"].to_dense() > 0)
    assert torch.equal(results["encode_threshold"].to_dense() > 0, results["select_threshold"].to_dense() > 0)
    kept = results["select_threshold"]
    assert 0.5 * SHAPE.K * SHAPE.N < int(kept.offsets[-1]) < 2 * SHAPE.K * SHAPE.N
    assert not kept.overflow
    assert_close(results["decode"], residual)
    assert_close(results["reconstruct"].residual, residual)
    assert_close(results["position_loss"].squared_error.sum(), residual.square().sum())
    assert_close(results["decode_values_grad"], (residual @ W_dec.T).gather(1, inputs.code.indices.long()))
    gradient = f.T @ residual
    assert_close(results["weight_grad"], gradient)
    tangent = gradient - (gradient * W_dec).sum(1, keepdim=True) * W_dec
    assert_close(results["row_norms"], tangent.square().sum(1))
    assert_close(results["adam_rows"], tangent)
    assert_close(inputs.sae.W_dec, W_dec)
    counts = (f > 0).sum(0).cumsum(0)
    for name in ("transpose", "sort_entries"):
        assert results[name].latent_offsets[1:].tolist() == counts.tolist()
    entries = results["entry_loss"]
    assert_close(entries.squared_error, residual.square().sum(1))
    assert_close(entries.dvalues, -2 / SHAPE.N * (residual @ W_dec.T).gather(1, inputs.code.indices.long()))


def test_objective_forward_and_backward_make_up_the_full_one(inputs: Inputs, assert_close: Any) -> None:
    forward, backward, full = (OPS[f"objective_{part}"].call(inputs)() for part in ("forward", "backward", "full"))
    f, sae = dense(inputs), inputs.sae
    x_hat = f @ sae.W_dec + sae.b_dec
    assert_close(forward, (inputs.x - x_hat).square().sum() / SHAPE.N)
    assert len(backward) == len(full) == 4
    for a, b in zip(backward, full, strict=True):
        assert_close(a, b)


@every_op
def test_calls_can_be_repeated(name: str, inputs: Inputs, assert_close: Any) -> None:
    call = OPS[name].call(inputs)

    def tensors(result: Any) -> list[torch.Tensor]:
        found = [result.values, result.indices] if isinstance(result, SparseCode) else result
        return [found] if isinstance(found, torch.Tensor) else [tensor for tensor in found if tensor is not None]

    first = [t.clone() for t in tensors(call())]
    for a, b in zip(first, tensors(call()), strict=True):
        assert_close(a, b, limit=1e-6)  # the decoder is divided by norms of 1 once more


def test_every_op_is_forward_or_backward_and_the_objective_is_both() -> None:
    directions = {name: op.direction for name, op in OPS.items()}
    assert set(directions.values()) == {"forward", "backward", "full"}
    for part in ("forward", "backward", "full"):
        assert directions[f"objective_{part}"] == part
    backward = {"decode_values_grad", "transpose", "weight_grad", "row_norms", "adam_rows", "objective_backward"}
    backward |= {"entry_loss", "sort_entries", "clip"}
    assert {name for name, direction in directions.items() if direction == "backward"} == backward


def test_work_of_known_ops() -> None:
    rates = KNOWN["H100"]
    n, d, f, k = HEADLINE
    encode = work("encode", HEADLINE, "bf16", "cpu", rates, backend="triton")
    assert encode.flops == 2 * n * d * f
    assert encode.bytes == 2 * (n * d + d * f + n * f)
    assert encode.floor_ms == pytest.approx(1e3 * 2 * n * d * f / 660e12)  # bound by arithmetic
    gradient = work("weight_grad", HEADLINE, "bf16", "cpu", rates, backend="triton")
    assert gradient.flops == 2 * n * k * d
    assert gradient.floor_ms == pytest.approx(1e3 * gradient.bytes / 3e12)  # bound by traffic
    assert work("encode", HEADLINE, "bf16", "cpu", rates).backend == "torch"


def test_backend_is_the_one_that_the_op_picks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an op asks its cost model, so does its row; elsewhere the device decides."""
    asked: list[tuple[str, float]] = []

    def why(name: str, *tensors: torch.Tensor, cost: Any) -> tuple[str, str]:
        asked.append((name, cost("torch").bytes if cost else 0))
        return "triton", "a test says so"

    monkeypatch.setattr("temposae.bench.ops.why", why)
    assert work("reconstruct", SHAPE, "bf16", "cpu", KNOWN["H100"]).backend == "triton"
    assert work("position_loss", SHAPE, "bf16", "cpu", KNOWN["H100"]).backend == "triton"
    n, d, f, k = SHAPE
    assert asked == [
        ("reconstruct", decode_cost(n, d, f, n * k, itemsize=2, backend="torch").bytes),
        ("position_loss", 0),
    ]


def test_parts_of_an_op_take_their_time_one_after_another() -> None:
    """Forward is bound by arithmetic in one part and by traffic in the next: together longer than either sum."""
    rates = KNOWN["H100"]
    forward, backward, full = (
        work(f"objective_{part}", HEADLINE, "bf16", "cpu", rates, backend="triton")
        for part in ("forward", "backward", "full")
    )
    assert full.floor_ms == pytest.approx(forward.floor_ms + backward.floor_ms)
    assert forward.floor_ms > 1.05 * 1e3 * max(forward.flops / 660e12, forward.bytes / 3e12)


def test_measure_reports_ops(made_up_rates: Any) -> None:
    names = ["encode", "weight_grad"]
    cases, left_out = measure([SHAPE], names, device="cpu", dtype="fp32", repeats=2)
    assert left_out == {}
    assert [case["op"] for case in cases] == names
    for case in cases:
        assert case.items() >= {**SHAPE._asdict(), "dtype": "fp32", "samples": 2, "provider": "temposae"}.items()
        assert 0 < case["ms_p20"] <= case["ms"] <= case["ms_p80"]
        assert case["floor_ms"] > 0
    made = {case["op"]: case["peak_bytes"] for case in cases}
    assert made["encode"] >= 4 * SHAPE.N * SHAPE.F  # its result at least
    assert made["weight_grad"] >= 4 * SHAPE.F * SHAPE.D


def test_a_shape_beyond_memory_is_left_out(made_up_rates: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("temposae.bench.ops.free_bytes", lambda device: 1000.0)
    cases, left_out = measure([SHAPE], ["encode"], device="cpu", dtype="fp32")
    assert cases == []
    assert list(left_out) == [f"encode at {SHAPE}"]
    assert "GiB" in left_out[f"encode at {SHAPE}"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(names=["encoed"]), ("op: 'encoed'", "did you mean encode")),
        (dict(dtype="fp8"), ("dtype: 'fp8'", "fp32, bf16, fp16")),
        (dict(repeats=0), ("repeats: 0", "at least 1")),
        (dict(shapes=[Shape(4, 4, 4, 5)]), ("K: 5", "at most F (4)")),
        (dict(shapes=[Shape(0, 4, 4, 4)]), ("N: 0", "at least 1")),
    ],
)
def test_measure_refuses(change: dict[str, Any], words: tuple[str, ...]) -> None:
    settings: dict[str, Any] = dict(shapes=[SHAPE], device="cpu", dtype="fp32") | change
    with pytest.raises(UserError) as error:
        measure(settings.pop("shapes"), **settings)
    assert all(word in str(error.value) for word in words), error.value


# --- for pytest-benchmark


def run_benchmark(name: str, shape: Shape, dtype: str, device: str, benchmark: Any) -> None:
    call = OPS[name].call(Inputs(shape, DTYPES[dtype], device))
    call()

    def timed() -> None:
        call()
        synchronise(device)

    found = work(name, shape, dtype, device, rates_of(device, DTYPES[dtype].itemsize))._asdict()
    benchmark(timed)
    if benchmark.stats:  # none where benchmarks are disabled, as beside other test workers
        found["percent_of_floor"] = found["floor_ms"] / (1e3 * benchmark.stats["median"]) * 100
    benchmark.extra_info.update(found)
    assert benchmark.extra_info["floor_ms"] > 0


@benchmarked
@pytest.mark.slow
@every_op
def test_benchmark(name: str, benchmark: Any) -> None:
    run_benchmark(name, Shape(1024, 768, 4096, 32), "fp32", "cpu", benchmark)


@benchmarked
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", [HEADLINE._replace(F=16384), HEADLINE], ids=str)
@every_op
def test_benchmark_gpu(name: str, shape: Shape, benchmark: Any) -> None:
    run_benchmark(name, shape, "bf16", "cuda", benchmark)
