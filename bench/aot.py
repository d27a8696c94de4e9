"""Compile every Triton kernel ahead of time, without a GPU, and read registers, spills and tensor-core use off the binary.

`python -m temposae.bench.aot` prints a table, with `--json` the same as JSON. Needs Triton, and TRITON_INTERPRET unset.
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

from ..kernels.backend import config_row

ARCHS = (80, 90, 100)
# scalar arguments that are not integers
FLOATS = ("threshold", "sharpness", "beta1", "beta2", "new1", "new2", "eps")
# mma.sync (on all others as well), wgmma (half precision and fp8) and tcgen05, as the disassembler spells them
TENSOR_CORE = {80: r"\bHMMA\.", 90: r"\b[HQ]GMMA\.", 100: r"\bUTC\w*MMA\b"}


class Spec(NamedTuple):
    """One kernel as training launches it: every pointer and every size a multiple of 16, unless `aligned` is false."""

    kernel: str  # op and function
    config: str  # entry of the config table
    pointers: dict[str, str]  # dtype of each pointer
    flags: Mapping[str, int] = {}
    hot: bool = True
    unit: tuple[str, ...] = ()  # integers that are 1, which Triton compiles in
    aligned: bool = True
    since: int = 80  # the first sm that has what it needs


def _encode(kernel: str, config: str, dtype: str, *, mask: int = 0, ragged: bool = False, **flags: int) -> Spec:
    """`mask` is a kind as `kernels.encode.triton` numbers them: none, bits, table, Gaussians."""
    pointers = dict(x=dtype, w=dtype, b="fp32", mask="i32" if mask == 1 else "fp32", pos="i64", used="i32", acts=dtype)
    pointers |= dict(
        x_scale="fp32", w_scale="fp32", threshold="fp32", aux_latents="u8", candidates="i32", aux_candidates="i32"
    )
    if dtype == "fp32" or ragged:
        config += "_small"
    flags |= dict(MASK=mask, EVEN_D=not ragged)
    return Spec(f"encode{kernel}", config, pointers, flags, hot=not ragged, unit=("stride_wd",), aligned=not ragged)


def _select(kernel: str, config: str, dtype: str, **pointers: str) -> Spec:
    flags = {} if config == "topk" else dict(PER_LATENT=True)
    return Spec(f"select.{kernel}", config, dict(acts=dtype) | pointers, flags, unit=("stride_f",))


def _sparse(kernel: str, config: str, *, ragged: bool, **pointers: str) -> Spec:
    extra_flags: dict[str, dict[str, int]] = {"decode": dict(RESIDUAL=True), "token_loss": dict(SQUARED=False)}
    flags = dict(RAGGED=ragged) | extra_flags.get(config, {})
    return Spec(kernel, config, dict(offsets="i64") | pointers, flags)


def _adam(bits: int, dtype: str) -> dict[str, str]:
    """A parameter with moments of so many bits, and a copy of this dtype."""
    m, v = {32: ("fp32", "fp32"), 16: ("bf16", "bf16"), 8: ("i8", "u8")}[bits]
    single = ("w", "scales", "step_size", "correction", "factor", "norms")
    return dict.fromkeys(single, "fp32") | dict(m=m, v=v, shadow=dtype, seed="i32", skip="i1")


def _specs(dtype: str) -> dict[str, Spec]:
    """Kernels whose operands have this dtype; gradients and sums are fp32."""
    candidates = dict(candidates="i32", values="fp32", indices="i32", unsure="i8")
    candidates |= dict(cut="i64", least="i64", above="i64", equal="i64", threshold="fp32")
    operands = dict(x=dtype, w=dtype, b="fp32", mask="i32", pos="i64", aux_latents="u8")
    tile = config_row(min(ARCHS))["encode_topk"]["BLOCK_F"]

    def candidates_spec(
        keep: int, aux_keep: int = 0, *, mask: int = 0, ragged: bool = False, threshold: bool = False
    ) -> Spec:
        return _encode(
            "_sparse.candidates_kernel", "encode_topk", dtype, mask=mask, ragged=ragged, SCALED=False,
            HAS_THRESHOLD=threshold, HAS_AUX_LATENTS=aux_keep > 0, KEEP=keep, AUX_KEEP=aux_keep,
        )  # fmt: skip

    def second_pass_spec(kernel: str, config: str, **flags: int) -> Spec:
        return Spec(
            f"encode_sparse.{kernel}", config, operands | candidates, dict(MASK=1, KEEP=4, BLOCK_F=tile) | flags,
            hot=False, unit=("stride_wd",),
        )  # fmt: skip

    modes = {"digits": 0, "count": 1, "fill": 2}
    specs = {
        "encode": _encode(".encode_kernel", "encode", dtype, RELU=True),
        "encode, hard mask": _encode(".encode_kernel", "encode", dtype, RELU=True, mask=1),
        "encode, soft mask": _encode(".encode_kernel", "encode", dtype, RELU=True, mask=2),
        "encode, unaligned": _encode(".encode_kernel", "encode", dtype, RELU=True, mask=2, ragged=True),
        "candidates": candidates_spec(4),
        "candidates, 8 of a tile": candidates_spec(8),
        "candidates, thresholds": candidates_spec(4, threshold=True),
        "candidates, hard mask": candidates_spec(4, mask=1),
        "candidates, soft mask": candidates_spec(4, mask=2),
        "candidates, Gaussians": candidates_spec(4, mask=3),
        "candidates, two codes": candidates_spec(4, 4),
        "candidates, unaligned": candidates_spec(4, 4, mask=2, ragged=True),
        "rescan": second_pass_spec("rescan_kernel", "rescan", HAS_AUX_LATENTS=False, BLOCK_K=64),
    } | {
        f"above_cut, {name}": second_pass_spec(
            "above_cut_kernel", "above_cut", HAS_THRESHOLD=False, MODE=mode, SHIFT=8, RESCAN=True
        )
        for name, mode in modes.items()
    } | {
        "fold": Spec("encode.fold_kernel", "fold", operands | dict(center="fp32", out="fp32"), unit=("stride_wd",)),
        "topk": _select("topk_kernel", "topk", dtype, values=dtype, indices="i32"),
        "batch digits": Spec(
            "select.batch_digits_kernel", "threshold", dict(acts=dtype, kth="i64", counts="i64"), dict(SHIFT=0),
            unit=("stride_f",),
        ),
        "batch count": Spec(
            "select.batch_count_kernel", "threshold", dict(acts=dtype, kth="i64", above="i64", equal="i64"),
            unit=("stride_f",),
        ),
        "batch fill": Spec(
            "select.batch_fill_kernel", "threshold",
            dict(acts=dtype, kth="i64", wanted="i64", offsets="i64", values=dtype, indices="i32"), unit=("stride_f",),
        ),
        "threshold count": _select("count_kernel", "threshold", dtype, threshold="fp32", counts="i64"),
        "threshold fill": _select(
            "fill_kernel", "threshold", dtype, threshold="fp32", offsets="i64", values=dtype, indices="i32"
        ),
    }  # fmt: skip
    entries = dict(values="fp32", order="i64", latents="i32", tokens="i32", offsets="i64", rows=dtype, windows="fp32")
    entries |= dict(center="fp32", ones="fp32", out="fp32")
    split = config_row(min(ARCHS))["windows"]["SPLIT"]
    for name, unit in (("weight_grad", ()), ("weight_grad, D = 1 (biases)", ("M", "D", "stride_row"))):
        specs[name] = Spec(
            "weight_grad.weight_grad_kernel", "weight_grad", entries, dict(HAS_CENTER=not unit, SPLIT=split), unit=unit
        )
    specs["windows"] = Spec("weight_grad.windows_kernel", "windows", entries)
    config = "adam_rows" if dtype == "bf16" else "adam_rows_small"
    # training in float32 at full width is nobody's aim
    for width in (768, 2304, 3584, 4096)[: 4 if dtype == "bf16" else 2]:
        high = 1 << (width - 1).bit_length() - 1
        pieces = dict(HIGH=high, LOW=1 << (width - high - 1).bit_length(), SPLIT=split)
        for name, flags in {
            "decoder": dict(HAS_CENTER=False, UNIT_NORM=True, UPDATE=True, HAS_SHADOW=True, HAS_SKIP=True),
            "encoder": dict(HAS_CENTER=True, UNIT_NORM=False, UPDATE=True, HAS_SHADOW=True, HAS_SKIP=True),
            "norms": dict(HAS_CENTER=False, UNIT_NORM=True, UPDATE=False, HAS_SHADOW=False, HAS_SKIP=False),
        }.items():
            for bits in (32, 16, 8) if dtype == "bf16" and name != "norms" else (32,):
                specs[f"adam_rows, {name}, D = {width}" + (f", {bits}-bit moments" if bits < 32 else "")] = Spec(
                    "adam.adam_rows_kernel", config, entries | _adam(bits, dtype), flags | pieces | dict(BITS=bits)
                )
    for ragged in (False, True):
        kind = "ragged" if ragged else "fixed K"
        code = dict(values=dtype, indices="i32")
        specs |= {
            f"decode, {kind}": _sparse(
                "decode.decode_kernel", "decode", ragged=ragged, w=dtype, b="fp32", target=dtype, out=dtype, **code
            ),
            f"reconstruct, {kind}": Spec(
                "decode.reconstruct_kernel", "reconstruct_loop" if ragged else "reconstruct",
                dict(offsets="i64", w=dtype, b="fp32", target=dtype, residual=dtype, error="fp32", projection="fp32")
                | code | dict(values="fp32"),
                dict(RAGGED=ragged, ONCE=not ragged),
            ),
            f"values_grad, {kind}": _sparse(
                "decode.values_grad_kernel", "values_grad", ragged=ragged, indices="i32", w=dtype, grad=dtype, out=dtype
            ),
            f"token_loss, {kind}": _sparse(
                "loss.token_loss_kernel", "token_loss", ragged=ragged, residual=dtype, values=dtype, stats="fp32"
            ),
        }  # fmt: skip
    return {f"{name} {dtype}": spec for name, spec in specs.items()}


SPECS = {
    **_specs("bf16"),
    **_specs("fp32"),
    "candidates fp8": _encode(
        "_sparse.candidates_kernel", "encode_fp8", "fp8e4nv", SCALED=True,
        HAS_THRESHOLD=False, HAS_AUX_LATENTS=False, KEEP=4, AUX_KEEP=0,
    )._replace(since=89),
    "merge": Spec(
        "encode_sparse.merge_kernel", "merge", dict(candidates="i32", values="fp32", indices="i32", unsure="i8"),
        dict(KEEP=4, BLOCK_F=128),
    ),
    "adam": Spec(
        "adam.adam_kernel", "adam", _adam(32, "fp32") | dict(grad="fp32"), dict(HAS_SHADOW=True, HAS_SKIP=True)
    ),
    **{
        f"adam, matrix, {bits}-bit moments": Spec(
            "adam.adam_matrix_kernel", "adam_matrix", _adam(bits, "bf16") | dict(grad="fp32"),
            dict(UNIT_NORM=True, HAS_SHADOW=True, HAS_SKIP=True, BITS=bits, HIGH=2048, LOW=2048),
        )
        for bits in (32, 16, 8)
    },
    "position_sum": Spec(
        "loss.position_sum_kernel", "position_sum", dict(stats="fp32", pos="i64", sums="fp32")
    ),
}  # fmt: skip


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
