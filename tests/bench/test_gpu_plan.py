"""The plan for a GPU: isolated steps, budgets, results on disk, smoke lines, several processes of tests, a dry run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from temposae.bench import gpu_plan, gpu_smoke, gpu_tests, process_pool
from temposae.bench.gpu_plan import Outcome, Step, merged, plan, read_result
from temposae.bench.process_pool import Ended, Job, run_jobs
from temposae.bench.tune import TRIALS
from temposae.kernels.configs import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
OK = "import sys; open(sys.argv[1], 'w').write('{\"value\": 1}')"


def code(name: str, text: str, seconds: float = 60.0, **settings: Any) -> Step:
    """A step that runs Python code. Its arguments are {json} and {out}."""
    return Step(name, seconds, (sys.executable, "-c", text, "{json}", "{out}"), **settings)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """run(*steps, seconds=60) -> outcomes; files are in tmp_path / "out"."""
    monkeypatch.setattr(gpu_plan, "GRACE", 1.0)
    for name in ("out", "work"):
        (tmp_path / name).mkdir()

    def run_steps(*steps: Step, seconds: float = 60.0) -> list[Outcome]:
        return gpu_plan.run(steps, tmp_path / "out", tmp_path / "work", seconds=seconds)

    return run_steps


# --- steps


def test_a_step_that_goes_wrong_costs_only_itself(run: Any, tmp_path: Path) -> None:
    kill = "import os, signal; os.kill(os.getpid(), signal.{})"
    outcomes = run(
        code("first", OK),
        code("raises", "raise SystemExit(3)"),
        code("crashes", kill.format("SIGSEGV")),
        code("is interrupted", kill.format("SIGINT")),
        code("hangs", "import time; time.sleep(60)", seconds=1),
        code("ignores signals", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)", seconds=1),
        Step("is missing", 10, ("/no/such/program",)),
        code("last", OK),
    )
    assert [(o.name, o.outcome) for o in outcomes] == [
        ("first", "done"), ("raises", "failed"), ("crashes", "failed"), ("is interrupted", "failed"),
        ("hangs", "stopped"), ("ignores signals", "stopped"), ("is missing", "failed"), ("last", "done"),
    ]  # fmt: skip
    assert [o.code for o in outcomes[1:3]] == [3, -signal.SIGSEGV]
    assert outcomes[5].code == -signal.SIGKILL
    assert outcomes[0].result == outcomes[-1].result == {"value": 1}
    written = json.loads((tmp_path / "out/results.json").read_text())["steps"]
    assert [step["outcome"] for step in written] == [o.outcome for o in outcomes]
    summary = (tmp_path / "out/summary.txt").read_text().splitlines()
    assert summary[2].startswith("crashes: failed with code -11 after ")


def test_results_are_on_disk_after_each_step(run: Any) -> None:
    look = "import shutil, sys; shutil.copy(sys.argv[2] + '/results.json', sys.argv[1])"
    *_, last = run(code("first", OK), code("crashes", "import os; os.abort()"), code("looks", look))
    steps = [(step["name"], step["result"]) for step in last.result["steps"]]
    assert steps == [("first", {"value": 1}), ("crashes", None)]


def test_what_a_stopped_step_wrote_is_kept(run: Any) -> None:
    lines = 'import sys, time; open(sys.argv[1], "w").write(\'{"a": 1}\\n{"a": 2}\\n{"a"\'); time.sleep(60)'
    (outcome,) = run(code("writes lines", lines, seconds=2))
    assert (outcome.outcome, outcome.result) == ("stopped", [{"a": 1}, {"a": 2}])


def test_processes_that_a_step_leaves_behind_are_ended(run: Any) -> None:
    leave = (
        "import json, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "json.dump(child.pid, open(sys.argv[1], 'w'))"
    )
    (outcome,) = run(code("leaves", leave))
    assert outcome.outcome == "done"
    status = Path(f"/proc/{outcome.result}/status")
    deadline = time.monotonic() + 10
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_when_the_time_is_spent_later_steps_are_skipped(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_plan, "SHORTEST", 0.5)
    outcomes = run(code("long", "import time; time.sleep(60)"), code("a", OK), code("b", OK), seconds=1.5)
    assert [o.outcome for o in outcomes] == ["stopped", "skipped", "skipped"]
    assert str(outcomes[1]) == "a: skipped, 0 of 2 s left"


def test_a_step_whose_program_is_missing_is_skipped(run: Any) -> None:
    outcomes = run(code("profiler", OK, needs="no-such-program"), code("package", OK, needs="json"))
    assert [str(o).partition(" in ")[0] for o in outcomes] == [
        "profiler: skipped, no-such-program is not installed", "package: done",
    ]  # fmt: skip


def test_lines_of_a_step_are_shown_and_its_output_is_logged(run: Any, tmp_path: Path) -> None:
    run(code("prints", "print('PASS decode bf16 N1: fine'); print('PASSED'); print('tests: 3 passed')"))
    summary = (tmp_path / "out/summary.txt").read_text().splitlines()
    assert summary[:2] == ["PASS decode bf16 N1: fine", "tests: 3 passed"]
    assert "PASSED\n" in (tmp_path / "out/log.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_an_interrupt_the_results_stand(tmp_path: Path, number: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from temposae.bench import gpu_plan\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "here = Path(sys.argv[1])\n"
        "sleep = 'import sys, time; print(\"tests: sleeping\", flush=True); time.sleep(60)'\n"
        "steps = [gpu_plan.Step(name, 60, (sys.executable, '-c', text)) for name, text in\n"
        "         (('first', ''), ('second', sleep), ('third', ''))]\n"
        "gpu_plan.run(steps, here, here)\n"
    )
    process = subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "sleeping" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=30)
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert [step["outcome"] for step in steps] == ["done", "interrupted", "skipped"]


# --- the plan


def test_the_most_telling_steps_come_first() -> None:
    names = [step.name for step in plan()]
    assert len(set(names)) == len(names)
    assert names[:4] == ["ceilings", "smoke", "memcheck", "kernel tests"]
    order = ["headline", "headline, clipped", "profile", "ncu candidates", "ncu adam_rows", "ops"]
    order += ["activations", "AuxK", "peer eai-sparsify", "peer SAELens", "tune encode_topk", "small", "other tests"]
    assert [name for name in names if name in order] == order
    assert sum(step.seconds for step in plan()[:5]) < gpu_plan.BUDGET / 2


def test_each_peer_has_a_process_of_its_own() -> None:
    from temposae.bench.providers import PROVIDERS

    peers = [step.command for step in plan() if step.name.startswith("peer ")]
    assert {command[command.index("--provider") + 1] for command in peers} == PROVIDERS.keys() - {"temposae"}
    assert all(command.count("--provider") == 1 for command in peers)


def test_a_dry_run_has_the_same_steps_on_a_cpu() -> None:
    assert [step.name for step in plan(dry=True)] == [step.name for step in plan()]
    assert not any("cuda" in argument for step in plan(dry=True) for argument in step.command)
    files = [argument for step in plan() for argument in step.command if argument.startswith("tests/")]
    assert files
    assert all((ROOT / file).is_file() for file in files)
    assert set(gpu_plan.TUNED) <= TRIALS.keys()
    assert {f"{kernel}_kernel" for kernel in gpu_plan.HOT_KERNELS} == {"candidates_kernel", "adam_rows_kernel"}


def test_the_plan_needs_no_packages() -> None:
    """A broken torch costs steps, not the plan."""
    text = "import sys, temposae.bench.gpu_plan; print([n for n in ('torch', 'numpy', 'pydantic') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_timed_cases_are_merged_and_other_results_left_out() -> None:
    assert merged([None, [1], {"device": "x"}]) is None
    records = [{"device": "a", "cases": [1], "left_out": {}}, None, {"cases": [2, 3], "left_out": {"x": "y"}}]
    assert merged(records) == {"device": "a", "cases": [1, 2, 3], "left_out": {"x": "y"}}


def test_results_are_json_or_lines_of_it(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert read_result(path) is None
    for text, expected in (('{"a": 1}', {"a": 1}), ('{"a": 1}\n{"b', [{"a": 1}]), ("", [])):
        path.write_text(text)
        assert read_result(path) == expected


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
    run_jobs(jobs, 2, on_end)
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


def test_a_right_kernel_passes_at_both_shapes(smoke: Any) -> None:
    lines = smoke(NAME)
    assert [line[:4] for line in lines] == [
        ("PASS", NAME, "fp32", "N16-D16-F256-K2"), ("PASS", NAME, "fp32", "N19-D27-F150-K1"),
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
    assert [line["verdict"] for line in read_result(tmp_path / "smoke.json")] == ["PASS", "FAIL"]


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


def test_a_test_that_kills_its_process_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "test_made_up.py").write_text(MADE_UP)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: needs a GPU\n")
    command = gpu_plan.python("temposae.bench.gpu_tests", "--workers", "2", "--json", "tests.json", "test_made_up.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    lines = read_result(tmp_path / "tests.json")
    outcomes = {line["test"].partition("::test_")[2]: line["outcome"] for line in lines}
    assert outcomes == {
        "one[good]": "passed", "one[crash]": "crashed", "one[dead]": "failed", "one[bad]": "failed",
        "one[last]": "passed", "two": "skipped",
    }  # fmt: skip
    assert len(lines) == 6
    text = result.stdout.splitlines()
    assert "FAIL test_made_up.py::test_one[crash]: crashed: code 9" in text
    assert text[-1] == "tests: 6 collected, 1 crashed, 2 failed, 2 passed, 1 skipped"
    assert "the CUDA context is dead" in result.stdout


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


# --- the whole plan


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"PYTHON": sys.executable}
    environment.pop("TRITON_INTERPRET", None)
    command = ["bash", ROOT / "bench/gpu.sh", "--dry-run", tmp_path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    log = (tmp_path / "log.txt").read_text()
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\n{log[-5000:]}"
    results = json.loads((tmp_path / "results.json").read_text())
    outcomes = {step["name"]: step["outcome"] for step in results["steps"]}
    assert list(outcomes) == [step.name for step in plan()]
    optional = {step.name for step in plan() if step.needs}
    assert {name for name, outcome in outcomes.items() if outcome != "done"} <= optional
    verdicts = next(step["result"] for step in results["steps"] if step["name"] == "smoke")
    assert {line["verdict"] for line in verdicts} == {"PASS"}
    assert len(verdicts) == 2 * len(gpu_smoke.smoke_tests(dry=True))
    assert results["compiled"] > 30
    assert "A training step" in (tmp_path / "summary.txt").read_text()
