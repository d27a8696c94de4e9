"""Run GPU tests on several processes. A crash, a hang or a dead CUDA context costs one test, and the others go on.

    python -m temposae.bench.gpu_tests [--workers 8] [--json FILE] PATH ...

Tests of one function and dtype compile the same kernels, so they stay in one process. A process whose CUDA context is
dead leaves, and its other tests run in a new one. This module is also the pytest plugin of those processes.
"""

import argparse
import re
import signal
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from .gpu_plan import add_line, python, read_lines
from .process_pool import Ended, Job, run_jobs

SILENCE = 60.0  # seconds after which a test counts as hanging
PLUGIN = "temposae.bench.gpu_tests"
DEAD_CONTEXT = 3  # exit code of a process that leaves
POISON = re.compile(
    r"CUDA (driver )?error|illegal memory access|device-side assert|unspecified launch failure|misaligned address"
)
HARMLESS = re.compile(r"out of memory|out of resource|no kernel image|invalid argument|invalid configuration")

# --- the plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--events", help="append what happens to this file, one JSON object per line")


def pytest_collection_finish(session: pytest.Session) -> None:
    _note(session.config, collected=[item.nodeid for item in session.items])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    _note(item.config, began=item.nodeid)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call" or not report.passed:
        message = "" if report.passed or call.excinfo is None else call.excinfo.exconly().splitlines()[0][:300]
        _note(item.config, test=item.nodeid, outcome=report.outcome, seconds=report.duration, message=message)
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and poisons(report.longreprtext):
        pytest.exit("the CUDA context is dead", returncode=DEAD_CONTEXT)


def poisons(text: str) -> bool:
    """Whether an error leaves the CUDA context unusable."""
    return any(POISON.search(line) and not HARMLESS.search(line) for line in text.splitlines())


def _note(config: pytest.Config, **event: Any) -> None:
    add_line(config.getoption("--events"), event)


# --- the processes


def command(events: Path, arguments: Iterable[str]) -> list[str]:
    """Run pytest with this plugin on these files or tests."""
    options = ["-v", "-m", "gpu", "-p", "no:cacheprovider", "-p", PLUGIN, "--events", str(events)]
    return python("pytest", *options, *arguments)


def outcomes_of(events: list[dict[str, Any]], ended: Ended) -> dict[str, dict[str, Any]]:
    """What became of each test that began in a process. The last one may have killed it."""
    outcomes = {event["test"]: event for event in events if "test" in event}
    began = [event["began"] for event in events if "began" in event]
    if began and began[-1] not in outcomes:
        outcome, reason = "crashed", f"code {ended.code}"
        if ended.stopped:
            outcome, reason = "stopped", f"it printed nothing for {SILENCE:.0f} s, or the time was up"
        outcomes[began[-1]] = dict(test=began[-1], outcome=outcome, seconds=0.0, message=f"{outcome}: {reason}")
    return outcomes


def packed(tests: Iterable[str], bins: int) -> list[list[str]]:
    """Distribute tests over at most `bins` lists of similar length. Tests of one function and dtype stay together."""
    groups = defaultdict[tuple[str, str], list[str]](list)
    for test in tests:
        dtype = re.search(r"\b(bf16|bfloat16|fp16|fp32)\b", test.replace("_", " ").replace("-", " "))
        groups[test.partition("[")[0], dtype[1] if dtype else ""].append(test)
    lists: list[list[str]] = [[] for _ in range(bins)]
    for group in sorted(groups.values(), key=len, reverse=True):
        min(lists, key=len).extend(group)
    return [tests for tests in lists if tests]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m temposae.bench.gpu_tests", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files of tests")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--json", help="write the outcomes to this file, one JSON object per line")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background and its children ignore it
    counts, listed = Counter[str](), list[str]()

    def record(outcome: dict[str, Any]) -> None:
        counts[outcome["outcome"]] += 1
        if outcome["outcome"] not in ("passed", "skipped"):
            print(f"FAIL {outcome['test']}: {outcome['message'] or outcome['outcome']}", flush=True)
        add_line(options.json, outcome)

    def job(name: str, tests: list[str]) -> Job:
        return Job(name, command(Path(folder, name), tests), SILENCE)

    def on_listed(ended: Ended) -> list[Job]:
        listed.extend(test for event in read_lines(Path(folder, "list")) for test in event.get("collected", []))
        if not listed:
            print(ended.output)
        lists = packed(listed, 2 * options.workers - 1)  # so that a worker that is done early takes another
        return [job(f"tests-{i}", tests) for i, tests in enumerate(lists, 1)]

    def on_end(ended: Ended) -> list[Job]:
        if ended.job.name == "list":
            return on_listed(ended)
        events = read_lines(Path(folder, ended.job.name))
        collected = next((event["collected"] for event in events if "collected" in event), [])
        outcomes = outcomes_of(events, ended)
        for outcome in outcomes.values():
            record(outcome)
        print(f"-- {ended.job.name}\n{ended.output}", flush=True)
        if not outcomes:
            record(dict(test=ended.job.name, outcome="crashed", seconds=0.0, message=f"code {ended.code}, no tests"))
            return []
        left = [test for test in collected if test not in outcomes]
        return [job(f"{ended.job.name}+", left)] if left else []

    with tempfile.TemporaryDirectory() as folder:
        finished = run_jobs([job("list", ["--collect-only", "-q", *options.paths])], options.workers, on_end)
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    print(f"tests: {len(listed)} collected, {outcomes or 'none ran'}")
    return 0 if finished and listed and counts.keys() <= {"passed", "skipped"} else 1


if __name__ == "__main__":
    raise SystemExit(main())
