"""A run's report: what was measured, what of it is to be trusted, and every table and figure, as Markdown and as one page
that needs no other file.

A control *reaches* a score if it is as good: `reached_by` where an eval says so itself (sparse probing within its standard
error), else where the control's figure is the dictionary's or above. What a control reaches too says nothing about the
dictionary. Figures of which neither more nor less is better (L0, absorption) are shown, and never marked.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.errors import UserError
from ..engine.process.progress import percent, progress_bar
from ..engine.storage.checkpoint import Checkpoint
from ..engine.storage.files import write_text
from ..engine.storage.run_folder import read_metrics
from . import result_files
from .eval_figures import draw_evals
from .markdown_page import NOTHING, anchor, html, number, plain, table
from .report_sections import ASKS, CONTROLS, PICTURES, lookup, section, shown
from .suite import EVALS

MARK = "†"
KNOW = "What to know first"
WORTH_A_WORD = 0.001  # share of dead latents from which on a reader must know of them


class Score(NamedTuple):
    """A main figure of an eval: where it is, whether more is better, and whether the eval's `reached_by` speaks of it."""

    label: str
    path: str
    better: bool = True
    own_rule: bool = False


SCORES = {
    "core": (
        Score("explained variance", "explained_variance"),
        Score("CE recovered", "ce_recovered"),
        Score("KL recovered", "kl_recovered"),
        Score("L0", "l0", better=False),
    ),
    "sparse_probing": (Score("top 1", "top_1", own_rule=True), Score("top 5", "top_5")),
    "positions": (
        Score("specialization", "specialization"),
        Score("fidelity: profile", "fidelity.profile"),
        Score("fidelity: EV, worst bin", "fidelity.explained_variance.worst"),
        Score("order probing: mean pooled", "order_probing.mean_pooled"),
        Score("order probing: last token", "order_probing.last_token"),
    ),
    "ground_truth": (
        Score("recovered", "recovered"),
        Score("mean F1", "mean_f1"),
        Score("mean top 5", "mean_top_5"),
    ),
    "unlearning": (Score("score", "score"), Score("retained", "retained", better=False)),
    "scr": (Score("score", "score", own_rule=True),),
    "tpp": (Score("score", "score", own_rule=True),),
    "clusters": (Score("stability", "stability.adjusted_rand"),),
    "absorption": (
        Score("mean F1 of main latents", "mean_main_f1"),
        Score("mean absorption", "mean_absorption", better=False),
    ),
}


@dataclass
class Line:
    """A score of the dictionary, those of its controls by name, and the controls that reach it."""

    label: str
    sae_score: float | None
    controls: dict[str, float | None]
    reached_by: list[str]


def write_report(run: Path, checkpoint: Checkpoint, version: int) -> Path:
    """Write report.md, report.html and figures/ of a run from the results in its evals/; returns the path of report.md.

    Only results of this checkpoint's dictionary and of this `version` of the evals are used; others are named as left out.
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
    """The report's title, and all of it as Markdown.

    `facts` of the run by name, results by eval, `left_out` the reason of each result that is not used, and of each eval its
    `figures`, the titles by the names of the files in figures/.
    """
    lines = {name: _lines(name, result) for name, result in results.items() if "skipped" not in result}
    title = f"Report: {facts['activation']} dictionary, F = {facts['F']}, at {facts['hook']} of {facts['model']}"
    places = [KNOW, "Scores at a glance", *results, "Time"]
    notes = _notes(results, lines, left_out)
    blocks = [
        f"# {plain(title)}",
        table([plain(name) for name in facts], [[plain(value) for value in facts.values()]], range(len(facts))),
        " · ".join(f"[{plain(place)}](#{anchor(place)})" for place in places),
        f"## {KNOW}",
        "\n".join(f"- {note}" for note in notes) or _nothing(results),
        "## Scores at a glance",
        *_glance(lines),
    ]
    for name, result in results.items():
        blocks += [f"## {plain(name)}", ASKS.get(name, "")]
        if "skipped" in result:
            blocks.append(f"Skipped: {plain(result['skipped'])}")
            continue
        pictures = "\n".join(f"![{plain(shows)}](figures/{file})" for file, shows in figures.get(name, {}).items())
        blocks += [pictures if block == PICTURES else block for block in section(name, result)]
    return title, "\n\n".join(block for block in [*blocks, "## Time", *_time(results)] if block) + "\n"


def _stored_results(run: Path, dictionary: str, version: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Results in the run's evals/ by name, in the order of `EVALS`, and why others are left out."""
    results: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name in result_files.names(run):
        try:
            origin = (result := result_files.read(run, name) or {})["of"]
            if origin["dictionary"] != dictionary:
                left_out[name] = f"it is of another dictionary, {origin['dictionary'][:12]}"
            elif origin["version"] != version:
                left_out[name] = f"it is of version {origin['version']} of the evals, not {version}"
            else:
                results[name] = result
        except UserError as error:
            left_out[name] = "its file is damaged"
            print(error, file=sys.stderr, flush=True)
        except (TypeError, KeyError):
            left_out[name] = "it doesn't say what it was measured of"
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


