"""The plan of `bench/gpu.sh`: what to run in the first ten minutes on a GPU, most telling first.

    python -m temposae.bench.gpu_plan [--dry-run] [--work FOLDER] [FOLDER]

Each step runs in processes of its own, with a limit in seconds and a limit for all of them, so a crash or a hang costs
one step. After every step FOLDER holds

    summary.txt   a line per step, per kernel of the smoke test and per failed test
    results.json  {seconds, compiled, steps: [{name, outcome, seconds, code, compiled, result}]}
    cases.json    all timed steps and ops in one file, for `temposae bench table`
    log.txt       everything that the steps print, as it arrives
    trace.json    of the profile, and configs.py if tuning found better settings, which the steps after it use

`compiled` counts kernels that were compiled, or that a GPU would compile in a dry run. A dry run goes through the whole
plan at toy size on a CPU, with Triton's interpreter. This module needs the standard library only, so it also runs where
torch is broken.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .process_pool import stop

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 560.0  # seconds for all steps
RESERVE = 20.0  # of those, for stopping the last step and for the table
DRY_FACTOR = 4  # how much longer a dry run may take
GRACE = 10.0  # seconds between SIGINT and SIGKILL, so that a step can still write what it has
SHORTEST = 5.0  # a step is skipped if less time is left
SHOWN = re.compile(r"(?:(?:PASS|FAIL|SKIP) |(?:smoke|tests|device|missing|copy|product): )")  # lines of steps
PEERS = (
    "eai-sparsify", "torch", "SAELens", "dictionary_learning", "torch.compile", "eai-sparsify, accelerated",
    "SAELens, accelerated", "dictionary_learning, accelerated",
)  # fmt: skip
TUNED = ("encode_topk", "encode_topk_persistent", "adam_rows", "reconstruct", "merge")  # entries of the config table
HOT_KERNELS = {"candidates": "encode_topk", "adam_rows": "adam_rows"}  # the hottest two, and ops that launch them
# arguments of a step, up to the number of latents
TOY = ("--device", "cpu", "--n", "16", "--d", "16", "--k", "1", "--f")
LARGE = ("--device", "cuda", "--n", "8192", "--d", "2304", "--k", "64", "--f")
SANITIZER = (
    "env", "TEMPOSAE_BACKEND=triton", "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
    "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9",
)  # fmt: skip
NCU = ("ncu", "--clock-control", "none", "--set", "full", "-c", "2", "-k")
TOY_TUNING = """
import sys
from temposae.bench import data, tune
launched = []
def timer(call, kernels):
    if not launched:
        launched.append(call())
    return 1.0
print(tune.summary(tune.tune(80, sys.argv[1:], data.Shape(16, 16, 128, 2), "cpu", timer, lambda entry, arch: "")))
"""


@dataclass(frozen=True)
class Step:
    """A command and the most seconds it may take. It is skipped if the program `needs` is missing.

    In the command, {json} is the file for its results, {out} the plan's folder, and {launches} a file of kernels that the
    interpreter ran.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    needs: str = ""


@dataclass
class Outcome:
    """What became of a step: done, failed, stopped, interrupted or skipped, and the result that it wrote, if any."""

    name: str
    outcome: str
    seconds: float = 0.0
    code: int | None = None
    detail: str = ""
    compiled: int = 0
    result: Any = None

    def __str__(self) -> str:
        if self.outcome == "skipped":
            return f"{self.name}: skipped, {self.detail}"
        code = f" with code {self.code}" if self.outcome == "failed" else ""
        compiled = f", {self.compiled} kernels compiled" if self.compiled else ""
        return f"{self.name}: {self.outcome}{code} after {self.seconds:.0f} s{compiled}"


def python(module: str, *arguments: str, launches: str | None = None) -> list[str]:
    """Run a module. `launches` is a file to which kernels that the interpreter runs are added."""
    recorder = ["temposae.bench.launches", launches] if launches else []
    return [sys.executable, "-m", *recorder, module, *arguments]


