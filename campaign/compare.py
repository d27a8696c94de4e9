"""Differences between the runs of a campaign, seed by seed: of each run from the plain baseline of its activation in the
same condition, and of runs that the logs set against each other.

With d_s the score of one less the other's at seed s, for the n >= 2 seeds that both have:

    mean d ± t(0.975, n - 1) sd(d) / sqrt(n)         the 95% interval, with Student's t, for d taken as normal
    p_holm(i) = max over j <= i of (m - j + 1) p(j)  Holm's correction, p(1) <= p(2) <= ... of the m comparisons of a score

A difference is *told* where p_holm <= 0.05: then the chance of even one false claim about a score is 5% at most, however its
comparisons hang together (and they do: they share baselines). Explained variance and CE recovered rise with L0 by
themselves: there a run with clearly more latents active is never told to be better, nor one with clearly fewer to be worse.
The intervals are over seeds, on the same text: they say nothing of other text.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..engine.errors import UserError
from ..variants.strictness import STRICTNESS
from .results import SCORES

LEVEL = 0.05
ALIKE = 1.1  # L0 of two dictionaries whose ratio is at most this is taken as the same
RISE_WITH_L0 = ("explained_variance", "ce_recovered")
#: what is compared: not L0, which is set, nor retention, of which the baseline has 1 because it is the reference
COMPARED = tuple(name for name in SCORES if name not in ("l0", "retention"))

Run = Mapping[str, Any]  # of campaign.json


@dataclass(frozen=True)
class Difference:
    """A score of `run` less that of `other`, by their names in campaign.json: `values` by seed, their mean, and half the
    width of its interval. `sign`: 1 or -1 where the difference is told, else 0, and then `why` not. `tested`: m."""

    score: str
    run: str
    other: str
    values: tuple[float, ...]
    half: float | None = None
    p: float | None = None
    p_holm: float | None = None
    tested: int = 0
    sign: int = 0
    why: str = ""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def verdict(self) -> str:
        """helped or hurt; of scores of which neither more nor less is better, rose or fell; open where it isn't told."""
        if not self.sign:
            return "open"
        good, bad = ("helped", "hurt") if SCORES[self.score].better else ("rose", "fell")
        return good if self.sign * (SCORES[self.score].better or 1) > 0 else bad


def against_baselines(found: Mapping[str, Any]) -> dict[str, list[Difference]]:
    """By score, every run that stands for itself against its baseline, of what was measured of both."""
    runs = {name: run for name, run in found["runs"].items() if name not in repeated(found)}
    pairs = [(name, other) for name, run in runs.items() if (other := baseline_of(run, found)) is not None]
    return compare(found, pairs)


def compare(found: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> dict[str, list[Difference]]:
    """By score, the differences of these pairs of runs or baselines that have it, corrected for their number."""
    every = found["baselines"] | found["runs"]
    differences = {
        score: [one for run, other in pairs if (one := _difference(score, run, other, every)) is not None]
        for score in COMPARED
    }
    return {score: _told(ones, every) for score, ones in differences.items() if ones}


def baseline_of(run: Run, found: Mapping[str, Any]) -> str | None:
    """The name of the plain dictionary with a run's activation in its condition; how strict a mask is, it doesn't know."""
    at = strictness(run["condition"])[1]
    fits = {
        name: one["run"]
        for name, one in found["baselines"].items()
        if (one["condition"], one["activation"]) == (at, run["activation"])
    }
    return next((name for name, kind in fits.items() if kind == run["activation"]), next(iter(fits), None))


def strictness(condition: str) -> tuple[str | None, str]:
    """How strict masks are in a condition, if it says so, and the rest of it."""
    how, _, rest = condition.partition("_")
    return (how, rest) if how in STRICTNESS else (None, condition)


def repeated(found: Mapping[str, Any]) -> dict[str, str]:
    """Runs that don't stand for themselves, by name, and whose numbers they have: analyses, and those that came out the same
    to five digits, since a condition makes their settings the same. They are counted once."""
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    for name, run in sorted(found["runs"].items(), key=lambda item: bool(item[1]["trained_as"])):
        keys: list[Any] = [tuple(run["folders"])]
        if run["scores"]:
            keys.append(
                tuple((score, *map(_rounded, run["scores"][score]["values"])) for score in sorted(run["scores"]))
            )
        known = next((first[key] for key in keys if key in first), None)
        if known is not None:
            same[name] = known
        first |= {key: name for key in keys if key not in first}
    return {name: same[name] for name in found["runs"] if name in same}  # in the order of the runs


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.4e}"


