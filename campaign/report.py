"""Write a campaign's report: tables and figures of its numbers, and the rules for its verdicts.

The sentences are the same in every report. What depends on numbers is in tables, and `significance` alone decides what is
significant.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from ..engine.process.progress import progress_bar
from ..engine.storage.files import write_text
from ..evals import result_files
from ..reporting.markdown import NOTHING, anchor, html, number, plain, table
from .difference_figure import draw_differences
from .documented import LOG_TITLES
from .figures import CAPTIONS, missing
from .questions import pairs_by_question
from .results import JUDGED, SCORES, against_random, analysis_figures, logs_of, read_results
from .significance import (
    ALIKE,
    COMPARED,
    LEVEL,
    NO_DIFFERENCE,
    VERDICTS,
    Difference,
    Run,
    against_baselines,
    baseline_of,
    compare,
    mean,
    repeated,
    strictness,
)

MARK = "†"
KNOW, VERDICT, SCORE_TABLE, CONTROLS, MEASURED = (
    "What to know first", "Verdicts", "All runs, all scores", "Controls and failures", "How it was measured"
)  # fmt: skip
RULES = f"""\
- A verdict compares a run with its baseline, the plain dictionary of the same activation in the same condition, or with a
  run that differs in one mechanism. It is about the mean of their differences, paired by seed on the same text.
- *Significant* means p of at most {LEVEL:g} after Holm's correction for all comparisons of a score. The chance of even one
  false claim about a score is then at most {LEVEL:.0%}. *{NO_DIFFERENCE.capitalize()}* does not mean that two
  dictionaries are equal. A single seed detects nothing.
- Explained variance and CE recovered rise with L0 by themselves. A run with more than {ALIKE:g} times the active latents is
  never called better in them, and one with fewer never worse. Training losses of different objectives are not compared.
- {MARK} marks a score in which the random control is at least as good: the same dictionary around a frozen, unit-norm random
  decoder, with encoder and biases trained on the same tokens.
