"""Check every kernel against float64, each in a process of its own. Prints a line of PASS or FAIL per kernel and shape.

    python -m temposae.bench.gpu_smoke [--dry-run] [--workers 8] [--json FILE] [--launches FILE] [NAME ...]

The calls are those of kernels/<op>/bench.py: launches of every entry of the config table, and ops. Entries with one
call are one test. The kernel gets operands of the call's dtype, and the reference the same numbers in float64.
`--dry-run` uses a CPU, Triton's interpreter, toy shapes, float32, because the interpreter has no bfloat16 arithmetic, and
one process per worker, because importing torch takes longest. `--here` checks in this process.
"""

import argparse
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels.backend import decided, has_fp8, has_wgmma
from ..kernels.bench_types import POSITIONS, CallOf, Inputs
from ..kernels.code import SparseCode
from ..kernels.configs import CONFIGS
from .data import DTYPES, Shape
from .gpu_plan import add_line, python
from .op_benches import BENCHES
from .process_pool import Ended, Job, run_jobs
from .step import in_one_line
from .tune import in_effect

ALIGNED, RAGGED = Shape(N=256, D=2304, F=16384, K=16), Shape(N=251, D=1037, F=5003, K=5)
TOY_ALIGNED, TOY_RAGGED = Shape(N=16, D=16, F=128, K=2), Shape(N=19, D=27, F=90, K=1)
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # largest relative RMS error
REPEATS = 300  # calls on a GPU that must give the same bits; races between copies and products would show
SILENCE = 50.0  # seconds after which a check counts as hanging
LINE = re.compile(r"^(PASS|FAIL|SKIP) (\S+) (\S+) (\S+): (.*)$", re.MULTILINE)


def smoke_tests(dry: bool = False) -> dict[str, tuple[str, CallOf]]:
    """Dtype and call of each test. Its name joins the entries and ops that make the call. A dry run is in float32."""
    names: dict[tuple[str, CallOf], list[str]] = {}
    for bench in BENCHES:
        for entry, trial in bench.trials.items():
            call = turned_on(entry, trial.call) if "USE" in CONFIGS[90][entry] else trial.call
            names.setdefault(("fp32" if dry else trial.dtype, call), []).append(entry)
        for name, op in bench.ops.items():
            names.setdefault(("fp32" if dry else "bf16", op.call), []).append(name)
    return {"+".join(dict.fromkeys(entries)): test for test, entries in names.items()}


def turned_on(entry: str, call_of: CallOf) -> CallOf:
    """The call with a kernel for sm_90 that the config table leaves off."""

    def forced(inputs: Inputs) -> Callable[[], Any]:
        call, row = call_of(inputs), CONFIGS[90]

        def run() -> Any:
            with in_effect(90, row | {entry: row[entry] | {"USE": 1}}):
                return call()

        return run

    return forced


def operands(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Inputs, Inputs]:
    """The same random operands in `dtype` and in float64. The reference works out what precedes an op, in float64."""
    n, d, f, k = shape
    draw = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=device).to(dtype).float()

    x, W_enc, W_dec = normal(n, d), (normal(f, d) / d**0.5).to(dtype).float().T, normal(f, d)
    W_dec = torch.nn.functional.normalize(W_dec, dim=1).to(dtype).float()
    pos = torch.randint(POSITIONS, (n,), generator=draw, device=device)
    b_enc, b_dec = 0.1 * normal(f), 0.1 * normal(d)
    narrow = Inputs(x.to(dtype), pos, W_enc, b_enc, W_dec, b_dec, k)
    exact = Inputs(x.double(), pos, W_enc.double(), b_enc.double(), W_dec.double(), b_dec.double(), k)
    with decided("torch"):
        narrow.acts = exact.acts.to(dtype)
        exact.acts = narrow.acts.double()
        exact.code = narrow.code.with_values(narrow.code.values.double())
        exact.threshold = narrow.threshold.double()
        reconstruction = exact.reconstruction
        narrow.reconstruction = reconstruction._make(t if t is None else t.float() for t in reconstruction)
        narrow.reconstruction = narrow.reconstruction._replace(residual=reconstruction.residual.to(dtype))
        exact.reconstruction = reconstruction._make(t if t is None else t.double() for t in narrow.reconstruction)
    return narrow, exact


def result_of(call: Any) -> Any:
    """What a call returns, or its arguments if it updates them in place."""
    result = call()
    return call.args if result is None else result