def _lines(name: str, result: dict[str, Any]) -> list[Line]:
    """The main scores of a result; of an eval that isn't known here all plain figures, of which the first is the score."""
    own_rule = "reached_by" in result
    unknown = [Score(label, path, False, own_rule and i == 0) for i, (label, path) in enumerate(shown(result).items())]
    lines = []
    for score in SCORES.get(name, unknown):
        prefix, _, key = score.path.rpartition(".")
        # controls stand beside a part of a result
        while prefix and not isinstance(lookup(result, f"{prefix}.controls"), dict):
            prefix, _, inner = prefix.rpartition(".")
            key = f"{inner}.{key}"
        scores = lookup(result, prefix) if prefix else result
        sae_score, controls = (
            lookup(scores, key),
            {c: lookup(control, key) for c, control in scores.get("controls", {}).items()},
        )
        reached = [
            c for c, value in controls.items() if score.better and None not in (sae_score, value) and value >= sae_score
        ]
        lines.append(Line(score.label, sae_score, controls, scores["reached_by"] if score.own_rule else reached))
    return lines


def _notes(results: dict[str, dict[str, Any]], lines: dict[str, list[Line]], left_out: dict[str, str]) -> list[str]:
    """What a reader must know before the scores, the gravest first."""
    notes = []
    for name, eval_lines in lines.items():
        reached = [(line.label, line.reached_by) for line in eval_lines if line.reached_by]
        sets = results[name].get("sets", {})
        reached += [
            (f"{s}, top 1", set_scores["reached_by"])
            for s, set_scores in sets.items()
            if len(sets) > 1 and set_scores.get("reached_by")
        ]
        if reached:
            reached_list = "; ".join(f"{plain(label)} ({', '.join(map(plain, by))})" for label, by in reached)
            notes.append(f"**{plain(name)}**: a control does as well at {reached_list}")
    notes += [
        f"**{plain(name)}**: no figure for {plain(line.label)}"
        for name, eval_lines in lines.items() for line in eval_lines if line.sae_score is None
    ]  # fmt: skip
    for name, result in results.items():
        order = result.get("order_probing", {})
        warnings = [*result.get("warnings", []), order.get("ailing")]
        warnings.append(f"order probing was skipped: {order['skipped']}" if "skipped" in order else None)
        notes += [f"**{plain(name)}**: {plain(warning)}" for warning in warnings if warning]
    if (dead := lookup(results, "core.dead_fraction")) and dead >= WORTH_A_WORD:
        tokens = number(lookup(results, "core.tokens"))
        notes.append(f"{percent(dead)} of the latents are dead: they fire on none of {tokens} held-out tokens")
    if lines and not any("random" in line.controls for eval_lines in lines.values() for line in eval_lines):
        reasons = dict.fromkeys(r["no_random_control"] for r in results.values() if r.get("no_random_control"))
        why = f" ({plain(', '.join(reasons))})" if reasons else ""
        notes.append(f"No random control{why}: how much an untrained decoder has of these scores is not known")
    notes += [f"**{plain(n)}** was skipped: {plain(r['skipped'])}" for n, r in results.items() if "skipped" in r]
    return notes + [f"The result of **{plain(name)}** is left out: {plain(why)}" for name, why in left_out.items()]


def _nothing(results: dict[str, dict[str, Any]]) -> str:
    """That there is nothing to know first, of what was measured."""
    if not results:
        return "Nothing was measured."
    said = ["no control reaches a score", "every score is there", "no eval warns or was skipped"]
    if "core" in results:
        said.append("no latent is dead" if not lookup(results, "core.dead_fraction") else "hardly a latent is dead")
    return f"Nothing: {', '.join(said[:-1])} and {said[-1]}."


def _glance(lines: dict[str, list[Line]]) -> list[str]:
    every = [control for eval_lines in lines.values() for line in eval_lines for control in line.controls]
    controls = list(dict.fromkeys([*CONTROLS, *every]))

    def cell(line: Line, control: str) -> str:
        value = number(line.controls.get(control))
        return f"**{value}**" if control in line.reached_by else value

    cells = [
        (
            "" if i else f"[{plain(name)}](#{anchor(name)})",
            plain(line.label),
            f"{MARK} " * bool(line.reached_by) + number(line.sae_score),
            *(cell(line, control) for control in controls),
            ", ".join(map(plain, line.reached_by)),
        )
        for name, eval_lines in lines.items()
        for i, line in enumerate(eval_lines)
    ]
    headings = ("eval", "score", "dictionary", *map(plain, controls), "reached by")
    reached = any(line.reached_by for eval_lines in lines.values() for line in eval_lines)
    unmarked = [s.label for name in lines for s in SCORES.get(name, ()) if not s.better]
    legend = [
        f"{MARK} A control (bold) is as good: the score says nothing about the dictionary." if reached else "",
        f"Never marked, as neither more nor less is better: {', '.join(unmarked)}." if unmarked else "",
        f"{NOTHING} stands for a figure that there is not." if lines else "",
    ]
    return [table(headings, cells, (0, 1, len(headings) - 1)) if lines else "", " ".join(filter(None, legend))]


def _time(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        (
            plain(name),
            f"{result['seconds']:.1f}",
            str(result["of"]["seed"]),
            plain(", ".join(result["of"]["given"])),
        )
        for name, result in results.items()
    ]
    total = sum(result["seconds"] for result in results.values())
    lines.append(("all", f"{total:.1f}", "", ""))
    missing = [name for name in EVALS if name not in results]
    return [
        table(("eval", "seconds", "seed", "given"), lines, (0, 3)),
        f"Not measured: {', '.join(missing)}." if missing else "",
    ]
