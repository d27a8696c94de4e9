"""Each op on its own: time beside FLOPs, bytes and the floor that they set.

One table, `OPS`. To add an op, add a row: what it computes on given inputs, and its cost model.
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.config import SAEConfig
from ..engine.errors import UserError
from ..engine.process.cpu_memory import tune_host
from ..engine.process.progress import progress_bar
from ..engine.sae import SparseAutoencoder
from ..kernels import adam, decode, encode, encode_sparse, loss, select, weight_grad
from ..kernels.backend import why
from ..kernels.code import LatentMajor, SparseCode
from ..kernels.cost import Cost
from ..kernels.torch_modes import default_modes
from .data import DTYPES, POSITIONS, Shape, tokens
from .floors import Rates, op_floor, rates_of
from .timing import free_bytes, inner_calls, memory, quantiles, samples

SAMPLE_MS = {"cuda": 5.0, "cpu": 20.0}  # a sample lasts at least as long


class Inputs:
    """What the ops take, each made when first asked for: tokens with structure, and the dictionary at its start.

    x [N, D], W_enc [D, F] and W_dec [F, D] (both latent-major) in `dtype`; biases and the code's values float32.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str):
        self.shape, self.dtype, self.device = shape, dtype, device
        self._tokens = tokens(shape, device, dtype, count=1)
        batch = self._tokens.batches[0]
        self.x, self.pos = batch.x, batch.pos

    @cached_property
    def sae(self) -> SparseAutoencoder:
        shape = self.shape
        sae = SparseAutoencoder(SAEConfig(d_in=shape.D, d_sae=shape.F, k=shape.K)).to(self.device)
        sae.initialise_bias(self._tokens.mean)
        return sae

    @cached_property
    def W_enc(self) -> Tensor:
        return self.sae.W_enc.detach().to(self.dtype)

    @cached_property
    def W_dec(self) -> Tensor:
        return self.sae.W_dec.detach().to(self.dtype)

    @cached_property
    def biases(self) -> tuple[Tensor, Tensor]:
        return self.sae.b_enc.detach(), self.sae.b_dec.detach()

    @cached_property
    def acts(self) -> Tensor:
        return encode.encode(self.x, self.W_enc, self.biases[0], center=self.biases[1])

    @cached_property
    def code(self) -> SparseCode:
        values, indices = self.acts.topk(self.shape.K, sorted=False)
        return SparseCode(values.float(), indices.int(), self.shape.F)

    @cached_property
    def threshold(self) -> Tensor:
        """One for all latents, above which lie about K activations a token."""
        return self.code.values.min(1).values.mean()

    @cached_property
    def entries(self) -> LatentMajor:
        return self.code.transpose()

    @cached_property
    def reconstruction(self) -> decode.Reconstruction:
        return decode.reconstruct(self.code, self.W_dec, self.biases[1], self.x)


Call = Callable[[], Any]


class Op(NamedTuple):
    """`call(inputs)`: the op, ready to run any number of times. `costs(shape, itemsize, backend)`: what its parts cost,
    which run one after another.

    `direction`: forward, backward, or full for both. `choice`: the cost by which the op itself picks a backend, if it does.
    """

    direction: str
    call: Callable[[Inputs], Call]
    costs: Callable[[Shape, int, str], list[Cost]]
    choice: Callable[[Shape, int, str], list[Cost]] | None = None


def _encode(i: Inputs) -> Call:
    x, w, (b_enc, b_dec) = i.x, i.W_enc, i.biases
    return lambda: encode.encode(x, w, b_enc, center=b_dec)


def _encode_topk(i: Inputs) -> Call:
    x, w, (b_enc, b_dec), k = i.x, i.W_enc, i.biases, i.shape.K
    return lambda: encode_sparse.encode_topk(x, w, b_enc, k, center=b_dec)[0]


def _encode_batch_topk(i: Inputs) -> Call:
    x, w, (b_enc, b_dec), k = i.x, i.W_enc, i.biases, i.shape.K
    return lambda: encode_sparse.encode_topk(x, w, b_enc, k, center=b_dec, across_batch=True)[0]


def _encode_threshold(i: Inputs) -> Call:
    x, w, (b_enc, b_dec), threshold, k = i.x, i.W_enc, i.biases, i.threshold.expand(i.shape.F), i.shape.K
    return lambda: encode_sparse.encode_threshold(x, w, b_enc, threshold, center=b_dec, expected=k)


def _select_topk(i: Inputs) -> Call:
    acts, k = i.acts, i.shape.K
    return lambda: select.select_topk(acts, k)


def _select_batch_topk(i: Inputs) -> Call:
    acts, total = i.acts, i.shape.N * i.shape.K
    return lambda: select.select_batch_topk(acts, total)


