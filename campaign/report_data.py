"""What a campaign's report is made from: the numbers of its folder, what follows of them, and its figures."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evals import result_files as kept
from ..evals.markdown_page import anchor, plain
from .difference_figure import draw_differences
from .questions import CAPTIONS, LOG_TITLES, MEANINGS, QUESTIONS, STRICT
from .results import SCORES, AgainstRandom, against_random, read_results
from .significance import COMPARED, Difference, Run, against_baselines, compare, mean, repeated, strictness

DIFFERENCES = "figures/differences"  # the report's own figures


@dataclass
class ReportFigure:
    """A figure by its path in the folder: its number, what it shows, the score if it is one, and the heading that leads to
    it."""

    path: str
    number: int
    shows: str
    score: str | None
    place: str

    @property
    def link(self) -> str:
        return f"[figure {self.number}](#{anchor(self.place)})"

    @property
    def markdown(self) -> str:
        return f"![{plain(self.shows.partition(':')[0])}]({self.path})\n\n*Figure {self.number}: {plain(self.shows)}*"


@dataclass
class ReportData:
    """A campaign's numbers, and what follows of them: `differences` from the baselines and `between` runs, by score; of runs
    that don't stand for themselves those whose numbers they have (`same`)."""

    found: dict[str, Any]
    out: Path
    differences: dict[str, list[Difference]]
    between: dict[str, list[Difference]]
    same: dict[str, str]
    pictures: list[ReportFigure] = field(default_factory=list)

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        return self.found["runs"]

    @property
    def baselines(self) -> dict[str, dict[str, Any]]:
        return self.found["baselines"]

    @property
    def every(self) -> dict[str, dict[str, Any]]:
        return self.baselines | self.runs

    def of(self, runs: Iterable[str]) -> list[Difference]:
        """The differences of these runs from their baselines, score by score."""
        wanted = set(runs)
        return [one for ones in self.differences.values() for one in ones if one.run in wanted]

    def figures(self, one: Difference) -> list[str]:
        """Links to the figures that show a difference: that of its score, and of all runs or its log's, which are of the
        first condition that a run has."""
        run = self.every[one.run]
        shown = {_forest(one.score, strictness(run["condition"])[1])}
        if one.run == next(name for name, other in self.every.items() if other["run"] == run["run"]):
            shown |= {
                p.path for p in self.pictures if Path(p.path).parent.as_posix() in ("figures", _folder(run["log"]))
            }
        return [picture.link for picture in self.pictures if picture.score == one.score and picture.path in shown]


def gathered(out: Path, drawn: Callable[[], None]) -> ReportData:
    """What follows of the numbers in a campaign's folder, with the figures of differences, which are drawn here: `drawn` is
    called after each. Raises UserError if there are no numbers."""
    found = read_results(out)
    findings = ReportData(found, out, against_baselines(found), compare(found, _asked(found)), repeated(found))
    findings.pictures = _pictures(findings, drawn)
    return findings


