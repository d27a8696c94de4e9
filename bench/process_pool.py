"""Run commands several at a time. One that crashes, or prints nothing for too long, costs only itself."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

Process = subprocess.Popen[bytes]
GRACE = 5.0  # seconds between SIGINT, after which pytest prints its summary, and SIGKILL
POLL = 0.05


class Job(NamedTuple):
    """A command, and for how many seconds it may print nothing."""

    name: str
    command: list[str]
    silence: float


class Ended(NamedTuple):
    """A job's exit code (negative: the signal that killed it), what it printed, and whether it was stopped here."""

    job: Job
    code: int
    output: str
    stopped: bool


def stop(processes: Iterable[Process], grace: float) -> None:
    """Interrupt processes, and kill those that still run after `grace` seconds."""
    processes, deadline = list(processes), time.monotonic() + grace
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.wait()


def run_jobs(jobs: Iterable[Job], workers: int, on_end: Callable[[Ended], Iterable[Job]]) -> bool:
    """Run jobs in order, `workers` at a time. `on_end` returns further jobs, which come first.

    If interrupted, stops the running jobs, calls `on_end` for each, starts no others and returns False.
    """
    waiting, running = deque(jobs), dict[Process, tuple[Job, Path]]()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as folder:

        def start(job: Job) -> None:
            descriptor, log = tempfile.mkstemp(dir=folder)
            with open(descriptor, "wb") as file:
                process = subprocess.Popen(job.command, stdout=file, stderr=file, env=environment)
            running[process] = job, Path(log)

        def end(process: Process, stopped: bool) -> Iterable[Job]:
            job, log = running.pop(process)
            return on_end(Ended(job, process.returncode, log.read_text(errors="replace"), stopped))

        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    start(waiting.popleft())
                time.sleep(POLL)
                for process, (job, log) in list(running.items()):
                    silent = process.poll() is None and time.time() - log.stat().st_mtime > job.silence
                    if silent:
                        stop([process], GRACE)
                    if process.poll() is not None:
                        waiting.extendleft(reversed([*end(process, silent)]))
        except KeyboardInterrupt:
            stop(running, GRACE)
            for process in list(running):
                end(process, stopped=True)
            return False
    return True
