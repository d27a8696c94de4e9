"""The plan for a GPU: isolated steps, budgets, results on disk, a dry run."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest
import typer
from temposae import cli
from temposae.bench import gpu_plan, gpu_smoke
from temposae.bench.gpu_plan import Outcome, Step, merged, plan, read_result
from temposae.bench.tune import TRIALS
from typer.core import TyperGroup

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
    outcomes = run(code("profiler", OK, needs="no-such-program"), code("shell", OK, needs="sh"))
    assert str(outcomes[0]) == "profiler: skipped, no-such-program is not installed"
    assert outcomes[1].outcome == "done"


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
    order += [
        "BatchTopK",
        "JumpReLU",
        "AuxK",
        "limits",
        "peer eai-sparsify",
        "peer SAELens",
        "tune encode_topk",
        "small",
    ]
    order += ["other tests"]
    assert [name for name in names if name in order] == order
    assert sum(step.seconds for step in plan()[:5]) < gpu_plan.BUDGET / 2


def test_what_explains_a_miss_runs_even_if_every_step_takes_its_limit() -> None:
    steps = plan()
    last = next(index for index, step in enumerate(steps) if step.name == "limits")
    assert sum(step.seconds for step in steps[: last + 1]) <= gpu_plan.BUDGET - gpu_plan.RESERVE


def test_all_gpu_tests_are_in_the_plan() -> None:
    paths = {argument for step in plan() for argument in step.command if argument.startswith("tests/")}
    assert paths >= {f"tests/gpu/{file.name}" for file in (ROOT / "tests/gpu").glob("test_*.py")}


def test_every_command_of_the_plan_is_understood() -> None:
    """Those for a GPU run nowhere else."""
    app = typer.main.get_command(cli.app)
    for step in plan():
        if "temposae" in step.command:
            command, arguments = app, list(step.command[step.command.index("temposae") + 1 :])
            while isinstance(command, TyperGroup):
                command = command.commands[arguments.pop(0)]
            command.make_context(step.name, arguments)


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


# --- the whole plan


def test_the_script_stands_in_for_an_installation(tmp_path: Path) -> None:
    """Parts are found by entry points, and bench/gpu.sh runs in a clone that nobody installed."""
    look = "import importlib.metadata as m, os, pathlib, sys; site = os.environ['PYTHONPATH'].split(':')[0]\n"
    look += "distribution, = m.Distribution.discover(name='temposae', path=[site])\n"
    look += (
        "print(distribution.version, *distribution.entry_points, pathlib.Path(site, 'temposae').resolve(), sys.argv)"
    )
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{look}" "$@"\n')
    interpreter.chmod(0o755)
    result = subprocess.run(
        ["bash", ROOT / "bench/gpu.sh", "x"],
        env=os.environ | {"PYTHON": str(interpreter)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    points = [point for point in entry_points(group="temposae.parts") if point.name == "temposae"]
    assert result.stdout.startswith(f"{version('temposae')} {points[0]} {ROOT} ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ceilings", "limits", "peer torch", "tune merge"])
def test_a_dry_step(name: str, run: Any) -> None:
    """One of each kind that no other test runs. `test_dry_run` runs all."""
    pytest.importorskip("triton")
    (outcome,) = run(*(step for step in plan(dry=True) if step.name == name), seconds=500)
    assert outcome.outcome == "done"
    assert outcome.result or name == "tune merge"


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