def plan(dry: bool = False) -> list[Step]:
    """The steps in their order. In a dry run, sizes are small and the seconds more."""
    shape = TOY if dry else LARGE
    size, narrow = (*shape, "128" if dry else "65536"), (*shape, "64" if dry else "2304")
    small = (*narrow, "--provider", "temposae") if dry else (*shape, "16384")
    rounds = ("--rounds", "1" if dry else "10")
    script = ("--library", "sparsify", "--n", "256", "--d", "16", "--f", "64", "--k", "4", "--steps", "5")
    scripts = script if dry else ("--steps", "20")
    mode = ("--dry-run", "--launches", "{launches}") if dry else ()

    def step(name: str, seconds: float, command: Iterable[str], needs: str = "") -> Step:
        return Step(name, DRY_FACTOR * seconds if dry else seconds, tuple(command), needs)

    def temposae(*arguments: str) -> list[str]:
        return python("temposae", *arguments, launches="{launches}" if dry else None)

    def bench(name: str, seconds: float, *arguments: str) -> Step:
        return step(name, seconds, temposae(*arguments, "--json", "{json}"))

    def race(name: str, seconds: float, provider: str, *arguments: str) -> Step:
        return bench(name, seconds, "bench", "step", *size, *rounds, "--provider", provider, *arguments)

    def tests(name: str, seconds: float, workers: int, *files: str) -> Step:
        paths = [f"tests/{file}.py" for file in files]
        count = str(1 if dry else workers)
        return step(name, seconds, python("temposae.bench.gpu_tests", "--workers", count, "--json", "{json}", *paths))

    def counters(kernel: str, op: str) -> Step:
        timed = temposae("bench", "ops", *size, "--op", op, "--repeats", "1")
        return step(f"ncu {kernel}", 30, (*NCU, f"regex:^{kernel}_kernel", *timed), needs="ncu")

    def tuning(entry: str) -> Step:
        if dry:
            return step(f"tune {entry}", 25, (sys.executable, "-c", TOY_TUNING, entry))
        return bench(f"tune {entry}", 25, "bench", "tune", "--entry", entry)

    checked = temposae("bench", "step", *shape[:2], *TOY[2:], "128", "--rounds", "1", "--provider", "temposae")
    return [
        step("ceilings", 25, python("temposae.bench.ceilings", "{json}")),
        step("smoke", 60, python("temposae.bench.gpu_smoke", *mode, "--workers", "2" if dry else "8", "--json", "{json}")),
        step("memcheck", 45, (*SANITIZER, *checked), needs="compute-sanitizer"),
        tests("kernel tests", 90, 8, "gpu/test_kernels_gpu"),
        race("headline", 40, "temposae"),
        race("headline, clipped", 30, "temposae", "--clip", "1"),
        bench("profile", 30, "profile", *size, "--steps", "1" if dry else "3", "--trace", "{out}/trace.json"),
        *(counters(kernel, op) for kernel, op in HOT_KERNELS.items()),
        bench("ops", 40, "bench", "ops", *((*narrow, "--op", "decode") if dry else size), "--repeats", "1" if dry else "20"),
        race("BatchTopK", 25, "temposae", "--activation", "batchtopk"),
        race("JumpReLU", 25, "temposae", "--activation", "jumprelu"),
        race("AuxK", 25, "temposae", "--auxk"),
        tests("limits", 45, 1, "gpu/test_limits_gpu"),  # a test may need most of the memory
        *(race(f"peer {peer}", 25, peer, "--own") for peer in PEERS),
        *map(tuning, TUNED),
        bench("small", 40, "bench", "step", *small, *rounds),
        bench("several", 25, "bench", "step", *narrow, *rounds, "--provider", "temposae",
              "--dictionaries", "2" if dry else "8"),
        bench("scripts", 60, "bench", "peers", *scripts, "--rounds", "1"),
        tests("other tests", 60, 8, "gpu/test_train_gpu", "bench/test_bench_gpu", "gpu/test_accelerate_gpu",
              "gpu/test_variants_gpu"),
    ]  # fmt: skip


def run(
    steps: Iterable[Step],
    out: Path,
    work: Path,
    *,
    seconds: float = BUDGET,
    environment: Mapping[str, str] = os.environ,
) -> list[Outcome]:
    """Run the steps in order and write the files of `out` after each one. `work` is a folder for temporary files.

    A step may take its own seconds or what is left of `seconds`. After an interrupt (SIGINT, SIGTERM) the others are
    skipped.
    """
    began, outcomes, interrupted = time.monotonic(), list[Outcome](), False
    environment = {**environment, "TRITON_CACHE_DIR": str(work / "triton")}
    for index, step in enumerate(steps):
        left = seconds - (time.monotonic() - began)
        if interrupted:
            outcome = Outcome(step.name, "skipped", detail="interrupted")
        elif left < SHORTEST:
            outcome = Outcome(step.name, "skipped", detail=f"{max(0.0, left):.0f} of {seconds:.0f} s left")
        elif step.needs and not shutil.which(step.needs):
            outcome = Outcome(step.name, "skipped", detail=f"{step.needs} is not installed")
        else:
            names = dict(json=str(work / f"{index}.json"), out=str(out), launches=str(work / "launches.jsonl"))
            outcome = _run_step(step, min(step.seconds, left), names, out, environment)
            outcome.compiled = _compiled(work) - sum(other.compiled for other in outcomes)
            outcome.result = read_result(Path(names["json"]))
            interrupted = outcome.outcome == "interrupted"
        outcomes.append(outcome)
        say(out, str(outcome))
        compiled = sum(outcome.compiled for outcome in outcomes)
        results = {"seconds": time.monotonic() - began, "compiled": compiled, "steps": [*map(asdict, outcomes)]}
        _write(out / "results.json", results)
        if cases := merged(outcome.result for outcome in outcomes):
            _write(out / "cases.json", cases)
    return outcomes


