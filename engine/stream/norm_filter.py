"""Find massive activations and leave them out.

In most language models a few tokens, often the first of a row and delimiters, have activations tens to hundreds of
times as large as the rest (Sun et al., arXiv 2402.17762). They serve attention as sinks and are nearly constant. One
token in a hundred can hold 99% of the variance. A dictionary trained on them learns little else, and its explained
variance says nothing about ordinary text.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..process.progress import percent
from .buffer import with_prefix

MULTIPLE, SIGMAS = 4.0, 6.0  # of the automatic limit
SAMPLE = 1024  # least number of tokens to find limits from, if there are as many
SMALLEST, LARGEST = 1e-15, 1e15  # allowed mean norms, so that sums of squares fit in float32
LOOKED_AT = 4096  # tokens to estimate a mean norm from
ALIKE = 1e-6  # largest difference between values, relative to the largest value, that counts as no variation
NO_VARIANCE = 1e-12  # variance relative to the squared norm below which it is only rounding error
_NAMED = 5  # positions listed in a message


class NormFilter:
    """Detects and counts massive activations.

    A token is massive if |x| > limit at any hook. With `max_norm="auto"`, over a sample of tokens,

        limit = median * max(4, exp(6 sigma)),    sigma = 1.4826 * median |log |x| - log median|

    sigma is a robust estimate of the spread of log |x|, so a hook with widely spread norms loses nothing. A number sets
    limit = max_norm * median, and None turns the filter off. Limits are computed once and stored with the run, so
    training and evaluation use the same tokens.
    """

    def __init__(self, max_norm: float | Literal["auto"] | None):
        self.max_norm = max_norm
        self.medians: dict[str, float] = {}
        self.limits: dict[str, float] = {}
        self.tokens = self.massive = 0  # counts so far
        self.positions: Counter[int] = Counter()  # of massive tokens
        self.variance_share: dict[str, float] = {}  # of massive tokens in the sample, by hook

    def knows(self, hooks: Iterable[str]) -> bool:
        """Whether all of these hooks have limits, or the filter is off."""
        return self.max_norm is None or all(hook in self.limits for hook in hooks)

    def calibrate(self, acts: Mapping[str, Tensor]) -> Tensor:
        """Compute missing limits from a sample of activations [n, D]. Returns a mask [n] of its ordinary tokens."""
        for hook, x in acts.items():
            if self.max_norm is None or hook in self.limits:
                continue
            check_scale(x, hook, median=True)
            norm = _norms(x)
            norm = norm[norm.isfinite()] if bool(norm.isfinite().any()) else torch.zeros(1)
            median = norm.median()
            sigma = 1.4826 * (norm.clamp_min(1e-30).log() - median.clamp_min(1e-30).log()).abs().median()
            multiple = max(MULTIPLE, math.exp(min(SIGMAS * float(sigma), 60)))
            self.medians[hook] = float(median)
            self.limits[hook] = float(median) * (multiple if self.max_norm == "auto" else float(self.max_norm))
        ordinary = self.ordinary(acts)
        for hook, x in acts.items():
            total_spread, ordinary_spread = _spread(x), _spread(x[ordinary])
            self.variance_share[hook] = 1 - ordinary_spread / total_spread if total_spread > 0 else 0.0
        return ordinary

    def ordinary(self, acts: Mapping[str, Tensor]) -> Tensor:
        """Mask [...] of the tokens of activations [..., D] that are not massive. Non-finite activations count as
        ordinary, so that they are reported where they are read."""
        first = next(iter(acts.values()))
        is_ordinary = torch.ones(first.shape[:-1], dtype=torch.bool, device=first.device)
        if self.max_norm is not None:
            for hook, x in acts.items():
                norm = _norms(x)
                massive = norm > self.limits[hook]
                if not bool(norm.isfinite().all()):  # a norm may overflow where no value does
                    massive &= x.isfinite().all(-1)
                is_ordinary &= ~massive
        return is_ordinary

    def count(self, tokens: int, positions: Tensor) -> None:
        """Add `tokens` tokens to the counts, with massive ones at these positions [m]."""
        self.tokens += tokens
        self.massive += len(positions)
        self.positions.update(positions.tolist())

    def report(self) -> dict[str, Any] | None:
        """Limits by hook, and the share and positions of massive tokens so far; None if the filter is off.

        `variance_share` is the share of the sample's variance that is due to massive tokens."""
        if self.max_norm is None or not self.limits:
            return None
        position_counts = dict(sorted(self.positions.items(), key=lambda item: (-item[1], item[0])))
        return {
            "max_norm": self.max_norm,
            "median": dict(self.medians),
            "limit": dict(self.limits),
            "tokens": self.tokens,
            "massive": self.massive,
            "share": self.massive / max(1, self.tokens),
            "variance_share": dict(self.variance_share),
            "positions": {str(position): count for position, count in position_counts.items()},
        }

    def state(self) -> dict[str, Tensor]:
        position_counts = torch.tensor(sorted(self.positions.items()), dtype=torch.int64).reshape(-1, 2)
        state = {"norms.counts": torch.tensor([self.tokens, self.massive]), "norms.positions": position_counts}
        for hook, limit in self.limits.items():
            values = (self.medians[hook], limit, self.variance_share.get(hook, 0.0))
            state[f"norms.hook.{hook}"] = torch.tensor(values, dtype=torch.float64)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if "norms.counts" not in state:  # runs of early versions, which did not filter by default
            return
        self.tokens, self.massive = state["norms.counts"].tolist()
        self.positions = Counter(dict(state["norms.positions"].tolist()))
        for hook, value in with_prefix(state, "norms.hook.").items():
            self.medians[hook], self.limits[hook], self.variance_share[hook] = value.tolist()

    def load_report(self, report: Mapping[str, Any] | None) -> None:
        """Restore the limits and counts of a `report`."""
        if report is not None and report["max_norm"] == self.max_norm:
            self.medians.update(report["median"])
            self.limits.update(report["limit"])
            self.variance_share.update(report["variance_share"])
            self.tokens, self.massive = report["tokens"], report["massive"]
            self.positions = Counter({int(position): count for position, count in report["positions"].items()})


