"""Time each op, with its FLOPs, its bytes and its floor.

The ops come from kernels/<op>/bench.py, forward ops first. The whole objective is added here.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.config import SAEConfig
from ..engine.errors import check_known
from ..engine.process.cpu_memory import tune_host
from ..engine.process.progress import progress_bar
from ..engine.sae import SparseAutoencoder
from ..kernels import bench_types
from ..kernels.backend import why
from ..kernels.bench_types import Call, Op
from ..kernels.torch_modes import default_modes
from .data import DTYPES, POSITIONS, Shape, check_settings, seed_of, tokens
from .floors import Rates, op_floor, rates_of
from .op_benches import BENCHES
from .timing import free_bytes, inner_calls, memory, quantiles, samples

SAMPLE_MS = {"cuda": 5.0, "cpu": 20.0}  # least duration of a sample


class Inputs(bench_types.Inputs):
    """Synthetic tokens in `dtype`, and an untrained dictionary."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str):
        self.shape, self.dtype, self.device = shape, dtype, device
        made_up = tokens(shape, device, dtype, count=1)
        config = SAEConfig(d_in=shape.D, d_sae=shape.F, k=shape.K)
        sae = self.sae = SparseAutoencoder(config, seed=seed_of("weights")).to(device)
        sae.initialise_bias(made_up.mean)
        weights = (weight.detach() for weight in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
        super().__init__(made_up.batches[0].x, made_up.batches[0].pos, *weights, k=shape.K)


def _objective(i: Inputs, direction: str) -> Call:
    """The objective through autograd, without the optimiser."""
    sae, x, pos = i.sae, i.x, i.pos
    weights = [p for p in sae.parameters() if p.requires_grad]

    def forward() -> Tensor:
        return sae.objective(x, pos, POSITIONS).loss

    if direction == "forward":
        return forward
    if direction == "full":
        return lambda: torch.autograd.grad(forward(), weights)
    loss_value = forward()
    return lambda: torch.autograd.grad(loss_value, weights, retain_graph=True)


OPS = {name: op for bench in BENCHES for name, op in bench.ops.items()}
OPS = dict(sorted(OPS.items(), key=lambda row: row[1].direction == "backward"))
_FORWARD, _BACKWARD = (
    [cost for name in names for cost in OPS[name].costs]
    for names in (("encode_topk", "reconstruct", "position_loss"), ("transpose", "weight_grad", "weight_grad"))
)
OPS |= {
    "objective_forward": Op("forward", lambda i: _objective(i, "forward"), _FORWARD),
    "objective_backward": Op("backward", lambda i: _objective(i, "backward"), _BACKWARD),
    "objective_full": Op("full", lambda i: _objective(i, "full"), [*_FORWARD, *_BACKWARD]),
}


class Work(NamedTuple):
    """Backend and cost of an op at a shape: FLOP, bytes, and the least time in milliseconds."""

    backend: str
    dtype: str
    flops: float
    bytes: float
    floor_ms: float


def work(name: str, shape: Shape, dtype: str, device: str, rates: Rates, backend: str | None = None) -> Work:
    """`Work` of an op, for the backend that runs here unless one is given. The floors of its parts add up."""
    op, itemsize = OPS[name], DTYPES[dtype].itemsize
    if backend is None:
        choice = op.choice
        by_cost = None if choice is None else lambda backend: choice(*shape, itemsize=itemsize, backend=backend)
        backend = why(name, torch.empty(0, device=device, dtype=DTYPES[dtype]), cost=by_cost)[0]
    pieces = [cost(*shape, itemsize=itemsize, backend=backend) for cost in op.costs]
    flops, traffic = (sum(column) for column in zip(*pieces, strict=True))
    return Work(backend, dtype, flops, traffic, sum(op_floor(piece, rates, itemsize) for piece in pieces))


@default_modes()
def measure(
    shapes: Iterable[Shape],
    names: Iterable[str] = tuple(OPS),
    *,
    device: str,
    dtype: str,
    repeats: int = 20,
    seconds: float = 5.0,
    keep: Callable[[list[dict[str, Any]], dict[str, str]], None] = lambda cases, left_out: None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Time ops at each shape. Returns the cases and, by op and shape, why it was left out. `keep` is called with both after
    each op.

    A case holds shape, dtype, backend, time quantiles, peak memory (results included), FLOP, bytes and floor. At most
    `seconds` are spent on an op at a shape. The backend is chosen as in training (TEMPOSAE_BACKEND forces one). Raises
    UserError for unknown ops and for sizes and dtypes that are not allowed.
    """
    shapes, names = [shape.check() for shape in shapes], list(names)
    for name in names:
        check_known("op", name, OPS)
    check_settings(dtype, DTYPES, repeats=repeats)
    tune_host()
    rates = rates_of(device, DTYPES[dtype].itemsize)
    cases: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    with progress_bar("ops", total=len(shapes) * len(names), unit="ops") as bar:
        for shape in shapes:
            least = 2 * shape.N * shape.F * DTYPES[dtype].itemsize + 3 * 4 * 2.0 * shape.D * shape.F
            inputs = Inputs(shape, DTYPES[dtype], device) if least < free_bytes(device) else None
            for name in names:
                bar.advance(0, now=f"{name} at {shape}")
                if inputs is None:
                    left_out[f"{name} at {shape}"] = f"needs {least / 2**30:,.1f} GiB, more than is free"
                else:
                    try:
                        case = _case(name, inputs, repeats, seconds)
                        cases.append(case | work(name, shape, dtype, device, rates)._asdict())
                    except torch.OutOfMemoryError:
                        left_out[f"{name} at {shape}"] = "out of memory"
                keep(cases, left_out)
                bar.advance(1)
    return cases, left_out


def _case(name: str, inputs: Inputs, repeats: int, seconds: float) -> dict[str, Any]:
    device = inputs.device
    call = OPS[name].call(inputs)
    call()  # compiles
    _, usage = memory(call, device)
    inner = inner_calls(call, device, SAMPLE_MS[torch.device(device).type])
    times = samples(call, device, repeats=repeats, inner=inner, warm=1, seconds=seconds)
    return {"provider": "temposae", "op": name, "direction": OPS[name].direction} | {
        **inputs.shape._asdict(),
        **quantiles(times)._asdict(),
        "peak_bytes": usage.peak,
    }
