"""The records of kernels/<op>/bench.py: kernels to compile ahead of time, launch settings to try, calls to time.

`temposae.bench` finds those files by listing the folders, so a new op brings its rows along and no table is edited.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from .code import LatentMajor, SparseCode
from .cost import Cost
from .decode import Reconstruction, reconstruct
from .encode import encode

POSITIONS = 128  # of a context
Stage = Literal["encode", "select", "decode", "loss", "gradient", "update"]
STAGES: tuple[Stage, ...] = get_args(Stage)  # in the order of a training step
Call = Callable[[], Any]
CallOf = Callable[[Any], Call]  # of `Inputs`
CostModel = Callable[..., Cost]  # cost(n, d, f, k, itemsize=, backend=): k of f latents are kept
Grid = Mapping[str, tuple[int, ...]]


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


class Op(NamedTuple):
    """`call(inputs)`: the op, ready to run any number of times. `costs`: of its parts, which run one after another.

    `direction`: forward, backward, or full for both. `choice`: the cost by which the op itself picks a backend, if it does.
    """

    direction: str
    call: CallOf
    costs: Sequence[CostModel]
    choice: CostModel | None = None


class Trial(NamedTuple):
    """`call(inputs)`: launches the entry's kernels, any number of times; what they update in place is a copy.

    `grid`: values to try, in every combination; what it does not name stays as it is.
    """

    dtype: str
    call: CallOf
    grid: Grid


class OpBench(NamedTuple):
    """What an op's `bench.py` holds as `BENCH`.

    stage        where its kernels come in a training step; rows are in this order
    ops          what to time, by name
    trials       what to tune, by entry of the config table
    specs        what to compile, by name: kernels whose operands have this dtype ("bf16" or "fp32")
    fixed_specs  the same for kernels without operands of that kind
    """

    stage: Stage
    ops: Mapping[str, Op]
    trials: Mapping[str, Trial]
    specs: Callable[[str], dict[str, Spec]]
    fixed_specs: Mapping[str, Spec] = {}


class Inputs:
    """What calls take: x [N, D] at pos [N], a dictionary that keeps k latents of a token, W_enc [D, F] and W_dec [F, D]
    (both latent-major) in the dtype of x, `master` (W_dec), biases and the code's values in float32."""

    def __init__(
        self, x: Tensor, pos: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int
    ):  # fmt: skip
        self.x, self.pos, self.b_enc, self.b_dec, self.k = x, pos, b_enc, b_dec, k
        self.master, self.W_enc, self.W_dec = W_dec, W_enc.to(x.dtype), W_dec.to(x.dtype)

    @cached_property
    def acts(self) -> Tensor:
        return encode(self.x, self.W_enc, self.b_enc, center=self.b_dec)

    @cached_property
    def code(self) -> SparseCode:
        values, indices = self.acts.topk(self.k, sorted=False)
        return SparseCode(values.float(), indices.int(), len(self.W_dec))

    @cached_property
    def threshold(self) -> Tensor:
        """One for all latents, above which lie about k activations a token."""
        return self.code.values.min(1).values.mean()

    @cached_property
    def entries(self) -> LatentMajor:
        return self.code.transpose()

    @cached_property
    def reconstruction(self) -> Reconstruction:
        return reconstruct(self.code, self.W_dec, self.b_dec, self.x)
