"""Types used in kernels/<op>/bench.py: kernels to compile ahead of time, launch settings to try, calls to time.

`temposae.bench` finds these files by listing the folders, so no table needs editing for a new op.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from .code import LatentMajor, SparseCode
from .cost import Cost
from .decode import Reconstruction, reconstruct
from .encode import encode

POSITIONS = 128  # T
Stage = Literal["encode", "select", "decode", "loss", "gradient", "update"]
STAGES: tuple[Stage, ...] = get_args(Stage)  # in the order of a training step
Call = Callable[[], Any]
CallOf = Callable[[Any], Call]  # takes `Inputs`
CostModel = Callable[..., Cost]  # cost(n, d, f, k, itemsize=, backend=)
Grid = Mapping[str, tuple[int, ...]]


class Spec(NamedTuple):
    """One kernel as training launches it."""

    kernel: str  # op.function in triton.py, or op.file.function
    config: str  # entry of the config table
    pointers: dict[str, str]  # dtype of each pointer
    flags: Mapping[str, int] = {}
    hot: bool = True  # runs in every training step
    unit: tuple[str, ...] = ()  # integer arguments that are 1, which Triton specialises on
    aligned: bool = True  # all pointers and sizes are multiples of 16
    since: int = 80  # the first sm that supports it
    only: int = 0  # the only one


class Op(NamedTuple):
    """An op to time."""

    direction: str  # forward, backward, or full for both
    call: CallOf  # returns the op ready to run any number of times
    costs: Sequence[CostModel]  # of its parts, which run one after another
    choice: CostModel | None = None  # the cost by which the op chooses its backend


class Trial(NamedTuple):
    """Launch settings to try."""

    dtype: str
    call: CallOf  # returns a launch of the entry's kernels that can be repeated: in-place updates go to a copy
    grid: Grid  # values to try in all combinations; other settings keep their values
    others: tuple[str, ...] = ()  # kernels that may run instead of the entry's own


class Step(NamedTuple):
    """A training step in bfloat16 whose time is predicted: its sizes and settings, and the launch settings of a GPU."""

    n: int
    d: int
    f: int
    k: int
    config: Mapping[str, Mapping[str, int]]  # a row of `CONFIGS`
    activation: str = "topk"
    aux_k: int = 0
    clip: bool = False

    @property
    def ragged(self) -> bool:
        return self.activation != "topk"

    @property
    def entries(self) -> int:
        """Entries of all codes, with L0 = K where the activation does not fix it."""
        return self.n * (self.k + self.aux_k)

    @property
    def per_latent(self) -> float:
        return self.entries / self.f

    def blocks(self, size: int, config: str, block: str) -> int:
        """Return how many blocks cover `size`."""
        return -(-size // self.config[config][block])


class Launch(NamedTuple):
    """One or several launches of a kernel in a training step, and their work, all together.

    `trips` names the loops of the compiled kernel by the function and the variable of their statement, and says how often
    a program runs each, over all copies of the loop that the compiler made. Bytes of `l2` are tiles that many programs
    read, and `gathered` are rows that are read again from L2. Reads that miss L2 also count as `dram`. `waits` counts loads
    of a program that wait for one another; one that hits L2 is half a wait.
    """

    stage: str  # as in the profile of a step: encode, decode, loss, aux, sort, update, or step for the rest
    name: str  # of the `Spec`, or what kernels of torch do
    programs: float = 0.0  # that do the work, of one launch; 0 for kernels of torch
    trips: Mapping[str, float] = {}
    dram: float = 0.0
    output: float = 0.0  # of dram: written when a program ends
    l2: float = 0.0
    gathered: float = 0.0
    tensor_flops: float = 0.0
    waits: float = 0.0
    longest: float = 0.0  # waits of the slowest program, if it has more work than others
    launches: int = 1
    groups: int = 1  # of 4 warps in a CTA, each of which does the work of a program while the others do theirs


class OpBench(NamedTuple):
    """`BENCH` of an op's `bench.py`."""

    stage: Stage  # position in a training step, by which rows are sorted
    ops: Mapping[str, Op]  # by name
    trials: Mapping[str, Trial]  # by entry of the config table
    specs: Callable[[str], dict[str, Spec]]  # by name, for operands of a dtype ("bf16" or "fp32")
    fixed_specs: Mapping[str, Spec] = {}  # by name, for kernels whose operands have fixed dtypes
    launches: Callable[[Step], list[Launch]] = lambda step: []  # in a training step


class Inputs:
    """Arguments of calls: x [N, D] at pos [N] and a TopK dictionary. W_enc [D, F] and W_dec [F, D], both latent-major,
    have the dtype of x. `master` (W_dec), biases and the code's values are float32."""

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
        """One threshold for all latents, exceeded by about k activations per token."""
        return self.code.values.min(1).values.mean()

    @cached_property
    def entries(self) -> LatentMajor:
        return self.code.transpose()

    @cached_property
    def reconstruction(self) -> Reconstruction:
        return reconstruct(self.code, self.W_dec, self.b_dec, self.x)
