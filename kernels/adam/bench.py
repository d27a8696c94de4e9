"""Kernels of adam to compile, launch settings to tune, and calls to time."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ..bench_types import Call, Inputs, Launch, Op, OpBench, Spec, Step, Trial
from ..configs import FP8_SINCE
from ..cost import Cost
from ..moments import LATENTS
from ..weight_grad import cost as weight_grad_cost
from ..weight_grad.bench import WIDTHS, gather_flags, gather_pointers, windows_launch
from . import Moments, Rates, adam, adam_each, adam_rows, cost, row_norms

MOMENTS = {32: ("fp32", "fp32"), 16: ("bf16", "bf16"), 8: ("i8", "u8")}
_UPDATE = dict(UPDATE=True, HAS_ALONG=False, HAS_SHADOW=True, HAS_FP8=False, HAS_SKIP=True)
_NORMS = dict(UPDATE=False, HAS_ALONG=False, HAS_SHADOW=False, HAS_FP8=False, HAS_SKIP=False)
_DECODER = dict(HAS_CENTER=False, UNIT_NORM=True, BIASES=False, LATENTS=1)
_ENCODER = dict(HAS_CENTER=True, UNIT_NORM=False, BIASES=False, LATENTS=1)
_BIASES = dict(BIASES=True, LATENTS=LATENTS)
ROWS = {
    "decoder": _DECODER | _UPDATE,
    "encoder": _ENCODER | _UPDATE,
    "encoder with biases": _ENCODER | _UPDATE | _BIASES,  # without clipping
    "encoder in fp8": _ENCODER | _UPDATE | dict(HAS_FP8=True),
    "encoder in fp8 with biases": _ENCODER | _UPDATE | _BIASES | dict(HAS_FP8=True),
    "norms": _DECODER | _NORMS | dict(UNIT_NORM=False, HAS_ALONG=True),
    "encoder norms": _ENCODER | _NORMS | _BIASES,
}


def _pointers(bits: int, dtype: str, flags: Mapping[str, int] = {}) -> dict[str, str]:
    """Return the pointers for a parameter with moments of `bits` bits and a shadow of this dtype."""
    m, v = MOMENTS[bits]
    fp8 = "fp8e4nv" if flags.get("HAS_FP8") else "fp32"
    single = (
        "w",
        "grad",
        "scales",
        "fp8_scale",
        "step_size",
        "correction",
        "factor",
        "norms",
        "along",
        "ones",
        "products",
    )
    single += ("w2", "grad2", "m2", "v2")
    return dict.fromkeys(single, "fp32") | dict(m=m, v=v, shadow=dtype, fp8=fp8, seed="i32", skip="i1")


def _specs(dtype: str) -> dict[str, Spec]:
    specs = {}
    for width in WIDTHS[dtype]:
        for name, flags in ROWS.items():
            if flags["HAS_FP8"] and (dtype, width) != ("bf16", 2304):
                continue  # where it spills least
            for bits in MOMENTS if dtype == "bf16" and name in ("decoder", "encoder") else (32,):
                config = "adam_rows" if flags["UPDATE"] else "row_norms"
                specs[f"adam_rows, {name}, D = {width}" + (f", {bits}-bit moments" if bits < 32 else "")] = Spec(
                    "adam.adam_rows_kernel", config, gather_pointers(dtype) | _pointers(bits, dtype, flags),
                    flags | gather_flags(dtype, width) | dict(BITS=bits),
                    hot=name != "encoder with biases" or width <= 2304,  # wider, it spills 24 bytes on sm_80
                    since=FP8_SINCE if flags["HAS_FP8"] else 80,
                )  # fmt: skip
    return specs


def _matrix_spec(bits: int, **flags: int) -> Spec:
    flags |= dict(HAS_SHADOW=True, HAS_SKIP=True, BITS=bits, HIGH=2048, LOW=2048)
    return Spec("adam.adam_matrix_kernel", "adam_matrix", _pointers(bits, "bf16", flags), flags)


def _rows_launches(step: Step, name: str, matrix: float, *, shared: bool = False) -> list[Launch]:
    """Describe a pass over the entries of all latents that moves `matrix` bytes per parameter. `shared`: the windows are
    summed already."""
    n, d, f, *_ = step
    latents = ROWS[name]["LATENTS"]
    # Two entries per iteration; the last may be half empty. Each iteration loads the rows of the next.
    iterations = step.per_latent / 2 + 0.25
    trips = {"sum_latent.index": 0, "sum_latent._": 1, "add_entries.index": iterations, "adam_rows_kernel.index": 1}
    # Packed entries and, from L2, rows; then weights, with moments and centre. Norms load the next latent's bounds ahead.
    flags = ROWS[name]
    waits = 1.5 + iterations / 2 + (flags["UPDATE"] | flags["BIASES"] | flags["UNIT_NORM"])
    waits = latents * (1 + waits) if flags["UPDATE"] else 1 + latents * waits
    rows = n * (2 if step.aux_k and name in ("decoder", "norms") else 1)
    products = 4 * d * f / latents if ROWS[name]["BIASES"] else 0
    if ROWS[name]["HAS_ALONG"]:  # a loop over 32 entries at a time, behind the first 32
        trips["adam_rows_kernel.following"] = max(0.0, step.per_latent / 32 - 0.5)
    return [
        *([] if shared else [windows_launch(step)]),
        Launch(
            "update", f"adam_rows, {name}, D = {d} bf16", f / latents,
            {loop: latents * count for loop, count in trips.items()}, gathered=2 * step.entries * d,
            dram=matrix * d * f + 2 * rows * d + (12 if ROWS[name]["HAS_ALONG"] else 8) * step.entries + 8 * f + products,
            waits=waits,
        ),
        *([Launch("update", "torch: gradient of the centre", dram=products)] if products else []),
    ]  # fmt: skip


def _launches(step: Step) -> list[Launch]:
    # read and written: fp32 weights and two moments; written: the shadow. The norms also give the biases' gradients, from
    # the weights.
    blocks = step.blocks(step.f, "adam", "BLOCK") + step.blocks(step.d, "adam", "BLOCK")
    if step.clip:
        launches = _rows_launches(step, "encoder norms", 4) + _rows_launches(step, "norms", 0)
        launches += _rows_launches(step, "encoder", 26, shared=True) + _rows_launches(step, "decoder", 26, shared=True)
    else:
        launches = _rows_launches(step, "encoder with biases", 26) + _rows_launches(step, "decoder", 26)
    return [
        *launches,
        Launch("update", "torch: gradient of b_dec", dram=2 * step.n * step.d, launches=3),
        Launch("update", "adam", blocks, dram=28 * (step.f + step.d), waits=2),
        *([Launch("update", "adam", step.blocks(step.f, "adam", "BLOCK"), dram=28 * step.f, waits=2),
           Launch("update", "torch: pace and limit of thresholds", dram=8 * step.f, launches=2)]
          if step.activation == "jumprelu" else []),
    ]  # fmt: skip


def _resting(w: Tensor) -> tuple[Moments, Rates]:
    """Return arguments for an update of w with step size zero and beta1 = 0: the usual work, and w stays the same."""
    zero, unit = torch.zeros((), device=w.device), torch.ones((), device=w.device)
    moments = Moments(torch.zeros_like(w), torch.zeros_like(w))  # the reference's are float64
    return moments, Rates(zero, unit, unit.clone(), beta1=0.0)


def _adam_rows(i: Inputs) -> Call:
    """Update a copy of the decoder. The call returns the first moment, which is the gradient."""
    w, entries, values, residual = i.master.clone(), i.entries, i.code.values, i.reconstruction.residual
    moments, rates = _resting(w)
    shadow = None if i.x.dtype == torch.float32 else w.to(i.x.dtype)

    def call() -> Tensor:
        adam_rows(w, entries, values, residual, moments, rates, unit_norm=True, shadow=shadow)
        return moments.exp_avg

    return call


def _adam_matrix(i: Inputs) -> Call:
    w = i.master.clone()
    rates = _resting(w)[1]._replace(seed=torch.zeros((), dtype=torch.int32, device=w.device))
    return partial(adam, w, torch.ones_like(w), Moments.zeros(w, "bfloat16"), rates)


def _row_norms_cost(n: int, d: int, f: int, k: int, *, itemsize: int, backend: str) -> Cost:
    # As for the gradient, but W is read and the gradient not written.
    flops, traffic = weight_grad_cost(n, d, f, n * k, itemsize=itemsize, backend=backend)
    return Cost(flops + 4.0 * f * d, traffic + (itemsize - 4) * f * d)


def _adam_each(i: Inputs) -> Call:
    """Update copies of both biases. The call returns the first moments, which are the gradients."""
    parameters = i.b_enc.clone(), i.b_dec.clone()
    moments, rates = zip(*map(_resting, parameters), strict=True)
    grads = [torch.ones_like(parameter) for parameter in parameters]

    def call() -> list[Tensor]:
        adam_each(parameters, grads, moments, rates[0])
        return [each.exp_avg for each in moments]

    return call


_row_norms = lambda i: partial(row_norms, i.entries, i.code.values, i.reconstruction.residual, W=i.W_dec)
_adam_rows_cost = lambda n, d, f, k, **settings: cost(n, d, f, n * k, **settings)
BENCH = OpBench(
    "update",
    ops={
        "row_norms": Op("backward", _row_norms, [_row_norms_cost]),
        "adam_rows": Op("backward", _adam_rows, [_adam_rows_cost]),
    },
    trials={
        "adam_rows": Trial("bf16", _adam_rows, dict(num_warps=(4, 8, 16))),
        "row_norms": Trial("bf16", _row_norms, dict(num_warps=(2, 4, 8))),
        "adam": Trial("bf16", _adam_each, dict(BLOCK=(256, 512, 1024, 2048), num_warps=(2, 4, 8))),
        "adam_matrix": Trial("bf16", _adam_matrix, dict(num_warps=(4, 8, 16))),
    },
    specs=_specs,
    launches=_launches,
    fixed_specs={
        "adam": Spec(
            "adam.adam_kernel", "adam", _pointers(32, "fp32"), dict(HAS_SHADOW=False, HAS_SKIP=True, HAS_SECOND=True)
        ),
        **{f"adam, matrix, {bits}-bit moments": _matrix_spec(bits, UNIT_NORM=True, HAS_FP8=False) for bits in MOMENTS},
        "adam, matrix in fp8": _matrix_spec(32, UNIT_NORM=False, HAS_FP8=True)._replace(since=FP8_SINCE),
    },
)  # fmt: skip
