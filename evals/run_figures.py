"""Figures of a run, from its saved numbers. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..engine.storage.files import whole_file

SEVERAL = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = "os^Dv<>p*h"
DPI = 300
WORST = 1.2  # FVU of predicting the mean is 1: axes end here, and what is still worse is marked with its number
COLOURS = {"sae": "#0072B2", "random": "#D55E00", "lm_neurons": "#E69F00", "mean": "#999999"}


def core_figures(metrics: list[dict[str, Any]], result: dict[str, Any]) -> dict[str, Any]:
    """Figures of core's result, by name, and of training where there are its `metrics`."""
    figures = {"position_explained_variance": _positions(result), "firing_rates": _firing(result)}
    return figures | ({"loss_curve": _loss(metrics)} if metrics else {})


def draw_pareto(folder: Path, scores: dict[str, dict[str, Any]]) -> Path:
    """Write pareto.png: L0 against FVU of several dictionaries and their random controls, a colour for each activation and
    hook, a marker for each F, and a line through those that no other is better than in both."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = new_axes(3.9)
    scores = {name: score for name, score in scores.items() if None not in (score["l0"], score["explained_variance"])}
    several_hooks = len({score["hook"] for score in scores.values()}) > 1
    kinds = list(dict.fromkeys((score["activation"], score["hook"]) for score in scores.values()))
    sizes = sorted({score["d_sae"] for score in scores.values()})

    def points(several: list[dict[str, Any]]) -> list[tuple[float, float]]:
        return sorted((score["l0"], 1 - score["explained_variance"]) for score in several)

    for (i, (activation, hook)), (j, size) in itertools.product(enumerate(kinds), enumerate(sizes)):
        alike = [s for s in scores.values() if (s["activation"], s["hook"], s["d_sae"]) == (activation, hook, size)]
        if alike:
            style = {"color": SEVERAL[i % len(SEVERAL)], "marker": MARKERS[j % len(MARKERS)], "linestyle": ""}
            label = f"{activation}{f' at {hook}' if several_hooks else ''}, F = {size}"
            axes.plot(*zip(*points(alike), strict=True), label=label, **style)
    controls = [score["controls"]["random"] for score in scores.values() if "random" in score["controls"]]
    controls = [score for score in controls if None not in (score["l0"], score["explained_variance"])]
    if controls:
        style = {"color": COLOURS["mean"], "marker": "x", "linestyle": ""}
        axes.plot(*zip(*points(controls), strict=True), label="random control", zorder=1, **style)
    every = points(list(scores.values()))
    front = [point for i, point in enumerate(every) if all(point[1] < other[1] for other in every[:i])]
    if front:
        axes.plot(*zip(*front, strict=True), color="#bbbbbb", linewidth=1, zorder=0)
    axes.set(
        xlabel="L0 (latents per token)", ylabel="fraction of variance unexplained", xscale="log", yscale="log",
        title="Sparsity against error, on held-out text",
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    shown = [(every, COLOURS["sae"]), (points(controls), COLOURS["mean"])]
    alone = [((l0,), (fvu,), colour) for curve, colour in shown for l0, fvu in curve]  # points, not a curve
    frame(axes, alone, x=robust([l0 for (l0,), *_ in alone], log=True), y=(None, WORST))
    legend_below(figure, columns=2)
    return save_figure(figure, folder / "pareto.png")


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as a PNG at `path`, 300 pixels an inch, and as a PDF beside it; returns the path of the PNG.

    The same figure gives the same bytes.
    """
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as fresh:
        figure.savefig(fresh, format="png", dpi=DPI)
    with whole_file(path.with_suffix(".pdf")) as fresh, rc_context({"pdf.fonttype": 42}):  # text stays text
        figure.savefig(fresh, format="pdf", dpi=DPI, metadata={"CreationDate": None})
    return path


def remove_figure(path: Path) -> None:
    """Remove what `save_figure` may have written."""
    for file in (path, path.with_suffix(".pdf")):
        file.unlink(missing_ok=True)


