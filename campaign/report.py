"""The report of a campaign: does position-aware structure help, and where? Every sentence is made from its numbers.

What is told to help or to hurt is what `significance` tells; nothing here weighs numbers in another way.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine.process.progress import percent, progress_bar
from ..engine.storage.files import write_text
from ..evals.markdown_page import NOTHING, anchor, html, number, plain, table
from .answer import MARK, answer, claim
from .figures import missing
from .questions import MEANINGS
from .report_data import (
    ReportData,
    below_random,
    bullets,
    count,
    gathered,
    is_known,
    judged,
    log_heading,
    names,
    of_random,
    pictures_in,
    reached,
    results,
)
from .results import JUDGED, SCORES, AgainstRandom, analysis_sentence, logs_of
from .significance import ALIKE, COMPARED, RISE_WITH_L0, Run, baseline_of, l0_apart, mean

KNOW, ANSWER, TABLE, AILING, MEASURED = (
    "What to know first", "The answer", "All runs, all scores", "Controls, failures and analyses", "How it was measured"
)  # fmt: skip
CEILING = 0.9995  # a baseline that has this much of a score of at most 1 leaves nothing to be better by
COLUMNS = {
    "loss": "loss", "fvu_last": "FVU",
    **{name: SCORES[name].label for name in ("l0", "explained_variance")},
    **{name: score.label for name, score in SCORES.items() if name not in ("l0", "explained_variance")},
}  # fmt: skip


def write(out: Path) -> Path:
    """Write report.md and report.html of a campaign's folder from campaign.json, the runs' results and the figures that are
    there, with its own in figures/differences/; returns the path of report.md. Raises UserError without campaign.json."""
    with progress_bar("writing the report", total=None, unit="files") as bar:
        findings = gathered(out, lambda: bar.advance(1))
        title = f"Does position-aware structure help? {findings.found['model']}, {findings.found['hook']}"
        write_text(out / "report.md", _markdown(title, findings, together=False))
        write_text(out / "report.html", html(_markdown(title, findings, together=True), out, title))
        bar.advance(2)
    return out / "report.md"


def _markdown(title: str, findings: ReportData, *, together: bool) -> str:
    """All of the report; the runs in one table, or in one a log."""
    logs = logs_of(findings.found)
    places = [KNOW, ANSWER, TABLE, AILING, *map(log_heading, logs), MEASURED]
    blocks = [
        f"# {plain(title)}",
        _facts(findings),
        " · ".join(f"[{place.partition(':')[0]}](#{anchor(place)})" for place in places),
        f"## {KNOW}",
        bullets(_know(findings)),
        f"## {ANSWER}",
        *answer(findings),
        f"## {TABLE}",
        *_table(findings, together=together),
        *[block for picture in pictures_in(findings, None) for block in (f"### {picture.place}", picture.markdown)],
        f"## {AILING}",
        *_ailing(findings),
    ]
    for log in logs:
        blocks += [f"## {log_heading(log)}", *_log(log, findings)]
    blocks += [f"## {MEASURED}", *_measured(findings)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _facts(findings: ReportData) -> str:
    found, every = findings.found, findings.every.values()
    tokens = [one["tokens"] for one in every if one.get("tokens")]
    sizes = sorted({one["d_sae"] for one in every})
    facts = {
        "model": found["model"],
        "hook": found["hook"],
        "F": " to ".join(number(size) for size in sorted({sizes[0], sizes[-1]})) if sizes else NOTHING,
        "tokens": " to ".join(number(n) for n in sorted({min(tokens), max(tokens)})) if tokens else NOTHING,
        "seeds": str(found["seeds"]),
        "runs": str(len(findings.runs)),
        "baselines": ", ".join(dict.fromkeys(one["run"] for one in findings.baselines.values())) or NOTHING,
        "conditions": ", ".join(one for one in found["conditions"] if one) or "one",
    }
    return table(list(facts), [[plain(value) for value in facts.values()]], range(len(facts)))


def _know(findings: ReportData) -> list[str]:
    """What a reader must know before the answer."""
    found, seeds = findings.found, findings.found["seeds"]
    trained = {name: run for name, run in findings.runs.items() if name not in findings.same}
    notes = []
    if seeds == 1:
        notes.append(
            "**One seed**: what differs by chance can't be told from what doesn't, so nothing here is said to help or to "
            "hurt."
        )
    else:
        wide = " With two seeds intervals are very wide: 12.7 standard errors to either side." if seeds == 2 else ""
        scores = count(len(findings.differences), "score")
        notes.append(
            f"**{seeds} seeds** each. A difference is told only where it stands after Holm's correction for all comparisons "
            f"of its score (p = 0.01 in 40: corrected for 40): of {scores}, about one in twenty may have a false claim at "
            f"that.{wide} The 95% intervals are each one's own, over seeds, on the same text."
        )
    notes.append(
        "Losses of different objectives are different quantities: they are shown, and not compared. FVU is "
        "comparable, at the same L0."
    )
    notes += _sparsity(findings, trained)
    beside = dict.fromkeys(one.other for ones in findings.differences.values() for one in ones)
    full = [
        f"{MEANINGS[score].name} ({plain(name)} {number(mean(findings.every[name], score), 3)})"
        for score in COMPARED if SCORES[score].better > 0
        for name in beside if (mean(findings.every[name], score) or 0) >= CEILING
    ]  # fmt: skip
    if full:
        notes.append(f"The baseline has all there is to have, and nothing can do better: {'; '.join(full)}.")
    below = {name: one for name, one in judged(findings).items() if one.below}
    failed = [name for name, run in findings.every.items() if run["failed"] and not run["trained_as"]]
    link = f"[{AILING}](#{anchor(AILING)})"
    if below:
        compared = list(dict.fromkeys(label for one in judged(findings).values() for label in _compared(one)))
        notes.append(f"Not above their random control in {' or '.join(compared)}: {names(below)} ({link}).")
    if failed:
        notes.append(f"Failed, with one seed or more: {names(failed)} ({link}).")
    if repeats := {name: other for name, other in findings.same.items() if not findings.runs[name]["trained_as"]}:
        each = "; ".join(f"{plain(name)} that of {plain(other)}" for name, other in repeats.items())
        notes.append(f"These came out the same to five digits, and are counted once: {each}.")
    notes.append(f"Measured: {'; '.join(_extent(findings)) or 'nothing'}.")
    if found["share"] > 1 and _extent(findings):
        notes.append(f"Measured on one in {found['share']} of the usual rows: scores that count few texts are coarse.")
    if unknown := [SCORES[score].label for score in SCORES if not is_known(findings, score)]:
        notes.append(f"Not measured: {', '.join(map(plain, unknown))}.")
    notes += [f"{plain(name)} was skipped: {plain(why)}" for name, why in _skipped(findings).items()]
    return notes


def _sparsity(findings: ReportData, trained: dict[str, dict[str, Any]]) -> list[str]:
    """Whether L0 was matched, and where it is not that of the baseline."""
    every = findings.baselines | trained
    free = [
        name for name, run in every.items() if run["activation"] in ("relu", "jumprelu") and run["target_l0"] is None
    ]
    used = {baseline_of(run, findings.found) for run in trained.values()}
    aside = [name for name in free if name in findings.baselines and name not in used]
    free = [name for name in free if name not in aside]
    aims = sorted({run["target_l0"] for run in every.values() if run["target_l0"] is not None})
    apart = [
        f"{plain(name)} {number(mean(run, 'l0'), 3)} beside {number(mean(findings.every[other], 'l0'), 3)}"
        for name, run in trained.items()
        if (other := baseline_of(run, findings.found)) is not None and l0_apart(run, findings.every[other])
    ]
    notes = []
    if free:
        notes.append(
            "**L0 was not matched** (`target_l0`): each run has the L0 that its L1 coefficient gives. "
            f"At different L0, {_rising(findings)} can't be compared."
        )
    if aside:
        each = "; ".join(f"{plain(name)} {number(mean(findings.every[name], 'l0'), 3)}" for name in aside)
        notes.append(f"Baselines with the L0 that their L1 coefficient gives, with which no run is compared: {each}.")
    if aims:
        goal = " or ".join(f"{aim:g}" for aim in aims)
        notes.append(
            f"L0 was matched{' in the others' if free else ''}: the L1 coefficient was changed in training until {goal} "
            f"latents were active on a token{'; how near it came is in the table' if is_known(findings, 'l0') else ''}."
        )
    if apart:
        notes.append(
            f"L0 differs from the baseline's by more than a factor of {ALIKE:g}: {'; '.join(apart)}. There "
            f"{_rising(findings)} can only be told as better with fewer latents active, and as worse with more."
        )
    return notes


def _extent(findings: ReportData) -> list[str]:
    """Of every eval on how much it was measured, as its results say."""
    says: dict[str, Callable[[Any], str]] = {
        "core": lambda r: (
            f"core on {number(r['tokens'])} tokens of {number(r['rows'])} held-out rows (CE on {number(r['ce_tokens'])})"
        ),
        "sparse_probing": lambda r: (
            f"sparse probing on {count(len(r['sets']), 'set')} of texts, with "
            f"{number(sum(c['test_rows'] for one in r['sets'].values() for c in one['classes'].values()))} test rows over "
            "its classes"
        ),
        "positions": lambda r: (
            f"positions on {number(r['tokens'])} tokens in {r['bins']} bins"
            + "".join(
                f", order probing on {number(sum(task['test'] for task in r['order_probing']['tasks'].values()))} test texts"
                for _ in [0] if "tasks" in r.get("order_probing", {})
            )
        ),
        "unlearning": lambda r: (
            f"unlearning on {number(r['questions']['forget'])} questions to forget and {number(r['questions']['retain'])} "
            "to retain"
        ),
        **{
            name: lambda r, name=name: f"{name.upper()} on {number(r['rows'])} rows, split {r['seeds']} times"
            for name in ("scr", "tpp")
        },
    }  # fmt: skip
    told = []
    for name in findings.found["evals"]:
        result = next((one for one in results(findings, name) if "skipped" not in one), None)
        if result is not None:
            try:
                told.append(says[name](result) if name in says else f"{name} on {number(result['rows'])} rows")
            except (KeyError, TypeError):
                told.append(name)
    return [plain(one) for one in told]


def _skipped(findings: ReportData) -> dict[str, str]:
    """Evals that no run has, and why."""
    found = {}
    for name in findings.found["evals"]:
        of_runs = list(results(findings, name))
        if of_runs and all("skipped" in one for one in of_runs):
            found[name] = str(of_runs[0]["skipped"])
    return found


def _table(findings: ReportData, *, together: bool) -> list[str]:
    columns = {key: label for key, label in COLUMNS.items() if is_known(findings, key)}
    helped = {(one.run, one.score) for ones in findings.differences.values() for one in ones if one.verdict == "helped"}
    headings = ("run", *map(plain, columns.values()))

    def rows(runs: Mapping[str, Run]) -> list[Sequence[str]]:
        return [
            (_named(name, run, findings), *(_cell(run, key, (name, key) in helped) for key in columns))
            for name, run in runs.items()
        ]

    logs = logs_of(findings.found)
    spread = " ± standard deviation over seeds" if findings.found["seeds"] > 1 else ", of one seed"
    legend = (
        f"Means{spread}; in brackets the random control's: a dictionary with a frozen random decoder, trained on the same "
        f"tokens. {MARK}: the control has as much. **Bold**: better than the baseline by the answer above. {NOTHING}: "
        "not measured. Losses are not comparable."
    )
    if together:
        blocks = [*rows(findings.baselines)]
        for log, runs in logs.items():
            blocks += [(f"**Log {log}**", *[""] * len(columns)), *rows(runs)]
        return [legend, table(headings, blocks)]
    found = [legend]
    for log, runs in logs.items() or {"": {}}.items():
        found += [f"### Table of log {log}" if log else "", table(headings, [*rows(findings.baselines), *rows(runs)])]
    return found


def _named(name: str, run: Run, findings: ReportData) -> str:
    said = run["title"]
    if run["failed"] and not run["scores"]:
        said = f"failed: {said}"
    elif name in findings.same:
        said = f"{said}; weights of {findings.same[name]}"
    elif run["trained_as"]:
        said = f"{said}; weights of {run['trained_as']}"
    link = f"[{plain(name)}](#{anchor(log_heading(run['log']))})" if run.get("log") else plain(name)
    return f"{link} *{plain(said)}*"


def _cell(run: Run, score: str, helped: bool) -> str:
    own, found = mean(run, score), run["scores"].get(score, {})
    if own is None:
        return NOTHING
    value = number(own, 3)
    decimals = len(value.partition(".")[2])
    spread = "" if found["spread"] is None else f" ± {found['spread']:,.{decimals}f}"
    control = of_random(run, score)
    beside = "" if control is None else f" *({number(control, 3)})*"
    return f"{MARK} " * reached(run, score) + f"{f'**{value}**' if helped else value}{spread}{beside}"


def _ailing(findings: ReportData) -> list[str]:
    beside = judged(findings)
    compared = list(dict.fromkeys(label for one in beside.values() for label in _compared(one)))
    lines = [
        f"**{plain(name)}**: {plain('; '.join(one.below))}.{_seen(name, findings)}"
        for name, one in beside.items() if one.below
    ]  # fmt: skip
    unknown = {
        name: missing
        for name, one in beside.items()
        if (missing := [why for why in one.unknown if why.startswith(tuple(compared))])  # others have it
    }
    failed = [
        f"**{plain(folder)}**: {plain(why)}"
        for name, run in findings.every.items() if not run["trained_as"] or name not in findings.same
        for folder, why in (run["failed"] or {}).items()
    ]  # fmt: skip
    analyses = [
        f"**{plain(name)}**, {plain(run['title'])}: looks at the weights of {plain(run['trained_as'])}, and has its numbers"
        for name, run in findings.runs.items()
        if run["trained_as"]
    ]
    known = [one.beats for one in beside.values() if one.beats is not None]
    what = " and in ".join(f"{label} (mean of top 1, 2 and 5)" if "probing" in label else label for label in compared)
    beaten = (
        f"Beaten means: the mean over seeds is above the control's, in {what}. {sum(known)} of "
        f"{count(len(known), 'dictionary')} do."
    )
    return [
        "### Runs that do not beat their random control",
        beaten if known else "Nothing was measured in which a run could be compared with its control.",
        bullets(lines) if lines else "No run that was measured is below its control." if known else "",
        bullets(f"**{plain(name)}**: {plain('; '.join(why))}." for name, why in unknown.items()),
        "### Runs that failed",
        bullets(failed) if failed else "None.",
        "### Runs that look at another's weights",
        f"{bullets(analyses)}\n\nThey are not counted as runs of their own." if analyses else "None in this campaign.",
        *_missing(findings, None),
    ]


def _compared(one: AgainstRandom) -> list[str]:
    """The scores in which a run and its control were both measured, in their order."""
    return [label for label in JUDGED.values() if label in one.above or any(why.startswith(label) for why in one.below)]


def _rising(findings: ReportData) -> str:
    """The scores that rise with L0 by themselves, of those that were measured: "explained variance and CE recovered"."""
    scores = [score for score in RISE_WITH_L0 if is_known(findings, score)] or ["fvu_last"]
    return " and ".join(MEANINGS[score].within for score in scores)


def _seen(name: str, findings: ReportData) -> str:
    """What else the numbers show of a run that its control beats: of use for the reason, which they don't tell."""
    run, seen = findings.every[name], []
    if None not in (run["fvu_first"], run["fvu_last"]):
        seen.append(f"FVU went from {number(run['fvu_first'], 3)} to {number(run['fvu_last'], 3)} in training")
    if dead := mean(run, "dead_fraction"):
        seen.append(f"{percent(dead)} of its latents are dead")
    if (l0 := mean(run, "l0")) is not None:
        aim = f" (aim {run['target_l0']:g})" if run["target_l0"] is not None else ""
        seen.append(f"L0 is {number(l0, 3)}{aim}")
    own, control = mean(run, "probing"), mean(run, "probing", control=True)
    if own is not None and control is not None and own <= control and control is not None and control >= 0.95:
        seen.append("the control has nearly all there is to have in sparse probing")
    other = baseline_of(run, findings.found) if name in findings.runs else None
    if other is not None and below_random(findings, other):
        seen.append(f"its baseline {plain(other)} doesn't beat its own control either")
    return f" Beside that: {'; '.join(seen)}." if seen else ""


