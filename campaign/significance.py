"""Differences between the runs of a campaign, seed by seed: of each run from the plain baseline of its activation in the
same condition, and of runs that the logs set against each other.

With d_s the score of one less the other's at seed s, for the n >= 2 seeds that both have:

    mean d ± t(0.975, n - 1) sd(d) / sqrt(n)         the 95% interval, with Student's t, for d taken as normal
    p_holm(i) = max over j <= i of (m - j + 1) p(j)  Holm's correction, p(1) <= p(2) <= ... of the m comparisons of a score

A difference is *significant* where p_holm <= 0.05. Then the chance of even one false claim about a score is 5% at most,
however its comparisons depend on each other (they share baselines). Explained variance and CE recovered rise with L0 by
themselves. There a run with clearly more latents active is never better, and one with clearly fewer never worse. The
intervals are over seeds, on the same text. They say nothing about other text.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..engine.errors import UserError
from .documented.strictness import STRICTNESS
from .results import SCORES

LEVEL = 0.05
ALIKE = 1.1  # L0 of two dictionaries whose ratio is at most this is taken as the same
RISE_WITH_L0 = ("explained_variance", "ce_recovered")
#: what is compared: not L0, which is set, nor retention, of which the baseline has 1 because it is the reference
COMPARED = tuple(name for name in SCORES if name not in ("l0", "retention"))

NO_DIFFERENCE = "no detectable difference"
VERDICTS = ("better", "worse", "more", "less", NO_DIFFERENCE)

Run = Mapping[str, Any]  # of campaign.json


@dataclass(frozen=True)
class Difference:
    """A score of `run` less that of `other`, by their names in campaign.json: `values` by seed, their mean, and half the
    width of its interval. `sign`: 1 or -1 where the difference is significant, else 0, and then `why` not. `tested`: m."""

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
        """One of `VERDICTS`: better or worse, or more or less of a score of which neither is better."""
        if not self.sign:
            return NO_DIFFERENCE
        good, bad = ("better", "worse") if SCORES[self.score].better else ("more", "less")
        return good if self.sign * (SCORES[self.score].better or 1) > 0 else bad


def against_baselines(campaign: Mapping[str, Any]) -> dict[str, list[Difference]]:
    """By score, every run that stands for itself against its baseline, of what was measured of both."""
    runs = {name: run for name, run in campaign["runs"].items() if name not in repeated(campaign)}
    pairs = [(name, other) for name, run in runs.items() if (other := baseline_of(run, campaign)) is not None]
    return compare(campaign, pairs)


def compare(campaign: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> dict[str, list[Difference]]:
    """By score, the differences of these pairs of runs or baselines that have it, corrected for their number."""
    all_runs = campaign["baselines"] | campaign["runs"]
    differences = {score: [_difference(score, *pair, all_runs) for pair in pairs] for score in COMPARED}
    measured = {score: [d for d in several if d is not None] for score, several in differences.items()}
    return {score: _with_verdicts(several, all_runs) for score, several in measured.items() if several}


def baseline_of(run: Run, campaign: Mapping[str, Any]) -> str | None:
    """The name of the plain dictionary with a run's activation in its condition; how strict a mask is, it doesn't know."""
    condition = strictness(run["condition"])[1]
    fits = {
        name: baseline["run"]
        for name, baseline in campaign["baselines"].items()
        if (baseline["condition"], baseline["activation"]) == (condition, run["activation"])
    }
    return next((name for name, kind in fits.items() if kind == run["activation"]), next(iter(fits), None))


def strictness(condition: str) -> tuple[str | None, str]:
    """How strict masks are in a condition, if it says so, and the rest of it."""
    level, _, rest = condition.partition("_")
    return (level, rest) if level in STRICTNESS else (None, condition)


def repeated(campaign: Mapping[str, Any]) -> dict[str, str]:
    """Runs that don't stand for themselves, by name, and whose numbers they have: analyses, and those that came out the same
    to five digits, since a condition makes their settings the same. They are counted once."""
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    for name, run in sorted(campaign["runs"].items(), key=lambda item: bool(item[1]["trained_as"])):
        keys: list[Any] = [tuple(run["folders"])]
        if run["scores"]:
            keys.append(
                tuple((score, *map(_rounded, run["scores"][score]["values"])) for score in sorted(run["scores"]))
            )
        known = next((first[key] for key in keys if key in first), None)
        if known is not None:
            same[name] = known
        first |= {key: name for key in keys if key not in first}
    return {name: same[name] for name in campaign["runs"] if name in same}  # in the order of the runs


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
    figures = run["scores"].get(score) or {}
    return (figures.get("random") or {}).get("mean") if control else figures.get("mean")


def l0_apart(run: Run, other: Run) -> int:
    """1 where clearly more latents are active in `run` than in `other`, -1 where clearly fewer, else 0."""
    l0, other_l0 = mean(run, "l0"), mean(other, "l0")
    if l0 is None or other_l0 is None or (l0 <= other_l0 * ALIKE and other_l0 <= l0 * ALIKE):
        return 0
    return 1 if l0 > other_l0 else -1


def _difference(score: str, run: str, other: str, all_runs: Mapping[str, Run]) -> Difference | None:
    by_seed_of_run, by_seed_of_other = by_seed(all_runs[run], score), by_seed(all_runs[other], score)
    values = tuple(by_seed_of_run[seed] - by_seed_of_other[seed] for seed in by_seed_of_run if seed in by_seed_of_other)
    if not values:
        return None
    difference = Difference(score, run, other, values)
    if len(values) == 1:
        return replace(difference, why="one seed")
    spread = statistics.stdev(values)
    if spread <= 1e-9 * max(map(abs, by_seed_of_run.values())):  # rounding apart, there is nothing to judge chance by
        same = max(map(abs, values)) <= 1e-9 * max(map(abs, by_seed_of_run.values()))
        return replace(difference, why="no difference with any seed" if same else "the same difference with every seed")
    half, p = student(difference.mean, spread, len(values))
    return replace(difference, half=half, p=p)


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
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = corrected[index] = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
    return corrected


def _with_verdicts(differences: Iterable[Difference], all_runs: Mapping[str, Run]) -> list[Difference]:
    all_differences = list(differences)
    corrected = iter(holm([difference.p for difference in all_differences if difference.p is not None]))
    tested = sum(difference.p is not None for difference in all_differences)
    return [
        difference if difference.p is None else _judged(difference, next(corrected), tested, all_runs)
        for difference in all_differences
    ]


def _judged(difference: Difference, p_holm: float, tested: int, all_runs: Mapping[str, Run]) -> Difference:
    difference = replace(difference, p_holm=p_holm, tested=tested)
    assert difference.p is not None
    if p_holm > LEVEL:
        why = "0 is in its interval" if difference.p > LEVEL else "not after correction"
        return replace(difference, why=why)
    sign = 1 if difference.mean > 0 else -1
    if difference.score in RISE_WITH_L0 and l0_apart(all_runs[difference.run], all_runs[difference.other]) == sign:
        return replace(difference, why=f"{'more' if sign > 0 else 'fewer'} latents are active")
    return replace(difference, sign=sign)
