"""What the figures of a campaign are made of: panels of bars, lines and heat maps, each with the spread of seeds.

A panel is prepared first, from saved numbers, which raises `NotMeasured` where there are none, and then drawn on its axes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..reporting.plots import COLOURS, SEVERAL, WORST, frame
from .seed_results import CampaignResults, Curve, NotMeasured, SeedValues

Draw = Callable[[Any], None]
Panel = Callable[[], Draw]

WIDE, NARROW = 7.0, 5.2  # inches: two columns of a paper, and one and a half
MOST = WORST
GREY, LIGHT = "#888888", "#bbbbbb"
LINES = [colour for colour in SEVERAL if colour != "#F0E442"]  # yellow is too pale for a line on white
STROKES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (8, 2)))
POSITION, HELD_OUT_FVU, L0 = "position in the context", "FVU on held-out text", "L0 (latents per token)"


@dataclass(frozen=True)
class DrawnFigure:
    """A figure, and what could not be shown in it, with the reason."""

    figure: Any
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunScores:
    """A run's figure: of its seeds, and of their random controls."""

    name: str
    title: str
    trained: SeedValues
    random: SeedValues
    is_baseline: bool = False
    has_failed: bool = False

    @property
    def label(self) -> str:
        return self.title if self.is_baseline else f"{self.name} {self.title}"


def scores_of_log(
    saved: CampaignResults, log: str, read: Callable[[Mapping[str, Any]], tuple[SeedValues, SeedValues]]
) -> list[RunScores]:
    """The baselines, then the runs of a log; `read` gives a run's figures."""
    return [
        *(scores_of_run(name, run, read, is_baseline=True) for name, run in saved.baselines.items()),
        *(scores_of_run(name, run, read) for name, run in saved.trained(log).items()),
    ]


def scores_without_values(runs: Mapping[str, Mapping[str, Any]]) -> list[RunScores]:
    """These runs without figures, for their names."""
    nothing = lambda run: (SeedValues(()), SeedValues(()))
    return [scores_of_run(name, run, nothing, is_baseline=run["log"] is None) for name, run in runs.items()]


def scores_of_run(
    name: str,
    run: Mapping[str, Any],
    read: Callable[[Mapping[str, Any]], tuple[SeedValues, SeedValues]],
    *,
    is_baseline: bool = False,
) -> RunScores:
    title = run["title"].partition(" (")[0]  # without what a baseline's says in brackets
    return RunScores(name, title, *read(run), is_baseline=is_baseline, has_failed=not saved_seeds(run))


def saved_seeds(run: Mapping[str, Any]) -> int:
    """How many of a run's seeds came through."""
    return len(run["folders"]) - len(run["failed"] or {})


def note(saved: CampaignResults, shown: str = "whiskers") -> str | None:
    """What whiskers or bands are."""
    count = saved.campaign["seeds"]
    every = [*saved.baselines.values(), *(run for runs in saved.logs.values() for run in runs.values())]
    fewer = " (fewer where some failed)" if any(run["failed"] for run in every) else ""
    return f"mean of {count} seeds{fewer}; {shown}: from the least to the largest" if count > 1 else None


