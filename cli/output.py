"""What commands print."""

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..engine.errors import printable
from ..engine.process.progress import percent

if TYPE_CHECKING:
    from rich.table import Table

NO_CONTROL = "no random control ({})"
#: score -> why there may be none, where something else was measured
WHY_NONE = {
    "explained_variance": "explained variance: the activations don't vary",
    "ce_recovered": "CE recovered: no token has a next one, or zeros in the activation's place do not raise the loss",
    "ce_recovered_over_mean": "over mean: as above, with the mean in the activation's place",
}


def core_table(result: dict[str, Any], title: str) -> None:
    """The scores of a dictionary, and of its controls; below, why some have none."""
    named = {"lm_neurons": "LM neurons"}
    controls = {named.get(name, f"{name} control"): scores for name, scores in result["controls"].items()}
    _table({"dictionary": result} | controls, title)
    if (reason := result.get("no_random_control")) is not None:
        _say(NO_CONTROL.format(reason))
    for warning in result.get("warnings", []):
        _say(f"warning: {warning}")


def scores_table(result: dict[str, Any], title: str) -> None:
    """Every score of an eval, and of each of its sections, a line each, with a column for each control that has it, and for
    the model's own activations (LLM) where they were measured; below, why some have none."""
    from rich.table import Table

    sections = {"": result} | {
        k: v for k, v in result.items() if isinstance(v, dict) and isinstance(v.get("controls"), dict)
    }
    names = list(dict.fromkeys(name for section in sections.values() for name in section.get("controls", {})))
    llm = ["LLM"] if any(isinstance(section.get("llm"), dict) for section in sections.values()) else []
    table = Table(title=printable(title), title_justify="left")
    for heading in ("", "dictionary", *names, *llm):
        table.add_column(printable(heading), justify="right" if heading else "left", no_wrap=True)
    missing: dict[str, list[str]] = {}
    for section, scores in sections.items():
        scores_by_control = {name: scores.get("controls", {}).get(name, {}) for name in names}
        scores_by_control |= {name: scores.get("llm") or {} for name in llm}
        columns = {"dictionary": scores, **scores_by_control}
        for key in _figures(columns.values()):
            label = f"{section} {key}".replace("_", " ").strip()
            values = {name: column.get(key) for name, column in columns.items()}
            table.add_row(printable(label), *(f"{x:.4f}" if isinstance(x, float) else "-" for x in values.values()))
            for name, value in values.items():
                if not isinstance(value, float):
                    missing.setdefault(name, []).append(label)
    _print(table)
    for name, labels in missing.items():
        _say(f"- no figure of {name} for {', '.join(labels)}")
    for section, scores in sections.items():
        if isinstance(scores.get("skipped"), str):
            _say(f"{section.replace('_', ' ')} was skipped: {scores['skipped']}")
    if (reason := result.get("no_random_control")) is not None:
        _say(NO_CONTROL.format(reason))
    for warning in result.get("warnings", []):
        _say(f"warning: {warning}")
    if reached := result.get("reached_by"):
        _say(f"a control does as well: {', '.join(reached)}")


def _figures(scores: Iterable[dict[str, Any]]) -> list[str]:
    """The names under which any of these has a figure, but times and what is told elsewhere."""
    return list(
        dict.fromkeys(
            key for column in scores for key, value in column.items() if isinstance(value, float) and key != "seconds"
        )
    )


def runs_table(summary: dict[str, Any]) -> None:
    """What `train` leaves behind: a dictionary beside its controls, or several, each beside its random control."""
    several = summary.get("dictionaries")
    if several is None:
        core_table(
            summary, f"{summary['activation']}, F = {summary['d_sae']}, at {summary['hook']} of {summary['model']}"
        )
        return
    whole = {name: scores for name, scores in several.items() if "failed" not in scores}
    controls = {name: scores["controls"].get("random", {}).get("explained_variance") for name, scores in whole.items()}
    beside = {"random EV": controls} if any("random" in scores["controls"] for scores in whole.values()) else {}
    _table(whole, f"{len(several)} dictionaries of {summary['model']}", beside)
    for reason in dict.fromkeys(s["no_random_control"] for s in whole.values() if s.get("no_random_control")):
        _say(NO_CONTROL.format(reason))
    for name, scores in several.items():
        if "failed" in scores:
            _say(f"{name} was stopped: {scores['failed']}")
        for warning in scores.get("warnings", []):
            _say(f"warning: {name}: {warning}")