def robust(values: Iterable[float], *, log: bool = False, reach: float = 4.0) -> tuple[float | None, float | None]:
    """Where an axis may end so that a few far values don't squash the others: the least and largest of those within `reach`
    interquartile ranges of the quartiles (of their logarithms, for a logarithmic axis). None where no value is farther, or
    where all others are the same."""
    known = sorted(math.log10(v) if log else v for v in values if math.isfinite(v) and (v > 0 or not log))
    if len(known) < 4:
        return None, None
    first, third = known[len(known) // 4], known[(3 * len(known) - 1) // 4]
    near = [v for v in known if first - reach * (third - first) <= v <= third + reach * (third - first)]
    if near[0] == near[-1]:
        return None, None
    low, high = (10**v if log else v for v in (near[0], near[-1]))
    return (low if known[0] < near[0] else None), (high if known[-1] > near[-1] else None)


Line = tuple[Sequence[float], Sequence[float], str]  # x, y and colour
Ends = tuple[float | None, float | None]


def frame(axes: Any, lines: Iterable[Line], *, x: Ends = (None, None), y: Ends = (None, None)) -> None:
    """End the axes at `x` and `y` (low, high; None: no limit) where `lines` go beyond, and mark what is beyond at the edge
    by a triangle in the line's colour, with the number. Of neighbouring points of a line the farthest is marked. An axis
    that nothing goes beyond stays as it is."""
    lines = list(lines)
    cut = [_cut(axes, lines, axis, ends) for axis, ends in enumerate((x, y))]
    if cut == [False, False]:
        return
    sides = [tuple(sorted(side)) for side in (axes.get_xlim(), axes.get_ylim())]  # an axis may be turned round
    for line in lines:
        points = list(zip(line[0], line[1], strict=True))
        beyond = [i for i, point in enumerate(points) if _over(point, sides, cut) > 0]
        for _, neighbours in itertools.groupby(enumerate(beyond), lambda pair: pair[1] - pair[0]):  # of neighbours
            _mark(
                axes,
                max((points[i] for _, i in neighbours), key=lambda point: _over(point, sides, cut)),
                sides,
                line[2],
            )


def _cut(axes: Any, lines: Sequence[Line], axis: int, ends: Ends) -> bool:
    """Set the limits of an axis (0: x, 1: y) to what lies within `ends`, if anything lies beyond; whether it does."""
    is_log = (axes.get_xscale, axes.get_yscale)[axis]() == "log"
    every = [
        v for line in lines for v in line[:2][axis] if v is not None and math.isfinite(v) and (v > 0 or not is_log)
    ]
    inside = [v for v in every if (ends[0] is None or v >= ends[0]) and (ends[1] is None or v <= ends[1])]
    if not inside or len(inside) == len(every):
        return False
    least, most = (float(math.log10(v) if is_log else v) for v in (min(inside), max(inside)))
    room = 0.06 * (most - least) or 0.05
    low, high = least - room, most + room
    (axes.set_xlim, axes.set_ylim)[axis](*((10**low, 10**high) if is_log else (low, high)))
    return True


def _over(point: Sequence[float | None], sides: Sequence[tuple[float, float]], cut: Sequence[bool]) -> float:
    """How far a point is beyond the axes that were cut."""
    return max(
        (
            max(side[0] - v, v - side[1])
            for v, side, was in zip(point, sides, cut, strict=True)
            if was and v is not None
        ),
        default=0.0,
    )


def _mark(axes: Any, point: tuple[float, float], sides: Sequence[tuple[float, float]], colour: str) -> None:
    """A triangle where the axes end on the way to a point, with the numbers that it has there."""
    place = [min(max(v, low), high) for v, (low, high) in zip(point, sides, strict=True)]
    is_left, is_below = (v < low for v, (low, _) in zip(point, sides, strict=True))
    number = ", ".join(f"{v:.3g}" for v, edge in zip(point, place, strict=True) if v != edge)
    across = place[1] == point[1]
    arrow = ("<" if is_left else ">") if across else ("v" if is_below else "^")
    axes.plot(*place, arrow, color=colour, markersize=5, clip_on=False, zorder=5, label="_beyond", gid="beyond")
    to_left = (
        place[0] > (sides[0][0] * sides[0][1]) ** 0.5 if axes.get_xscale() == "log" else 2 * place[0] > sum(sides[0])
    )
    away = (-7 if to_left else 7, 0 if across else 3 if is_below else -8)
    white = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.4}
    style = {"fontsize": 6.5, "color": colour, "va": "center" if across else "bottom", "zorder": 6, "bbox": white}
    axes.annotate(number, place, away, textcoords="offset points", ha="right" if to_left else "left", **style)


def new_axes(height: float = 3.4) -> tuple[Any, Any]:
    """A figure, so many inches high, and its axes."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def legend_below(figure: Any, note: str | None = None, columns: int = 3) -> None:
    """The legend, and a note, below the axes, where they cover nothing."""
    figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, fontsize=7.5, title=note, title_fontsize=7.5
    )


def _loss(metrics: list[dict[str, Any]]) -> Any:
    from matplotlib.ticker import EngFormatter

    figure, axes = new_axes(3.6)
    tokens = [line["tokens"] for line in metrics]
    lines = [(tokens, [line["fvu"] for line in metrics], COLOURS["sae"])]
    axes.plot(*lines[0][:2], color=COLOURS["sae"], label="dictionary")
    if beside := [(line["tokens"], line["random"]["fvu"]) for line in metrics if "random" in line]:
        lines.append(([n_tokens for n_tokens, _ in beside], [fvu for _, fvu in beside], COLOURS["random"]))
        axes.plot(*lines[1][:2], color=COLOURS["random"], label="random control")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="tokens", ylabel="fraction of variance unexplained", yscale="log", title="Training")
    frame(axes, lines, y=(None, WORST))
    legend_below(figure)
    return figure


def _positions(result: dict[str, Any]) -> Any:
    figure, axes = new_axes(3.7)
    every = {"sae": result, **result["controls"]}
    labels = {
        "sae": "dictionary",
        "random": "random control",
        "lm_neurons": "K largest neurons",
        "mean": "mean control",
    }
    lines = []
    for name, scores in every.items():
        per_position = scores["per_position"]
        points = [
            (p, v)
            for p, v in zip(per_position["position"], per_position["explained_variance"], strict=True)
            if v is not None
        ]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=COLOURS[name], label=labels[name], linewidth=1.2)
        lines.append(([p for p, _ in points], [v for _, v in points], COLOURS[name]))
    axes.set(xlabel="position in the context", ylabel="explained variance", title="Where it explains")
    axes.set_ylim(-0.05, 1.02)
    frame(axes, lines, y=(-0.05, None))
    legend_below(figure)
    return figure


def _firing(result: dict[str, Any]) -> Any:
    figure, axes = new_axes()
    rates = result["firing_rates"]
    axes.stairs(rates["latents"], rates["log10_edges"], fill=True, color=COLOURS["sae"])
    axes.set(
        xlabel="log10 of firing rate (share of tokens)",
        ylabel="latents",
        title=f"Firing rates ({rates['never']} never fire)",
    )
    return figure
