"""The figure of a score: every run's difference from its baseline, with its interval."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..reporting.plots import frame, legend_below, new_axes, robust, save_figure
from .significance import VERDICTS, Difference

COLOURS: dict[str, str] = dict(zip(VERDICTS, ("#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999"), strict=True))


def draw_differences(
    path: Path, title: str, from_baseline: Sequence[Difference], between: Sequence[Difference] = ()
) -> None:
    """Write the figure of these differences."""
    save_figure(differences_figure(title, from_baseline, between), path)


def differences_figure(title: str, from_baseline: Sequence[Difference], between: Sequence[Difference] = ()) -> Any:
    """A line a difference, those between runs below; a point for the mean, a bar for the interval (cut where it would leave
    the picture), and small dots for the seeds."""
    differences = [*from_baseline, *between]
    names = [difference.run for difference in from_baseline] + [
        f"{difference.run} less {difference.other}" for difference in between
    ]
    figure, axes = new_axes(1.3 + 0.17 * len(differences))
    axes.axvline(0, color="#444444", linewidth=0.8, zorder=0)
    labelled: set[str] = set()
    lines = []
    for index, difference in enumerate(differences):
        verdict, colour = difference.verdict, COLOURS[difference.verdict]
        if difference.half is not None:
            ends = [difference.mean - difference.half, difference.mean + difference.half]
            axes.plot(ends, [index, index], color=colour, linewidth=1.4)
        lines.append((difference.values, [index] * len(difference.values), colour))
        axes.plot(*lines[-1][:2], ".", color=colour, markersize=3, alpha=0.6)
        style = {"linestyle": "", "color": colour, "markersize": 4.5, "label": None if verdict in labelled else verdict}
        axes.plot(difference.mean, index, "o" if difference.sign else "D", **style)
        labelled.add(verdict)
    if between and from_baseline:
        axes.axhline(len(from_baseline) - 0.5, color="#bbbbbb", linewidth=0.8)
    points = [0.0, *(value for difference in differences for value in difference.values)]
    margin = 0.25 * (max(points) - min(points)) or 0.01
    axes.set(
        yticks=range(len(differences)), xlim=(min(points) - margin, max(points) + margin),
        ylim=(len(differences) - 0.4, -0.6), title=title, xlabel="difference",
    )  # fmt: skip
    axes.set_yticklabels(names, fontsize=7)
    axes.grid(axis="y", visible=False)
    low, high = robust(points)
    ends = None if low is None else min(low, 0.0), None if high is None else max(high, 0.0)
    frame(axes, [*lines, ([0.0], [0], "#444444")], x=ends)  # where there is no difference is always seen
    legend_below(figure)
    return figure
