"""The figures that logs A, B and E name."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ..engine.folder import HELD_OUT
from ..engine.progress import percent
from ..evals.figures import COLOURS, SEVERAL, legend_below
from .panels import (
    GREY,
    HELD_OUT_FVU,
    MOST,
    NARROW,
    WIDE,
    Draw,
    Drawing,
    Row,
    bars,
    curves,
    name_rows,
    note,
    plain_ticks,
    rows,
    rows_named,
    together,
    whisker,
)
from .saved import Lacking, Saved, Seeds, final_fvu, score

COMPARED = ("B9", "B10")  # which log B's pictures are about


def unlearning_scores(saved: Saved, log: str) -> Drawing:
    """Bars of the runs' scores, with their random controls'."""
    given = rows(saved, log, partial(score, name="unlearning"))
    if not any(row.own for row in given if not row.is_baseline):
        why = "no setting counts for any run" if "unlearning" in saved.found["evals"] else "it is not among the evals"
        raise Lacking(f"unlearning was not measured in this campaign: {why}")
    return _bars(
        saved, given, "unlearning score", "Unlearning: 1 - least forget accuracy, while other answers are kept"
    )


def training_curves(saved: Saved, log: str) -> Drawing:
    """Error over training, a line a run: training losses of different objectives can't be compared, FVU can."""
    every = {**saved.baselines, **saved.trained(log)}
    alive = {name: run for name, run in every.items() if saved.folders(run)}
    try:
        file, where = HELD_OUT, "on held-out text"
        found = {name: saved.curve(run, "fvu", file=file) for name, run in alive.items()}
    except Lacking:
        where = "on batches not seen before"
        found = {name: saved.curve(run, "fvu") for name, run in alive.items()}
    lines = {name: found[name] for name in alive if name not in saved.baselines}
    if not lines:
        raise Lacking("every run failed")
    greys = {name: found[name] for name in alive if name in saved.baselines}
    names = {row.name: row.label for row in rows_named(every)}
    title = f"Error over training, runs of log {log}"
    panel = lambda: curves(lines, greys, names, ylabel=f"FVU {where}", title=title)
    drawing = together({title: panel}, 1, (WIDE, 4.2))
    legend_below(drawing.figure, note(saved, "bands"), columns=3)
    return drawing


def final_metrics(saved: Saved, log: str) -> Drawing:
    """Bars of what each run leaves unexplained at the end."""
    title = f"Error at the end, runs of log {log}"
    return _bars(saved, rows(saved, log, _fvu), HELD_OUT_FVU, title, digits=3, most=MOST)


def training_progression(saved: Saved, log: str) -> Drawing:
    """How far each run of the log came, and its error there."""

    def steps(run: Mapping[str, Any]) -> tuple[Seeds, Seeds]:
        return saved.steps(run), Seeds(())

    def completed() -> Draw:
        given, title = rows(saved, log, steps), "Steps completed"
        draw = bars(given, "training steps", title=title, best=COMPARED, lying=True)
        runs = {**saved.baselines, **saved.trained(log)}
        planned = {name: _planned(saved.settings(run)["train"]) for name, run in runs.items()}

        def with_plan(axes: Any) -> None:
            draw(axes)
            _marks(axes, runs, planned, "|", "steps planned")

        return with_plan

    def ends() -> Draw:
        how = {"title": "Error at the end", "best": COMPARED, "most": MOST, "digits": 3}
        return bars(rows(saved, log, _fvu), HELD_OUT_FVU, lying=True, **how)

    drawing = together({"steps": completed, "error": ends}, 2, (WIDE, _height(saved, log)))
    _one_legend(drawing, note(saved))
    return drawing


def hyperparameters(saved: Saved, log: str) -> Drawing:
    """Learning rates and L1 coefficients, and what they were beside what the settings say."""
    runs = {**saved.baselines, **saved.trained(log)}

    def rates(axes: Any) -> None:
        own = {name: run["lr"] for name, run in runs.items() if run["lr"]}
        paced = {name: own[name] * pace for name in own if (pace := _of_parts(saved, runs[name], "pace")) != 1}
        _levels(axes, runs, own, "peak learning rate", "Learning rate")
        _marks(axes, runs, paced, "D", "of its adapters")
        axes.margins(x=0.15)
        plain_ticks(axes.xaxis, (1, 3))

    def penalties(axes: Any) -> None:
        known = {name: run["l1_coefficient"] for name, run in runs.items() if run["activation"] == "relu"}
        given = {name: value for name, value in known.items() if value}  # a logarithmic axis has no 0
        factors = {name: _last_factor(saved, runs[name]) for name in given}
        first = {name: given[name] * at for name in given if (at := _of_parts(saved, runs[name], "l1_from")) != 1}
        _levels(axes, runs, given, "L1 coefficient", "Sparsity penalty")
        _marks(axes, runs, first, "D", "while its base is alone")
        found = {name: given[name] * at.mean for name, at in factors.items() if at}
        _marks(axes, runs, found, "^", "at the end, moved to reach the L0 asked for")
        axes.margins(x=0.15)
        plain_ticks(axes.xaxis, (1,))

    drawing = together({"rates": lambda: rates, "penalties": lambda: penalties}, 2, (WIDE, _height(saved, log)))
    _one_legend(drawing, None, columns=3)
    return drawing


