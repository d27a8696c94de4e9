"""Figures of a run: legends cover no curve, and a few far values squash none."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
from temposae.bench.figures import bars, roofline, scaling
from temposae.evals.run_figures import core_figures, draw_pareto

from ..reporting.marks import beyond, numbers

ROOT = Path(__file__).resolve().parents[2]


def at(level: float, bad: float | None = None) -> dict[str, Any]:
    values = [level + 0.01 * math.sin(p) for p in range(32)]
    return {
        "per_position": {"position": list(range(32)), "explained_variance": [values[0], bad or values[1], *values[2:]]}
    }


RATES = {"firing_rates": {"latents": [1, 4], "log10_edges": [-2, -1, 0], "never": 3}}
METRICS = [
    {"tokens": 1000 * i, "fvu": 0.05 + math.exp(-i / 5), "random": {"fvu": 0.3 + math.exp(-i / 5)}}
    for i in range(1, 60)
]


def result(bad: float | None = None) -> dict[str, Any]:
    return at(0.95, bad) | RATES | {"controls": {"random": at(0.7), "mean": at(0.01)}}


def scores(**far: Any) -> dict[str, dict[str, Any]]:
    found = {
        f"{kind}{k}": {
            "activation": kind, "hook": "h", "d_sae": 512, "l0": 1.01 * k, "explained_variance": 1 - 0.3 / math.log(k),
            "controls": {"random": {"l0": k, "explained_variance": 0.5}},
        }
        for kind in ("topk", "relu") for k in (8, 16, 32)
    }  # fmt: skip
    return found | ({"far": found["relu8"] | far} if far else {})


def legends(figure: Any) -> list[Any]:
    return [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend() is not None)]


def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    from temposae.evals import run_figures

    kept: dict[str, Any] = {}
    monkeypatch.setattr(run_figures, "save_figure", lambda figure, path: kept.setdefault("pareto", figure))
    draw_pareto(tmp_path, scores())
    return (
        kept | core_figures(METRICS, result()) | {"roofline": roofline([]), "steps": bars([]), "scaling": scaling([])}
    )


def test_legends_cover_no_curve(tmp_path, monkeypatch):
    found = drawn(tmp_path, monkeypatch)
    for name, figure in found.items():
        figure.draw_without_rendering()
        for legend in legends(figure):
            box = legend.get_window_extent()
            assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes), name
            inside = figure.bbox
            assert box.x0 >= inside.x0 and box.x1 <= inside.x1, name  # noqa: PT018
    assert sum(bool(legends(figure)) for figure in found.values()) >= 5


class TestOutliers:
    def test_of_training(self):
        spiked = [dict(line) for line in METRICS]
        spiked[30]["fvu"] = 10.2
        (axes,) = core_figures(spiked, result())["loss_curve"].axes
        assert numbers(axes) == ["10.2"]
        assert axes.get_ylim()[1] < 2

    def test_of_a_position(self):
        (axes,) = core_figures([], result(bad=-3.2))["position_explained_variance"].axes
        assert numbers(axes) == ["-3.2"]
        assert axes.get_ylim()[0] > -0.2
        (axes,) = core_figures([], result())["position_explained_variance"].axes
        assert beyond(axes) == []

    def test_of_a_sweep(self, tmp_path, monkeypatch):
        from temposae.evals import run_figures

        kept: list[Any] = []
        monkeypatch.setattr(run_figures, "save_figure", lambda figure, path: kept.append(figure))
        draw_pareto(tmp_path, scores(l0=20_000.0, explained_variance=-24.1))
        (axes,) = kept[0].axes
        assert numbers(axes) == ["2e+04, 25.1"]
        assert axes.get_xlim()[1] < 100
        assert axes.get_ylim()[1] < 1.5

    def test_of_differences(self):
        from temposae.campaign.difference_figure import differences_figure
        from temposae.campaign.significance import Difference

        ones = [Difference("tpp", f"A{i}", "relu", (0.01 * i, 0.012 * i), half=0.01, p=0.5) for i in range(1, 8)]
        ones.append(Difference("tpp", "A9", "relu", (-3.2, -4.0), half=1.0, p=0.5))
        (axes,) = differences_figure("TPP", ones).axes
        assert numbers(axes) == ["-4"]
        low, high = axes.get_xlim()
        assert -0.2 < low < 0 < 0.084 < high < 0.2
        ((x, y, marker),) = beyond(axes)
        assert (x, y, marker) == (low, 7, "<")

    def test_numbers_below_differences_do_not_touch(self):
        from temposae.campaign.difference_figure import differences_figure
        from temposae.campaign.significance import Difference

        ones = [Difference("tpp", "B10 minus B9", "relu", (0.01 * i,), half=0.01) for i in range(-9, 7)]
        figure = differences_figure("TPP", ones)
        figure.draw_without_rendering()
        shown = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
        ends = [(box.x0, box.x1) for box in (label.get_window_extent() for label in shown)]
        assert len(ends) > 2
        assert all(first[1] + 5 < second[0] for first, second in itertools.pairwise(ends))


def test_the_quick_start_says_in_which_files_figures_are():
    page = (ROOT / "docs/quick-start.md").read_text()
    assert re.search(r"figures/ .*\.png \(300 dpi\) and \.pdf", page)