- Failed dictionaries, and runs that are not above their random control, are listed under [{CONTROLS}](#{anchor(CONTROLS)}).
  Runs with the weights or the numbers of another are compared once."""
SCORE_LEGEND = f"""\
Means ± standard deviation over seeds, the verdict against the baseline if it is significant, and in brackets the mean of the
random control. {MARK}: the control is at least as good. {NOTHING}: not measured."""
SLICING = """\
Each latent of a trained baseline was switched off outside one range of positions, or outside random positions, without
training. These are the mean changes from the unchanged baseline. The effects of trained masks are below, score by score."""
METHOD = """\
All dictionaries were trained on the same batches of one stream and measured on the same rows. Seeds differ in the initial
weights and in random draws, not in the text. Intervals are 95% intervals of Student's t over seeds.

Formulas and controls are in `docs/evals.md` and in the modules of `evals/`, the runs in `campaign/documented/log_a.py` to
`log_e.py`. `campaign.json` has the numbers of this report by seed, `campaign.yaml` the settings."""

#: eval -> what it was measured on, and the path of its extent in the result (* is every name)
EXTENT = {
    "core": {"tokens": "tokens", "held-out rows": "rows", "tokens for CE": "ce_tokens"},
    "sparse_probing": {"sets of texts": "sets.*", "test rows of all classes": "sets.*.classes.*.test_rows"},
    "positions": {"tokens": "tokens", "bins": "bins", "test texts of order probing": "order_probing.tasks.*.test"},
    "unlearning": {"questions to forget": "questions.forget", "questions to retain": "questions.retain"},
    **{name: {"rows": "rows", "splits": "seeds"} for name in ("scr", "tpp")},
}
COLUMNS = {"loss": "Loss", "fvu_last": "FVU", **{name: score.name for name, score in SCORES.items()}}
GROUPS = {"position-aware structure": "ABC", "other mechanisms": "DE"}  # of logs


def write(out: Path) -> Path:
    """Write report.md, report.html and the figures of differences into a campaign's folder.

    Reads campaign.json, the results in runs/ and the figures in figures/. Returns the path of report.md. Raises UserError
    without campaign.json.
    """
    report = _Report(out)
    title = f"Does position-aware structure help? {report.campaign['model']}, {report.campaign['hook']}"
    with progress_bar("writing the report", total=None, unit="figures") as bar:
        markdown = f"# {plain(title)}\n\n{report.markdown(lambda: bar.advance(1))}\n"
    write_text(out / "report.md", markdown)
    write_text(out / "report.html", html(markdown, out, title))
    return out / "report.md"


class _Markdown(str):
    """A table cell in Markdown. All other cells are text, shown as it is."""


class _Report:
    """The tables and figures of a campaign's numbers as Markdown."""

    def __init__(self, out: Path):
        self.out = out
        self.campaign = read_results(out)
        self.runs: dict[str, Run] = self.campaign["runs"]
        self.baselines: dict[str, Run] = self.campaign["baselines"]
        self.every = self.baselines | self.runs
        self.logs = logs_of(self.campaign)
        self.same = repeated(self.campaign)
        self.questions = pairs_by_question(self.campaign)
        self.question_of = {pair: question for question, pairs in self.questions.items() for pair in pairs}
        self.differences = against_baselines(self.campaign)
        self.between = compare(self.campaign, list(self.question_of))
        self.known = [key for key in COLUMNS if any(mean(run, key) is not None for run in self.every.values())]
        distinct = {name: run for name, run in self.every.items() if name not in self.same and run["scores"]}
        self.judged = {name: against_random(run["scores"]) for name, run in distinct.items()}
        self.failed = {name: why for run in self.every.values() for name, why in (run["failed"] or {}).items()}

    def markdown(self, drawn: Callable[[], None]) -> str:
        """Make the report below its title. Calls `drawn` after each figure of differences."""
        headings = {log: f"Log {log}: {LOG_TITLES[log]}" for log in self.logs}
        places = (KNOW, VERDICT, SCORE_TABLE, CONTROLS, *headings.values(), MEASURED)
        links = " · ".join(f"[{place.partition(':')[0]}](#{anchor(place)})" for place in places)
        blocks = [links, f"## {KNOW}", RULES, self.facts(), f"## {VERDICT}", *self.overviews()]
        blocks += ["### Static slicing", SLICING, self.slicing()]
        for score in COMPARED:
            if score in self.differences or score in self.between:
                blocks += [f"### {SCORES[score].name}", *self.comparisons(score), *self.draw_differences(score, drawn)]
        blocks += [f"## {SCORE_TABLE}", SCORE_LEGEND, self.scores(), *self.figures("")]
        blocks += [f"## {CONTROLS}", "### Random controls", self.controls()]
        blocks += ["### Failed dictionaries", _table("dictionary | reason", self.failed.items(), words=2)]
        for log, heading in headings.items():
            blocks += [f"## {heading}", self.settings(log), *self.analyses(log), *self.figures(f"log_{log.lower()}")]
        return "\n\n".join([*blocks, f"## {MEASURED}", METHOD, self.extent()])

    def facts(self) -> str:
        every, beats = self.every.values(), [comparison.beats for comparison in self.judged.values()]
        facts = {
            "model": self.campaign["model"], "hook": self.campaign["hook"], "seeds": self.campaign["seeds"],
            "runs": len(self.runs), "baselines": ", ".join(dict.fromkeys(run["run"] for run in self.baselines.values())),
            "conditions": ", ".join(condition or "as documented" for condition in self.campaign["conditions"]),
            "F": _span(run["d_sae"] for run in every), "tokens": _span(run.get("tokens") for run in every),
            "L0 target": ", ".join(dict.fromkeys(map(_target, every))), "failed dictionaries": len(self.failed),
            "not above their random control": f"{beats.count(False)} of {len(beats) - beats.count(None)}",
            "runs with the numbers of another": len(self.same), "rows measured": f"1 in {self.campaign['share']}",
            "questions without their runs": f"{list(self.questions.values()).count([])} of {len(self.questions)}",
            "scores not measured": ", ".join(SCORES[key].name for key in SCORES if key not in self.known) or NOTHING,
        }  # fmt: skip
        return _table("campaign | value", facts.items(), words=2)

    def overviews(self) -> list[str]:
        """Count verdicts by log, by question and by score."""
        differences, between = (list(chain(*scores.values())) for scores in (self.differences, self.between))
        logs = {label: names for label, names in GROUPS.items() if set(names) & self.logs.keys()}
        logs |= {f"log {log}, {LOG_TITLES[log]}": log for log in self.logs}
        by_log = {label: [d for d in differences if self.runs[d.run]["log"] in names] for label, names in logs.items()}
        by_question = {
            question: [d for d in between if (d.run, d.other) in pairs]
            for question, pairs in self.questions.items() if pairs
        }  # fmt: skip
        by_score = {SCORES[score].name: several for score, several in self.differences.items()}
        return [
            "### By log", _overview("log", by_log),
            "### By question", _overview("what two runs differ in", by_question),
            "### By score", _overview("score", by_score),
        ]  # fmt: skip

    def slicing(self) -> str:
        lines, keys = [], ("specialization", "explained_variance")
        for name, run in self.baselines.items():
            sliced = [result["slicing"] for result in self._results("positions", run) if result.get("slicing")]
            for way, label in (("ranges", "ranges"), ("random", "random positions")) if sliced else ():
                pairs = [[(seed[way][key], seed["none"][key]) for seed in sliced] for key in keys]
                l0 = number(fmean(seed[way]["l0"] for seed in sliced), 3)
                lines.append([name, label, *map(_mean_change, pairs), l0])
        return _table("baseline | slices | specialization | explained variance | L0", lines, words=2)

    def comparisons(self, score: str) -> list[str]:
        """A table of the significant differences in a score, and a list of the others by the reason."""
        lines: list[list[Any]] = []
        reasons: dict[str, list[str]] = {}
        for difference in [*self.differences.get(score, []), *self.between.get(score, [])]:
            name, other, half, digits = difference.run, difference.other, difference.half, _digits(difference)
            change, question = _signed(difference.mean, digits), self.question_of.get((name, other))
            if difference.sign and half:
                edges = difference.mean - half, difference.mean + half
                interval = " to ".join(_signed(edge, digits) for edge in edges)
                run, seeds, p = self.every[name], len(difference.values), difference.p_holm or 0.0
                shown_p = f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"
                verdict = _Markdown(f"**{difference.verdict}**, significant ({shown_p})")
                control = f"{MARK} " * _is_reached(run, score) + number(mean(run, score, control=True), 3)
                cell = _Markdown(plain(name) + (f" *{plain(question)}*" if question else ""))
                lines.append([cell, other, change, interval, seeds, difference.tested, control, verdict])
            else:
                pair, interval = f"{name} minus {other}" if question else name, f" ± {half:.{digits}f}" if half else ""
                reasons.setdefault(difference.why, []).append(f"{plain(pair)} {change}{interval}")
        headings = "run | against | difference | 95% interval | seeds | corrected for | random control | verdict"
        bullets = [f"- {NO_DIFFERENCE} ({why}): {'; '.join(changes)}" for why, changes in reasons.items()]
        return [_table(headings, lines, words=2)] * bool(lines) + ["\n".join(bullets)] * bool(bullets)

    def draw_differences(self, score: str, drawn: Callable[[], None]) -> list[str]:
        """Draw the differences in a score, in a figure per condition with all its strictnesses of masks."""
        by_condition: dict[str, tuple[list[Difference], list[Difference]]] = {}
        for index, scores in enumerate((self.differences, self.between)):
            for difference in scores.get(score, []):
                condition = strictness(self.every[difference.run]["condition"])[1]
                by_condition.setdefault(condition, ([], []))[index].append(difference)
        figures = []
        for condition, differences in by_condition.items():
            path = f"figures/differences/{score}{f'-{condition}' if condition else ''}.png"
            title = f"{SCORES[score].name}{f' ({condition})' if condition else ''}"
            draw_differences(self.out / path, title, *differences)
            drawn()
            figures.append(_figure(path, f"{title}: differences from baselines and between runs, means and seeds."))
        return figures

    def scores(self) -> str:
        differences = chain.from_iterable(self.differences.values())
        verdicts = {(d.run, d.score): d.verdict for d in differences if d.sign}
        lines = []
        for name, run in self.every.items():
            weights = self.same.get(name) or run["trained_as"]
            title = "failed: " * bool(run["failed"] and not run["scores"]) + run["title"]
            title += f"; weights of {weights}" if weights else ""
            cells = (_Markdown(_cell(run, key, verdicts.get((name, key), ""))) for key in self.known)
            lines.append([_Markdown(f"{plain(name)} *{plain(title)}*"), *cells])
        return _table(" | ".join(["run", *(COLUMNS[key] for key in self.known)]), lines)

    def controls(self) -> str:
        """A table of dictionaries beside their random controls, those that are not above it first."""
        lines = []
        for name, comparison in sorted(self.judged.items(), key=lambda item: item[1].beats is not False):
            values = [mean(self.every[name], key, control=control) for key in JUDGED for control in (False, True)]
            above = {True: "yes", False: f"no {MARK}", None: NOTHING}[comparison.beats]
            lines.append([name, above, *map(number, values), number(mean(self.every[name], "probing_error"))])
        headings = " | ".join(f"{label} | control's {label}" for label in JUDGED.values())
        return _table(f"run | above its control | {headings} | standard error", lines, words=2)

    def settings(self, log: str) -> str:
        lines = []
        for name, run in self.logs[log].items():
            base = baseline_of(run, self.campaign)
            weights = self.same.get(name) or run["trained_as"] or NOTHING
            measured = (run["fvu_first"], run["fvu_last"], mean(run, "l0"), base and mean(self.every[base], "l0"))
            lines.append([
                name, run["title"], weights, run["mask"], ", ".join(run["parts"]) or NOTHING, run["activation"],
                _target(run), f"{run['l1_coefficient']:g}", f"{run['lr']:g}", number(run["steps"]),
                *(number(value, 3) for value in measured),
            ])  # fmt: skip
        settings = "run | what it is | weights of | mask | parts | activation | L0 target | L1 | learning rate"
        return _table(f"{settings} | steps | first FVU | last FVU | L0 | baseline's L0", lines, words=7)

    def analyses(self, log: str) -> list[str]:
        lines = [
            [name, run["trained_as"], *figure]
            for name, run in self.logs[log].items() if run["trained_as"] for figure in analysis_figures(run).items()
        ]  # fmt: skip
        return ["### Analyses", _table("run | looks at | figure | value", lines, words=4)] if lines else []

    def figures(self, folder: str) -> list[str]:
        """The figures in a folder of figures/, and the reasons for missing figures and panels."""
        paths = sorted((self.out / "figures" / folder).glob("[!.]*.png"))
        blocks = [_figure(path.relative_to(self.out).as_posix(), CAPTIONS.get(path.stem, path.stem)) for path in paths]
        reasons = [(name, why) for name, why in missing(self.out).items() if name.rpartition("/")[0] == folder]
        return [*blocks, _table("figure missing or not whole | reason", reasons, words=2)] if reasons else blocks

    def extent(self) -> str:
        """Tables of what each score means, of the extent of each eval, and of the time that the campaign took."""
        scores = [[SCORES[key].name, SCORES[key].eval, SCORES[key].meaning] for key in self.known if key in SCORES]
        lines = []
        for name in self.campaign["evals"]:
            results = [result for run in self.every.values() for result in self._results(name, run)]
            complete = [result for result in results if "skipped" not in result]
            if complete:
                totals = {unit: _total(complete[0], path) for unit, path in EXTENT.get(name, {"rows": "rows"}).items()}
                lines.append([name, "; ".join(f"{unit}: {total:,}" for unit, total in totals.items() if total)])
            elif results:
                lines.append([name, f"skipped: {results[0]['skipped']}"])
        lines += [[stage, f"{number(float(time))} s"] for stage, time in (self.campaign.get("seconds") or {}).items()]
        return f"{_table('score | eval | meaning', scores, 3)}\n\n{_table('eval or stage | extent', lines, 2)}"

    def _results(self, name: str, run: Run) -> list[dict[str, Any]]:
        folders = [self.out / folder for folder in run["folders"] if Path(folder).name not in self.failed]
        return [result for folder in folders if (result := result_files.read(folder, name)) is not None]


def _table(headings: str, lines: Iterable[Iterable[Any]], words: int = 1) -> str:
    """A Markdown table. Its first `words` columns and the verdicts are text, the others numbers."""
    names = headings.split(" | ")
    cells = [[cell if isinstance(cell, _Markdown) else plain(cell) for cell in line] for line in lines]
    columns = [index for index, name in enumerate(names) if index < words or name == "verdict"]
    return table(names, cells, columns) if cells else "None."


def _overview(heading: str, groups: Mapping[str, Sequence[Difference]]) -> str:
    lines = []
    for group, differences in groups.items():
        runs = (len({d.run for d in differences if verdict in ("", d.verdict)}) for verdict in ("", *VERDICTS[:2]))
        counts = Counter(difference.verdict for difference in differences)
        lines.append([group, *runs, counts.total(), *(counts[verdict] for verdict in VERDICTS)])
    runs = "runs compared | runs better somewhere | runs worse somewhere | comparisons"
    return _table(f"{heading} | {runs} | {' | '.join(VERDICTS)}", lines)


def _figure(path: str, caption: str) -> str:
    return f"![{plain(caption.partition(':')[0])}]({path})\n\n*{plain(caption)}*"


def _span(values: Iterable[int | None]) -> str:
    known = [value for value in values if value is not None]
    return " to ".join(number(value) for value in sorted({min(known), max(known)})) if known else NOTHING


def _target(run: Run) -> str:
    """The L0 that a run was trained for: K, or the one that its L1 coefficient was adjusted to."""
    if run["activation"] in ("topk", "batchtopk"):
        return f"K = {run['k']}"
    return "none" if run["target_l0"] is None else f"{run['target_l0']:g}"


def _total(value: Any, path: str) -> int:
    """The sum of the numbers at a path. Any other value counts as one."""
    if not path:
        return value if isinstance(value, int) else 1
    name, _, rest = path.partition(".")
    inner = value if isinstance(value, Mapping) else {}
    return sum(_total(inner[key], rest) for key in (inner if name == "*" else {name} & inner.keys()))


def _digits(difference: Difference) -> int:
    """Decimals that show half the width of the interval with two digits."""
    return min(5, max(3, 1 - math.floor(math.log10(difference.half)))) if difference.half else 3


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def _mean_change(pairs: Iterable[tuple[float | None, float | None]]) -> str:
    changes = [value - base for value, base in pairs if value is not None and base is not None]
    return _signed(fmean(changes), 3) if changes else NOTHING


def _is_reached(run: Run, score: str) -> bool:
    """Whether the random control is at least as good, in a score where more is better."""
    value, control = mean(run, score), mean(run, score, control=True)
    is_better_higher = score in SCORES and SCORES[score].better > 0
    return is_better_higher and value is not None and control is not None and control >= value


def _cell(run: Run, key: str, verdict: str) -> str:
    """A run's mean and spread in a score, its verdict, and its random control's mean."""
    value, control = mean(run, key), mean(run, key, control=True)
    if value is None:
        return NOTHING
    shown, spread = number(value, 3), run["scores"][key]["spread"]
    words = [MARK] * _is_reached(run, key) + [shown]
    words += [] if spread is None else [f"± {spread:,.{len(shown.partition('.')[2])}f}"]
    words += [f"**{verdict}**"] * bool(verdict)
    return " ".join(words if control is None else [*words, f"*({number(control, 3)})*"])
