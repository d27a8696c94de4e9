"""A run's report: all tables and figures of its evals, as Markdown and as one self-contained page.

It starts with skipped evals, results left out and warnings. A control *reaches* a score if it is as good as the dictionary:
by the eval's own `reached_by` if it has one (sparse probing allows for the standard error), otherwise if its figure is at
least the dictionary's. Figures that are not better when larger (L0, absorption) are never marked.
"""

import sys
from pathlib import Path
from typing import Any

from ..engine.errors import UserError
from ..engine.process.progress import progress_bar
from ..engine.storage.checkpoint import Checkpoint
from ..engine.storage.files import write_text
from ..engine.storage.run_folder import read_metrics
from ..reporting.markdown import NOTHING, anchor, html, number, plain, table
from . import result_files
from .report_tables import PICTURES, lookup, main_scores, section, with_requested
from .report_words import ASKS, NOT_BETTER, SCORES, label
from .run_figures import draw_evals
from .suite import EVALS

MARK, MORE = "†", "↑"
SPREAD = 1e-9  # width of an interval below which the items show no spread
FEWEST = 6  # items for a difference in bold: five that all favour one side do so by chance in 6% of cases
KNOW, GLANCE, TIME = "What to know first", "Scores at a glance", "Time"
SUMMARY = (
    f"Controls are measured on the same text as the dictionary. {MARK} marks a score that a control reaches, so it is no "
    f"evidence for the dictionary. The last column names the control. Scores with {MORE} are better when larger; only these "
    "are compared with all controls, unless an eval has its own rule. Intervals are 95% intervals over test items. The "
    f"difference from the random control is paired by item, and in bold if its interval excludes zero and rests on at least "
    f"{FEWEST} items. A score without an interval is never bold. "
    f"{NOTHING} is a missing figure."
)


def write_report(run: Path, checkpoint: Checkpoint, version: int) -> Path:
    """Write report.md, report.html and figures/ of a run from the results in its evals/; returns the path of report.md.

    Uses only results of this checkpoint's dictionary and this `version` of the evals, and lists others as left out.
    """
    results, left_out = _stored_results(run, checkpoint.manifest["files"]["sae.safetensors"]["sha256"], version)
    measured = {name: result for name, result in results.items() if "skipped" not in result}
    with progress_bar("writing the report", total=None, unit="files") as bar:
        figures = draw_evals(run / "figures", measured, read_metrics(run, until=checkpoint.step))
        bar.advance(sum(map(len, figures.values())))
        title, markdown = compose(_facts(run, checkpoint, results), results, left_out, figures)
        for name, text in (("report.md", markdown), ("report.html", html(markdown, run, title))):
            write_text(run / name, text)
            bar.advance(1)
    return run / "report.md"


def compose(
    facts: dict[str, str],
    results: dict[str, dict[str, Any]],
    left_out: dict[str, str],
    figures: dict[str, dict[str, str]],
) -> tuple[str, str]:
    """Compose the report; returns its title, and all of it as Markdown.

    `facts` of the run by name, `results` by eval, `left_out`: the reason for each unused result, `figures`: for each eval,
    titles by the names of files in figures/.
    """
    title = f"Report: {facts['activation']} dictionary, F = {facts['F']}, at {facts['hook']} of {facts['model']}"
    notes = _notes(results, left_out)
    blocks = [
        f"# {plain(title)}",
        table([plain(name) for name in facts], [[plain(value) for value in facts.values()]], range(len(facts))),
        " · ".join(f"[{plain(heading)}](#{anchor(heading)})" for heading in (KNOW, GLANCE, *results, TIME)),
        f"## {KNOW}",
        SUMMARY,
        table(("eval", "note", "reason"), notes, (0, 1, 2)) if notes else "",
        f"## {GLANCE}",
        _glance({name: result for name, result in results.items() if "skipped" not in result}),
    ]
    for name, result in results.items():
        pictures = "\n".join(f"![{plain(text)}](figures/{file})" for file, text in figures.get(name, {}).items())
        skipped = [f"Skipped: {plain(result['skipped'])}"] if "skipped" in result else None
        blocks += [f"## {plain(name)}", ASKS.get(name, "")]
        blocks += [pictures if block == PICTURES else block for block in skipped or section(name, result)]
    return title, "\n\n".join(block for block in [*blocks, f"## {TIME}", *_time(results)] if block) + "\n"


