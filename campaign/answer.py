"""A campaign's answer: what helped, what hurt and what can't be told, in all, by log, as the logs asked, and by score."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evals.markdown_page import NOTHING, anchor, number, plain, table
from .questions import LOG_TITLES, MEANINGS, POSITIONAL
from .report_data import (
    ReportData,
    bullets,
    count,
    log_heading,
    names,
    nested,
    of_random,
    questions,
    reached,
    result_in,
    score_heading,
    signed,
)
from .results import SCORES, logs_of
from .significance import Difference, Run, baseline_of, mean

SLICING = "Static slicing"
MARK = "†"


def answer(findings: ReportData) -> list[str]:
    logs = logs_of(findings.found)
    about = {
        "Position-aware structure (logs A to C)": [log for log in logs if log in POSITIONAL],
        "The other mechanisms (logs D and E)": [log for log in logs if log not in POSITIONAL],
    }
    overall = bullets(_overall(what, which, findings) for what, which in about.items() if which)
    by_log = bullets(_of_log(log, runs, findings) for log, runs in logs.items())
    blocks = [overall, f"{MARK}: its random control is as good." if MARK in overall else ""]
    blocks += ["### In each log", by_log]
    if any(questions(findings.found).values()):
        blocks += ["### What the logs asked", *_asked_answers(findings)]
    blocks += _slicing(findings)
    for score, ones in findings.differences.items():
        blocks += [f"### {score_heading(score)}", *_of_score(score, ones, findings)]
    for score in (score for score in findings.between if score not in findings.differences):
        blocks += [f"### {score_heading(score)}", *_of_score(score, [], findings)]
    return blocks


def _overall(what: str, which: Sequence[str], findings: ReportData) -> str:
    runs = [name for name, run in findings.runs.items() if run["log"] in which]
    ones = [one for one in findings.of(runs) if SCORES[one.score].better]
    if not ones:
        return f"**{what}**: nothing could be compared with a baseline."
    runs, scores = (len(set(of)) for of in zip(*((one.run, one.score) for one in ones), strict=True))
    begins = f"**{what}**: {count(runs, 'run')} compared with the baseline on {count(scores, 'score')}."
    if all(one.half is None for one in ones):
        return f"{begins} **It can't be told** whether anything helped: {_without_intervals(ones)}."
    said = []
    for verdict in ("helped", "hurt"):
        n = len({one.run for one in ones if one.verdict == verdict})
        where = _by_score(ones, verdict, findings)
        said.append(f"**{n} {verdict} somewhere**: {where}." if n else f"None is told to have {verdict} anywhere.")
    open_ = sum(one.verdict == "open" for one in ones)
    said.append(f"Of {count(len(ones), 'comparison')} {open_} can't be told, which is not to say that they are equal.")
    return nested(begins, said)


def _without_intervals(ones: Sequence[Difference]) -> str:
    reasons = list(dict.fromkeys(one.why for one in ones))
    return "there is one seed" if reasons == ["one seed"] else "there is no spread over seeds to judge chance by"


def _of_log(log: str, runs: Mapping[str, Run], findings: ReportData) -> str:
    ones = findings.of(runs)
    scored = [one for one in ones if SCORES[one.score].better]
    head = f"**[Log {log}](#{anchor(log_heading(log))})**, {LOG_TITLES[log]}: {count(len(runs), 'run')}"
    same = [name for name in runs if name in findings.same]
    head += f", of which {names(same)} {'has' if len(same) == 1 else 'have'} the weights of others." if same else "."
    if not scored:
        return f"{head} Nothing could be compared with a baseline."
    open_ = sum(one.verdict == "open" for one in scored)
    if open_ == len(scored):
        why = f": {_without_intervals(scored)}" if all(one.half is None for one in scored) else ""
        parts = [f"None of {count(len(scored), 'comparison')} with the baseline is told to help or to hurt{why}."]
    else:
        parts = []
    for verdict in ("helped", "hurt", "rose", "fell"):
        if where := _by_score(ones, verdict, findings):
            parts.append(f"{verdict.capitalize()}: {where}.")
    if open_ < len(scored):
        parts.append(f"Can't be told: {open_} of {count(len(scored), 'comparison')}.")
    return nested(head, parts)


def _asked_answers(findings: ReportData) -> list[str]:
    """An answer to each question that two runs of this campaign differ in."""
    lines, without = [], 0
    for about, pairs in questions(findings.found).items():
        if not pairs:
            without += 1
            continue
        ones = [one for every in findings.between.values() for one in every if (one.run, one.other) in pairs]
        told = [one for one in ones if one.sign]
        who = ", ".join(f"{plain(run)} against {plain(other)}" for run, other in pairs)
        head = f"**{about[0].upper()}{about[1:]}** ({who}): "
        if not ones:
            lines.append(f"{head}not measured.")
        elif not told:
            why = f" {_without_intervals(ones).capitalize()}." if all(one.half is None for one in ones) else ""
            lines.append(f"{head}can't be told, in any of {count(len(ones), 'comparison')}.{why}")
        else:
            said = f"{head}{len(told)} of {count(len(ones), 'comparison')} can be told."
            lines.append(nested(said, [claim(one, findings) for one in told]))
    left = f"{count(without, 'other question')} of the logs would take runs that are not here." if without else ""
    return [
        "Runs against each other, with Holm's correction for all such comparisons of a score.", bullets(lines), left
    ]  # fmt: skip


def _slicing(findings: ReportData) -> list[str]:
    """Cutting a trained dictionary into ranges of positions, beside masks that were trained."""
    blocks = []
    for base_name, base in findings.baselines.items():
        seeds = [
            found["slicing"]
            for folder in base["folders"]
            if Path(folder).name not in (base["failed"] or {})
            and (found := result_in(findings, folder, "positions")) is not None and found.get("slicing")
        ]  # fmt: skip
        if not seeds:
            continue

        def change(way: str, key: str, seeds: Sequence[Any] = seeds) -> float | None:
            known = [(one[way][key], one["none"][key]) for one in seeds]
            if any(None in pair for pair in known):
                return None
            return sum(cut - whole for cut, whole in known) / len(known)

        masked = {
            name: (_less(run, base, "specialization"), _less(run, base, "explained_variance"), mean(run, "l0"))
            for name, run in findings.runs.items()
            if run["mask"] != "none" and name not in findings.same and baseline_of(run, findings.found) == base_name
        }
        masked = {name: ones for name, ones in masked.items() if None not in ones[:2]}
        ways = {
            way: [change(way, key) for key in ("specialization", "explained_variance")] for way in ("ranges", "random")
        }
        l0 = {way: number(sum(one[way]["l0"] for one in seeds) / len(seeds), 3) for way in ways}
        said = {"ranges": "cut into ranges of positions", "random": "cut at random positions"}
        rows = [(f"{plain(base_name)}, {said[way]}", *_changes(*of), l0[way]) for way, of in ways.items()]
        rows += [(plain(name), *_changes(*ones[:2]), number(ones[2], 3)) for name, ones in masked.items()]
        blocks += [
            "" if blocks else f"### {SLICING}",
            f"The trained baseline {plain(base_name)} with each latent shut off outside one range of positions, and "
            "outside positions drawn at random: specialization that takes no training. Changes from the baseline as it is; "
            "those of slices on the text that `positions` reads, explained variance of runs on that of `core`. There are no "
            "intervals, so nothing is told about chance.",
            table(("", "specialization", "explained variance", "L0"), rows),
            _beside_slices(masked, *ways["ranges"]),
        ]
    return blocks


def _beside_slices(masked: Mapping[str, Sequence[Any]], specialization: float | None, variance: float | None) -> str:
    """How many of the masked runs keep more explained variance than slicing does, and which specialize as much."""
    if not masked or specialization is None or variance is None:
        return ""
    kept = [name for name, one in masked.items() if one[1] > variance]
    both = [name for name in kept if masked[name][0] >= specialization]
    told = f"In means over seeds {len(kept)} of {count(len(masked), 'masked run')} keep more explained variance than ranges"
    if not kept:
        return f"{told}."
    return f"{told}; of these {names(both) or 'none'} have at least as much specialization."


def _changes(*values: float | None) -> list[str]:
    return [NOTHING if value is None else signed(value, 3) for value in values]


def _less(run: Run, base: Run, score: str) -> Any:
    own, beside = mean(run, score), mean(base, score)
    return None if own is None or beside is None else own - beside


def _of_score(score: str, ones: Sequence[Difference], findings: ReportData) -> list[str]:
    """What helped, what hurt and what can't be told, in one score."""
    levels = []
    for name in dict.fromkeys(one.other for one in ones):
        control = of_random(findings.every[name], score)
        beside = "" if control is None else f" (its random control {number(control, 3)})"
        levels.append(f"{plain(name)} has {number(mean(findings.every[name], score), 3)}{beside}")
    said = MEANINGS[score].what
    blocks = [f"{said[0].upper()}{said[1:]}. {'; '.join(levels).capitalize() if not levels else '; '.join(levels)}."]
    groups = {"helped": "Helped", "hurt": "Hurt", "rose": "Rose", "fell": "Fell"}
    for verdict, heading in groups.items():
        if claims := [claim(one, findings) for one in ones if one.verdict == verdict]:
            blocks += [f"**{heading}** ({len(claims)}):", bullets(claims)]
    open_ = [one for one in ones if one.verdict == "open"]
    if open_:
        by: dict[str, list[str]] = {}
        for one in open_:
            by.setdefault(one.why, []).append(f"{plain(one.run)} {signed(one.mean, 3)}")
        lines = [f"{why}: {', '.join(each)}" for why, each in by.items()]
        blocks += [f"**Can't be told** ({len(open_)}), and why:", bullets(lines)]
    pictures = [picture.markdown for picture in findings.pictures if picture.place == score_heading(score)]
    return [*blocks, *pictures]