def feature_statistics(saved: Saved, log: str) -> Drawing:
    """Sizes of the dictionaries, and how many of their latents are alive."""
    runs = {**saved.baselines, **saved.trained(log)}
    given = rows(saved, log, lambda run: (_alive(run), Seeds(())))
    if not any(row.own for row in given):
        raise Lacking("core was not measured of any run")

    def prepare() -> Draw:
        def draw(axes: Any) -> None:
            sizes = [run["d_sae"] for run in runs.values()]
            style = {"linestyle": "", "gid": "d_sae", "markersize": 6, "mfc": "none", "color": "#222222"}
            axes.plot(range(len(sizes)), sizes, marker="s", label="dictionary size F", **style)
            known = [(at, row) for at, row in enumerate(given) if row.own]
            colours = [GREY if row.is_baseline else COLOURS["sae"] for _, row in known]
            axes.scatter(
                [at for at, _ in known], [row.own.mean for _, row in known], s=22, color=colours, zorder=3, gid="alive"
            )
            label = "latents alive on held-out text, and their share"
            axes.plot([], [], "o", color=COLOURS["sae"], markersize=4.5, label=label)
            for (at, row), colour in zip(known, colours, strict=True):
                text = percent(row.own.mean / sizes[at], 0)
                low = (at, row.own.mean - row.own.reach[0])
                axes.annotate(text, low, (0, -5), textcoords="offset points", ha="center", va="top", fontsize=6.5)
                if len(row.own.values) > 1:
                    whisker(axes, at, row.own, colour)
            axes.grid(axis="y", alpha=0.25)
            axes.set(ylabel="latents", title=f"Dictionary sizes, runs of log {log}")
            axes.set_ylim(0, 1.08 * max(sizes))
            name_rows(axes, [row.label for row in given])

        return draw

    drawing = together({"sizes": prepare}, 1, (_width(len(given)), 3.4))
    legend_below(drawing.figure, note(saved))
    return drawing


def _fvu(run: Mapping[str, Any]) -> tuple[Seeds, Seeds]:
    return final_fvu(run), Seeds(())


def _alive(run: Mapping[str, Any]) -> Seeds:
    return Seeds(tuple(run["d_sae"] * (1 - dead) for dead in score(run, "dead_fraction")[0].values))


def _bars(saved: Saved, given: list[Row], ylabel: str, title: str, **how: Any) -> Drawing:
    drawing = together({title: lambda: bars(given, ylabel, title=title, **how)}, 1, (_width(len(given)), 3.4))
    legend_below(drawing.figure, note(saved))
    return drawing


def _width(count: int) -> float:
    """Of a figure with a bar for each run."""
    return WIDE if count > 7 else NARROW


def _height(saved: Saved, log: str) -> float:
    """Of a figure with a line for each run."""
    return 1.3 + 0.165 * (len(saved.baselines) + len(saved.trained(log)))


def _one_legend(drawing: Drawing, text: str | None, columns: int = 4) -> None:
    """What several panels name, once; and names of runs at the left of the first only."""
    seen = set[str]()
    for at, axes in enumerate(drawing.figure.axes):
        for artist in axes.get_legend_handles_labels()[0]:
            label = artist.get_label()
            artist.set_label(f"_{label}" if label in seen else label)
            seen.add(label)
        if at:
            axes.tick_params(axis="y", labelleft=False)
    legend_below(drawing.figure, text, columns=columns)


def _levels(axes: Any, runs: Mapping[str, Any], of: Mapping[str, float], label: str, title: str) -> None:
    """A mark for each run's setting, on a logarithmic axis, where bars would have no beginning."""
    given = rows_named(runs)
    for at, row in enumerate(given):
        if row.name in of:
            colour = GREY if row.is_baseline else SEVERAL[1] if row.name in COMPARED else COLOURS["sae"]
            axes.plot(of[row.name], at, "o", color=colour, markersize=5.5, gid=row.name)
            _tell(axes, of[row.name], at)
    axes.plot([], [], "o", color=COLOURS["sae"], label="as the settings say")
    if set(COMPARED) & set(of):
        axes.plot([], [], "o", color=SEVERAL[1], label=f"{' and '.join(COMPARED)}'s")
    axes.grid(axis="x", alpha=0.25)
    axes.set(xscale="log", xlabel=label, title=title)
    name_rows(axes, [row.label for row in given], lying=True)


def _marks(axes: Any, runs: Mapping[str, Any], of: Mapping[str, float], marker: str, label: str) -> None:
    if of:
        at = [list(runs).index(name) for name in of]
        size = 10 if marker == "|" else 4.5
        style = {"color": "#222222", "mfc": "none", "markersize": size, "linestyle": "", "label": label, "gid": label}
        axes.plot(list(of.values()), at, marker=marker, **style)
        if marker != "|":
            for each in zip(of.values(), at, strict=True):
                _tell(axes, *each, before=marker == "D")


def _tell(axes: Any, value: float, at: float, *, before: bool = False) -> None:
    """Its number, beside a mark."""
    away, side = ((-5, 0), "right") if before else ((5, 0), "left")
    axes.annotate(f"{value:.2g}", (value, at), away, textcoords="offset points", fontsize=6, ha=side, va="center")


def _of_parts(saved: Saved, run: Mapping[str, Any], setting: str) -> float:
    """What a run's parts have for a setting that is a factor; 1 where none has it."""
    given = [one[setting] for one in saved.settings(run)["sae"]["parts"] if setting in one]
    return given[0] if given else 1.0


def _planned(train: Mapping[str, Any]) -> int:
    return -(-train["tokens"] // train["batch"])


def _last_factor(saved: Saved, run: Mapping[str, Any]) -> Seeds:
    """The factor on L1 that training ended with, to have the L0 that was asked for."""
    try:
        return Seeds(tuple(float(value) for value in saved.curve(run, "sparsity").of_seeds[:, -1]))
    except Lacking:
        return Seeds(())
