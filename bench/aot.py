"""Compile Triton kernels ahead of time, without a GPU, and read registers, spills and instructions from the binaries.

`python -m temposae.bench.aot` prints a table or, with `--json`, JSON; with `--budgets` it fails if a kernel is over its
budget (budgets.py). It needs Triton, and TRITON_INTERPRET must be unset.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.errors import UserError
from ..kernels.backend import config_row
from ..kernels.bench_types import Spec
from . import sass
from .budgets import over_budget
from .gpus import SMS
from .op_benches import BENCHES
from .results import markdown

ARCHS = (80, 90, 100)
# float arguments of kernels; other scalars are integers
FLOATS = ("threshold", "sharpness", "beta1", "beta2", "new1", "new2", "eps", "scale", "limit")
# names in the disassembly of mma.sync (sm_80 and all others), wgmma (half precision and fp8) and tcgen05
TENSOR_CORE = {80: r"\bHMMA\.", 90: r"\b[HQ]GMMA\.", 100: r"\bUTC\w*MMA\b"}
#: variants of all kernels by name, in the order of the ops
SPECS: dict[str, Spec] = {}
for bench in BENCHES:
    for dtype in ("bf16", "fp32"):
        SPECS |= {f"{name} {dtype}": spec for name, spec in bench.specs(dtype).items()}
    SPECS |= bench.fixed_specs


class Compiled(NamedTuple):
    """A compiled kernel. Registers and spilled bytes are per thread, shared bytes per CTA."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int  # of a CTA
    code: sass.Code
    tensor_core_instructions: int
    triton: str

    def ctas_per_sm(self, arch: int) -> int:
        """CTAs that fit on a multiprocessor by their registers, shared memory and warps. Registers are allocated to warps
        by 256."""
        sm = SMS[min(SMS, key=lambda row: abs(row - arch))]
        warp_registers = -(-32 * self.registers // 256) * 256
        by_registers = sm.registers // warp_registers // self.warps
        return max(1, min(by_registers, sm.shared_bytes // (self.shared_bytes + 1024), sm.warps // self.warps, sm.ctas))


def report(archs: Sequence[int] = ARCHS, names: Sequence[str] = tuple(SPECS)) -> list[dict[str, Any]]:
    """Compile the kernels `names` of SPECS for each architecture that supports them. Returns one dict per kernel and
    architecture, in the order of SPECS and then of the architectures:

    name, arch, hot           hot kernels run in every training step
    registers                 per thread
    spill_bytes               local memory per thread, 0 if the registers suffice
    shared_bytes              shared memory per block
    tensor_core_instructions  number in the binary
    instructions              number in the binary, without padding
    loop_instructions         number of those inside of loops
    loops                     instructions of the largest copy of each loop, by function and variable of its statement
    ctas_per_sm               blocks that fit on a multiprocessor together
    triton                    version of the compiler

    Raises UserError under Triton's interpreter, which has nothing to compile.
    """
    rows = []
    for name in SPECS:
        for arch in sorted(archs):
            if name in names and arch >= SPECS[name].since and SPECS[name].only in (0, arch):
                kernel = compiled(name, arch)
                row = {"name": name, "arch": arch, "hot": SPECS[name].hot} | kernel._asdict()
                del row["code"], row["warps"]
                rows.append(row | {
                    "instructions": len(kernel.code.opcodes), "loop_instructions": kernel.code.loop_instructions,
                    "loops": kernel.code.loop_sizes, "ctas_per_sm": kernel.ctas_per_sm(arch),
                })  # fmt: skip
    return rows


def table(compiled: list[dict[str, Any]]) -> list[str]:
    """The report as a Markdown table."""
    keys = ("registers", "spill_bytes", "shared_bytes", "ctas_per_sm", "tensor_core_instructions", "instructions",
            "loop_instructions")  # fmt: skip
    lines = [("kernel", "sm", "hot", *(key.replace("_", " ") for key in keys))]
    for kernel in compiled:
        hot = "yes" if kernel["hot"] else ""
        lines.append((kernel["name"], str(kernel["arch"]), hot, *(str(kernel[key]) for key in keys)))
    return markdown(lines)


_compiled: dict[Any, Compiled] = {}


def compiled(name: str, arch: int, settings: Mapping[str, int] | None = None) -> Compiled:
    """Compile a kernel of SPECS for an architecture, once per process, with the table's launch settings unless given."""
    config = {**config_row(arch)[SPECS[name].config], **(settings or {})}
    key = name, arch, tuple(config.items())
    if key not in _compiled:
        _compiled[key] = _compile(SPECS[name], arch, config)
    return _compiled[key]


def _compile(spec: Spec, arch: int, config: Mapping[str, int]) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    op, *file, function = spec.kernel.split(".")
    kernel = getattr(import_module(f"..kernels.{op}.{file[0] if file else 'triton'}", __package__), function)
    if not isinstance(kernel, triton.JITFunction):
        raise UserError("TRITON_INTERPRET is set, so there are no kernels to compile; unset it")
    constants = {**spec.flags, **dict.fromkeys(spec.unit, 1)} | {
        k: v for k, v in config.items() if k in kernel.arg_names
    }
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = name.endswith("_ptr")
        signature[name] = "fp32" if name in FLOATS else "i32"
        if pointer:
            signature[name] = _pointer(spec.pointers[name[:-4]], config, kernel.is_gluon())
        if spec.aligned and signature[name] != "fp32" and "<" not in signature[name]:
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in config.items() if not k.isupper()} | {"enable_fp_fusion": True}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, assembly = _disassemble(binary.asm["cubin"])
    tensor_core = TENSOR_CORE.get(arch, TENSOR_CORE[80])
    return Compiled(
        registers=int(usage["REG"]), spill_bytes=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared_bytes=binary.metadata.shared, warps=binary.metadata.num_warps, code=sass.parse(assembly),
        tensor_core_instructions=len(re.findall(tensor_core, assembly)), triton=triton.__version__,
    )  # fmt: skip


def _pointer(dtype: str, config: Mapping[str, int], is_gluon: bool) -> str:
    """The type of a pointer. "bf16[BLOCK_N, BLOCK_D]" is a descriptor of such blocks if the entry says TMA, or in Gluon,
    where its type has a layout."""
    if "[" in dtype and (is_gluon or config.get("TMA")):
        sized = re.sub("[A-Z_]{2,}", lambda size: str(config[size[0]]), dtype)
        if is_gluon:
            from ..kernels.encode_sparse.persistent import layout_of

            sized += f",{layout_of([int(size) for size in re.findall(r'[0-9]+(?=[],])', sized)])!r}"
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
            subprocess.run([tools / tool, *flags, path], check=True, capture_output=True, text=True).stdout
            for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c", "-g"]))
        )
    return dict(re.findall(r"(\w+):(\d+)", usage)), assembly


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m temposae.bench.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="GPU architectures, default %(default)s")
    parser.add_argument("--kernel", nargs="+", default=list(SPECS), choices=SPECS, metavar="NAME", help="default all")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="leave out kernels of the other dtype")
    parser.add_argument("--budgets", action="store_true", help="fail if a kernel on sm_90 is over its budget")
    arguments = parser.parse_args()
    other_dtype = {"bf16": "fp32", "fp32": "bf16"}.get(arguments.dtype, "none")
    try:
        lines = report(arguments.arch, [name for name in arguments.kernel if not name.endswith(other_dtype)])
    except UserError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(json.dumps(lines) if arguments.json else "\n".join(table(lines)))
    if arguments.budgets and (faults := over_budget(lines)):
        parser.exit(1, "\n".join(faults) + "\n")


if __name__ == "__main__":
    main()