def _stored_results(run: Path, dictionary: str, version: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Results in the run's evals/ in the order of `EVALS`, and the reasons why others are left out."""
    results: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name in result_files.names(run):
        try:
            origin = (result := result_files.read(run, name) or {})["of"]
            if origin["dictionary"] != dictionary:
                left_out[name] = f"measured on another dictionary, {origin['dictionary'][:12]}"
            elif origin["version"] != version:
                left_out[name] = f"measured with version {origin['version']} of the evals, not {version}"
            else:
                results[name] = result
        except UserError as error:
            left_out[name] = "its file is damaged"
            print(error, file=sys.stderr, flush=True)
        except (TypeError, KeyError):
            left_out[name] = "it does not say what was measured"
    order = {name: i for i, name in enumerate(EVALS)}
    return dict(sorted(results.items(), key=lambda item: order.get(item[0], len(order)))), left_out


def _facts(run: Path, checkpoint: Checkpoint, results: dict[str, dict[str, Any]]) -> dict[str, str]:
    sae, stream = checkpoint.manifest["dictionaries"]["sae"], None if checkpoint.run is None else checkpoint.run.stream
    metrics = read_metrics(run, until=checkpoint.step)
    origins = [result["of"] for result in results.values()]
    return {
        "model": NOTHING if stream is None else stream.model,
        "hook": NOTHING if stream is None else " to ".join(stream.hooks),
        "activation": sae["activation"],
        "F": number(sae["d_sae"]),
        "K": number(sae["k"]) if sae["activation"] in ("topk", "batchtopk") else NOTHING,
        "D": number(sae["d_in"]) if sae["d_out"] is None else f"{number(sae['d_in'])} to {number(sae['d_out'])}",
        "trained on": f"{number(metrics[-1]['tokens'])} tokens" if metrics else NOTHING,
        "dictionary": checkpoint.manifest["files"]["sae.safetensors"]["sha256"][:12],
        "evals": "; ".join(
            f"{key} {', '.join(sorted({str(origin[key]) for origin in origins}))}"
            for key in ("version", "seed")
            if origins
        ),
    }


def _notes(results: dict[str, dict[str, Any]], left_out: dict[str, str]) -> list[tuple[str, str, str]]:
    """Notes to read before the scores: eval, note and reason."""
    notes = []
    for name, result in results.items():
        order = result.get("order_probing", {})
        notes += [
            (name, "skipped", result.get("skipped")),
            (name, "order probing skipped", order.get("skipped")),
            *((name, "warning", warning) for warning in result.get("warnings", ())),
            (name, "warning", order.get("ailing")),
            (name, "no random control", result.get("no_random_control")),
        ]
    notes += [(name, "left out", why) for name, why in left_out.items()]
    return [(plain(name), note, plain(reason)) for name, note, reason in notes if reason]


def _glance(measured: dict[str, dict[str, Any]]) -> str:
    controls = with_requested(control for result in measured.values() for control in result.get("controls", ()))
    lines = []
    for name, result in measured.items():
        for i, path in enumerate(main_scores(name, result)):
            part, _, key = path.partition(".")
            if lookup(result, f"{part}.controls") is None:  # the whole result's controls
                scores, key = result, path
            else:
                scores = result[part]
            score, more = lookup(scores, key), name in SCORES and path not in NOT_BETTER
            control_scores = {c: lookup(figures, key) for c, figures in scores.get("controls", {}).items()}
            known = {c: value for c, value in control_scores.items() if None not in (score, value)}
            reached = [c for c, value in known.items() if more and value >= score]
            if i == 0:
                reached = result.get("reached_by", reached)
            cells = {c: number(control_scores.get(c)) for c in controls}
            lines.append(
                (
                    "" if i else f"[{plain(name)}](#{anchor(name)})",
                    plain(label(path)) + f" {MORE}" * more,
                    f"{MARK} " * bool(reached) + number(score),
                    *cells.values(),
                    *_uncertainty(lookup(scores.get("intervals"), key)),
                    ", ".join(map(plain, reached)),
                )
            )
    headings = ("eval", "score", "dictionary", *map(plain, controls), "interval", "minus random", "reached by")
    return table(headings, lines, (0, 1, len(headings) - 2, len(headings) - 1)) if lines else "Nothing was measured."


def _uncertainty(interval: dict[str, Any] | None) -> tuple[str, str]:
    """Cells of a score's interval, and of its paired difference from the random control."""
    if interval is None:
        return NOTHING, NOTHING
    edges, above = f"{interval['low']:.3f} to {interval['high']:.3f}", interval["above_random"]
    if above is None:
        return edges, NOTHING
    value, between = f"{above['difference']:+.3f}", f"({above['low']:+.3f} to {above['high']:+.3f})"
    if interval["items"] < FEWEST:
        return edges, f"{value} {between}: {interval['items']} items are too few for any conclusion"
    if above["high"] - above["low"] < SPREAD:
        return edges, f"{value}: all items agree, so there is no interval"
    if above["low"] > 0 or above["high"] < 0:
        return edges, f"**{value}** {between}"
    return edges, f"{value} {between}: too few items to show less than {above['least']:.3f}"


def _time(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        (plain(name), f"{result['seconds']:.1f}", str(result["of"]["seed"]), plain(", ".join(result["of"]["given"])))
        for name, result in results.items()
    ]
    lines.append(("all", f"{sum(result['seconds'] for result in results.values()):.1f}", "", ""))
    missing = [name for name in EVALS if name not in results]
    return [
        table(("eval", "seconds", "seed", "inputs"), lines, (0, 3)),
        f"Not measured: {', '.join(missing)}." if missing else "",
    ]
