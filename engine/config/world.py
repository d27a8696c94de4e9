"""Settings of a synthetic world, whose features are known."""

from typing import Annotated

from pydantic import Field, model_validator

from ..setting_types import Config
from .base import Positions, Share

Seed = Annotated[int, Field(ge=0, lt=2**62)]


class WorldConfig(Config):
    """Settings of a synthetic world: activations x = sum_i a_i d_i + b with known directions d_i [features, width] and
    sparse coefficients a_i >= 0. The defaults are the world of SynthSAEBench (arXiv 2602.14687), without positions.

        WorldConfig(features=1024, width=96, roots=8)
    """

    SECTION = "stream.world"

    features: int = Field(default=16384, ge=2, le=2**20, description="Number of features.")
    width: int = Field(default=768, ge=1, le=2**16, description="D, the width of the activations.")
    firing_exponent: float = Field(
        default=0.5, ge=1e-3, le=10, description="Feature i fires at a rate that falls like i^-firing_exponent."
    )
    firing_max: float = Field(default=0.4, ge=1e-6, le=0.9, description="Firing rate of the most frequent feature.")
    firing_min: float = Field(default=5e-4, ge=1e-9, le=0.9, description="Firing rate of the rarest feature.")
    roots: int = Field(
        default=128,
        ge=0,
        lt=2**31,
        description="Number of trees of features. A child fires only where its parent does. 0: no hierarchy.",
    )
    branching: int = Field(default=4, ge=2, le=1024, description="Children of a parent.")
    depth: int = Field(default=3, ge=1, le=16, description="Levels of a tree below its root.")
    exclusive: Share = Field(default=1.0, description="Share of parents of which only one child fires at a time.")
    scale_by_parent: bool = Field(
        default=True, description="Multiply a child's coefficient by its parent's, over the parent's mean."
    )
    compensate: bool = Field(
        default=True, description="Raise the rates of children, so that the hierarchy hardly lowers them."
    )
    correlation_rank: int = Field(default=25, ge=1, le=1024, description="Rank of the features' correlations.")
    correlation_scale: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Standard deviation of the entries of the correlations' factor. 0: features are independent.",
    )
    magnitude_first: float = Field(default=5.0, gt=0, le=1e6, description="Mean coefficient of the first feature.")
    magnitude_last: float = Field(default=4.0, gt=0, le=1e6, description="Mean coefficient of the last feature.")
    spread_mean: float = Field(
        default=0.5,
        ge=0,
        le=1e6,
        description="A feature's coefficients have the standard deviation |N(spread_mean, spread_std^2)|.",
    )
    spread_std: float = Field(default=0.5, ge=0, le=1e6, description="See spread_mean.")
    bias: float = Field(default=0.5, ge=0, le=1e6, description="Norm of the bias b.")
    orthogonal_steps: int = Field(
        default=100, ge=0, le=10**5, description="Steps of Adam that make the directions more orthogonal."
    )
    seed: Seed = Field(default=42, description="Seed of the world. The seed of its samples is train.seed.")
    positions: Positions = Field(
        default=1, description="T, the number of positions in a row. 1: samples are independent."
    )
    lasting: Share = Field(
        default=0.0,
        description="Share of features that last: each is an on/off Markov chain over positions. This and the next three "
        "are shares of the features without a parent. The rest are plain, independent from one position to the next.",
    )
    positional: Share = Field(default=0.0, description="Share of features that fire only in an interval of positions.")
    order: Share = Field(
        default=0.0,
        description="Share of features in groups of four: two events a and b, and two features that fire at b up to "
        "`reach` positions after a, and at a up to `reach` positions after b.",
    )
    context: Share = Field(
        default=0.0, description="Share of features whose rate follows a context variable that changes slowly."
    )
    duration_min: float = Field(
        default=2.5, ge=1, le=1e6, description="Mean number of positions for which the shortest feature lasts."
    )
    duration_max: float = Field(default=16.0, ge=1, le=1e6, description="The same for the longest.")
    intervals: Positions = Field(
        default=4, description="Number of equal intervals of positions that positional features fire in."
    )
    reach: Positions = Field(default=4, description="Positions over which the order of two events counts.")
    context_duration: float = Field(
        default=32.0, gt=0, le=1e6, description="Positions over which the context's correlation falls to 1/e."
    )
    context_strength: Share = Field(
        default=0.7, description="Correlation of a feature's latent variable with the context variable."
    )

    @model_validator(mode="after")
    def _check(self) -> "WorldConfig":
        def at_most(name: str, other: str) -> None:
            value, limit = getattr(self, name), getattr(self, other)
            if value > limit:
                raise ValueError(f"{name}: {value} is not allowed; it must be at most {other} ({limit})")

        at_most("roots", "features")
        at_most("firing_min", "firing_max")
        at_most("duration_min", "duration_max")
        shares = {name: getattr(self, name) for name in ("lasting", "positional", "order", "context")}
        for name, share in shares.items():
            if share > 0 and self.positions == 1:
                raise ValueError(f"{name}: {share} is not allowed with positions 1; positions must be at least 2")
        if (total := sum(shares.values())) > 1 + 1e-9:
            raise ValueError(
                f"order: {self.order} is not allowed; {' + '.join(shares)} is {total:g} and must be at most 1"
            )
        if self.positional > 0:
            at_most("intervals", "positions")
        return self
