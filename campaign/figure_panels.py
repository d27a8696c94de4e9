"""Panels of a campaign's figures: bars, lines and heat maps of means over seeds, with the range of the seeds.

A panel is a function that draws saved numbers on axes, and raises `NotMeasured` where there are none.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..reporting.plots import COLOURS, SEVERAL, WORST, frame, legend_below, new_figure
from .seed_results import CampaignResults, Curve, NotMeasured, Seeds, final_fvu

Panel = Callable[[Any], None]

WIDE, NARROW = 7.0, 5.2  # inches: two columns of a paper, and one and a half
GREY, LIGHT, DARK = "#888888", "#bbbbbb", "#222222"
LINES = [colour for colour in SEVERAL if colour != "#F0E442"]  # yellow is too pale for a line on white
STROKES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (8, 2)))
POSITION, HELD_OUT_FVU, L0 = "position in the context", "FVU on held-out text", "L0 (latents per token)"


@dataclass(frozen=True)
class DrawnFigure:
    """A figure, and the name of each panel that is missing from it, with the reason."""

    figure: Any
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunScores:
    """A score of a run of campaign.json: the values of its seeds and of their random controls."""

    run: Mapping[str, Any]
    trained: Seeds
    random: Seeds = ()

    @property
    def name(self) -> str:
        return self.run["run"]

    @property
    def is_baseline(self) -> bool:
        return self.run["log"] is None

    @property
    def absence(self) -> str:
        return "failed" if len(self.run["folders"]) == len(self.run["failed"] or {}) else "none"


def scores_of_log(
    saved: CampaignResults, log: str, read: Callable[[Mapping[str, Any]], tuple[Seeds, ...]]
) -> list[RunScores]:
    """The scores of the baselines and of a log's runs. `read` returns a run's values, and its control's if there are any."""
    return [RunScores(run, *read(run)) for run in saved.runs_of(log).values()]


def final_errors(saved: CampaignResults, log: str) -> list[RunScores]:
    return scores_of_log(saved, log, lambda run: (final_fvu(run),))


def label_of(run: Mapping[str, Any]) -> str:
    """A run's name and title; a baseline's title, without what it has in brackets."""
    title = run["title"].partition(" (")[0]
    return title if run["log"] is None else f"{run['run']} {title}"


def note(saved: CampaignResults, shown: str = "whiskers") -> str | None:
    """What the whiskers or bands of a figure are; None with one seed."""
    count = saved.campaign["seeds"]
    every = [*saved.baselines.values(), *(run for runs in saved.logs.values() for run in runs.values())]
    fewer = " (fewer where some failed)" if any(run["failed"] for run in every) else ""
    return f"mean of {count} seeds{fewer}; {shown}: smallest to largest" if count > 1 else None