def arranged(
    panels: Mapping[str, Panel], columns: int, size: tuple[float, float], heading: str | None = None, **grid: Any
) -> DrawnFigure:
    """Panels by what they show, so many side by side, the last as wide as there is room; one that lacks its numbers is left
    out, and the others move up. `grid` goes to the grid of all.

    Raises Lacking where all are.
    """
    ready: list[Draw] = []
    lacks: dict[str, str] = {}
    for name, prepare in panels.items():
        try:
            ready.append(prepare())
        except NotMeasured as reason:
            lacks[name] = str(reason)
    if not ready:
        raise NotMeasured("; ".join(dict.fromkeys(lacks.values())))
    down, down_of_all = -(-len(ready) // columns), -(-len(panels) // columns)
    figure = new_figure(size[0], size[1] * down / down_of_all)
    across = min(columns, len(ready))
    cells = figure.add_gridspec(down, across, **({} if lacks else grid))
    for index, draw in enumerate(ready):
        line, column = divmod(index, across)
        axes = figure.add_subplot(cells[line, column:] if index == len(ready) - 1 else cells[line, column])
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
    if heading:
        figure.suptitle(heading, fontsize=9)
    return DrawnFigure(polished(figure), tuple(f"{name}: {reason}" for name, reason in lacks.items()))


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    return Figure(figsize=(width, height), layout="constrained")


def polished(figure: Any) -> Any:
    """The type at the size that papers print."""
    for axes in figure.axes:
        axes.title.set_fontsize(8.5)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_fontsize(8)
            axis.offsetText.set_fontsize(7)
        axes.tick_params(labelsize=7)
    return figure


def bars(
    all_scores: Sequence[RunScores], label: str, *, title: str = "", best: Sequence[str] = (), digits: int = 0,
    most: float = math.inf, lying: bool = False, short: bool = False,
) -> Draw:  # fmt: skip
    """Bars from zero with the seeds' reach, baselines in grey, random controls as a mark across; `best` stand out, `digits`
    are written at the end, and one longer than `most` is cut there and told in figures. `lying`: names stand at the left;
    `short`: without titles."""
    if not any(scores.trained for scores in all_scores):
        raise NotMeasured("no run has a figure")
    labelled = set[str]()

    def once(kind: str) -> str:
        text = f"_{kind}" if kind in labelled else kind  # what begins so is not in a legend
        labelled.add(kind)
        return text

    def draw(axes: Any) -> None:
        xy = (lambda index, value: (value, index)) if lying else (lambda index, value: (index, value))
        put = axes.barh if lying else axes.bar
        transform = axes.get_yaxis_transform() if lying else axes.get_xaxis_transform()
        turned = {
            "rotation": 0 if lying else 90,
            "ha": "left" if lying else "center",
            "va": "center" if lying else "bottom",
        }
        tops = [max(scores.trained.values) for scores in all_scores if scores.trained and scores.trained.mean <= most]
        cut = 1.12 * max(tops, default=most)
        for index, scores in enumerate(all_scores):
            if not scores.trained:
                reason = " failed" if scores.has_failed else " none"
                axes.text(*xy(index, 0), reason, fontsize=7, color=GREY, transform=transform, **turned)
                continue
            kind, colour = ("baseline", LIGHT) if scores.is_baseline else ("documented run", COLOURS["sae"])
            if scores.name in best:
                kind, colour = " and ".join(best), SEVERAL[1]
            put(index, scores.trained.mean, 0.72, color=colour, label=once(kind), gid=scores.name)
            if scores.trained.mean > most:
                at_end = turned | ({"ha": "right"} if lying else {"va": "top"})
                text_style = {"fontsize": 6.5, "color": "white", "transform": transform, **at_end}
                axes.text(*xy(index, 0.985), f"{scores.trained.mean:.3g} →", **text_style)
                continue
            if len(scores.trained.values) > 1:
                whisker(axes, index, scores.trained, "#222222", across=lying)
            if scores.random:
                style = {"marker": "|" if lying else "_", "markersize": 9, "mew": 1.8, "clip_on": False, "zorder": 4}
                axes.plot(
                    *xy(index, scores.random.mean), color=COLOURS["random"], linestyle="", label=once("random control"),
                    gid=f"{scores.name} random", **style,
                )  # fmt: skip
                if len(scores.random.values) > 1:
                    whisker(axes, index, scores.random, COLOURS["random"], across=lying)
            if digits:
                axes.annotate(
                    f"{scores.trained.mean:.{digits}f}".removeprefix("0"),
                    xy(index, scores.trained.mean + scores.trained.reach[1]),
                    (3, 0) if lying else (0, 2), textcoords="offset points", ha="left" if lying else "center",
                    va="center" if lying else "bottom", fontsize=6.5, color="#333333",
                )  # fmt: skip
        name_runs(axes, [scores.name if short else scores.label for scores in all_scores], lying=lying)
        line, bounds = (axes.axvline, axes.set_xlim) if lying else (axes.axhline, axes.set_ylim)
        line(0, color="#222222", linewidth=0.8)
        if most < math.inf:
            bounds(0, cut)
        if lying:
            axes.locator_params(axis="x", nbins=5)
        (axes.set_xlabel if lying else axes.set_ylabel)(label)
        axes.set_title(title)

    return draw


def name_runs(axes: Any, labels: Sequence[str], *, lying: bool = False) -> None:
    """Names of runs along the axis: at the left where they lie, else below, rotated."""
    reach = (-0.6, len(labels) - 0.4)
    if lying:
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(reach[::-1])
    else:
        axes.set_xticks(range(len(labels)), labels, rotation=38, ha="right", rotation_mode="anchor")
        axes.set_xlim(reach)
    axes.tick_params(axis="y" if lying else "x", length=0, pad=3)


def whisker(axes: Any, position: float, seeds: SeedValues, colour: str, *, across: bool = False) -> None:
    """The seeds' reach around their mean; `across` for one that lies down."""
    reach = [[side] for side in seeds.reach]
    point = (seeds.mean, position) if across else (position, seeds.mean)
    style = {"color": colour, "linewidth": 0.9, "capsize": 2, "fmt": "none", "zorder": 3}
    axes.errorbar(*point, **({"xerr": reach} if across else {"yerr": reach}), **style)


def curves(
    lines: Mapping[str, Curve], greys: Mapping[str, Curve], names: Mapping[str, str], *, ylabel: str, title: str
) -> Draw:
    """A line a run, of the mean over seeds, with a band for their reach; named at its end, and in the legend by `names`."""

    def draw(axes: Any) -> None:
        ends: list[tuple[str, str, float]] = []
        styles = {
            name: {"color": LINES[index % len(LINES)], "linestyle": STROKES[index // len(LINES) % len(STROKES)]}
            for index, name in enumerate(lines)
        }
        for index, name in enumerate(greys):
            styles[name] = {"color": GREY, "linestyle": STROKES[index % len(STROKES)], "linewidth": 1.0}
        for name, curve in {**greys, **lines}.items():
            style = {"linewidth": 1.3, "alpha": 0.9, **styles[name]}
            axes.plot(curve.steps, curve.mean, label=names[name], gid=name, **style)
            band(axes, curve, str(style["color"]))
            ends.append((name, str(style["color"]), float(curve.mean[-1])))
        axes.grid(alpha=0.25)
        axes.set(xlabel="training step", ylabel=ylabel, title=title, yscale="log")
        axes.margins(x=0)
        all_curves = {**greys, **lines}.items()
        frame(
            axes,
            [(c.steps.tolist(), c.mean.tolist(), str(styles[name]["color"])) for name, c in all_curves],
            y=(None, MOST),
        )
        plain_ticks(axes.yaxis)
        _name_ends(axes, ends)

    return draw


def band(axes: Any, curve: Curve, colour: str) -> None:
    if len(curve.of_seeds) > 1:
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0, zorder=1)


def plain_ticks(axis: Any, subs: Sequence[float] = (1, 2, 5)) -> None:
    """Of a logarithmic axis: these of every decade, more of less than one and fewer of many, written plainly."""
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


def _name_ends(axes: Any, ends: Sequence[tuple[str, str, float]]) -> None:
    """Names to the right of where lines end, moved apart where they would lie on each other."""
    axes.autoscale_view()
    below, above = axes.get_ylim()
    axes.set_ylim(below, above)  # as it is now: places are worked out for it
    share = axes.transAxes.inverted()
    gap = 0.115 / (axes.figure.get_figheight() * 0.68)  # a line of 7 points, on axes of about so much of the height
    true_places = sorted(
        (float(share.transform(axes.transData.transform((0, y)))[1]), name, colour) for name, colour, y in ends
    )
    places = [place for place, _, _ in true_places]
    for _ in range(200):
        for low in range(len(places) - 1):
            over = gap - (places[low + 1] - places[low])
            if over > 0:
                places[low] -= over / 2
                places[low + 1] += over / 2
        lift = -min(0.0, places[0] if places else 0.0)
        places = [place + lift for place in places]
    for place, (true, name, colour) in zip(places, true_places, strict=True):
        axes.annotate(
            name, (1, true), (1.035, place), xycoords="axes fraction", textcoords="axes fraction", fontsize=7,
            color=colour, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 1, "shrinkB": 0},
        )  # fmt: skip


def over_steps(curve: Curve, label: str, title: str, *, log: bool = False) -> Draw:
    """Heat map of steps [S] and positions [T]: a report is the mean since the one before."""

    def draw(axes: Any) -> None:
        edges = np.concatenate([[0], curve.steps])
        heat(axes, edges, np.arange(curve.mean.shape[1] + 1) - 0.5, curve.mean.T, label, log=log)
        axes.set(xlabel="training step", ylabel=POSITION, title=title)

    return draw


def heat(
    axes: Any, x: np.ndarray, y: np.ndarray, values: np.ndarray, label: str, *, log: bool = False, root: bool = False
) -> None:
    """Cells between edges `x` and `y`, with a bar for the colours, which may follow the logarithm or the root of values;
    white where there is nothing."""
    from matplotlib.colors import LogNorm, PowerNorm

    known = values[np.isfinite(values) & ((values > 0) | (not log))]
    is_log = log and len(known) > 0 and known.min() < known.max()
    norm = LogNorm(known.min(), known.max()) if is_log else PowerNorm(0.5, 0, known.max()) if root else None
    mesh = axes.pcolormesh(x, y, np.ma.masked_invalid(values), cmap="viridis", norm=norm, rasterized=True)
    colours = axes.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=30)
    colours.set_label(label, fontsize=7.5)
    if is_log:
        plain_ticks(colours.ax.yaxis)


def by_position(lines: Mapping[str, Curve], ylabel: str, title: str, *, log: bool = False) -> Draw:
    """A line over positions for each, with the seeds' reach."""

    def draw(axes: Any) -> None:
        for index, (name, curve) in enumerate(lines.items()):
            colour = LINES[index % len(LINES)]
            style = {"color": colour, "linestyle": STROKES[index % len(STROKES)], "linewidth": 1.2}
            axes.plot(curve.steps, curve.mean, label=name, gid=name, **style)  # lines may lie on each other
            band(axes, curve, colour)
        axes.grid(alpha=0.25)
        axes.set(xlabel=POSITION, ylabel=ylabel, title=title)
        if log:
            axes.set_yscale("log")
            plain_ticks(axes.yaxis)
        if len(lines) > 1:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.24), "ncols": min(6, len(lines))}
            axes.legend(frameon=False, fontsize=7, handlelength=1.6, columnspacing=1.0, **below)

    return draw