def _missing(findings: ReportData, log: str | None) -> list[str]:
    """Figures that are not there, or not whole, and why: a log's, or those that belong to none."""
    absent = missing(findings.out)

    def belongs(name: str) -> str | None:
        return found[1].upper() if (found := re.search(r"log_([a-z])\b", name.lower())) else None

    here = {name: why for name, why in absent.items() if belongs(name) == log}
    lines = bullets(f"`{name.replace('`', '')}`: {plain(why)}" for name, why in here.items())
    return (
        [f"Figures {f'of log {log} ' if log else ''}that are not there, or not whole, and why:", lines] if here else []
    )


def _log(log: str, findings: ReportData) -> list[str]:
    runs = logs_of(findings.found)[log]
    headings = (
        "run",
        "what it is",
        "mask",
        "parts",
        "activation",
        "L1",
        "learning rate",
        "steps",
        "FVU, first to last",
    )
    rows = [
        (
            plain(name), plain(run["title"]) + (f" (weights of {plain(run['trained_as'])})" if run["trained_as"] else ""),
            plain(run["mask"]), names(run["parts"]) or NOTHING, plain(run["activation"]),
            f"{run['l1_coefficient']:g}", f"{run['lr']:g}", number(run["steps"]),
            f"{number(run['fvu_first'], 3)} to {number(run['fvu_last'], 3)}"
            if None not in (run["fvu_first"], run["fvu_last"]) else NOTHING,
        )
        for name, run in runs.items()
    ]  # fmt: skip
    told = [one for one in findings.of(runs) if one.sign]
    claims = [claim(one, findings) for one in told]
    analyses = [
        f"**{plain(name)}**, {plain(run['title'])}, in {plain(run['trained_as'])}: {plain(analysis_sentence(run))}."
        for name, run in runs.items() if run["trained_as"]
    ]  # fmt: skip
    blocks = [
        table(headings, rows, (0, 1, 2, 3, 4)),
        *([f"### What the analyses of log {log} find", bullets(analyses)] if analyses else []),
        f"### What is told of log {log}",
        bullets(claims) if claims else "No difference from a baseline is told.",
    ]
    for picture in pictures_in(findings, log):
        pointing = names(dict.fromkeys(one.run for one in told if picture.link in findings.figures(one)))
        said = (
            f"Claims that point here: {MEANINGS[picture.score].within} of {pointing}."
            if picture.score and pointing
            else ""
        )
        blocks += [f"### {picture.place}", picture.markdown, said]
    return [*blocks, *_missing(findings, log)]


