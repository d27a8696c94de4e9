"""Kernels of weight_grad to compile, launch settings to tune, and calls to time, the sort by latent included."""

from functools import partial

from ..bench_types import Grid, Launch, Op, OpBench, Spec, Step, Trial
from ..code import SparseCode
from ..configs import CONFIGS
from ..cost import Cost
from . import cost, weight_grad

SPLIT = CONFIGS[min(CONFIGS)]["windows"]["SPLIT"]


def entry_pointers(dtype: str) -> dict[str, str]:
    """Return the pointers of kernels that sum by latent."""
    pointers = dict(values="fp32", order="i64", latents="i32", tokens="i32", offsets="i64", rows=dtype, windows="fp32")
    return pointers | dict(center="fp32", ones="fp32", out="fp32")


def _specs(dtype: str) -> dict[str, Spec]:
    kernel, pointers = "weight_grad.weight_grad_kernel", entry_pointers(dtype)
    flags, bias_flags = dict(HAS_CENTER=True, SPLIT=SPLIT), dict(HAS_CENTER=False, SPLIT=SPLIT)
    return {
        "weight_grad": Spec(kernel, "weight_grad", pointers, flags),
        "weight_grad, D = 1 (biases)": Spec(kernel, "weight_grad", pointers, bias_flags, unit=("M", "D", "stride_row")),
        "windows": Spec("weight_grad.windows_kernel", "windows", pointers),
    }


def entry_blocks(step: Step, config: str) -> float:
    """Return the mean number of blocks of entries of a latent: the last one is half empty."""
    return step.per_latent / step.config[config]["BLOCK_E"] + 0.5


def latent_sums(step: Step) -> list[Launch]:
    """Describe sums of values by latent, D = 1. Hardly any window lies within one latent."""
    windows = step.entries // SPLIT
    trips = {"sum_entries.start": entry_blocks(step, "weight_grad"), "sum_latent.index": 0}
    return [
        Launch("update", "windows bf16", windows, {"sum_entries.start": 0}, gathered=8 * windows, waits=1),
        Launch(
            "update", "weight_grad, D = 1 (biases) bf16", step.f, trips,
            dram=16 * step.entries + 12 * step.f, waits=1 + trips["sum_entries.start"],
        ),
    ]  # fmt: skip


def _launches(step: Step) -> list[Launch]:
    # torch sorts 12 bytes per entry in 4 passes, then gathers latents and tokens and searches the bounds of latents.
    sort = Launch("sort", "torch: sort by latent", dram=150 * step.entries + 16 * step.f, launches=14)
    gradients = 1 + (step.activation == "jumprelu")  # of b_enc and of thresholds
    return [sort, *gradients * latent_sums(step)]


_transpose = lambda i: lambda: SparseCode(i.code.values, i.code.indices, len(i.W_dec)).transpose()
_weight_grad = lambda i: partial(weight_grad, i.entries, i.code.values, i.reconstruction.residual)
# Reads the keys. Writes order (8 bytes), latent and token (4 each) per entry, and F + 1 offsets.
_transpose_cost = lambda n, d, f, k, **settings: Cost(0.0, 20 * n * k + 8 * (f + 1))
# The sort always runs in torch.
_torch_only = lambda n, d, f, k, itemsize, backend: Cost(0.0, float(backend != "torch"))
_cost = lambda n, d, f, k, **settings: cost(n, d, f, n * k, **settings)
_GATHERS: Grid = dict(BLOCK_D=(256, 512), STAGES=(2, 3), num_warps=(4, 8), BLOCK_E=(4, 8, 16))
# windows' SPLIT is not tuned: results depend on where windows end.
BENCH = OpBench(
    "gradient",
    ops={
        "transpose": Op("backward", _transpose, [_transpose_cost], _torch_only),
        "weight_grad": Op("backward", _weight_grad, [_cost], _cost),
    },
    trials={"weight_grad": Trial("bf16", _weight_grad, _GATHERS), "windows": Trial("bf16", _weight_grad, _GATHERS)},
    specs=_specs,
    launches=_launches,
)
