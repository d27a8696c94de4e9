"""Figures: sharp, the same each time, saved by one function, and not squashed by a few far values."""

import math
import struct
from pathlib import Path

import pytest
from temposae.reporting.plots import DPI, frame, new_axes, robust, save_figure

from .marks import beyond, numbers

ROOT = Path(__file__).resolve().parents[2]


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
    sources = [
        path
        for part in ("reporting", "evals", "campaign", "bench", "engine", "cli")
        for path in (ROOT / part).rglob("*.py")
    ]
    saving = [path.name for path in sources if ".savefig(" in path.read_text()]
    assert saving == ["plots.py"]


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
