"""Compile every Triton kernel ahead of time, without a GPU, and read registers, spills and tensor-core use off the binary.

`python -m temposae.bench.aot` prints a table, with `--json` the same as JSON. Needs Triton, and TRITON_INTERPRET unset.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..kernels.backend import config_row
from ..kernels.bench_types import Spec
from .op_benches import BENCHES

ARCHS = (80, 90, 100)
# scalar arguments that are not integers
FLOATS = ("threshold", "sharpness", "beta1", "beta2", "new1", "new2", "eps")
# mma.sync (on all others as well), wgmma (half precision and fp8) and tcgen05, as the disassembler spells them
TENSOR_CORE = {80: r"\bHMMA\.", 90: r"\b[HQ]GMMA\.", 100: r"\bUTC\w*MMA\b"}


SPECS = {
    f"{name} {dtype}": spec
    for dtype in ("bf16", "fp32")
    for bench in BENCHES
    for name, spec in bench.specs(dtype).items()
} | {name: spec for bench in BENCHES for name, spec in bench.fixed_specs.items()}


def report(archs: Sequence[int] = ARCHS, names: Sequence[str] = tuple(SPECS)) -> list[dict[str, Any]]:
    """Compile the kernels `names` of SPECS for each sm in `archs` that can have them. One dict per kernel and sm:

    name, arch, hot           which; hot kernels run in every training step
    registers                 per thread
    spill_bytes               local memory per thread, zero unless registers did not suffice
    shared_bytes              per block
    tensor_core_instructions  in the binary

    Raises RuntimeError under Triton's interpreter, which has nothing to compile.
    """
    return [{"name": name, "arch": arch, "hot": SPECS[name].hot, **_measure(SPECS[name], arch)}
            for arch in archs for name in names if arch >= SPECS[name].since]  # fmt: skip


def _measure(spec: Spec, arch: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    op, function = spec.kernel.split(".")
    kernel = getattr(import_module(f"..kernels.{op}.triton", __package__), function)
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set, so there are no kernels to compile; unset it")
    config = config_row(arch)[spec.config]
    constants = {**spec.flags, **dict.fromkeys(spec.unit, 1)} | {k: v for k, v in config.items() if k.isupper()}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = name.endswith("_ptr")
        signature[name] = f"*{spec.pointers[name[:-4]]}" if pointer else "fp32" if name in FLOATS else "i32"
        if spec.aligned and signature[name] != "fp32":
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in config.items() if not k.isupper()} | {"enable_fp_fusion": True}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", arch, 32), options=options
    )
    usage, assembly = _disassemble(compiled.asm["cubin"])
    return {
        "registers": int(usage["REG"]),
        "spill_bytes": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core_instructions": len(re.findall(TENSOR_CORE.get(arch, TENSOR_CORE[80]), assembly)),
    }


def _disassemble(cubin: bytes) -> tuple[dict[str, str], str]:
    """Resource usage and assembly, by the tools that come with Triton."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, assembly = (
            subprocess.run([tools / tool, flag, path], check=True, capture_output=True, text=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return dict(re.findall(r"(\w+):(\d+)", usage)), assembly


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m temposae.bench.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="sm numbers, default %(default)s")
    parser.add_argument("--kernel", nargs="+", default=list(SPECS), choices=SPECS, metavar="NAME", help="default all")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="leave out kernels of the other dtype")
    arguments = parser.parse_args()
    other_dtype = {"bf16": "fp32", "fp32": "bf16"}.get(arguments.dtype, "none")
    try:
        lines = report(arguments.arch, [name for name in arguments.kernel if not name.endswith(other_dtype)])
    except RuntimeError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if arguments.json:
        print(json.dumps(lines))
        return
    print(f"{'kernel':47} {'sm':>4} {'registers':>9} {'spill':>6} {'shared':>7} {'tensor-core':>11}")
    for line in lines:
        print(f"{line['name']:47} {line['arch']:4} {line['registers']:9} {line['spill_bytes']:6} {line['shared_bytes']:7} "
              f"{line['tensor_core_instructions']:11}")  # fmt: skip


if __name__ == "__main__":
    main()
