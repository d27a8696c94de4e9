"""What commands print."""

from typing import Any


def core_table(result: dict[str, Any], title: str) -> None:
    """The scores of a dictionary, and of its controls."""
    named = {"lm_neurons": "LM neurons"}
    controls = {named.get(name, f"{name} control"): scores for name, scores in result["controls"].items()}
    _table({"dictionary": result} | controls, title)


def scores_table(result: dict[str, Any], title: str) -> None:
    """Every score of an eval, and of each of its parts, a line each, with a column for each control that has it."""
    from rich.console import Console
    from rich.table import Table

    parts = {"": result} | {
        k: v for k, v in result.items() if isinstance(v, dict) and isinstance(v.get("controls"), dict)
    }
    names = list(dict.fromkeys(name for part in parts.values() for name in part.get("controls", {})))
    table = Table(title=title, title_justify="left")
    for heading in ("", "dictionary", *names):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for part, scores in parts.items():
        for key, value in scores.items():
            if isinstance(value, float) and key != "seconds":
                others = (scores.get("controls", {}).get(name, {}).get(key) for name in names)
                cells = (f"{x:.4f}" if isinstance(x, float) else "-" for x in (value, *others))
                table.add_row(f"{part} {key}".replace("_", " ").strip(), *cells)
    Console().print(table)
    for warning in result.get("warnings", []):
        print(f"warning: {warning}")
    if reached := result.get("reached_by"):
        print(f"a control does as well: {', '.join(reached)}")


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
    _table(whole, f"{len(several)} dictionaries of {summary['model']}", {"random EV": controls})
    for name, scores in several.items():
        if "failed" in scores:
            print(f"{name} was stopped: {scores['failed']}")


def campaign_table(found: dict[str, Any]) -> None:
    """The main scores of a campaign's runs and baselines, means over seeds."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from ..campaign.results import found_by

    def number(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    title = f"{found['model']}, {found['hook']}, {found['seeds']} seed(s)"
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0)
    )  # 80 columns, with conditions' names
    for heading in ("", "FVU first", "FVU last", "L0", "dead", "EV", "of random", "probing", "of random"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for name, run in (found["baselines"] | found["runs"]).items():
        if run["trained_as"] in found["runs"]:
            continue
        own = [run["scores"].get(key, {}) for key in ("explained_variance", "probing")]
        pairs = [number(x) for one in own for x in (one.get("mean"), (one.get("random") or {}).get("mean"))]
        table.add_row(
            name, number(run["fvu_first"]), number(run["fvu_last"]), number(run["l0"], 1),
            number(run["dead_fraction"]), *pairs,
        )  # fmt: skip
    Console().print(table)
    for name, run in found["runs"].items():
        if run["trained_as"]:
            print(f"{name}, {run['title']}, in {run['trained_as']}: {found_by(run)}")
        elif run["failed"]:
            print(f"{name}: {next(iter(run['failed'].values()))}")
        elif run["why_not"]:
            print(f"{name} does not beat its random control: {run['why_not']}")


def _table(
    lines: dict[str, dict[str, Any]], title: str, more: dict[str, dict[str, float | None]] | None = None
) -> None:
    """Core scores, a line each, with further columns `more`: heading -> line -> value."""
    from rich.console import Console
    from rich.table import Table

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    names = ("explained variance", "CE recovered", "over mean") if more is None else ("EV", "CE", "over mean")
    more = more or {}
    table = Table(title=title, title_justify="left")
    for heading in ("", *names, "L0", "dead", *more):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for name, scores in lines.items():
        keys = ("explained_variance", "ce_recovered", "ce_recovered_over_mean")
        dead = "-" if name == "mean control" else f"{scores['dead_fraction']:.1%}"
        others = (number(column[name]) for column in more.values())
        table.add_row(name, *(number(scores[key]) for key in keys), f"{scores['l0']:.1f}", dead, *others)
    Console().print(table)


def figures(values: dict[str, Any]) -> None:
    width = max(map(len, values))
    for key, value in values.items():
        print(f"{key:{width}}  {value if not isinstance(value, float) else format(value, '.4f')}")
