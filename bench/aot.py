"""Compile Triton kernels ahead of time, without a GPU, and read registers, spills and tensor-core use from the binaries.

`python -m temposae.bench.aot` prints a table or, with `--json`, JSON. It needs Triton, and TRITON_INTERPRET must be unset.
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

from ..engine.errors import UserError
from ..kernels.backend import config_row
from ..kernels.bench_types import Spec
from .op_benches import BENCHES
from .results import markdown

ARCHS = (80, 90, 100)
# float arguments of kernels; other scalars are integers
FLOATS = ("threshold", "sharpness", "beta1", "beta2", "new1", "new2", "eps")
# names in the disassembly of mma.sync (sm_80 and all others), wgmma (half precision and fp8) and tcgen05
TENSOR_CORE = {80: r"\bHMMA\.", 90: r"\b[HQ]GMMA\.", 100: r"\bUTC\w*MMA\b"}
#: variants of all kernels by name, in the order of the ops
SPECS: dict[str, Spec] = {}
for bench in BENCHES:
    for dtype in ("bf16", "fp32"):
        SPECS |= {f"{name} {dtype}": spec for name, spec in bench.specs(dtype).items()}
    SPECS |= bench.fixed_specs


def report(archs: Sequence[int] = ARCHS, names: Sequence[str] = tuple(SPECS)) -> list[dict[str, Any]]:
    """Compile the kernels `names` of SPECS for each architecture that supports them. Returns one dict per kernel and
    architecture, in the order of SPECS and then of the architectures:

    name, arch, hot           hot kernels run in every training step
    registers                 per thread
    spill_bytes               local memory per thread, 0 if the registers suffice
    shared_bytes              shared memory per block
    tensor_core_instructions  number in the binary

    Raises UserError under Triton's interpreter, which has nothing to compile.
    """
    return [{"name": name, "arch": arch, "hot": SPECS[name].hot, **_measure(SPECS[name], arch)}
            for name in SPECS if name in names for arch in sorted(archs) if arch >= SPECS[name].since]  # fmt: skip


def table(compiled: list[dict[str, Any]]) -> list[str]:
    """The report as a Markdown table."""
    keys = ("registers", "spill_bytes", "shared_bytes", "tensor_core_instructions")
    lines = [("kernel", "sm", "hot", *(key.replace("_", " ") for key in keys))]
    for kernel in compiled:
        hot = "yes" if kernel["hot"] else ""
        lines.append((kernel["name"], str(kernel["arch"]), hot, *(str(kernel[key]) for key in keys)))
    return markdown(lines)


def _measure(spec: Spec, arch: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    op, *file, function = spec.kernel.split(".")
    kernel = getattr(import_module(f"..kernels.{op}.{file[0] if file else 'triton'}", __package__), function)
    if not isinstance(kernel, triton.JITFunction):
        raise UserError("TRITON_INTERPRET is set, so there are no kernels to compile; unset it")
    config = config_row(arch)[spec.config]
    constants = {**spec.flags, **dict.fromkeys(spec.unit, 1)} | {k: v for k, v in config.items() if k.isupper()}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = name.endswith("_ptr")
        signature[name] = _pointer(spec.pointers[name[:-4]], config) if pointer else "fp32" if name in FLOATS else "i32"
        if spec.aligned and signature[name] != "fp32" and "<" not in signature[name]:
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


def _pointer(dtype: str, config: dict[str, int]) -> str:
    """The type of a pointer. "bf16[BLOCK_N, BLOCK_D]" is a descriptor of such blocks if the entry says TMA."""
    if "[" in dtype and config.get("TMA"):
        sized = re.sub("[A-Z_]{2,}", lambda size: str(config[size[0]]), dtype)
        return f"tensordesc<{sized}>"
    return "*" + dtype.partition("[")[0]


def _disassemble(cubin: bytes) -> tuple[dict[str, str], str]:
    """Resource usage and assembly of a binary, from the tools in Triton's package."""
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
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="GPU architectures, default %(default)s")
    parser.add_argument("--kernel", nargs="+", default=list(SPECS), choices=SPECS, metavar="NAME", help="default all")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="leave out kernels of the other dtype")
    arguments = parser.parse_args()
    other_dtype = {"bf16": "fp32", "fp32": "bf16"}.get(arguments.dtype, "none")
    try:
        lines = report(arguments.arch, [name for name in arguments.kernel if not name.endswith(other_dtype)])
    except UserError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(json.dumps(lines) if arguments.json else "\n".join(table(lines)))


if __name__ == "__main__":
    main()
