"""The figure of a score: the difference of every run from its baseline, with its interval."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..reporting.plots import frame, new_axes, robust, save_figure
from .figure_panels import legend_once
from .significance import VERDICTS, Difference

COLOURS: dict[str, str] = dict(zip(VERDICTS, ("#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999"), strict=True))


def draw_differences(
    path: Path, title: str, from_baseline: Sequence[Difference], between: Sequence[Difference] = ()
) -> None:
    """Write the figure of these differences."""
    save_figure(differences_figure(title, from_baseline, between), path)


def differences_figure(title: str, from_baseline: Sequence[Difference], between: Sequence[Difference] = ()) -> Any:
    """Draw a line per difference, those between runs below: the mean, a bar for the interval, and dots for the seeds.

    Seeds far from all others are marked at the edge with their number. Bars are cut at the edge.
    """
    differences = [*from_baseline, *between]
    names = [difference.run for difference in from_baseline]
    names += [f"{difference.run} minus {difference.other}" for difference in between]
    figure, axes = new_axes(1.3 + 0.17 * len(differences))
    axes.axvline(0, color="#444444", linewidth=0.8, zorder=0)
    lines = []
    for index, difference in enumerate(differences):
        colour = COLOURS[difference.verdict]
        if difference.half is not None:
            ends = [difference.mean - difference.half, difference.mean + difference.half]
            axes.plot(ends, [index, index], color=colour, linewidth=1.4)
        lines.append((difference.values, [index] * len(difference.values), colour))
        axes.plot(*lines[-1][:2], ".", color=colour, markersize=3, alpha=0.6)
        marker = "o" if difference.sign else "D"
        style = {"linestyle": "", "color": colour, "markersize": 4.5, "label": difference.verdict}
        axes.plot(difference.mean, index, marker, **style)
    if between and from_baseline:
        axes.axhline(len(from_baseline) - 0.5, color="#bbbbbb", linewidth=0.8)
    points = [0.0, *(value for difference in differences for value in difference.values)]
    margin = 0.25 * (max(points) - min(points)) or 0.01
    axes.set(xlim=(min(points) - margin, max(points) + margin), ylim=(len(differences) - 0.4, -0.6))
    axes.set(yticks=range(len(differences)), title=title, xlabel="difference")
    axes.set_yticklabels(names, fontsize=7)
    axes.locator_params(axis="x", nbins=5)  # labels such as -0.075 must not touch
    axes.grid(axis="y", visible=False)
    low, high = robust(points)
    ends = None if low is None else min(low, 0.0), None if high is None else max(high, 0.0)  # 0 is always shown
    frame(axes, [*lines, ([0.0], [0], "#444444")], x=ends)
    legend_once(figure)
    return figure
