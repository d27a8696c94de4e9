"""Kernels of weight_grad to compile, launch settings to tune, and calls to time, the sort by latent included."""

from functools import partial

from ..bench_types import Call, Grid, Inputs, Launch, Op, OpBench, Spec, Step, Trial
from ..code import SparseCode
from ..configs import CONFIGS
from ..cost import Cost
from ..numerics import pieces
from . import cost, latent_sums, sort_entries, weight_grad

SPLIT = CONFIGS[min(CONFIGS)]["windows"]["SPLIT"]
_ENTRIES = dict(values="fp32", order="i64")
WIDTHS = {"bf16": (768, 2304, 3584, 4096), "fp32": (768, 2304)}  # float32 training at full width is unusual


def gather_pointers(dtype: str) -> dict[str, str]:
    """Return the pointers of kernels that gather rows by latent."""
    return dict(packed="i64", offsets="i64", rows=dtype, windows="fp32", window_ones="fp32", center="fp32")


def gather_flags(dtype: str, width: int) -> dict[str, int]:
    """Return their constants for aligned rows."""
    return pieces(width) | dict(SPLIT=SPLIT, PAIRED=dtype == "bf16" and width > 2048, D=width, stride_row=width)


def _specs(dtype: str) -> dict[str, Spec]:
    specs, pointers = {}, gather_pointers(dtype) | dict(latents="i32", out="fp32")
    for width in WIDTHS[dtype]:
        flags = gather_flags(dtype, width)
        specs |= {
            f"weight_grad, D = {width}": Spec(
                "weight_grad.weight_grad_kernel", "weight_grad", pointers, flags | dict(HAS_CENTER=True)
            ),
            f"windows, D = {width}": Spec("weight_grad.windows_kernel", "windows", pointers, flags),
        }
    return specs


def latent_sums_launch(step: Step) -> Launch:
    """Describe sums of values by latent."""
    trips = {"latent_sums_kernel.start": step.per_latent / step.config["latent_sums"]["BLOCK"] + 0.5}
    waits = 1 + trips["latent_sums_kernel.start"]
    return Launch("update", "latent_sums", step.f, trips, dram=12 * step.entries + 12 * step.f, waits=waits)


def windows_launch(step: Step) -> Launch:
    """Describe the sums of windows. Hardly any window lies within one latent."""
    windows = step.entries // SPLIT
    return Launch(
        "update", f"windows, D = {step.d} bf16", windows, {"add_entries.index": 0}, gathered=8 * windows, waits=1
    )


def _launches(step: Step) -> list[Launch]:
    steps = step.entries.bit_length()
    return [
        # torch numbers the entries, counts digits and sums the counts, and moves 12 bytes per entry in 4 passes. It also
        # clears memory before each pass.
        Launch("sort", "torch: sort by latent", dram=(4 + 8 + 4 + 4 * 24) * step.entries, launches=13),
        # Weights are gathered by 4 bytes, of which L2 holds all. A latent's bound is found by bisection in L2.
        Launch(
            "sort", "sorted", step.blocks(max(step.entries, step.f + 1), "sorted", "BLOCK"), {"sorted_kernel._": steps},
            dram=(12 + 24 + 12) * step.entries + 8 * step.f, gathered=32 * 3 * step.entries, waits=2 + steps / 2,
        ),
        *([latent_sums_launch(step)] if step.activation == "jumprelu" else []),  # gradients of thresholds
    ]  # fmt: skip


def _sort_entries(i: Inputs) -> Call:
    weights, f, n = (i.reconstruction.projection, i.code.values, i.reconstruction.projection), len(i.W_dec), len(i.x)
    return lambda: sort_entries(i.code.indices.flatten(), i.k, f, *weights, (n, n))[0]


_transpose = lambda i: lambda: SparseCode(i.code.values, i.code.indices, len(i.W_dec)).transpose()
_weight_grad = lambda i: partial(weight_grad, i.entries, i.code.values, i.reconstruction.residual)
# Reads the keys. Writes order (8 bytes), latent and token (4 each) per entry, and F + 1 offsets.
_transpose_cost = lambda n, d, f, k, **settings: Cost(0.0, 20 * n * k + 8 * (f + 1))
# The sort with weights reads three and writes two packed ones and the last.
_sort_cost = lambda n, d, f, k, **settings: Cost(0.0, 52 * n * k + 8 * (f + 1))
# The sort always runs in torch.
_torch_only = lambda n, d, f, k, itemsize, backend: Cost(0.0, float(backend != "torch"))
_cost = lambda n, d, f, k, **settings: cost(n, d, f, n * k, **settings)
_latent_sums = lambda i: partial(latent_sums, i.entries, i.code.values)
_WARPS: Grid = dict(num_warps=(4, 8, 16))
# windows' SPLIT is not tuned: results depend on where windows end.
BENCH = OpBench(
    "gradient",
    ops={
        "transpose": Op("backward", _transpose, [_transpose_cost], _torch_only),
        "sort_entries": Op("backward", _sort_entries, [_sort_cost]),
        "weight_grad": Op("backward", _weight_grad, [_cost], _cost),
    },
    trials={
        "sorted": Trial("bf16", _sort_entries, dict(BLOCK=(256, 512, 1024), num_warps=(2, 4, 8))),
        "pack": Trial("bf16", _weight_grad, dict(BLOCK=(512, 1024, 2048), num_warps=(2, 4, 8))),
        "windows": Trial("bf16", _weight_grad, _WARPS),
        "weight_grad": Trial("bf16", _weight_grad, _WARPS),
        "latent_sums": Trial("bf16", _latent_sums, dict(BLOCK=(32, 64, 128), num_warps=(1, 2))),
    },
    specs=_specs,
    launches=_launches,
    fixed_specs={
        "pack": Spec("weight_grad.pack_kernel", "pack", _ENTRIES | dict(tokens="i32", packed="i64")),
        "sorted": Spec(
            "weight_grad.sorted_kernel", "sorted",
            dict(
                latents="i32", order="i64", tokens="i64", encoder="fp32", decoder="fp32", along="fp32",
                sorted_tokens="i32", packed_encoder="i64", packed_decoder="i64", sorted_along="fp32", offsets="i64",
            ),
            dict(HAS_TOKENS=False),
        ),
        "latent_sums": Spec(
            "weight_grad.latent_sums_kernel", "latent_sums", _ENTRIES | dict(offsets="i64", out="fp32")
        ),
    },
)  # fmt: skip