def _digits(one: Difference) -> int:
    """So many decimals that the half width of the interval has two figures."""
    return min(5, max(2, 1 - math.floor(math.log10(one.half)))) if one.half else 3


def _step(one: Difference) -> str:
    return signed(one.mean, _digits(one))


def _interval(one: Difference) -> str:
    assert one.half is not None
    low, high = (signed(edge, _digits(one)).removeprefix("+") for edge in (one.mean - one.half, one.mean + one.half))
    return f"95% {low} to {high}"


def claim(one: Difference, findings: ReportData) -> str:
    """A difference that is told, as a sentence with its numbers and its figure; and if the control has as much, that."""
    run = findings.every[one.run]
    between = one.other not in findings.baselines
    said = {"helped": "is better", "hurt": "is worse", "rose": "has more", "fell": "has less"} if between else {}
    against = f" against **{plain(one.other)}**" if between else ""
    assert one.p_holm is not None
    chance = f"p = {one.p_holm:.2g}" if one.p_holm >= 1e-4 else "p < 0.0001"
    brackets = [_interval(one), f"{chance} in {one.tested}" if one.tested > 1 else chance]
    if len(one.values) != findings.found["seeds"]:
        brackets.append(count(len(one.values), "seed"))
    control = ""
    if one.verdict == "helped" and SCORES[one.score].better > 0:
        if reached(run, one.score):
            control = f" But its random control is as good, with {number(of_random(run, one.score), 3)}."
        elif of_random(run, one.score) is None:
            control = " What its random control has isn't known."
    return (
        f"{MEANINGS[one.score].name}: **{plain(one.run)}**{against} {said.get(one.verdict, one.verdict)}, "
        f"{_step(one)} ({'; '.join([*brackets, *findings.figures(one)])}).{control}"
    )


def _by_score(ones: Iterable[Difference], verdict: str, findings: ReportData) -> str:
    """Scores with the runs of which this is told, marked where their control is as good; empty if there are none."""
    by: dict[str, list[str]] = {}
    for one in ones:
        if one.verdict == verdict:
            mark = MARK if verdict == "helped" and reached(findings.every[one.run], one.score) else ""
            by.setdefault(one.score, []).append(plain(one.run) + mark)
    return "; ".join(f"{MEANINGS[score].within} ({', '.join(runs)})" for score, runs in by.items())
