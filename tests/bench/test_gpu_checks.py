"""Smoke lines, GPU tests in several processes, and counts of kernels, without a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from temposae.bench import gpu_smoke, gpu_tests, process_pool
from temposae.bench.gpu_plan import python, read_lines
from temposae.bench.process_pool import Ended, Job, run_jobs
from temposae.kernels.backend import config_row
from temposae.kernels.configs import CONFIGS

# --- the pool


def test_a_silent_job_is_stopped_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_pool, "GRACE", 0.5)
    ends: list[Ended] = []

    def on_end(ended: Ended) -> list[Job]:
        ends.append(ended)
        return [python_job("again", "print(2)")] if ended.job.name == "crashes" else []

    def python_job(name: str, text: str, silence: float = 60) -> Job:
        return Job(name, [sys.executable, "-c", text], silence)

    jobs = [
        python_job("hangs", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)", silence=2),
        python_job("crashes", "import os; print(1, flush=True); os.abort()"),
        python_job("is fine", "print(3)"),
    ]
    assert run_jobs(jobs, 2, on_end)
    ended = {end.job.name: (end.code, end.stopped, end.output[:1]) for end in ends}
    assert ended == {
        "hangs": (-signal.SIGKILL, True, ""), "crashes": (-signal.SIGABRT, False, "1"),
        "again": (0, False, "2"), "is fine": (0, False, "3"),
    }  # fmt: skip


# --- the smoke test

NAME = "token_loss+position_sum+position_loss"


@pytest.fixture
def smoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """smoke(NAME) -> lines of the check in this process."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def check(name: str) -> list[tuple[str, ...]]:
        gpu_smoke.check_shapes(name, dry=True)
        text = capsys.readouterr().out
        lines = gpu_smoke.LINE.findall(text)
        assert len(lines) == len(text.splitlines())
        return lines

    return check


def test_every_entry_and_op_has_a_smoke_test() -> None:
    names = [name for test in gpu_smoke.smoke_tests() for name in test.split("+")]
    assert len(names) == len(set(names))
    assert set(names) >= CONFIGS[80].keys() | {"encode_threshold", "row_norms", "select_batch_topk"}
    assert all(" " not in test for test in gpu_smoke.smoke_tests())
    assert "encode_topk+merge+rescan" in gpu_smoke.smoke_tests()  # the same call is made once


def test_a_kernel_that_the_table_leaves_off_is_turned_on() -> None:
    used = lambda: config_row(90)["encode_topk_persistent"]["USE"]
    call = gpu_smoke.turned_on("encode_topk_persistent", lambda inputs: used)(cast(Any, None))
    assert (used(), call(), used()) == (0, 1, 0)
    assert "encode_topk_persistent" in gpu_smoke.smoke_tests()


def test_a_right_kernel_passes_at_both_shapes(smoke: Any) -> None:
    lines = smoke(NAME)
    assert [line[:4] for line in lines] == [
        ("PASS", NAME, "fp32", "N16-D16-F128-K2"), ("PASS", NAME, "fp32", "N19-D27-F90-K1"),
    ]  # fmt: skip
    assert all("of the limit" in line[4] for line in lines)


