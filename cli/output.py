"""Tables that commands print."""

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..engine.errors import printable
from ..engine.process.progress import percent

if TYPE_CHECKING:
    from rich.table import Table

NO_CONTROL = "no random control ({})"
#: score -> why it may be undefined
WHY_NONE = {
    "explained_variance": "explained variance: the activations do not vary",
    "ce_recovered": "CE recovered: no token has a next token, or zero ablation does not raise the loss",
    "ce_recovered_over_mean": "over mean: the same with mean ablation",
}


def core_table(result: dict[str, Any], title: str) -> None:
    """Print the core scores of a dictionary and its controls."""
    named = {"lm_neurons": "LM neurons"}
    controls = {
        named.get(name, f"{name.replace('_', ' ')} control"): scores for name, scores in result["controls"].items()
    }
    _table({"dictionary": result} | controls, title)
    _print_notes(result)


def scores_table(result: dict[str, Any], title: str, main: Iterable[str] = ()) -> None:
    """Print every score of an eval and its sections, with columns for the controls and the model (LLM). `main`: paths of its
    main scores, of which nested ones ("stability.adjusted_rand") are printed too."""
    sections = {"": result} | {
        k: v for k, v in result.items() if isinstance(v, dict) and isinstance(v.get("controls"), dict)
    }
    names = list(dict.fromkeys(name for section in sections.values() for name in section.get("controls", {})))
    llm = ["LLM"] if any(isinstance(section.get("llm"), dict) for section in sections.values()) else []
    table = _new_table(title, ("", "dictionary", *names, *llm), no_wrap=True)
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
    for path in main:
        part, _, key = path.partition(".")
        if key and part not in sections and isinstance(result.get(part), dict):
            columns = [result, *(result.get("controls", {}).get(name, {}) for name in names)]
            values = [(column.get(part) or {}).get(key) for column in columns]
            cells = [f"{x:.4f}" if isinstance(x, float) else "-" for x in values]
            table.add_row(printable(path.replace("_", " ").replace(".", " ")), *cells, *("-" for _ in llm))
    _print(table)
    for name, labels in missing.items():
        _say(f"- no value for {name}: {', '.join(labels)}")
    for section, scores in sections.items():
        if isinstance(scores.get("skipped"), str):
            _say(f"{section.replace('_', ' ')} was skipped: {scores['skipped']}")
    _print_notes(result)
    if reached := result.get("reached_by"):
        _say(f"controls that score as well: {', '.join(reached)}")


def probes_table(result: dict[str, Any], title: str) -> None:
    """Print the AUC and accuracy of sae_probes by k, and the AUC of each data set."""
    number = lambda x: "-" if x is None else f"{x:.4f}"
    columns = {"dictionary": result, **result["controls"]}
    table = _new_table(title, ("", *columns, "LLM, all"), no_wrap=True)
    for figure in ("auc", "accuracy"):
        for k in result[figure]:
            values = [*(scores[figure][k] for scores in columns.values()), result["llm"][figure]]
            table.add_row(f"{figure}, k = {k}", *map(number, values))
    _print(table)
    first, main = str(result["protocol"]["k_values"][0]), str(result["protocol"]["main_k"])
    controls = [name for name in result["controls"] if name != "shuffled"]
    headings = (f"AUC, k = {first}", f"k = {main}", *(f"{name}, k = {main}" for name in controls), "LLM, all")
    table = _new_table("By data set", ("", *headings), no_wrap=True)
    for name, scores in result["sets"].items():
        values = [scores["auc"][first], scores["auc"][main]]
        values += [*(scores["controls"][control]["auc"][main] for control in controls), scores["llm"]["auc"]]
        table.add_row(printable(name), *map(number, values))
    _print(table)
    _print_notes(result)
    if reached := result["reached_by"]:
        _say(f"controls that score as well: {', '.join(reached)}")


def _print_notes(result: dict[str, Any]) -> None:
    if (reason := result.get("no_random_control")) is not None:
        _say(NO_CONTROL.format(reason))
    for warning in result.get("warnings", []):
        _say(f"warning: {warning}")


def _figures(scores: Iterable[dict[str, Any]]) -> list[str]:
    items = (item for column in scores for item in column.items())
    return list(dict.fromkeys(key for key, value in items if isinstance(value, float) and key != "seconds"))


def runs_table(summary: dict[str, Any]) -> None:
    """Print the results of `train`: one dictionary and its controls, or several with their controls' explained variance."""
    dictionaries = summary.get("dictionaries")
    if dictionaries is None:
        title = f"{summary['activation']}, F = {summary['d_sae']}, at {summary['hook']} of {summary['model']}"
        core_table(summary, title)
        return
    trained = {name: scores for name, scores in dictionaries.items() if "failed" not in scores}
    names = dict.fromkeys(name for scores in trained.values() for name in scores["controls"])
    control_columns = {
        f"{control.replace('_', ' ')} EV": {
            name: scores["controls"].get(control, {}).get("explained_variance") for name, scores in trained.items()
        }
        for control in names
        if control not in ("lm_neurons", "mean")
    }
    _table(trained, f"{len(dictionaries)} dictionaries of {summary['model']}", control_columns)
    for reason in dict.fromkeys(s["no_random_control"] for s in trained.values() if s.get("no_random_control")):
        _say(NO_CONTROL.format(reason))
    for name, scores in dictionaries.items():
        if "failed" in scores:
            _say(f"{name} was stopped: {scores['failed']}")
        for warning in scores.get("warnings", []):
            _say(f"warning: {name}: {warning}")


