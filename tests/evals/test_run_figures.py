"""Figures: sharp, off the curves, and not squashed by a few far values."""

import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from temposae.bench.figures import bars, roofline, scaling
from temposae.evals.run_figures import DPI, core_figures, draw_pareto, frame, new_axes, robust, save_figure

ROOT = Path(__file__).resolve().parents[2]


def beyond(axes: Any) -> list[tuple[float, float, str]]:
    """Where outliers are marked, and by which triangle."""
    found = [line for line in axes.lines if line.get_gid() == "beyond"]
    return [(line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in found]


def numbers(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


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


def test_a_figure_is_written_for_screen_and_for_print_the_same_each_time(tmp_path):
    for folder in ("a", "b"):
        figure, axes = new_axes()
        axes.plot([1, 2], [3, 4])
        assert save_figure(figure, tmp_path / folder / "f.png") == tmp_path / folder / "f.png"
    width, height = struct.unpack(">II", (tmp_path / "a" / "f.png").read_bytes()[16:24])
    assert (width, height) == (5.2 * DPI, 3.4 * DPI)
    assert width >= 1500
    for file in ("f.png", "f.pdf"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"f.png", "f.pdf"}


def test_every_figure_is_saved_by_one_function():
    sources = [path for part in ("evals", "campaign", "bench", "engine", "cli") for path in (ROOT / part).rglob("*.py")]
    saving = [path.name for path in sources if ".savefig(" in path.read_text()]
    assert saving == ["run_figures.py"]


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


class TestFrame:
    @pytest.mark.parametrize("log", [False, True])
    def test_a_far_value_is_marked_with_its_number_and_the_others_keep_their_room(self, log):
        _, axes = new_axes()
        y = [1.0, 1.2, 1.1, 50.0, 60.0, 55.0, 1.3]
        axes.plot(range(7), y)
        axes.set_yscale("log" if log else "linear")
        frame(axes, [(range(7), y, "red")], y=(None, 2.0))
        low, high = axes.get_ylim()
        assert low < 1.0
        assert 1.3 < high < 2.0
        assert beyond(axes) == [(4, high, "^")]  # of neighbours the farthest
        assert numbers(axes) == ["60"]

    def test_nothing_far_changes_nothing(self):
        _, axes = new_axes()
        axes.plot([0, 1], [0, 1])
        before = axes.get_xlim(), axes.get_ylim()
        frame(axes, [([0, 1], [0, 1], "red")], x=(None, 1.0), y=(-1, 2))
        assert (axes.get_xlim(), axes.get_ylim()) == before
        assert beyond(axes) == []

    def test_where_all_is_far_nothing_is_cut(self):
        _, axes = new_axes()
        axes.plot([0, 1], [5, 6])
        frame(axes, [([0, 1], [5, 6], "red")], y=(None, 1.2))
        assert axes.get_ylim()[1] > 6

    def test_far_in_both_and_missing_values(self):
        figure, axes = new_axes()
        axes.plot([1, 2, 90], [1, 2, 90], "o")
        axes.invert_yaxis()
        frame(axes, [([1, 2, 90], [1, None, 90], "red"), ([2], [2], "red")], x=(None, 5), y=(None, 5))
        ((x, y, _),) = beyond(axes)
        assert (x, y) == (axes.get_xlim()[1], max(axes.get_ylim()))
        assert numbers(axes) == ["90, 90"]
        figure.draw_without_rendering()
        assert axes.get_window_extent().height > 0.5 * figure.bbox.height

    @pytest.mark.parametrize(
        ("values", "log", "ends"),
        [
            ([1, 2, 3, 4, 5, 6, 7, 8], False, (None, None)),
            ([1, 2, 3, 4, 5, 6, 7, 800], False, (None, 7)),
            ([-900, 2, 3, 4, 5, 6, 7, 8], False, (2, None)),
            ([8, 16, 32, 8.5, 15, 31, 20000], True, (None, 32)),
            ([1, 10, 100, 1000, 10_000], True, (None, None)),
            ([1, 1, 1, 1, 9], False, (None, None)),
            ([1, 1000], False, (None, None)),
            ([math.nan, 1, 2, 3, 4, 5, math.inf], False, (None, None)),
        ],
    )
    def test_the_robust_range(self, values, log, ends):
        assert robust(values, log=log) == (
            pytest.approx(ends[0]) if ends[0] else None,
            pytest.approx(ends[1]) if ends[1] else None,
        )


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


def test_readme_says_in_which_files_figures_are():
    assert re.search(r"figures/ .*\.png \(300 dpi\) and \.pdf", (ROOT / "README.md").read_text())
