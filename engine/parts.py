"""Parts: mechanisms that extend a dictionary beyond its encoder, mask, selection and decoder.

A part has a name, settings, and some of the methods below. Each method acts at one place:

    x -> `input` -> (. - b_dec) W_enc + b_enc -> `pre` -> relu -> `acts` -> mask -> `latents` -> selection -> f
    f -> f W_dec + b_dec -> squared error and L1, weighted by position (`weigh`), + `penalty`

Parts at the same place act in the order of the settings. The decorator `part("name")` registers a part under a name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ..kernels.code import SparseCode
from ..kernels.numerics import sum_by
from .config import Config, SAEConfig
from .errors import UserError
from .metrics import plain
from .registry import part as part
from .sae import SparseAutoencoder

UNSET: Any = None  # in fields of `BatchView` that a step sets before they are read


class PartSettings(Config):
    """Settings of a part. `config.yaml` stores the values, and `temposae config --explain` prints the descriptions.

    class HalfSettings(PartSettings):
        factor: float = Field(default=0.5, description="Factor on activations.")
    """

    kind: str = Field(description="Name of the part.")

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**values)
        except UserError as error:
            raise UserError(f"sae.parts.{values.get('kind')}.{error}") from None


@dataclass(frozen=True)
class RowLayout:
    """Maps N tokens, row after row in order of position, to a grid [R, L] of R rows, and back.

    `number` int64 [N] is each token's row, counted from 0 without gaps. `pos` int64 [N] is its column. L is the largest
    position + 1. Cells without a token (padding, or left out by a filter) hold zeros.
    """

    number: Tensor
    pos: Tensor

    @classmethod
    def of(cls, pos: Tensor) -> "RowLayout":
        """Infer the rows from positions: a new row begins wherever the position does not rise. Raises UserError if
        fewer than half of the tokens are followed by the next position, because then the tokens are not in rows."""
        pos = pos.long()
        step = pos.diff()
        if len(step) > 1 and int((step == 1).sum()) * 2 < len(step):
            raise UserError(
                f"pos: these {len(pos)} tokens are not in the order of their rows; a dictionary that looks along a row "
                "needs whole rows, one after another (stream.mode: sequences)"
            )
        return cls(torch.cat([pos.new_zeros(1), (step <= 0).long()]).cumsum(0), pos)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """R, L. Synchronises with the device."""
        return int(self.number[-1]) + 1, int(self.pos.max()) + 1

    @cached_property
    def at(self) -> Tensor:
        return self.number * self.shape[1] + self.pos

    @cached_property
    def kept(self) -> Tensor:
        """bool [R, L]: cells with a token."""
        return self.spread(torch.ones_like(self.pos, dtype=torch.bool))

    def spread(self, value: Tensor) -> Tensor:
        """[N, ...] -> [R, L, ...]. Differentiable."""
        rows, length = self.shape
        grid = value.new_zeros(rows * length, *value.shape[1:])
        return grid.index_copy(0, self.at, value).unflatten(0, (rows, length))

    def gather(self, value: Tensor) -> Tensor:
        """[R, L, ...] -> [N, ...]"""
        return value.flatten(0, 1).index_select(0, self.at)


@dataclass
class BatchView:
    """A batch as parts see it, in training units (|x| about sqrt(D)).

    Given: x [N, D]; pos int64 [N] in [0, n_positions); `target` [N, d_out], which is x unless the dictionary is a
    transcoder; `progress` of the run from 0 to 1, and 1 outside training. In training, for parts that read them: `row`
    [N], the row of each token; `attribute` int64 [N], 0 or 1 (see `ActivationStream.attribute`); `second` [N, D],
    activations at `stream.second`.

    Filled in during the step: `acts` [N, F] before the mask; `f` [N, F] as decoded, which topk and batchtopk also give
    as `code`; `residual` [N, d_out] = target - x_hat; `squared_error` and `l1` [n_positions], sums as in
    `kernels.loss`; `weights` [n_positions] on the squared error, if any. A part may set `penalised` [N, F], whose L1
    then replaces that of f.
    """

    sae: Any  # composed.ComposedAutoencoder, whose module imports this one
    x: Tensor
    pos: Tensor
    n_positions: int
    progress: float = 1.0
    training: bool = False
    step: int = 0
    seed: int = 0
    target: Tensor = UNSET
    row: Tensor | None = None
    attribute: Tensor = UNSET
    second: Tensor = UNSET
    acts: Tensor = UNSET
    f: Tensor = UNSET
    code: SparseCode | None = None
    penalised: Tensor | None = None
    residual: Tensor = UNSET
    squared_error: Tensor = UNSET
    l1: Tensor = UNSET
    count: Tensor = UNSET
    weights: Tensor | None = None
    drawn: int = field(default=0, repr=False)

    @cached_property
    def rows(self) -> RowLayout:
        """The arrangement of the tokens in rows."""
        if self.row is None:
            return RowLayout.of(self.pos)
        return RowLayout(torch.cat([self.row.new_zeros(1), (self.row.diff() != 0).long()]).cumsum(0), self.pos)

    @torch.no_grad()
    def summed(self, weight: Tensor) -> Tensor:
        """Return sum_j f_nj weight_j [N], float32, for weight [F]. Uses `code` if there is no dense f."""
        if self.f is not None:
            return self.f.float() @ weight.float()
        assert self.code is not None
        entries = self.code.live(self.code.values.float() * weight[self.code.live(self.code.indices)])
        return sum_by(self.code.rows.flatten(), entries.flatten(), self.code.n_tokens)

    def generator(self) -> torch.Generator:
        """Return a new CPU generator, seeded from the run's seed, the step and the number of calls so far."""
        self.drawn += 1
        return torch.Generator().manual_seed(((self.seed * 1_000_003 + self.step) * 64 + self.drawn % 64) % 2**63)