def campaign_table(results: dict[str, Any]) -> None:
    """The main scores of a campaign's runs and baselines, means over seeds; below, what analyses find, and runs that failed
    or are not above their random control."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ..campaign.results import against_random, analysis_figures
    from ..campaign.significance import mean

    def number(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    title = f"{results['model']}, {results['hook']}, {results['seeds']} seed(s)"
    table = Table(
        title=printable(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 0)
    )  # 80 columns, with conditions' names
    for heading in ("", "FVU first", "FVU last", "L0", "dead", "EV", "of random", "probing", "of random"):
        table.add_column(printable(heading), justify="right" if heading else "left", no_wrap=not heading)
    for name, run in (results["baselines"] | results["runs"]).items():
        if run["trained_as"] not in results["runs"]:
            keys = ("explained_variance", "probing")
            pairs = [number(mean(run, key, control=control)) for key in keys for control in (False, True)]
            fvu_and_l0 = number(run["fvu_first"]), number(run["fvu_last"]), number(run["l0"], 1)
            table.add_row(printable(name), *fvu_and_l0, number(run["dead_fraction"]), *pairs)
    _print(table)
    for name, run in results["runs"].items():
        if run["trained_as"]:
            _say(f"{name}, {run['title']}, in {run['trained_as']}:")
            figures(analysis_figures(run))
        elif run["failed"]:
            _say(f"{name} failed: {next(iter(run['failed'].values()))}")
        elif below := against_random(run["scores"]).below:
            _say(f"{name} does not beat its random control: {'; '.join(below)}")


def documented_list(
    activation: str | None = None, d_sae: int | None = None, k: int | None = None, tokens: int | None = None
) -> None:
    """The documented runs, a line each: title, activation, F, tokens, how long training is expected to take, and the run's
    mechanisms. The arguments are those of `temposae run`."""
    from ..bench.documented_runs import expected_seconds
    from ..campaign.documented import BASELINES, RUNS, settings

    print(f"{'run':13}  {'title':42}  {'activation':12}  {'F':>6}  {'tokens':>9}  {'time':>7}  mask and parts")
    where = ""
    for name, run in (BASELINES | RUNS).items():
        run_settings = settings(name, activation)
        sae, n_tokens = run_settings["sae"], tokens or run_settings["train"]["tokens"]
        size, kind = d_sae or sae["d_sae"], sae["activation"]
        mask = sae.get("mask", {}).get("kind", "none")
        mechanisms = [f"mask {mask}"] * (mask != "none") + [part["kind"] for part in sae.get("parts", ())]
        mask_and_parts = f"the weights of {run.trained_as}" if run.trained_as else ", ".join(mechanisms) or "-"
        seconds, where = expected_seconds(name, size, n_tokens, plain=kind)
        label = kind if kind == "relu" else f"{kind} {k or sae.get('k', 32)}"
        time = f"{max(1.0, seconds / 60):.0f} min"
        print(f"{name:13}  {run.title:42}  {label:12}  {size:6,}  {n_tokens:9,}  {time:>7}  {mask_and_parts}")
    print(
        "time: an estimate for training the run, the plain dictionary beside it, and a random control of each, on the "
        f"embedded model and {where}.\nMeasuring them comes on top. temposae bench runs --preset testbed measures it anew."
    )


def _table(
    lines: dict[str, dict[str, Any]], title: str, more: dict[str, dict[str, float | None]] | None = None
) -> None:
    """Core scores, a line each, with their standard errors or with further columns `more`: heading -> line -> value. Below,
    why some are missing."""
    from rich.table import Table

    def number(value: float | None, error: float | None = None) -> str:
        return "-" if value is None else f"{value:.4f}" if error is None else f"{value:.4f} ±{error:.4f}"

    narrow = more is not None  # both don't fit in 80 columns
    names = ("EV", "CE", "over mean") if narrow else ("explained variance", "CE recovered", "over mean")
    more = more or {}
    table = Table(title=printable(title), title_justify="left")
    for heading in ("", *names, "L0", "dead", *more):
        table.add_column(printable(heading), justify="right" if heading else "left", no_wrap=not heading)
    for name, scores in lines.items():
        figures = (number(scores.get(key), None if narrow else scores.get(f"{key}_error")) for key in WHY_NONE)
        l0, dead = scores.get("l0"), None if name == "mean control" else scores.get("dead_fraction")
        cells = ("-" if l0 is None else f"{l0:.1f}", "-" if dead is None else percent(dead))
        table.add_row(printable(name), *figures, *cells, *(number(column.get(name)) for column in more.values()))
    _print(table)
    measured = [scores for scores in lines.values() if "measured_on" not in scores]  # with a model, that is
    for key, why in WHY_NONE.items():
        if any(scores.get(key) is None for scores in measured):
            _say(f"- {why}")


def _print(table: "Table") -> None:
    """Names are shown as they are: brackets are no markup, colons no emoji."""
    from rich.console import Console

    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ  # else nothing says at which width to break lines
    width = None if has_width else 120
    Console(markup=False, emoji=False, highlight=False, width=width).print(table)


def _say(text: str) -> None:
    print(printable(text))


def figures(values: dict[str, Any]) -> None:
    width = max(map(len, values))
    for key, value in values.items():
        _say(f"{key:{width}}  {value if not isinstance(value, float) else format(value, '.4f')}")
