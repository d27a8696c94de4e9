"""Differences between the runs of a campaign, paired by seed: of each run from its baseline, and between runs that the logs
compare.

A run's baseline is the plain dictionary of its activation in the same condition. With d_s the difference of a score at seed
s, for the n >= 2 seeds that both runs have:

    mean d ± t(0.975, n - 1) sd(d) / sqrt(n)         the 95% interval, with Student's t, for d taken as normal
    p_holm(i) = max over j <= i of (m - j + 1) p(j)  Holm's correction, p(1) <= p(2) <= ... of the m comparisons of a score

A difference is *significant* if p_holm <= 0.05. The chance of even one false claim about a score is then at most 5%, however
its comparisons depend on each other (they share baselines). Explained variance and CE recovered rise with L0 by themselves.
In these, a run with clearly more active latents is never better, and one with clearly fewer never worse. The intervals are
over seeds on the same text. They say nothing about other text.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import UserError
from .documented.strictness import STRICTNESS
from .results import SCORES

LEVEL = 0.05
ALIKE = 1.1  # two dictionaries whose L0 differ by at most this factor count as equally sparse
RISE_WITH_L0 = ("explained_variance", "ce_recovered")
#: the scores that are compared: not L0, which is set, nor agreement with the baseline, which is 1 for the baseline
COMPARED = tuple(name for name in SCORES if name != "l0" and not name.startswith("agreement"))

NO_DIFFERENCE = "no detectable difference"
VERDICTS = ("better", "worse", "more", "less", NO_DIFFERENCE)

Run = Mapping[str, Any]  # an entry of campaign.json


@dataclass(frozen=True)
class Difference:
    """A score of `run` minus that of `other`, by their names in campaign.json.

    `values` are by seed. `half` is half the width of the interval, `p` uncorrected, `tested` the number of comparisons that
    `p_holm` is corrected for. `sign` is 1 or -1 for a significant difference. Otherwise it is 0, and `why` is the reason.
    """

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
        """One of `VERDICTS`: better or worse; more or less for a score where neither is better."""
        if not self.sign:
            return NO_DIFFERENCE
        good, bad = ("better", "worse") if SCORES[self.score].better else ("more", "less")
        return good if self.sign * (SCORES[self.score].better or 1) > 0 else bad


def against_baselines(campaign: Mapping[str, Any]) -> dict[str, list[Difference]]:
    """The differences of every run from its baseline, by score. Runs in `repeated` are left out."""
    same = repeated(campaign)
    pairs = [(name, baseline_of(run, campaign)) for name, run in campaign["runs"].items() if name not in same]
    return compare(campaign, [(name, other) for name, other in pairs if other is not None])


def compare(campaign: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> dict[str, list[Difference]]:
    """The differences of these pairs of runs or baselines, by score, corrected for the number of pairs that have it."""
    all_runs, compared = campaign["baselines"] | campaign["runs"], dict[str, list[Difference]]()
    for score in COMPARED:
        differences = [d for pair in pairs if (d := _difference(score, *pair, all_runs)) is not None]
        p_holm = holm([d.p for d in differences if d.p is not None])
        remaining = iter(p_holm)
        judged = [d if d.p is None else _judged(d, next(remaining), len(p_holm), all_runs) for d in differences]
        compared |= {score: judged} if judged else {}
    return compared


def baseline_of(run: Run, campaign: Mapping[str, Any]) -> str | None:
    """The name of the plain dictionary with a run's activation and condition. Strictness of masks does not count."""
    condition = strictness(run["condition"])[1]
    kinds = {
        name: baseline["run"]
        for name, baseline in campaign["baselines"].items()
        if (baseline["condition"], baseline["activation"]) == (condition, run["activation"])
    }
    return next((name for name, kind in kinds.items() if kind == run["activation"]), next(iter(kinds), None))


def strictness(condition: str) -> tuple[str | None, str]:
    """The strictness of masks in a condition, if it names one, and the rest of the condition."""
    level, _, rest = condition.partition("_")
    return (level, rest) if level in STRICTNESS else (None, condition)