def _select_threshold(i: Inputs) -> Call:
    # Into a code that holds them all: nothing waits.
    acts, threshold = i.acts, float(i.threshold)
    capacity = 2 * i.code.values.numel()
    return lambda: select.select_threshold(acts, threshold, capacity)


def _decode(i: Inputs) -> Call:
    code, w, (_, b_dec), x = i.code, i.W_dec, i.biases, i.x
    return lambda: decode.decode(code, w, b_dec, target=x)


def _reconstruct(i: Inputs) -> Call:
    code, w, (_, b_dec), x = i.code, i.W_dec, i.biases, i.x
    return lambda: decode.reconstruct(code, w, b_dec, x)


def _position_loss(i: Inputs) -> Call:
    squared_error, code, pos = i.reconstruction.squared_error, i.code, i.pos
    return lambda: loss.position_loss(squared_error, code, pos, POSITIONS)


def _values_grad(i: Inputs) -> Call:
    code, w, residual = i.code, i.W_dec, i.reconstruction.residual
    return lambda: decode.decode_values_grad(code, w, residual)


def _transpose(i: Inputs) -> Call:
    values, indices, f = i.code.values, i.code.indices, i.shape.F
    return lambda: SparseCode(values, indices, f).transpose()


def _weight_grad(i: Inputs) -> Call:
    entries, values, residual = i.entries, i.code.values, i.reconstruction.residual
    return lambda: weight_grad.weight_grad(entries, values, residual)


def _row_norms(i: Inputs) -> Call:
    entries, values, residual, w = i.entries, i.code.values, i.reconstruction.residual, i.W_dec
    return lambda: adam.row_norms(entries, values, residual, W=w)


def resting(w: Tensor) -> tuple[adam.Moments, adam.Rates]:
    """For an update of w with a step of size zero and no memory of the first moment: the work of any step, and the next call
    finds the same weights."""
    zero, unit = torch.zeros((), device=w.device), torch.ones((), device=w.device)
    return adam.Moments(torch.zeros_like(w), torch.zeros_like(w)), adam.Rates(zero, unit, unit.clone(), beta1=0.0)


def _adam_rows(i: Inputs) -> Call:
    """The decoder's update, on a copy: it works in place. Gives the first moment, which is the gradient."""
    w, entries, values, residual = i.sae.W_dec.detach().clone(), i.entries, i.code.values, i.reconstruction.residual
    moments, rates = resting(w)
    shadow = None if i.dtype == torch.float32 else w.to(i.dtype)

    def call() -> torch.Tensor:
        adam.adam_rows(w, entries, values, residual, moments, rates, unit_norm=True, shadow=shadow)
        return moments.exp_avg

    return call


def _objective(i: Inputs, direction: str) -> Call:
    """The whole objective through autograd, without the optimiser."""
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


Costs = Callable[[Shape, int, str], list[Cost]]


def _encode_cost(s: Shape, itemsize: int, backend: str) -> list[Cost]:
    return [encode.cost(s.N, s.D, s.F, itemsize=itemsize, backend=backend)]


def _encode_topk_cost(s: Shape, itemsize: int, backend: str) -> list[Cost]:
    return [encode_sparse.cost(s.N, s.D, s.F, itemsize=itemsize, backend=backend)]


def _select_topk_cost(s: Shape, itemsize: int, backend: str) -> list[Cost]:
    return [select.cost(s.N, s.F, s.K, itemsize=itemsize, backend=backend)]


def _select_threshold_cost(s: Shape, itemsize: int, backend: str) -> list[Cost]:
    # acts are read to be counted and read to be collected
    return [Cost(0.0, 2 * itemsize * s.N * s.F + s.N * s.K * (itemsize + 4) + 16 * s.N)]


def _decode_cost(s: Shape, itemsize: int, backend: str) -> list[Cost]:
    return [decode.cost(s.N, s.D, s.F, s.N * s.K, itemsize=itemsize, backend=backend)]


def _reconstruct_cost(s: Shape, itemsize: int, backend: str) -> list[Cost]:
    # the projections are a second multiply-add, on rows that were gathered already
    cost = decode.cost(s.N, s.D, s.F, s.N * s.K, itemsize=itemsize, backend=backend)
    return [Cost(2 * cost.flops, cost.bytes + 4 * s.N * s.K)]


def _loss_cost(s: Shape, itemsize: int, backend: str) -> list[Cost]:
    return [loss.cost(s.N, 1, s.N * s.K, POSITIONS, itemsize=4, backend=backend)]


def _transpose_cost(s: Shape, itemsize: int, backend: str) -> list[Cost]:
    # keys read; order (8 bytes), latent and token (4 each) of each entry and F + 1 offsets written
    return [Cost(0.0, 20 * s.N * s.K + 8 * (s.F + 1))]


def _weight_grad_cost(s: Shape, itemsize: int, backend: str) -> list[Cost]:
    return [weight_grad.cost(s.N, s.D, s.F, s.N * s.K, itemsize=itemsize, backend=backend)]


