"""Markdown written from numbers and names."""

import pytest
from temposae.reporting.markdown import number, plain, table


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"), (True, "yes"), (1024, "1,024"), (0.99439, "0.9944"), (1.0, "1.0000"), (-5e-18, "0.0000"),
        (26.5551, "26.56"), (114.68, "114.7"), (12345.6, "12,346"), (-0.0690, "-0.0690"),
    ],
)  # fmt: skip
def test_numbers_have_four_places(value, shown):
    assert number(value) == shown


def test_a_line_break_does_not_leave_a_cell():
    assert plain("a\n\n# b\u202ec") == "a \\# b c"
    assert table(("x", "n"), [("a", "1")]) == "| x | n |\n| :-- | --: |\n| a | 1 |"