def repeated(campaign: Mapping[str, Any]) -> dict[str, str]:
    """The runs that repeat another's numbers, with the name of that run. They are counted once.

    These are analyses, and runs with the same scores to five digits because a condition makes their settings the same.
    """
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    for name, run in sorted(campaign["runs"].items(), key=lambda item: bool(item[1]["trained_as"])):
        keys: list[Any] = [tuple(run["folders"])]
        if run["scores"]:
            keys.append(
                tuple((score, *map(_rounded, run["scores"][score]["values"])) for score in sorted(run["scores"]))
            )
        original = next((first[key] for key in keys if key in first), None)
        if original is not None:
            same[name] = original
        first |= {key: name for key in keys if key not in first}
    return {name: same[name] for name in campaign["runs"] if name in same}  # in the order of the runs


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.4e}"


def by_seed(run: Run, score: str) -> dict[int, float]:
    """A score by seed, for the seeds that did not fail and have it."""
    failed = run["failed"] or {}
    seeds = [seed for seed, folder in enumerate(run["folders"]) if Path(folder).name not in failed]
    values = run["scores"].get(score, {}).get("values", [])
    return {seed: value for seed, value in zip(seeds, values, strict=False) if value is not None}


def mean(run: Run, score: str, *, control: bool = False) -> float | None:
    """The mean over seeds of a run's score, or of its random control's."""
    summary = run["scores"].get(score) or {}
    return (summary.get("random") or {}).get("mean") if control else summary.get("mean")


def l0_apart(run: Run, other: Run) -> int:
    """1 if clearly more latents are active in `run` than in `other`, -1 if clearly fewer, else 0."""
    l0, other_l0 = mean(run, "l0"), mean(other, "l0")
    return 0 if l0 is None or other_l0 is None else (l0 > other_l0 * ALIKE) - (other_l0 > l0 * ALIKE)


def _difference(score: str, run: str, other: str, all_runs: Mapping[str, Run]) -> Difference | None:
    own, others = by_seed(all_runs[run], score), by_seed(all_runs[other], score)
    values = tuple(own[seed] - others[seed] for seed in own if seed in others)
    if not values:
        return None
    difference = Difference(score, run, other, values)
    if len(values) == 1:
        return replace(difference, why="one seed")
    rounding = 1e-9 * max(map(abs, own.values()))
    if statistics.stdev(values) <= rounding:  # no spread to compare the mean with
        same = max(map(abs, values)) <= rounding
        return replace(difference, why="no difference with any seed" if same else "the same difference with every seed")
    half, p = student(values)
    return replace(difference, half=half, p=p)


def student(values: Sequence[float]) -> tuple[float, float]:
    """Half the width of the 95% interval of the mean of two values or more, and p of the mean being 0. Raises UserError
    without scipy."""
    try:
        from scipy.stats import ttest_1samp
    except ModuleNotFoundError:
        raise UserError(
            "report: scipy is missing; pip install 'temposae[evals]', then run temposae plot on the campaign's folder"
        ) from None
    test = ttest_1samp(values, 0)
    low, high = test.confidence_interval(1 - LEVEL)
    return float(high - low) / 2, float(test.pvalue)  # pyright: ignore[reportAttributeAccessIssue]


def holm(ps: Sequence[float]) -> list[float]:
    """p-values by Holm's correction for their number, in their order."""
    order = np.argsort(ps, kind="stable")
    corrected = np.zeros(len(ps))
    factors = len(ps) - np.arange(len(ps))
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, factors * np.array(ps)[order]))
    return corrected.tolist()


def _judged(difference: Difference, p_holm: float, tested: int, all_runs: Mapping[str, Run]) -> Difference:
    difference = replace(difference, p_holm=p_holm, tested=tested)
    assert difference.p is not None
    if p_holm > LEVEL:
        return replace(difference, why="0 is in its interval" if difference.p > LEVEL else "not after correction")
    sign = 1 if difference.mean > 0 else -1
    if difference.score in RISE_WITH_L0 and l0_apart(all_runs[difference.run], all_runs[difference.other]) == sign:
        return replace(difference, why=f"{'more' if sign > 0 else 'fewer'} latents are active")
    return replace(difference, sign=sign)
