"""Parts: mechanisms that a dictionary is composed of, beyond its encoder, mask, selection and decoder.

A part has a name, settings of its own, and some of the methods below, each at one place of

    x -> `input` -> (. - b_dec) W_enc + b_enc -> `pre` -> relu -> `acts` -> mask -> `latents` -> selection -> f
    f -> f W_dec + b_dec -> squared error and L1, weighted by position as `weigh` says, + `penalty`

Parts that share a place act in the order in which the settings list them. `part("name")` makes a part known under a name;
`registry` finds it there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from ..kernels.code import SparseCode
from ..kernels.numerics import sum_by
from .config import Config, SAEConfig
from .errors import UserError
from .masks import PositionMask
from .registry import find, register
from .sae import SparseAutoencoder


class PartSettings(Config):
    """Settings of a part. The defaults go into `config.yaml`, the descriptions into `temposae config --explain`.

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
    """Tokens [N] of rows of text, row after row in order of position, as [R, L] and back.

    `number` int64 [N]: which row each is of, from 0 on without gaps; `pos` int64 [N]: its column. L is the largest position
    + 1. Columns without a token (padding, what filters left out) hold zeros.
    """

    number: Tensor
    pos: Tensor

    @classmethod
    def of(cls, pos: Tensor) -> "RowLayout":
        """From positions alone: a row begins where they don't rise. Raises UserError where fewer than half of the steps are
        to the next position, as they are in rows."""
        pos = pos.long()
        step = pos.diff()
        if len(step) > 1 and int((step == 1).sum()) * 2 < len(step):
            raise UserError(
                f"pos: these {len(pos)} tokens are not in the order of their rows; a dictionary that looks along a row "
                "needs whole rows, one after the other (stream.mode sequences)"
            )
        return cls(torch.cat([pos.new_zeros(1), (step <= 0).long()]).cumsum(0), pos)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """R, L. Waits for the device."""
        return int(self.number[-1]) + 1, int(self.pos.max()) + 1

    @cached_property
    def at(self) -> Tensor:
        return self.number * self.shape[1] + self.pos

    @cached_property
    def kept(self) -> Tensor:
        """bool [R, L]: where there is a token."""
        has_token = torch.zeros(self.shape, dtype=torch.bool, device=self.pos.device)
        has_token.view(-1)[self.at] = True
        return has_token

    def spread(self, value: Tensor) -> Tensor:
        """[N, ...] -> [R, L, ...]. Differentiable."""
        rows, length = self.shape
        grid = value.new_zeros(rows * length, *value.shape[1:])
        return grid.index_copy(0, self.at, value).unflatten(0, (rows, length))

    def gather(self, value: Tensor) -> Tensor:
        """[R, L, ...] -> [N, ...]"""
        return value.flatten(0, 1).index_select(0, self.at)


class ComposedDictionary(Protocol):
    """What a part sees of its dictionary; see `composed.ComposedAutoencoder`. W_enc [D, F], W_dec [F, d_out], b_enc [F],
    b_dec [d_out]; x * unit is in the units of training."""

    cfg: SAEConfig
    k: int
    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    mask: PositionMask
    unit: Tensor

    def latents_of(self, x: Tensor, pos: Tensor) -> Tensor: ...


@dataclass
class BatchView:
    """A batch as parts see it, in the units that training scales activations to: |x| about sqrt(D).

    x [N, D], pos int64 [N] in [0, n_positions); `target` [N, d_out], x itself unless it is a transcoder; `progress`: where
    in the run this is, from 0 to 1; 1 outside of training. `row` [N] of the text, `attribute` int64 [N] (0 or 1, see
    `ActivationStream.attribute`) and `second` [N, D], the activations at `stream.second`, are there in training for parts
    that read them. Filled in on the way: `acts` [N, F] before the mask, `f` [N, F] as it is decoded, with topk and batchtopk
    the same as a `code`, `residual` [N, d_out] = target - x_hat, `squared_error` and `l1` [n_positions], sums as in
    `kernels.loss`, and `weights` [n_positions], those on the squared error, if there are any. A part may set `penalised`
    [N, F], the activations whose L1 counts in place of f's.
    """

    sae: ComposedDictionary
    x: Tensor
    pos: Tensor
    n_positions: int
    progress: float = 1.0
    training: bool = False
    step: int = 0
    seed: int = 0
    target: Tensor | None = None
    row: Tensor | None = None
    attribute: Tensor | None = None
    second: Tensor | None = None
    acts: Tensor | None = None
    f: Tensor | None = None
    code: SparseCode | None = None
    penalised: Tensor | None = None
    residual: Tensor | None = None
    squared_error: Tensor | None = None
    l1: Tensor | None = None
    l0: Tensor | None = None
    count: Tensor | None = None
    weights: Tensor | None = None
    drawn: int = field(default=0, repr=False)

    @cached_property
    def rows(self) -> RowLayout:
        """How the tokens lie in rows."""
        if self.row is None:
            return RowLayout.of(self.pos)
        return RowLayout(torch.cat([self.row.new_zeros(1), (self.row.diff() != 0).long()]).cumsum(0), self.pos)

    @torch.no_grad()
    def summed(self, weight: Tensor) -> Tensor:
        """sum_j f_nj weight_j [N], float32, for weight [F]; of a code where there is nothing [N, F]."""
        if self.f is not None:
            return self.f.float() @ weight.float()
        assert self.code is not None
        entries = self.code.live(self.code.values.float() * weight[self.code.live(self.code.indices)])
        return sum_by(self.code.rows.flatten(), entries.flatten(), self.code.n_tokens)

    def generator(self) -> torch.Generator:
        """Random numbers on the CPU, others each time, that follow from the run's seed and the step."""
        self.drawn += 1
        return torch.Generator().manual_seed(((self.seed * 1_000_003 + self.step) * 64 + self.drawn % 64) % 2**63)