def excess(result: Any, expected: Any, acts: Tensor, limit: float) -> float:
    """The largest error of a result, divided by its limit. NaN counts as infinite.

    Codes are compared by their sorted values and by the activations at their latents, because near ties may fall either
    way.
    """
    if isinstance(result, SparseCode):
        dense = result.to_dense().double()
        active, shape = dense != 0, (1, -1) if result.ragged else dense.shape
        ranked, expected_ranked = (code.reshape(shape).sort(1).values for code in (dense, expected.to_dense()))
        return max(excess(ranked, expected_ranked, acts, limit), excess(dense[active], acts[active], acts, limit))
    if isinstance(result, tuple | list):
        return max((excess(a, b, acts, limit) for a, b in zip(result, expected, strict=True)), default=0.0)
    if not isinstance(result, Tensor):
        return 0.0
    if result.shape != expected.shape:
        raise ValueError(f"shape {list(result.shape)} instead of {list(expected.shape)}")
    limit = max(limit, LIMITS.get(result.dtype, 0.0))
    result, expected = result.double(), expected.double()
    error = float((result - expected).norm() / expected.norm().clamp_min(1e-30))
    return error / limit if error == error else float("inf")


def tensors(result: Any) -> Iterator[Tensor]:
    """All tensors of a result."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, SparseCode):
        yield from tensors((result.live(result.values), result.live(result.indices), result.offsets))
    elif isinstance(result, tuple | list):
        for part in result:
            yield from tensors(part)


def check(call_of: CallOf, shape: Shape, dtype: torch.dtype, device: str, repeats: int) -> str:
    """Run a call with Triton, compare it, and return its error as a share of the limit.

    Raises ValueError if it is too large, and if one of `repeats` further calls on the same operands gives other bits.
    """
    narrow, exact = operands(shape, dtype, device)
    with decided("torch"):
        expected = result_of(call_of(exact))
    with decided("triton"):
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty holds NaN, which shows if unwritten
        result = result_of(call_of(narrow))
        torch.use_deterministic_algorithms(False)
        share = excess(result, expected, exact.acts, LIMITS[dtype])
        if share > 1:
            raise ValueError(f"the error is {share:.3g} of its limit")
        first = [t.clone() for t in tensors(result)]
        for repeat in range(repeats):
            if not all(map(torch.equal, first, tensors(result_of(call_of(narrow))))):
                raise ValueError(f"call {repeat + 2} gave other bits than the first")
    return f"{share:.2g} of the limit"


def check_shapes(name: str, dry: bool) -> bool:
    """Check one test at an aligned and a ragged shape, and print the lines. Returns whether all passed."""
    dtype_name, call_of = smoke_tests(dry)[name]
    device = "cpu" if dry else "cuda"
    passed = True
    for shape in (TOY_ALIGNED, TOY_RAGGED) if dry else (ALIGNED, RAGGED):
        began = time.monotonic()
        verdict = "SKIP"
        try:
            if "fp8" in name and not has_fp8(torch.device(device)):
                detail = "this GPU has no fp8"
            elif "persistent" in name and not dry and not has_wgmma(torch.device(device)):
                detail = "for sm_90"
            else:
                detail = check(call_of, shape, DTYPES[dtype_name], device, 1 if dry else REPEATS)
                verdict = "PASS"
        except Exception as error:
            verdict, detail, passed = "FAIL", in_one_line(error), False
        print(f"{verdict} {name} {dtype_name} {shape}: {detail}, {time.monotonic() - began:.1f} s", flush=True)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m temposae.bench.gpu_smoke", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default all")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--here", action="store_true", help="check in this process")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--json", help="write the verdicts to this file, one JSON object per line")
    parser.add_argument("--launches", help="add the kernels that the interpreter ran to this file")
    options = parser.parse_args()
    names, dry = options.names or list(smoke_tests(options.dry_run)), options.dry_run
    if options.here:
        passed = [check_shapes(name, dry) for name in names]
        return 0 if all(passed) else 1

    failed = 0

    def report(ended: Ended) -> list[Job]:
        nonlocal failed
        verdicts = LINE.findall(ended.output)
        last = (ended.output.strip().splitlines() or ["no output"])[-1]
        reason = f"hung for {SILENCE:.0f} s" if ended.stopped else f"ended with code {ended.code}: {last}"
        for name in ended.job.name.split():
            if sum(verdict[1] == name for verdict in verdicts) < 2:  # its process crashed or hung
                verdicts.append(("FAIL", name, "-", "-", reason))
        for verdict in verdicts:
            failed += verdict[0] == "FAIL"
            print("{} {} {} {}: {}".format(*verdict), flush=True)
            add_line(options.json, dict(zip(("verdict", "name", "dtype", "shape", "detail"), verdict, strict=True)))
        return []

    groups = [names[i :: options.workers] for i in range(options.workers)] if dry else [[name] for name in names]
    arguments = ("--here", "--dry-run") if dry else ("--here",)
    jobs = [
        Job(" ".join(group), python("temposae.bench.gpu_smoke", *arguments, *group, launches=options.launches), SILENCE)
        for group in groups
        if group
    ]
    finished = run_jobs(jobs, options.workers, report)
    print(f"smoke: {len(names)} kernels, {failed} failures")
    return 0 if finished and not failed else 1


if __name__ == "__main__":
    raise SystemExit(main())