def check_scale(x: Tensor, hook: str, *, median: bool = False) -> None:
    """Raise UserError if the mean (or median) norm of activations [N, D] is too large or small to square in float32."""
    norm = torch.linalg.vector_norm(x[:: -(-len(x) // LOOKED_AT) or 1], dim=-1, dtype=torch.float64)
    norm = norm[norm.isfinite()]
    typical = float(norm.median() if median else norm.mean()) if len(norm) else 0.0
    if typical > 0 and not SMALLEST <= typical <= LARGEST:
        raise UserError(
            f"activations: a typical norm of {typical:.3g} at {hook} is not allowed; it must be between {SMALLEST:g} "
            f"and {LARGEST:g} (multiply them by a constant)"
        )


def check_variance(x: Tensor, hook: str) -> None:
    """Raise UserError if activations [N, D] are all equal."""
    if not len(x):
        return
    first = x[:1].float()
    tolerance = ALIKE * float(first.abs().max())
    if all(float((chunk.float() - first).abs().max()) <= tolerance for chunk in x.split(LOOKED_AT)):
        raise UserError(
            f"activations: those at {hook} don't vary, all {len(x):,} tokens that were checked have the same one; "
            "there is nothing to learn"
        )


def has_variance(spread: float, squares: float) -> bool:
    """Whether a sum of squared distances from the mean exceeds rounding error, given the sum of squared norms."""
    return spread > NO_VARIANCE * squares


def describe(report: Mapping[str, Any] | None) -> str | None:
    """Summarise a `NormFilter.report` in a sentence; None if nothing was left out."""
    if not report or not report["massive"]:
        return None
    hooks = list(report["limit"])
    limits = ", ".join(
        f"{report['limit'][hook]:.4g} ({report['limit'][hook] / report['median'][hook]:.3g} x the median)"
        + (f" at {hook}" if len(hooks) > 1 else "")
        for hook in hooks
    )
    position_counts = list(report["positions"].items())
    named_positions = ", ".join(
        f"{position} ({count / report['massive']:.0%})" for position, count in position_counts[:_NAMED]
    )
    more = f" and {len(position_counts) - _NAMED} more" if len(position_counts) > _NAMED else ""
    variance_share = max(report["variance_share"].values(), default=0.0)
    variance = f", which hold {variance_share:.1%} of the variance," if variance_share > 0.005 else ""
    return (
        f"massive activations: {report['massive']:,} of {report['tokens']:,} tokens ({percent(report['share'])})"
        f"{variance} are left out: norm above {limits}; at positions {named_positions}{more} (stream.max_norm)"
    )


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


def _spread(x: Tensor) -> float:
    """Sum of squared distances of x [n, D] from their mean."""
    x = x.double()
    return float((x - x.mean(0)).square().sum()) if len(x) else 0.0