class Part(nn.Module):
    """A mechanism. Every method here does nothing; a part overrides those that it is about.

    Shapes and units are those of `BatchView`. What `acts` and `latents` return is never negative, and float32. `reads`: what
    it needs in training besides x and pos: "rows" (whole rows, stream.mode sequences; outside of training, too),
    "attribute", "second"; "f" for `batch.acts` and `batch.f`. `paces`: factors on the learning rate of its own parameters,
    by name. `is_alone`: at most one of its kind. `part` shows one, docs/guides/parts.md all of the way.

        @part("half")
        class Half(Part): ...
    """

    kind: ClassVar[str]
    reads: ClassVar[frozenset[str]] = frozenset()
    is_alone: ClassVar[bool] = True

    Settings: ClassVar[type[PartSettings]] = PartSettings

    def __init__(self, settings: Any, sae: SAEConfig, positions: int, generator: torch.Generator):
        super().__init__()
        self.settings, self.cfg, self.positions = settings, sae, positions
        self.paces: Mapping[str, float] = {}

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        """Raise ValueError("field: ...") for settings that don't go with the dictionary's; a field of either."""

    def initialise(self, sae: SparseAutoencoder, generator: torch.Generator) -> None:
        """Change how the dictionary's weights begin."""

    def input(self, x: Tensor, batch: BatchView) -> Tensor:
        """What the encoder gets in place of x [N, D]."""
        return x

    def pre(self, pre: Tensor, batch: BatchView) -> Tensor:
        """Pre-activations [N, F]."""
        return pre

    def acts(self, acts: Tensor, batch: BatchView) -> Tensor:
        """Activations [N, F] before the mask."""
        return acts

    def latents(self, f: Tensor, batch: BatchView) -> Tensor:
        """Activations [N, F] after the mask, before topk and batchtopk select."""
        return f

    def weigh(self, batch: BatchView) -> tuple[Tensor | None, Tensor | None]:
        """Factors by position [n_positions] on the squared error and on L1; None for 1."""
        return None, None

    def penalty(self, batch: BatchView) -> Tensor | None:
        """A term of the loss, in units of |x|^2 ~ D, the squared error of a token."""
        return None

    def after(self, batch: BatchView) -> None:
        """Look at a step that was just taken, without gradients."""

    def report(self) -> dict[str, Any]:
        """Figures for a line of metrics."""
        return {}

    def does(self, hook: str) -> bool:
        """Whether it has something to do in the method `hook`: it overrides it."""
        return getattr(type(self), hook) is not getattr(Part, hook)


P = TypeVar("P", bound=type[Part])


def part(kind: str) -> Callable[[P], P]:
    """Decorator: a part's name in settings. Raises UserError for a name that one of temposae's own parts has.

    @part("half")
    class Half(Part):
        def acts(self, acts: Tensor, batch: BatchView) -> Tensor:
            return acts / 2
    """

    def named(cls: P) -> P:
        register(kind, cls)
        return cls

    return named


def build(sae: SAEConfig, generator: torch.Generator) -> list[Part]:
    """The parts of a dictionary; positions are those that its mask's settings name."""
    parts = []
    for part_settings in sae.parts:
        cls = cast(type[Part], find(part_settings["kind"]))
        parts.append(cls(cls.Settings(**part_settings), sae, sae.mask.positions, generator))
    return parts
