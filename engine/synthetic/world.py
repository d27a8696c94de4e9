"""The structure of a synthetic world: directions, firing rates, hierarchy, correlations and kinds of features.

The world and its constants are those of SynthSAEBench (Chanin and Garriga-Alonso, arXiv 2602.14687). SAELens 6.54.12
draws the same directions, rates, spreads and correlations from the same seed. The axis of positions is added here.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.code import SparseCode
from ..config.world import WorldConfig

KINDS = ("plain", "lasting", "positional", "order", "context")
LARGEST_SHARED = 0.99  # largest share of a feature's variance that the low-rank factor may have
MOST_OFTEN = 0.5  # largest rate of a positional feature in its interval
ORTHOGONAL_LR = 3e-4


@dataclass(frozen=True)
class TimeAxis:
    """How features without a parent depend on positions. Columns number these features.

    lasting, positional, context  int64, the columns of each kind
    events, ordered      int64 [P], columns: ordered[p] fires at events[p ^ 1] after events[p]; pairs are (2j, 2j + 1)
    duration             [lasting], mean number of positions that a feature stays on
    interval             [positional], in which of the intervals a feature fires
    sign                 [context], 1 or -1: the direction in which the context variable moves a feature
    """

    lasting: Tensor
    positional: Tensor
    context: Tensor
    events: Tensor
    ordered: Tensor
    duration: Tensor
    interval: Tensor
    sign: Tensor


class World:
    """Tensors of a synthetic world on `device`.

        x = sum_i a_i directions_i + bias        a_i = relu(N(mean_i, spread_i^2)) where feature i fires, else 0

    directions [features, D], bias [D]; rate, mean, spread [features]: a feature's own firing rate given that its parent
    fires, and its coefficients. Feature i fires where a Gaussian variable exceeds threshold_i. These variables have the
    correlations factor factor^T, with factor [features, rank] and independent parts of standard deviation `own`.

    Features 0 to roots - 1 are roots. The children of feature i < parents are roots + i * branching + 0, 1, ...; features
    from `tree_end` on are in no tree. `base` int64 lists the features without a parent. exclusive [parents].

        world = World(WorldConfig(features=1024, width=96, roots=8))
    """

    @torch.no_grad()
    def __init__(self, config: WorldConfig, device: str | torch.device = "cpu"):
        c = self.config = config
        self.device = torch.device(device)
        self.parents = c.roots * (c.branching**c.depth - 1) // (c.branching - 1)
        self.tree_end = min(c.features, c.roots + self.parents * c.branching)
        self.parents = min(self.parents, max(0, self.tree_end - c.roots + c.branching - 1) // c.branching)
        base = torch.cat([torch.arange(c.roots), torch.arange(self.tree_end, c.features)])
        exclusive = self._exclusive()
        zipf = self._zipf()
        rate = self._compensated(zipf, exclusive) if c.compensate else zipf
        factor = torch.randn(c.features, c.correlation_rank, generator=_drawn(c.seed + 4)) * c.correlation_scale
        shared = factor.square().sum(1)
        factor *= torch.where(shared > LARGEST_SHARED, (LARGEST_SHARED / shared.clamp_min(1e-30)).sqrt(), 1)[:, None]
        spread = (c.spread_mean + c.spread_std * torch.randn(c.features, generator=_drawn(c.seed + 1))).abs()
        draw = _drawn(c.seed)
        directions = functional.normalize(torch.randn(c.features, c.width, generator=draw), dim=1, eps=1e-8)
        bias = functional.normalize(torch.randn(c.width, generator=draw), dim=0, eps=1e-8) * c.bias
        self.time, self.kind = self._time_axis(base, zipf)
        self.base, self.exclusive, self.rate = base.to(device), exclusive.to(device), rate.to(device)
        self.factor, self.own = factor.to(device), (1 - factor.square().sum(1)).sqrt().to(device)
        self.threshold = exceeded(rate).to(device)
        self.mean = torch.linspace(c.magnitude_first, c.magnitude_last, c.features).to(device)
        self.spread, self.bias = spread.to(device), bias.to(device)
        self.directions = orthogonal(directions.to(device), c.orthogonal_steps)

    def activations(self, code: SparseCode) -> Tensor:
        """x [N, D] float32 of coefficients over N tokens."""
        assert code.offsets is not None
        x = functional.embedding_bag(
            code.indices.long(), self.directions, code.offsets[:-1], mode="sum", per_sample_weights=code.values
        )
        return x + self.bias

    def _zipf(self) -> Tensor:
        """Firing rates [features] from firing_max to firing_min, linear in rank^-exponent."""
        c = self.config
        power = torch.arange(1, c.features + 1, dtype=torch.float32) ** -c.firing_exponent
        return c.firing_min + (c.firing_max - c.firing_min) * (power - power[-1]) / (power[0] - power[-1])

    def _exclusive(self) -> Tensor:
        """Which parents have exclusive children: a share of those with at least two, bool [parents]."""
        c = self.config
        eligible = [i for i in range(self.parents) if min(self.tree_end - c.roots - i * c.branching, c.branching) >= 2]
        chosen = random.Random(c.seed + 3).sample(range(len(eligible)), int(len(eligible) * c.exclusive))
        exclusive = torch.zeros(self.parents, dtype=torch.bool)
        exclusive[[eligible[i] for i in chosen]] = True
        return exclusive

    def _compensated(self, zipf: Tensor, exclusive: Tensor) -> Tensor:
        """Rates given that the parent fires: rate / parent's rate, times 1 + the mean number of exclusive siblings that
        would fire too."""
        c, rate = self.config, zipf.clone()
        child = torch.arange(c.roots, self.tree_end)
        parent = (child - c.roots) // c.branching
        siblings = torch.zeros(self.parents).index_add_(0, parent, zipf[child])[parent] - zipf[child]
        rivals = torch.where(exclusive[parent], siblings.clamp_min(0) / zipf[parent], 0)
        rate[child] = (zipf[child] / zipf[parent] * (1 + rivals)).clamp_max(1)
        return rate

    def _time_axis(self, base: Tensor, zipf: Tensor) -> tuple[TimeAxis, Tensor]:
        """Draw a kind for every feature without a parent, so that each kind has frequent and rare features."""
        c, draw = self.config, _drawn(self.config.seed + 5)
        shuffled = torch.randperm(len(base), generator=draw)
        counts = [round(share * len(base)) for share in (c.lasting, c.positional, c.context, c.order)]
        lasting, positional, context, members, _ = (
            part.sort().values for part in shuffled.split([*counts, len(base) - sum(counts)])
        )
        pairs = len(members) // 4 * 2
        steps = torch.rand(len(lasting), generator=draw)
        duration = c.duration_min * (c.duration_max / c.duration_min) ** steps
        time = TimeAxis(
            lasting, positional, context, members[:pairs], members[pairs : 2 * pairs],
            # below 1 / (1 - rate) a chain would turn on more readily than it stays on
            duration=torch.maximum(duration, 1 / (1 - zipf[base[lasting]])),
            interval=torch.randint(c.intervals, (len(positional),), generator=draw),
            sign=2.0 * torch.randint(2, (len(context),), generator=draw) - 1,
        )  # fmt: skip
        kind = torch.zeros(c.features, dtype=torch.int64)
        for name in ("lasting", "positional", "context"):
            kind[base[getattr(time, name)]] = KINDS.index(name)
        kind[base[time.ordered]] = KINDS.index("order")
        return TimeAxis(**{name: value.to(self.device) for name, value in vars(time).items()}), kind.to(self.device)


def exceeded(rate: Tensor) -> Tensor:
    """The value that a standard Gaussian variable exceeds at `rate`."""
    return math.sqrt(2) * torch.erfinv(1 - 2 * rate)


def orthogonal(directions: Tensor, steps: int) -> Tensor:
    """Make unit rows V [n, D] more orthogonal by steps of Adam on sum_(i != j) (v_i . v_j)^2 + n sum_i (|v_i|^2 - 1)^2.

    The first sum is |V^T V|^2 - sum_i |v_i|^4, so that no n x n matrix is needed.
    """
    with torch.enable_grad():
        rows = directions.clone().requires_grad_()
        optimizer = torch.optim.Adam([rows], lr=ORTHOGONAL_LR)
        for _ in range(steps):
            optimizer.zero_grad()
            squares = rows.square().sum(1)
            overlap = (rows.T @ rows).square().sum() - squares.square().sum()
            (overlap + len(rows) * (squares - 1).square().sum()).backward()
            optimizer.step()
    return functional.normalize(rows.detach(), dim=1, eps=1e-8)


def _drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