def say(out: Path, line: str) -> None:
    """Print a line and add it to the summary."""
    print(line, flush=True)
    with (out / "summary.txt").open("a") as file:
        file.write(line + "\n")


def _run_step(step: Step, limit: float, names: dict[str, str], out: Path, environment: Mapping[str, str]) -> Outcome:
    """Run a step in a session of its own, so that all its processes can be ended."""
    began = time.monotonic()
    command = [re.sub(r"\{(json|out|launches)\}", lambda match: names[match[1]], part) for part in step.command]
    with (out / "log.txt").open("a") as log, (out / "log.txt").open(errors="replace") as tail:
        log.write(f"== {step.name}: {' '.join(command)}\n")
        log.flush()
        tail.seek(0, os.SEEK_END)
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            log.write(f"{error}\n")
            return Outcome(step.name, "failed", code=127)
        outcome = "stopped"
        try:
            while time.monotonic() - began < limit:
                if process.poll() is not None:
                    outcome = "failed" if process.returncode else "done"
                    break
                _show(tail, out)
                time.sleep(0.1)
        except KeyboardInterrupt:
            outcome = "interrupted"
        stop([process], GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # processes that the step left behind
        _show(tail, out)
    return Outcome(step.name, outcome, time.monotonic() - began, process.returncode)


def _show(tail: Any, out: Path) -> None:
    """Print the new lines of a log that the summary holds too."""
    while True:
        position = tail.tell()
        line = tail.readline()
        if not line.endswith("\n"):  # the rest is still to come
            tail.seek(position)
            return
        if SHOWN.match(line):
            say(out, line.rstrip())


def _compiled(work: Path) -> int:
    """Kernels in Triton's cache, and kernels that a GPU would compile."""
    launches = work / "launches.jsonl"
    variants = set(launches.read_text().splitlines()) if launches.exists() else set[str]()
    return len(variants) + sum(1 for _ in (work / "triton").rglob("*.cubin"))


def add_line(path: str | Path | None, values: dict[str, Any]) -> None:
    """Append a line of JSON to a file, if one is given."""
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(values) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON, without one that was cut off when its process died."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def read_result(path: Path) -> Any:
    """The JSON of a file, or its lines of JSON. None without a file."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        return read_lines(path)


def merged(results: Iterable[Any]) -> dict[str, Any] | None:
    """All timed cases as one results file, or None if there are none."""
    records = [result for result in results if isinstance(result, dict) and result.get("cases")]
    if not records:
        return None
    cases = [case for record in records for case in record["cases"]]
    left_out = {name: reason for record in records for name, reason in record["left_out"].items()}
    return records[0] | {"left_out": left_out, "cases": cases}


def _write(path: Path, values: Any) -> None:
    """Write JSON atomically."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(values, indent=1) + "\n")
    fresh.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description="Run the plan of bench/gpu_plan.py.")
    parser.add_argument("folder", nargs="?", type=Path, help="results, default $OUT or bench-gpu")
    parser.add_argument("--dry-run", action="store_true", help="at toy size on a CPU, through Triton's interpreter")
    parser.add_argument("--work", type=Path, help="folder for temporary files")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="time for all steps, default %(default)s")
    options = parser.parse_args(arguments)
    out = (options.folder or Path(os.environ.get("OUT") or "bench-gpu")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("log.txt", "summary.txt", "results.json", "cases.json"):
        (out / name).unlink(missing_ok=True)
    chosen = ("TRITON_INTERPRET", "TEMPOSAE_BACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if options.dry_run:
        environment |= {"TRITON_INTERPRET": "1", "TEMPOSAE_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"TORCHDYNAMO_DISABLE": "1"}  # compiling for a CPU takes longer than all other steps of peers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # a shell's background and its children ignore SIGINT
    configs = ROOT / "kernels/configs.py"
    settings = configs.read_bytes()
    seconds = (options.seconds - RESERVE) * (DRY_FACTOR if options.dry_run else 1)
    try:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            outcomes = run(plan(options.dry_run), out, Path(folder), seconds=seconds, environment=environment)
    finally:
        if configs.read_bytes() != settings:  # tuning changed them
            shutil.copy(configs, out / "configs.py")
            configs.write_bytes(settings)
    if (out / "cases.json").exists():
        command = python("temposae", "bench", "table", str(out / "cases.json"))
        with contextlib.suppress(subprocess.TimeoutExpired):
            table = subprocess.run(
                command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=RESERVE - GRACE
            )
            say(out, table.stdout)
    say(out, f"compiled: {sum(outcome.compiled for outcome in outcomes)} distinct kernels")
    say(out, f"all results: {out}")
    return int(any(outcome.outcome in ("failed", "stopped", "interrupted") for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