#: scores of `recovery` and their names in tables
RECOVERY = {
    "f1": "F1", "precision": "precision", "recall": "recall", "mcc": "MCC", "uniqueness": "uniqueness", "r2": "R2",
    "shrinkage": "shrinkage", "l0": "L0", "true_l0": "L0 of the world", "dead": "dead latents",
}  # fmt: skip


def recovery_table(summary: dict[str, Any]) -> None:
    """Print how well each dictionary and its random control recover the features of a world, if there is one."""
    for name, scores in (summary.get("dictionaries") or {"": summary}).items():
        if "recovery" not in scores:
            continue
        columns = {"dictionary": scores["recovery"]}
        columns |= {
            f"{name.replace('_', ' ')} control": control["recovery"]
            for name, control in scores["controls"].items()
            if "recovery" in control
        }
        table = _new_table(f"Recovery of the world's features{name and f': {name}'}", ("", *columns))
        lines = {column: _recovery_lines(values) for column, values in columns.items()}
        for key in dict.fromkeys(key for values in lines.values() for key in values):
            table.add_row(key, *(values.get(key, "-") for values in lines.values()))
        _print(table)


def _recovery_lines(scores: dict[str, Any]) -> dict[str, str]:
    lines = {label: format(scores[key], "" if key == "dead" else ".4f") for key, label in RECOVERY.items()}
    for kind, values in scores["kinds"].items():
        lines[f"{kind}: recovered of {values['features']}"] = percent(values["recovered"])
        lines[f"{kind}: F1"] = f"{values['f1']:.4f}"
    durations = scores["durations"] or {}
    if (r := durations.get("r")) is not None:
        lines["durations: correlation"] = f"{r:.4f}"
    if (error := durations.get("log2_error")) is not None:
        lines["durations: log2 error"] = f"{error:.4f}"
    return lines


def campaign_table(results: dict[str, Any]) -> None:
    """Print a campaign's main scores (means over seeds), results of analyses, and runs that failed."""
    from rich.box import SIMPLE_HEAD

    from ..campaign.results import against_random, analysis_figures
    from ..campaign.significance import mean

    def number(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    title = f"{results['model']}, {results['hook']}, {results['seeds']} seed(s)"
    headings = ("", "FVU first", "FVU last", "L0", "dead", "EV", "of random", "probing", "of random")
    table = _new_table(title, headings, box=SIMPLE_HEAD, padding=(0, 0))  # fits into 80 columns
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
    """Print the documented runs, one line each. The arguments are options of `temposae run`."""
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
        "time: estimate for training the run, its plain dictionary and their random controls on the embedded model, on "
        f"{where}.\nEvaluation takes extra time. temposae bench runs --preset testbed measures the times again."
    )


def _table(
    scores_by_name: dict[str, dict[str, Any]], title: str, more: dict[str, dict[str, float | None]] | None = None
) -> None:
    """Print core scores, a line per name, with standard errors or further columns `more` (heading -> name -> value)."""

    def number(value: float | None, error: float | None = None) -> str:
        return "-" if value is None else f"{value:.4f}" if error is None else f"{value:.4f} ±{error:.4f}"

    narrow = more is not None  # errors and further columns do not both fit into 80 columns
    names = ("EV", "CE", "over mean") if narrow else ("explained variance", "CE recovered", "over mean")
    more = more or {}
    table = _new_table(title, ("", *names, "L0", "dead", *more))
    for name, scores in scores_by_name.items():
        figures = (number(scores.get(key), None if narrow else scores.get(f"{key}_error")) for key in WHY_NONE)
        l0, dead = scores.get("l0"), None if name == "mean control" else scores.get("dead_fraction")
        cells = ("-" if l0 is None else f"{l0:.1f}", "-" if dead is None else percent(dead))
        table.add_row(printable(name), *figures, *cells, *(number(column.get(name)) for column in more.values()))
    _print(table)
    measured = [scores for scores in scores_by_name.values() if "measured_on" not in scores]  # with a model
    for key, why in WHY_NONE.items():
        if any(scores.get(key) is None for scores in measured):
            _say(f"- {why}")


def _new_table(title: str, headings: Iterable[str], no_wrap: bool = False, **style: Any) -> "Table":
    from rich.table import Table

    table = Table(title=printable(title), title_justify="left", **style)
    for heading in headings:
        table.add_column(printable(heading), justify="right" if heading else "left", no_wrap=no_wrap or not heading)
    return table


def _print(table: "Table") -> None:
    """Print a table without interpreting markup or emoji codes in names."""
    from rich.console import Console

    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = None if has_width else 120
    Console(markup=False, emoji=False, highlight=False, width=width).print(table)


def _say(text: str) -> None:
    print(printable(text))


def figures(values: dict[str, Any]) -> None:
    width = max(map(len, values))
    for key, value in values.items():
        _say(f"{key:{width}}  {value if not isinstance(value, float) else format(value, '.4f')}")
