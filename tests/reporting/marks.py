"""What `frame` left on the axes of a figure."""

from typing import Any


def beyond(axes: Any) -> list[tuple[float, float, str]]:
    """Where outliers are marked, and by which triangle."""
    found = [line for line in axes.lines if line.get_gid() == "beyond"]
    return [(line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in found]


def numbers(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]