class Part(nn.Module):
    """A mechanism of a dictionary. Every method does nothing by default; a part overrides those that it needs.

    Shapes and units are those of `BatchView`. `acts` and `latents` must return float32 values that are not negative.
    `reads` names what the part needs besides x and pos: "rows" (whole rows, stream.mode sequences, also outside
    training), "attribute", "second", or "f" (`batch.acts` and `batch.f`). `paces` maps the part's parameters to factors
    on their learning rate. `least_latents` is the least d_sae that it allows. docs/guides/parts.md is a full guide.

        @part("half")
        class Half(Part): ...
    """

    kind: ClassVar[str]
    reads: ClassVar[frozenset[str]] = frozenset()
    least_latents: ClassVar[int] = 1

    Settings: ClassVar[type[PartSettings]] = PartSettings

    def __init__(self, settings: Any, sae: SAEConfig, positions: int, generator: torch.Generator):
        super().__init__()
        self.settings, self.cfg, self.positions = settings, sae, positions
        self.paces: Mapping[str, float] = {}
        self.figures: dict[str, Tensor] = {}
        self.build(generator)

    def build(self, generator: torch.Generator) -> None:
        """Make parameters and buffers, from `settings`, `cfg` (the dictionary's) and `positions`."""

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        """Raise ValueError("field: ...") if the part's settings conflict with the dictionary's."""

    def initialise(self, sae: SparseAutoencoder, generator: torch.Generator) -> None:
        """Change the dictionary's initial weights."""

    def input(self, x: Tensor, batch: BatchView) -> Tensor:
        """Change the encoder's input x [N, D]."""
        return x

    def pre(self, pre: Tensor, batch: BatchView) -> Tensor:
        """Change pre-activations [N, F]."""
        return pre

    def acts(self, acts: Tensor, batch: BatchView) -> Tensor:
        """Change activations [N, F] before the mask."""
        return acts

    def latents(self, f: Tensor, batch: BatchView) -> Tensor:
        """Change activations [N, F] after the mask, before topk or batchtopk selects."""
        return f

    def weigh(self, batch: BatchView) -> tuple[Tensor | None, Tensor | None]:
        """Return weights [n_positions] on the squared error and on L1. None means 1."""
        return None, None

    def penalty(self, batch: BatchView) -> Tensor | None:
        """Return a term of the loss, in the units of a token's squared error (|x|^2 is about D)."""
        return None

    def after(self, batch: BatchView) -> None:
        """Observe a finished step. Called without gradients."""

    def report(self) -> dict[str, Any]:
        """Return figures for a line of metrics. By default these are the tensors that the part has put into `figures`."""
        return {name: plain(value) for name, value in self.figures.items()}

    def does(self, hook: str) -> bool:
        """Whether the part overrides the method `hook`."""
        return getattr(type(self), hook) is not getattr(Part, hook)
