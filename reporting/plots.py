"""Colours, axes and files of all figures. The colours are Okabe and Ito's, which colour-blind readers can distinguish."""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..engine.storage.files import whole_file

SEVERAL = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
COLOURS = {
    "sae": "#0072B2", "random": "#D55E00", "soft_frozen": "#009E73", "frozen_encoder": "#56B4E9", "lm_neurons": "#E69F00",
    "mean": "#999999",
}  # fmt: skip
MARKERS = "os^Dv<>p*h"
DPI = 300
WORST = 1.2  # FVU at which axes end (predicting the mean has 1); worse values are marked with their number

Line = tuple[Sequence[float], Sequence[float], str]  # x, y and colour
Ends = tuple[float | None, float | None]


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    return Figure(figsize=(width, height), layout="constrained")


def new_axes(height: float = 3.4) -> tuple[Any, Any]:
    """Make a figure `height` inches high, and its axes."""
    figure = new_figure(5.2, height)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def legend_below(figure: Any, note: str | None = None, columns: int = 3) -> None:
    """Put the legend, with a note as its title, below the axes."""
    style = {"frameon": False, "fontsize": 7.5, "title_fontsize": 7.5}
    figure.legend(loc="outside lower center", ncols=columns, title=note, **style)


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG (300 dpi) at `path` and as PDF beside it, reproducible to the byte; returns `path`."""
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as fresh:
        figure.savefig(fresh, format="png", dpi=DPI)
    with whole_file(path.with_suffix(".pdf")) as fresh, rc_context({"pdf.fonttype": 42}):  # fonttype 42 keeps text
        figure.savefig(fresh, format="pdf", dpi=DPI, metadata={"CreationDate": None})
    return path


def remove_figure(path: Path) -> None:
    """Remove the files of `save_figure`, if they exist."""
    for file in (path, path.with_suffix(".pdf")):
        file.unlink(missing_ok=True)


def robust(values: Iterable[float], *, log: bool = False, reach: float = 4.0) -> Ends:
    """Find limits of an axis such that a few outliers don't compress the other values.

    The limits are the smallest and largest values within `reach` interquartile ranges of the quartiles (of the logarithms,
    for a logarithmic axis). A limit is None without outliers on its side, or if all other values are equal.
    """
    known = sorted(math.log10(v) if log else v for v in values if math.isfinite(v) and (v > 0 or not log))
    if len(known) < 4:
        return None, None
    first, third = known[len(known) // 4], known[(3 * len(known) - 1) // 4]
    near = [v for v in known if first - reach * (third - first) <= v <= third + reach * (third - first)]
    if near[0] == near[-1]:
        return None, None
    low, high = (10**v if log else v for v in (near[0], near[-1]))
    return (low if known[0] < near[0] else None), (high if known[-1] > near[-1] else None)


def frame(axes: Any, lines: Iterable[Line], *, x: Ends = (None, None), y: Ends = (None, None)) -> None:
    """Limit the axes to `x` and `y` (low, high; None: no limit) if `lines` go beyond, and mark the points outside.

    A mark is a triangle at the edge in the line's colour, with the value. Of neighbouring points outside, only the farthest
    is marked. An axis without points outside doesn't change.
    """
    lines = list(lines)
    cut = [_cut(axes, lines, axis, ends) for axis, ends in enumerate((x, y))]
    if cut == [False, False]:
        return
    sides = [tuple(sorted(side)) for side in (axes.get_xlim(), axes.get_ylim())]  # an axis may be inverted
    for line in lines:
        points = list(zip(line[0], line[1], strict=True))
        beyond = [i for i, point in enumerate(points) if _over(point, sides, cut) > 0]
        for _, neighbours in itertools.groupby(enumerate(beyond), lambda pair: pair[1] - pair[0]):
            farthest = max((points[i] for _, i in neighbours), key=lambda point: _over(point, sides, cut))
            _mark(axes, farthest, sides, line[2])


def _cut(axes: Any, lines: Sequence[Line], axis: int, ends: Ends) -> bool:
    """Limit an axis (0: x, 1: y) to the values within `ends` if some are outside; returns whether it did."""
    is_log = (axes.get_xscale, axes.get_yscale)[axis]() == "log"
    values = [v for line in lines for v in line[:2][axis] if v is not None and math.isfinite(v)]
    values = [v for v in values if v > 0 or not is_log]
    inside = [v for v in values if (ends[0] is None or v >= ends[0]) and (ends[1] is None or v <= ends[1])]
    if not inside or len(inside) == len(values):
        return False
    least, most = (float(math.log10(v) if is_log else v) for v in (min(inside), max(inside)))
    room = 0.06 * (most - least) or 0.05
    low, high = least - room, most + room
    (axes.set_xlim, axes.set_ylim)[axis](*((10**low, 10**high) if is_log else (low, high)))
    return True


def _over(point: Sequence[float | None], sides: Sequence[tuple[float, float]], cut: Sequence[bool]) -> float:
    """Distance of a point beyond the axes that were cut; 0 if inside."""
    known = [(v, side) for v, side, is_cut in zip(point, sides, cut, strict=True) if is_cut and v is not None]
    return max((max(low - v, v - high) for v, (low, high) in known), default=0.0)


def _mark(axes: Any, point: tuple[float, float], sides: Sequence[tuple[float, float]], colour: str) -> None:
    """Mark a point outside by a triangle at the edge, with the values that are cut off."""
    place = [min(max(v, low), high) for v, (low, high) in zip(point, sides, strict=True)]
    is_left, is_below = (v < low for v, (low, _) in zip(point, sides, strict=True))
    number = ", ".join(f"{v:.3g}" for v, edge in zip(point, place, strict=True) if v != edge)
    across = place[1] == point[1]
    arrow = ("<" if is_left else ">") if across else ("v" if is_below else "^")
    axes.plot(*place, arrow, color=colour, markersize=5, clip_on=False, zorder=5, label="_beyond", gid="beyond")
    low, high = sides[0]
    to_left = place[0] > ((low * high) ** 0.5 if axes.get_xscale() == "log" else (low + high) / 2)
    away = (-7 if to_left else 7, 0 if across else 3 if is_below else -8)
    white = {"facecolor": "white", "linewidth": 0, "pad": 0.4}
    style = {"fontsize": 6.5, "color": colour, "va": "center" if across else "bottom", "zorder": 6, "bbox": white}
    axes.annotate(number, place, away, textcoords="offset points", ha="right" if to_left else "left", **style)