def _measured(findings: ReportData) -> list[str]:
    found = findings.found
    rows = [
        (plain(COLUMNS[key]), f"`{SCORES[key].eval}`" if key in SCORES else "training", plain(meaning.what))
        for key, meaning in MEANINGS.items() if is_known(findings, key)
    ]  # fmt: skip
    rises = (
        f"In {_rising(findings)} nothing is told to be better with clearly more latents active, nor worse with clearly "
        "fewer. "
        if any(is_known(findings, score) for score in RISE_WITH_L0) else ""
    )  # fmt: skip
    retention = "Retention is not compared: the ReLU baseline is what it refers to, and has 1."
    took = found.get("seconds") or {}
    time = ", ".join(f"{plain(what)} {number(float(seconds), 4)} s" for what, seconds in took.items())
    return [
        "All dictionaries were trained on the same batches of one stream, each beside its random control: a frozen, "
        "unit-norm random decoder of the same size, whose encoder and biases are trained. Seeds differ in the weights that "
        "training starts from and in what is drawn at random, not in the text."
        + (" All were measured on the same rows." if _extent(findings) else ""),
        "A run is compared with the plain dictionary of its activation in its condition, seed by seed: the mean of the "
        "differences, with the 95% interval of Student's t over seeds, and p corrected by Holm's method over all runs "
        f"compared in that score. Only what stands at 5% is told. {rises}Analyses, and runs that came out the same, are "
        f"counted once. {retention if is_known(findings, 'retention') else ''}",
        table(("column", "eval", "what it is"), rows, (0, 1, 2)),
        "Formulas and controls are in `docs/evals.md` and in the modules of `evals/`; the runs in "
        "`campaign/documented/log_a.py` to `campaign/documented/log_e.py`; these numbers in `campaign.json`, the campaign's "
        "settings in `campaign.yaml`.",
        f"Time: {time}." if time else "",
    ]  # fmt: skip