def by_seed(run: Run, score: str) -> dict[int, float]:
    """A score by seed, of the seeds that came through and have it."""
    failed = run["failed"] or {}
    seeds = [seed for seed, folder in enumerate(run["folders"]) if Path(folder).name not in failed]
    values = run["scores"].get(score, {}).get("values", [])
    return {seed: value for seed, value in zip(seeds, values, strict=False) if value is not None}


def mean(run: Run, score: str, *, control: bool = False) -> float | None:
    """The mean over seeds of a run's score, or of its random control's."""
    found = run["scores"].get(score) or {}
    return (found.get("random") or {}).get("mean") if control else found.get("mean")


def l0_apart(run: Run, other: Run) -> int:
    """1 where clearly more latents are active in `run` than in `other`, -1 where clearly fewer, else 0."""
    own, beside = mean(run, "l0"), mean(other, "l0")
    if own is None or beside is None or (own <= beside * ALIKE and beside <= own * ALIKE):
        return 0
    return 1 if own > beside else -1


def _difference(score: str, run: str, other: str, every: Mapping[str, Run]) -> Difference | None:
    own, beside = by_seed(every[run], score), by_seed(every[other], score)
    values = tuple(own[seed] - beside[seed] for seed in own if seed in beside)
    if not values:
        return None
    found = Difference(score, run, other, values)
    if len(values) == 1:
        return replace(found, why="one seed")
    spread = statistics.stdev(values)
    if spread <= 1e-9 * max(map(abs, own.values())):  # rounding apart, there is nothing to judge chance by
        same = max(map(abs, values)) <= 1e-9 * max(map(abs, own.values()))
        return replace(found, why="no difference with any seed" if same else "the same difference with every seed")
    half, p = student(found.mean, spread, len(values))
    return replace(found, half=half, p=p)


def student(mean: float, spread: float, n: int) -> tuple[float, float]:
    """Half the width of the 95% interval of a mean of n values with this standard deviation, and p of its being 0. Raises
    UserError without scipy."""
    try:
        from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats has the same, and takes a second to import
    except ModuleNotFoundError:
        raise UserError(
            "report: intervals need scipy; pip install 'temposae[evals]', then temposae plot on the campaign's folder"
        ) from None
    error = spread / math.sqrt(n)
    return float(stdtrit(n - 1, 1 - LEVEL / 2) * error), float(2 * stdtr(n - 1, -abs(mean) / error))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected by Holm's method for being so many, in their order."""
    corrected, most = [0.0] * len(ps), 0.0
    for rank, at in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        most = corrected[at] = max(most, min(1.0, (len(ps) - rank) * ps[at]))
    return corrected


def _told(differences: Iterable[Difference], every: Mapping[str, Run]) -> list[Difference]:
    ones = list(differences)
    corrected = iter(holm([one.p for one in ones if one.p is not None]))
    tested = sum(one.p is not None for one in ones)
    return [one if one.p is None else _judged(one, next(corrected), tested, every) for one in ones]


def _judged(one: Difference, p_holm: float, tested: int, every: Mapping[str, Run]) -> Difference:
    one = replace(one, p_holm=p_holm, tested=tested)
    assert one.p is not None
    if p_holm > LEVEL:
        why = "0 is in its interval" if one.p > LEVEL else f"not after correction for {tested} comparisons"
        return replace(one, why=why)
    sign = 1 if one.mean > 0 else -1
    if one.score in RISE_WITH_L0 and l0_apart(every[one.run], every[one.other]) == sign:
        return replace(one, why=f"{'more' if sign > 0 else 'fewer'} latents are active")
    return replace(one, sign=sign)