def arranged(panels: Mapping[str, Panel], columns: int, size: tuple[float, float]) -> DrawnFigure:
    """Draw panels, given by what they show, in a grid; the last one takes the rest of its line.

    A panel without its numbers is left out, and the others move up. Raises NotMeasured if no panel is left.
    """
    figure, lacks = new_figure(*size), dict[str, str]()
    down, across = -(-len(panels) // columns), min(columns, len(panels))
    cells = figure.add_gridspec(down, across)
    for index, (name, draw) in enumerate(panels.items()):
        line, column = divmod(index, across)
        axes = figure.add_subplot(cells[line, column:] if index == len(panels) - 1 else cells[line, column])
        axes.spines[["top", "right"]].set_visible(False)
        try:
            draw(axes)
        except NotMeasured as reason:
            lacks[name] = str(reason)
    if len(lacks) == len(panels):
        raise NotMeasured("; ".join(dict.fromkeys(lacks.values())))
    if lacks:
        others = {name: draw for name, draw in panels.items() if name not in lacks}
        figure = arranged(others, columns, (size[0], size[1] * -(-len(others) // columns) / down)).figure
    return DrawnFigure(polished(figure), tuple(f"{name}: {reason}" for name, reason in lacks.items()))


def polished(figure: Any) -> Any:
    """Set type sizes for print."""
    for axes in figure.axes:
        axes.title.set_fontsize(8.5)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_fontsize(8)
            axis.offsetText.set_fontsize(7)
        axes.tick_params(labelsize=7)
    return figure


def legend_once(figure: Any, text: str | None = None, columns: int = 3) -> None:
    """Put one legend, with a note, below all panels, and each label in it once."""
    labels = set[str]()
    for axes in figure.axes:
        for artist in axes.get_legend_handles_labels()[0]:
            label = artist.get_label()
            artist.set_label(f"_{label}" if label in labels else label)  # an underscore keeps it out of legends
            labels.add(label)
    legend_below(figure, text, columns=columns)


def with_legend(drawing: DrawnFigure, text: str | None = None, columns: int = 3) -> DrawnFigure:
    legend_once(drawing.figure, text, columns)
    return drawing


def bars(
    axes: Any, all_scores: Sequence[RunScores], label: str, *, title: str = "", best: Sequence[str] = (),
    digits: int = 0, most: float = math.inf, short: bool = False,
) -> None:  # fmt: skip
    """Draw a horizontal bar per run, with whiskers and a mark for the random control.

    Runs in `best` have a colour of their own. The mean is written at the end with so many `digits`, if any. A bar longer
    than `most` is cut, with its number. `short`: run names without titles.
    """
    if not any(scores.trained for scores in all_scores):
        raise NotMeasured("no run has a figure")
    ends = [max(scores.trained) for scores in all_scores if scores.trained and np.mean(scores.trained) <= most]
    for index, scores in enumerate(all_scores):
        style = {"fontsize": 6.5, "va": "center", "transform": axes.get_yaxis_transform()}
        if not scores.trained:
            axes.text(0.01, index, scores.absence, color=GREY, **style)
            continue
        mean = float(np.mean(scores.trained))
        kind, colour = ("baseline", LIGHT) if scores.is_baseline else ("documented run", COLOURS["sae"])
        if scores.name in best:
            kind, colour = " and ".join(best), SEVERAL[1]
        axes.barh(index, mean, 0.72, color=colour, label=kind, gid=scores.name)
        if mean > most:
            axes.text(0.985, index, f"{mean:.3g} →", color="white", ha="right", **style)
            continue
        whisker(axes, index - 0.17, scores.trained, DARK, across=True)
        if scores.random:
            style = {"marker": "|", "markersize": 6, "mew": 1.8, "linestyle": "", "clip_on": False, "zorder": 4}
            style |= {"color": COLOURS["random"], "label": "random control", "gid": f"{scores.name} random"}
            axes.plot(np.mean(scores.random), index + 0.17, **style)
            whisker(axes, index + 0.17, scores.random, COLOURS["random"], across=True)
        if digits:
            text, end = f"{mean:.{digits}f}".removeprefix("0"), (max(scores.trained), index)
            axes.annotate(text, end, (3, 0), textcoords="offset points", va="center", fontsize=6.5, color="#333333")
    name_runs(axes, [scores.name if short else label_of(scores.run) for scores in all_scores], lying=True)
    axes.axvline(0, color=DARK, linewidth=0.8)
    if most < math.inf:
        axes.set_xlim(0, 1.12 * max(ends, default=most))
    axes.locator_params(axis="x", nbins=5)
    axes.set(xlabel=label, title=title)


def name_runs(axes: Any, labels: Sequence[str], *, lying: bool = False) -> None:
    """Name runs along the axis: at the left where they lie, else below, rotated."""
    limits = (-0.6, len(labels) - 0.4)
    if lying:
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(limits[::-1])
    else:
        axes.set_xticks(range(len(labels)), labels, rotation=38, ha="right", rotation_mode="anchor")
        axes.set_xlim(limits)
    axes.tick_params(axis="y" if lying else "x", length=0, pad=3)


def whisker(axes: Any, position: float, seeds: Seeds, colour: str, *, across: bool = False) -> None:
    """Draw the range of two seeds or more around their mean, horizontally if `across`."""
    if len(seeds) > 1:
        mean = np.mean(seeds)
        sides = [[mean - min(seeds)], [max(seeds) - mean]]
        style = {"color": colour, "linewidth": 0.9, "capsize": 2, "fmt": "none", "zorder": 3}
        place = (mean, position) if across else (position, mean)
        axes.errorbar(*place, **{"xerr" if across else "yerr": sides}, **style)


def curves(axes: Any, curve_by_run: Mapping[str, Curve], runs: Mapping[str, Any], *, ylabel: str, title: str) -> None:
    """Draw a line per run, baselines in grey, with a band for the seeds. Lines are named at their end and in the legend."""
    numbers = {True: 0, False: 0}  # of baselines, and of other runs
    lines: dict[str, tuple[list[float], list[float], str]] = {}
    for name, curve in curve_by_run.items():
        is_baseline = runs[name]["log"] is None
        number, count = numbers[is_baseline], len(LINES)
        numbers[is_baseline] += 1
        colour = GREY if is_baseline else LINES[number % count]
        stroke = STROKES[(number if is_baseline else number // count) % len(STROKES)]
        style = {"linestyle": stroke, "linewidth": 1.0 if is_baseline else 1.3, "alpha": 0.9, "gid": name}
        axes.plot(curve.steps, curve.mean, color=colour, label=label_of(runs[name]), **style)
        band(axes, curve, colour)
        lines[name] = curve.steps.tolist(), curve.mean.tolist(), colour
    axes.grid(alpha=0.25)
    axes.set(xlabel="training step", ylabel=ylabel, title=title, yscale="log")
    axes.margins(x=0)
    frame(axes, lines.values(), y=(None, WORST))
    plain_ticks(axes.yaxis)
    _name_ends(axes, {name: (y[-1], colour) for name, (_, y, colour) in lines.items()})


def band(axes: Any, curve: Curve, colour: str) -> None:
    if len(curve.of_seeds) > 1:
        ends = curve.over("min"), curve.over("max")
        axes.fill_between(curve.steps, *ends, color=colour, alpha=0.18, linewidth=0, zorder=1)


def plain_ticks(axis: Any, subs: Sequence[float] = (1, 2, 5)) -> None:
    """Write a logarithmic axis with plain numbers: these of every decade, more on a short axis and fewer on a long one."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    low, high = axis.get_view_interval()
    is_short = high / low < 12
    axis.set_major_locator(
        LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if is_short else subs if high / low < 2000 else (1,))
    )
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
    if is_short:
        axis.set_minor_locator(NullLocator())


def _name_ends(axes: Any, ends: Mapping[str, tuple[float, str]]) -> None:
    """Write names to the right of where lines end, (y, colour) by name, with room for each."""
    axes.autoscale_view()
    axes.set_ylim(axes.get_ylim())  # as it is now: places are worked out for it
    to_share = axes.transData + axes.transAxes.inverted()
    places = {name: min(1.0, float(to_share.transform((0, y))[1])) for name, (y, _) in ends.items()}
    names = sorted(places, key=places.__getitem__)
    gap = 0.115 / (axes.figure.get_figheight() * 0.68)  # a line of 7 points, on axes of about so much of the height
    steps = gap * np.arange(len(names))
    pushed_up = np.maximum.accumulate([places[name] for name in names] - steps) + steps
    for name, place in zip(names, np.minimum(pushed_up, 1 + steps - steps[-1]), strict=True):
        colour = ends[name][1]
        axes.annotate(
            name, (1, places[name]), (1.035, place), xycoords="axes fraction", textcoords="axes fraction", fontsize=7,
            color=colour, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 1, "shrinkB": 0},
        )  # fmt: skip


def over_steps(axes: Any, curve: Curve, label: str, title: str, *, scale: str = "") -> None:
    """Draw a heat map of steps [S] and positions [T]. A report is the mean since the one before."""
    edges = np.concatenate([[0], curve.steps])
    heat(axes, edges, np.arange(curve.mean.shape[1] + 1) - 0.5, curve.mean.T, label, scale=scale)
    axes.set(xlabel="training step", ylabel=POSITION, title=title)


def heat(axes: Any, x: np.ndarray, y: np.ndarray, values: np.ndarray, label: str, *, scale: str = "") -> None:
    """Draw cells between edges `x` and `y`, with a colour bar, on a linear, "log" or "root" scale. Unknown values are
    white."""
    from matplotlib.colors import LogNorm, PowerNorm

    known = values[np.isfinite(values) & ((values > 0) | (scale != "log"))]
    is_log = scale == "log" and len(known) > 0 and known.min() < known.max()
    norm = LogNorm(known.min(), known.max()) if is_log else PowerNorm(0.5, 0, known.max()) if scale == "root" else None
    mesh = axes.pcolormesh(x, y, np.ma.masked_invalid(values), cmap="viridis", norm=norm, rasterized=True)
    colour_bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=30)
    colour_bar.set_label(label, fontsize=7.5)
    if is_log:
        plain_ticks(colour_bar.ax.yaxis)


def by_position(axes: Any, lines: Mapping[str, Curve], ylabel: str, title: str, *, log: bool = False) -> None:
    """Draw a line over positions for each run, with a band for the seeds."""
    for index, (name, curve) in enumerate(lines.items()):
        colour = LINES[index % len(LINES)]
        style = {"color": colour, "linestyle": STROKES[index % len(STROKES)], "linewidth": 1.2}
        axes.plot(curve.steps, curve.mean, label=name, gid=name, **style)  # strokes tell apart lines that coincide
        band(axes, curve, colour)
    axes.grid(alpha=0.25)
    axes.set(xlabel=POSITION, ylabel=ylabel, title=title)
    if log:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
    if len(lines) > 1:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.24), "ncols": min(6, len(lines))}
        axes.legend(frameon=False, fontsize=7, handlelength=1.6, columnspacing=1.0, **below)