def test_a_wrong_kernel_fails(smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from temposae.kernels.loss import reference

    right = reference.position_loss
    monkeypatch.setattr(reference, "position_loss", lambda *args: tuple(1.001 * t for t in right(*args)))
    assert [line[0] for line in smoke(NAME)] == ["FAIL", "FAIL"]
    monkeypatch.setattr(reference, "position_loss", lambda *args: tuple(t * torch.nan for t in right(*args)))
    lines = smoke(NAME)
    assert [line[0] for line in lines] == ["FAIL", "FAIL"]
    assert "the error is inf of its limit" in lines[0][4]
    monkeypatch.setattr(reference, "position_loss", lambda *args: tuple(t[1:] for t in right(*args)))
    assert "shape" in smoke(NAME)[0][4]


def test_a_wrong_code_fails(smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from temposae.kernels.select import reference

    name = next(test for test in gpu_smoke.smoke_tests(dry=True) if "topk" in test.split("+"))
    right = reference.select_topk
    monkeypatch.setattr(reference, "select_topk", lambda acts, k: right(acts.roll(1, 0), k))
    assert [line[0] for line in smoke(name)] == ["FAIL", "FAIL"]
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert [line[0] for line in smoke(name)] == ["PASS", "PASS"]


def test_other_bits_at_a_second_call_fail() -> None:
    values = iter((1.0, 1.0, 1.000001))  # the reference, the first and the second call
    with pytest.raises(ValueError, match="call 2 gave other bits"):
        gpu_smoke.check(
            lambda inputs: lambda: torch.tensor([next(values)]), gpu_smoke.TOY_RAGGED, torch.float32, "cpu", repeats=1
        )


def test_updates_in_place_are_repeated_on_fresh_copies() -> None:
    gpu_smoke.check(
        lambda inputs: partial(torch.Tensor.mul_, inputs.master.clone(), 1.5), gpu_smoke.TOY_RAGGED, torch.float32, "cpu",
        repeats=2,
    )  # fmt: skip


@pytest.mark.parametrize("ending", ["crashes", "hangs"])
def test_a_kernel_whose_process_dies_fails(
    ending: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_smoke, "SILENCE", 2.0 if ending == "hangs" else 60.0)
    body = "import os, time; print('PASS one fp32 N1: fine', flush=True); "
    body += "time.sleep(60)" if ending == "hangs" else "os.abort()"
    monkeypatch.setattr(gpu_smoke, "python", lambda *args, launches: [sys.executable, "-c", body])
    monkeypatch.setattr(sys, "argv", ["gpu_smoke", "one", "--json", str(tmp_path / "smoke.json")])
    assert gpu_smoke.main() == 1
    reason = "hung for 2 s" if ending == "hangs" else "ended with code -6: PASS one fp32 N1: fine"
    assert capsys.readouterr().out.splitlines() == [
        "PASS one fp32 N1: fine", f"FAIL one - -: {reason}", "smoke: 1 kernels, 1 failures",
    ]  # fmt: skip
    assert [line["verdict"] for line in read_lines(tmp_path / "smoke.json")] == ["PASS", "FAIL"]


# --- kernels that are compiled


def test_launches_are_counted_by_kernel_constants_and_dtypes() -> None:
    pytest.importorskip("triton")
    from temposae.bench.launches import recorded
    from temposae.kernels.loss import position_loss

    def loss(n: int, dtype: torch.dtype) -> None:
        position_loss(torch.ones(n, 16), torch.ones(n, 16, dtype=dtype), torch.zeros(n).long(), 4, backend="triton")

    variants: set[str] = set()
    with recorded(variants):
        loss(8, torch.float32)
        first = set(variants)
        loss(8, torch.float32)
        assert variants == first
        loss(8, torch.float16)
    assert {json.loads(variant)["kernel"] for variant in first} == {"token_loss_kernel", "position_sum_kernel"}
    assert [json.loads(variant)["kernel"] for variant in variants - first] == ["token_loss_kernel"]
    loss(1, torch.float32)  # no longer recorded
    assert len(variants) == 3


# --- tests in several processes

MADE_UP = """
import os
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["good", "crash", "dead", "bad", "last"])
def test_one(kind):
    if kind == "crash":
        os._exit(9)
    if kind == "dead":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert kind != "bad"

@pytest.mark.gpu
def test_two():
    pytest.skip("no reason")

def test_without_the_mark():
    pass
"""


def started(folder: Path, tests: str) -> subprocess.Popen[str]:
    """Start `gpu_tests` on a file of tests in `folder`. It writes tests.json."""
    (folder / "test_made_up.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: needs a GPU\n")
    command = python("temposae.bench.gpu_tests", "--workers", "2", "--json", "tests.json", "test_made_up.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_test_that_kills_its_process_costs_only_itself(tmp_path: Path) -> None:
    process = started(tmp_path, MADE_UP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    lines = read_lines(tmp_path / "tests.json")
    outcomes = {line["test"].partition("::test_")[2]: line["outcome"] for line in lines}
    assert outcomes == {
        "one[good]": "passed", "one[crash]": "crashed", "one[dead]": "failed", "one[bad]": "failed",
        "one[last]": "passed", "two": "skipped",
    }  # fmt: skip
    assert len(lines) == 6
    text = output.splitlines()
    assert "FAIL test_made_up.py::test_one[crash]: crashed: code 9" in text
    assert text[-1] == "tests: 6 collected, 1 crashed, 2 failed, 2 passed, 1 skipped"
    assert "the CUDA context is dead" in output


def test_an_interrupt_keeps_the_outcomes(tmp_path: Path) -> None:
    sleep = "import time, pytest\n@pytest.mark.gpu\ndef test_quick(): pass\n@pytest.mark.gpu\ndef test_slow():\n"
    sleep += "    open('began', 'w').close()\n    time.sleep(60)\n"
    process = started(tmp_path, sleep)
    while not (tmp_path / "began").exists() or not read_lines(tmp_path / "tests.json"):  # one has ended, one runs
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    outcomes = {line["test"].partition("::test_")[2]: line["outcome"] for line in read_lines(tmp_path / "tests.json")}
    assert outcomes == {"quick": "passed", "slow": "stopped"}
    assert "KeyboardInterrupt" in output  # pytest said where
    assert output.splitlines()[-1] == "tests: 2 collected, 1 passed, 1 stopped"


def test_tests_of_a_function_and_dtype_stay_together() -> None:
    tests = [f"a.py::test_{name}[{n}-{dtype}]" for name in "xyz" for n in range(3) for dtype in ("fp32", "bf16")]
    lists = gpu_tests.packed(tests, 4)
    assert sorted(test for tests in lists for test in tests) == sorted(tests)
    assert [len(tests) for tests in lists] == [6, 6, 3, 3]
    for name in "xyz":
        for dtype in ("fp32", "bf16"):
            assert sum(any(f"_{name}[" in test and dtype in test for test in tests) for tests in lists) == 1
    assert gpu_tests.packed(["a.py::test_x"], 4) == [["a.py::test_x"]]


def test_errors_that_leave_a_dead_context() -> None:
    assert gpu_tests.poisons("E  RuntimeError: CUDA error: an illegal memory access was encountered")
    assert gpu_tests.poisons("RuntimeError: Triton Error [CUDA]: misaligned address")
    assert not gpu_tests.poisons("AssertionError: output: error 3e-2")
    assert not gpu_tests.poisons("RuntimeError: CUDA error: out of memory")
