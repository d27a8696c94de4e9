"""The performance model: its arithmetic on kernels made up here, and its use of the compiled ones."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from temposae.bench import aot, model, sass
from temposae.bench.data import HEADLINE
from temposae.bench.floors import Rates, card_named, step_floors
from temposae.bench.gpus import GPUS, SMS, Gpu
from temposae.bench.op_benches import BENCHES
from temposae.kernels.backend import config_row
from temposae.kernels.bench_types import Launch, Step

ROOT = Path(__file__).resolve().parents[2]
# 10 multiprocessors at 1 GHz; 1 TFLOP/s, 1 TB/s and 2 TB/s, tiles 4 TB/s; a load takes 1 us
ROUND = Gpu(90, 10, 1e9, Rates("round numbers", {2: 1e12}, 1e12, 2e12, "a test"), 4e12, 1e-6)


def kernel(instructions: int = 100, in_loop: int = 0, **changes: Any) -> aot.Compiled:
    """A kernel of 4 warps of MOV instructions, the last `in_loop` of which are a loop "f.i"."""
    code = sass.Code(
        dict.fromkeys(range(instructions), "MOV"),
        [sass.Loop("f.i", instructions - in_loop, instructions - 1)] if in_loop else [],
    )
    whole = aot.Compiled(32, 0, 0, 4, code, 0, "9.9")
    return whole._replace(**changes)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch):
    def use(made_up: aot.Compiled) -> None:
        monkeypatch.setattr(aot, "compiled", lambda name, arch, settings=None: made_up)

    return use


def test_ctas_by_registers_shared_memory_and_warps() -> None:
    assert kernel().ctas_per_sm(90) == 16  # 64 warps
    assert kernel(registers=128, warps=8).ctas_per_sm(90) == 2
    assert kernel(registers=129, warps=8).ctas_per_sm(90) == 1  # registers are allocated by 8
    assert kernel(shared_bytes=98304).ctas_per_sm(90) == 2
    assert kernel(shared_bytes=98304).ctas_per_sm(80) == 1
    assert kernel(registers=32, warps=1).ctas_per_sm(90) == SMS[90].ctas
    assert kernel(registers=255, warps=16).ctas_per_sm(90) == 1


@pytest.mark.parametrize(
    ("launch", "bound", "ms"),
    [
        (Launch("encode", "torch", dram=1e9), "DRAM", 1.0),
        (Launch("encode", "torch", l2=4e9), "L2", 1.0),
        (Launch("encode", "torch", gathered=4e9), "L2", 2.0),
        (Launch("encode", "torch", tensor_flops=3e9), "tensor cores", 3.0),
    ],
)
def test_one_resource(launch: Launch, bound: str, ms: float) -> None:
    found = model.time_launch(launch, ROUND)
    assert found["bound"] == bound
    assert found["ms"] == pytest.approx(ms + 1e3 * model.LAUNCH_S)
    assert found["ctas_per_sm"] is None
    assert found["l2_bytes"] == launch.l2 + launch.gathered


def test_resources_overlap_imperfectly() -> None:
    both = Launch("encode", "torch", dram=1e9, tensor_flops=1e9)
    found = model.time_launch(both, ROUND)["ms"]
    assert 1.1 < found < 1.3  # more than the longer, less than the sum
    assert model.time_launch(both._replace(tensor_flops=1e7), ROUND)["ms"] == pytest.approx(1.0, rel=0.01)


def test_instructions_are_those_of_the_code_times_the_trips(compiled) -> None:
    compiled(kernel(100, in_loop=60))
    launch = Launch("encode", "k", programs=160_000, trips={"f.i": 11})
    found = model.time_launch(launch, ROUND)
    # 16,000 programs on each multiprocessor, with one warp for each scheduler
    assert found["issue_cycles"] == 16_000 * (40 + 11 * 60)
    assert found["ms"] == pytest.approx(11.2, rel=0.01)
    assert (found["bound"], found["ctas_per_sm"], found["unknown_loops"]) == ("instructions", 16, [])
    assert model.time_launch(launch._replace(launches=3), ROUND)["issue_cycles"] == 3 * found["issue_cycles"]
    assert model.time_launch(launch._replace(trips={}), ROUND)["unknown_loops"] == ["f.i"]
    # few warps cannot issue in every cycle
    compiled(kernel(100, in_loop=60, registers=255))
    slow = model.time_launch(launch, ROUND)
    assert slow["ctas_per_sm"] == 2
    assert slow["ms"] == pytest.approx(found["ms"] * model.ISSUE_GAP / 2, rel=0.01)


def test_an_only_cta_overlaps_nothing_with_its_epilogue(compiled) -> None:
    launch = Launch("encode", "k", programs=100_000, trips={"f.i": 10}, tensor_flops=1e12)
    times = {}
    for registers in (128, 255):
        compiled(kernel(1000, in_loop=10, warps=8, registers=registers))
        times[registers] = model.time_launch(launch, ROUND)["ms"]
    clock = ROUND.tensor_clock
    assert clock == pytest.approx(1e12 / 10 / 4096)
    epilogue = 1e3 * 10_000 * 2 * 990 / clock * model.ISSUE_GAP / 2
    assert times[255] - 1000 == pytest.approx(epilogue, rel=0.01)
    assert times[128] < times[255] - epilogue / 2


def test_waiting_programs(compiled) -> None:
    compiled(kernel(registers=255))  # two CTAs on a multiprocessor
    rounds = Launch("encode", "k", programs=20_000, waits=3)
    assert model.time_launch(rounds, ROUND)["bound"] == "latency"
    assert model.time_launch(rounds, ROUND)["ms"] == pytest.approx(3.0, rel=0.02)
    slowest = rounds._replace(programs=1, waits=1, longest=500)
    assert model.time_launch(slowest, ROUND)["ms"] == pytest.approx(0.5, rel=0.02)
    last_round = rounds._replace(programs=21)  # leaves multiprocessors idle
    assert model.time_launch(last_round, ROUND)["ms"] - 1e3 * model.LAUNCH_S == pytest.approx(2 * 3e-3, rel=0.1)


@pytest.mark.parametrize("mode", model.MODES)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_launches_name_kernels_that_are_compiled(arch: int, mode: str) -> None:
    step = Step(*HEADLINE, config=config_row(arch), **model.MODES[mode])
    launches = [launch for bench in BENCHES for launch in bench.launches(step)]
    assert {launch.name for launch in launches if launch.programs} <= set(aot.SPECS)
    assert all(launch.name.startswith("torch: ") for launch in launches if not launch.programs)
    assert {launch.stage for launch in launches} - {"aux"} == {"encode", "decode", "loss", "sort", "update"}
    # the product and the state of Adam, which are most of the step
    n, d, f, _ = HEADLINE
    assert 1 <= sum(launch.tensor_flops for launch in launches) / (2 * n * d * f) < 1.1
    assert sum(launch.dram for launch in launches) > 26 * 2 * d * f


def test_measured_results_stand_beside_the_prediction() -> None:
    row = {"stages": [{"stage": "encode", "ms": 5.0}], "ms": 10.0, "floor_ms": 8.0}
    predictions = {"H100": dict(row) | {"modes": {mode: dict(row) for mode in model.MODES}}}
    case = dict(zip("NDFK", HEADLINE, strict=True)) | dict(provider="temposae", op="train_step", dtype="bf16", ms=12.0)
    cases = [
        case | {"settings": "own", "ms": 99.0},
        case,
        case | {"clip": 1.0, "ms": 15.0},
        case | {"activation": "batchtopk", "ms": 14.0},
        case | {"auxk": 1152, "ms": 99.0},  # not the default
        case | {"F": 4096, "ms": 99.0},
        case | {"op": "encode_topk", "ms": 6.0},
    ]
    model.add_measured(
        predictions, [{"device": "NVIDIA H100 80GB HBM3", "cases": cases}, {"device": "CPU", "cases": cases}]
    )
    found = predictions["H100"]
    assert (found["measured_ms"], found["measured_ratio"]) == (12.0, 1.2)
    measured = {mode: row.get("measured_ms") for mode, row in found["modes"].items()}
    assert measured == {"topk": 12.0, "topk, clipped": 15.0, "topk, AuxK": None, "batchtopk": 14.0, "jumprelu": None}
    assert found["measured_stages"]["encode"] == {"measured_ms": 6.0, "measured_ratio": 1.2}


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_names_of_devices(device: str, name: str | None) -> None:
    assert card_named(device, GPUS) == name


def run(*command: str) -> str:
    """In a process of its own, because this one interprets kernels instead of compiling them."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_prediction_of_the_headline_step() -> None:
    script = "import json; from temposae.bench import model; print(json.dumps(model.headline(['H200'])))"
    found = json.loads(run("-c", script))["H200"]
    rates = GPUS["H200"].rates
    assert (
        found["ms"] > found["floor_ms"]
    )  # with AuxK, floors count gathers as cache misses, and predictions may be below
    for row in found["modes"].values():
        assert row["ms"] == pytest.approx(sum(stage["ms"] for stage in row["stages"]))
        assert row["ms"] < 4 * row["floor_ms"]
        assert row["ms"] > 1e3 * sum(
            max(stage["dram_bytes"] / rates.bytes_per_s, stage["tensor_flops"] / rates.flops[2])
            for stage in row["stages"]
        )
        assert [loop for stage in row["stages"] for loop in stage["unknown_loops"]] == []  # a formula lacks its trips
    assert found["floor_ms"] == pytest.approx(step_floors(*HEADLINE, rates=GPUS["H200"].rates).fused)
    keys = {"name", "dram_bytes", "l2_bytes", "tensor_flops", "issue_cycles", "ctas_per_sm", "ms"}
    assert all(stage.keys() >= keys for stage in found["stages"])
    candidates = next(stage for stage in found["stages"] if stage["name"].startswith("candidates"))
    assert candidates["issue_cycles"] > 0
    assert found["modes"]["topk, clipped"]["ms"] > found["ms"]


def test_the_documents_table_of_published_measurements() -> None:
    """The model's side is worked out again; a compiler of another version may move a digit, so it is compared within 5%."""
    block = re.search(
        r"<!-- published -->\n(.*?)\n*<!-- end of table -->", (ROOT / "docs/bench.md").read_text(), re.DOTALL
    )
    assert block is not None
    rows = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
        for text in (block[1], run("-m", "temposae.bench.published"))
    ]
    documented, computed = rows
    assert [row[:3] + row[5:] for row in documented] == [row[:3] + row[5:] for row in computed]
    for before, now in zip(documented[2:], computed[2:], strict=True):
        assert float(before[4]) == pytest.approx(float(now[4]), rel=0.05)
        assert 0.5 < float(now[4]) < 1.5, f"{now[0]}, {now[1]}: the model is far from what was measured"