def _asked(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every pair of runs that a question is about, by the names in campaign.json."""
    return list(dict.fromkeys(pair for pairs in questions(found).values() for pair in pairs))


def questions(found: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Of each question the pairs of runs in this campaign that answer it."""
    runs: dict[str, Any] = found["runs"]
    by = {(run["run"], run["condition"]): name for name, run in runs.items() if not run["trained_as"]}
    pairs: dict[str, list[tuple[str, str]]] = {question.about: [] for question in QUESTIONS}
    for question in QUESTIONS:
        for (run, condition), name in by.items():
            other = by.get((dict(question.pairs).get(run, ""), condition))
            if other is not None and not (question.strict and strictness(condition)[0]):
                pairs[question.about].append((name, other))
    for (run, condition), name in by.items():
        how, rest = strictness(condition)
        for (more, less), about in STRICT.items():
            other = by.get((run, f"{less}_{rest}" if rest else less))
            if how == more and other is not None:
                pairs[about].append((name, other))
    same = repeated(found)
    return {about: _once(each, same) for about, each in pairs.items()}


def _once(pairs: Iterable[tuple[str, str]], same: Mapping[str, str]) -> list[tuple[str, str]]:
    """Without pairs of runs that came out the same as those of another pair."""
    first: dict[tuple[str, str], tuple[str, str]] = {}
    for run, other in pairs:
        first.setdefault((same.get(run, run), same.get(other, other)), (run, other))
    return list(first.values())


def _forest(score: str, condition: str) -> str:
    return f"{DIFFERENCES}/{score}{f'-{condition}' if condition else ''}.png"


def _pictures(findings: ReportData, drawn: Callable[[], None]) -> list[ReportFigure]:
    """Draw the differences, and number all figures in the order in which the report has them."""
    found: list[ReportFigure] = []

    def add(path: str, shows: str, score: str | None, place: str | None = None) -> None:
        label = Path(path).stem.replace("_", " ")
        found.append(ReportFigure(path, len(found) + 1, shows, score, place or f"Figure {len(found) + 1}: {label}"))

    def at(ones: Iterable[Difference]) -> dict[str, list[Difference]]:
        by: dict[str, list[Difference]] = {}
        for one in ones:
            by.setdefault(strictness(findings.every[one.run]["condition"])[1], []).append(one)
        return by

    for score in COMPARED:
        alone, between = at(findings.differences.get(score, [])), at(findings.between.get(score, []))
        name = MEANINGS[score].name
        for condition in dict.fromkeys([*alone, *between]):
            path, where = _forest(score, condition), f" ({condition})" if condition else ""
            ones, others = alone.get(condition, []), between.get(condition, [])
            draw_differences(findings.out / path, f"{name}{where}", ones, others)
            seeds = max(len(one.values) for one in [*ones, *others])
            interval = (
                "bars are 95% intervals, cut at the picture's edge" if seeds > 1 else "of one seed, without intervals"
            )
            below = "; below, runs against each other" if ones and others else ""
            add(path, f"{name}{where}: differences from the baseline{below}; {interval}.", score, score_heading(score))
            drawn()
    there = sorted(
        str(path.relative_to(findings.out).as_posix())
        for path in (findings.out / "figures").rglob("*.png")
        if not path.name.startswith(".")
    )
    common = [path for path in there if Path(path).parent.name == "figures"]
    of_logs = [path for log in LOG_TITLES for path in there if path.startswith(f"{_folder(log)}/")]
    for path in [*common, *of_logs]:
        shows, score = CAPTIONS.get(Path(path).stem, (f"{Path(path).stem.replace('_', ' ').capitalize()}.", None))
        add(path, shows, score)
    return found


def pictures_in(findings: ReportData, log: str | None) -> list[ReportFigure]:
    """The figures of a log, or those of all runs."""
    return [picture for picture in findings.pictures if Path(picture.path).parent.as_posix() == _folder(log)]


def _folder(log: str | None) -> str:
    return f"figures/log_{log.lower()}" if log else "figures"


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def nested(line: str, below: Iterable[str]) -> str:
    """A line of a list, with a list below it."""
    return "\n".join([line, *(f"  - {one}" for one in below)])


def score_heading(score: str) -> str:
    return f"By score: {MEANINGS[score].name}"


def log_heading(log: str) -> str:
    return f"Log {log}: {LOG_TITLES[log]}"


def signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def of_random(run: Run, score: str) -> float | None:
    return mean(run, score, control=True)


def reached(run: Run, score: str) -> bool:
    """Whether the random control has as much of a score of which more is better."""
    if score not in SCORES or SCORES[score].better <= 0:
        return False
    own, control = mean(run, score), of_random(run, score)
    return own is not None and control is not None and control >= own


def names(ones: Iterable[str]) -> str:
    return ", ".join(map(plain, ones))


def count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what.removesuffix('y')}{'ies' if what.endswith('y') else 's'}"


def result_in(findings: ReportData, folder: str, name: str) -> dict[str, Any] | None:
    return kept.read(findings.out / folder, name)


def results(findings: ReportData, name: str) -> Iterable[dict[str, Any]]:
    """An eval's results in the runs' folders."""
    for folder in dict.fromkeys(folder for run in findings.every.values() for folder in run["folders"]):
        if (found := result_in(findings, folder, name)) is not None:
            yield found


def is_known(findings: ReportData, score: str) -> bool:
    return any(mean(run, score) is not None for run in findings.every.values())


def judged(findings: ReportData) -> dict[str, AgainstRandom]:
    """The runs that stand for themselves, and have scores, beside their random controls."""
    return {
        name: against_random(run["scores"])
        for name, run in findings.every.items()
        if name not in findings.same and run["scores"]
    }


def below_random(findings: ReportData, name: str) -> list[str]:
    """In what a run that stands for itself does not beat its random control, a sentence each."""
    found = judged(findings).get(name)
    return [] if found is None else found.below