def _row_norms_cost(s: Shape, itemsize: int, backend: str) -> list[Cost]:
    # as the gradient, which is not written, and W is read
    cost = weight_grad.cost(s.N, s.D, s.F, s.N * s.K, itemsize=itemsize, backend=backend)
    return [Cost(cost.flops + 4.0 * s.F * s.D, cost.bytes + (itemsize - 4) * s.F * s.D)]


def _adam_rows_cost(s: Shape, itemsize: int, backend: str) -> list[Cost]:
    return [adam.cost(s.N, s.D, s.F, s.N * s.K, itemsize=itemsize, backend=backend)]


def _torch_only(s: Shape, itemsize: int, backend: str) -> list[Cost]:
    """A choice that is none: torch sorts, whatever the device."""
    return [Cost(0.0, float(backend != "torch"))]


def _all(*costs: Costs) -> Costs:
    return lambda s, itemsize, backend: [piece for cost in costs for piece in cost(s, itemsize, backend)]


_FORWARD = _all(_encode_topk_cost, _reconstruct_cost, _loss_cost)
_BACKWARD = _all(_transpose_cost, _weight_grad_cost, _weight_grad_cost)

OPS = {
    "encode": Op("forward", _encode, _encode_cost, _encode_cost),
    "encode_topk": Op("forward", _encode_topk, _encode_topk_cost, _encode_topk_cost),
    "encode_batch_topk": Op("forward", _encode_batch_topk, _encode_topk_cost, _encode_topk_cost),
    "encode_threshold": Op("forward", _encode_threshold, _encode_topk_cost, _encode_topk_cost),
    "select_topk": Op("forward", _select_topk, _select_topk_cost, _select_topk_cost),
    "select_batch_topk": Op("forward", _select_batch_topk, _select_topk_cost, _select_topk_cost),
    "select_threshold": Op("forward", _select_threshold, _select_threshold_cost),
    "decode": Op("forward", _decode, _decode_cost, _decode_cost),
    "reconstruct": Op("forward", _reconstruct, _reconstruct_cost, _decode_cost),
    "position_loss": Op("forward", _position_loss, _loss_cost),
    "decode_values_grad": Op("backward", _values_grad, _decode_cost, _decode_cost),
    "transpose": Op("backward", _transpose, _transpose_cost, _torch_only),
    "weight_grad": Op("backward", _weight_grad, _weight_grad_cost, _weight_grad_cost),
    "row_norms": Op("backward", _row_norms, _row_norms_cost),
    "adam_rows": Op("backward", _adam_rows, _adam_rows_cost),
    "objective_forward": Op("forward", lambda i: _objective(i, "forward"), _FORWARD),
    "objective_backward": Op("backward", lambda i: _objective(i, "backward"), _BACKWARD),
    "objective_full": Op("full", lambda i: _objective(i, "full"), _all(_FORWARD, _BACKWARD)),
}


class Work(NamedTuple):
    """What an op has to do at a shape, and the least time for it in milliseconds."""

    backend: str
    dtype: str
    flops: float
    bytes: float
    floor_ms: float


def work(name: str, shape: Shape, dtype: str, device: str, rates: Rates, backend: str | None = None) -> Work:
    """`Work` of op `name`, for the backend that runs here unless one is given. Parts don't overlap: their floors add up."""
    op, itemsize = OPS[name], DTYPES[dtype].itemsize
    if backend is None:
        choice = op.choice
        by_cost = None if choice is None else lambda backend: choice(shape, itemsize, backend)[0]
        backend = why(name, torch.empty(0, device=device, dtype=DTYPES[dtype]), cost=by_cost)[0]
    pieces = op.costs(shape, itemsize, backend)
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
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Time the ops `names` at each shape. Returns the cases and, by op and shape, why it was left out.

    A case holds shape, dtype, backend, time quantiles and peak memory (results included), flops, bytes and the floor that
    they set. At most `seconds` are spent on an op at a shape. The backend is chosen as in training (TEMPOSAE_BACKEND forces
    it). Raises UserError for unknown ops and for sizes and dtypes that are not allowed.
    """
    shapes, names = [shape.check() for shape in shapes], list(names)
    for name in names:
        if name not in OPS:
            raise UserError(f"op: {name!r} is not allowed; there are {', '.join(OPS)}")
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not allowed; it must be one of {', '.join(DTYPES)}")
    if repeats < 1:
        raise UserError(f"repeats: {repeats} is not allowed; it must be at least 1")
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
                        cases.append(
                            _case(name, inputs, repeats, seconds) | work(name, shape, dtype, device, rates)._asdict()
                        )
                    except torch.OutOfMemoryError:
                        left_out[f"{name} at {shape}"] = "out of memory"
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
