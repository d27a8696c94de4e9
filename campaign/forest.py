"""The figure of a score: every run's difference from its baseline, with its interval."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evals.figures import frame, legend_below, new_axes, robust, save_figure
from .compare import Difference

COLOURS = {"helped": "#009E73", "hurt": "#D55E00", "rose": "#0072B2", "fell": "#CC79A7", "open": "#999999"}
TOLD = {"helped": "better", "hurt": "worse", "rose": "more", "fell": "less", "open": "can't be told"}


def draw_differences(
    path: Path, title: str, from_baseline: Sequence[Difference], between: Sequence[Difference] = ()
) -> None:
    """Write the figure of these differences."""
    save_figure(differences_figure(title, from_baseline, between), path)


def differences_figure(title: str, from_baseline: Sequence[Difference], between: Sequence[Difference] = ()) -> Any:
    """A line a difference, those between runs below; a point for the mean, a bar for the interval (cut where it would leave
    the picture), and small dots for the seeds."""
    rows = [*from_baseline, *between]
    names = [one.run for one in from_baseline] + [f"{one.run} less {one.other}" for one in between]
    figure, axes = new_axes(1.3 + 0.17 * len(rows))
    axes.axvline(0, color="#444444", linewidth=0.8, zorder=0)
    shown: set[str] = set()
    for at, one in enumerate(rows):
        colour = COLOURS[one.verdict]
        if one.half is not None:
            axes.plot([one.mean - one.half, one.mean + one.half], [at, at], color=colour, linewidth=1.4)
        axes.plot(one.values, [at] * len(one.values), ".", color=colour, markersize=3, alpha=0.6)
        label = None if one.verdict in shown else TOLD[one.verdict]
        axes.plot(one.mean, at, "o" if one.sign else "D", color=colour, markersize=4.5, label=label, linestyle="")
        shown.add(one.verdict)
    if between and from_baseline:
        axes.axhline(len(from_baseline) - 0.5, color="#bbbbbb", linewidth=0.8)
    points = [0.0, *(value for one in rows for value in one.values)]
    margin = 0.25 * (max(points) - min(points)) or 0.01
    axes.set(
        yticks=range(len(rows)), xlim=(min(points) - margin, max(points) + margin), ylim=(len(rows) - 0.4, -0.6),
        title=title, xlabel="difference",
    )  # fmt: skip
    axes.set_yticklabels(names, fontsize=7)
    axes.grid(axis="y", visible=False)
    low, high = robust(points)
    ends = None if low is None else min(low, 0.0), None if high is None else max(high, 0.0)
    seeds = [(one.values, [at] * len(one.values), COLOURS[one.verdict]) for at, one in enumerate(rows)]
    frame(axes, [*seeds, ([0.0], [0], "#444444")], x=ends)  # where there is no difference is always seen
    legend_below(figure)
    return figure
