"""What progress says is never more than all, nor a time before now."""

import io
import re

import pytest
from temposae.engine.process import progress
from temposae.engine.process.progress import ProgressBar, percent, progress_bar


@pytest.mark.parametrize("counts", [[900, 900], [1000, 1], [5000]])
def test_a_pipe_is_told_at_most_all(counts, capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    bar = ProgressBar("filling", total=1000, unit="tokens")
    for count in counts:
        now += 11
        bar.advance(count)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == len(counts)
    assert shown[-1].startswith(f"filling: 100%  {sum(counts) / now:,.0f} tokens/s")
    assert shown[-1].endswith("  0 s left")


def test_all_is_said_only_when_it_is_done(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    bar = ProgressBar("filling", total=1000, unit="tokens")
    now = 11
    bar.advance(999)
    assert capsys.readouterr().err.startswith("filling: 99%")


@pytest.mark.parametrize("total", [0, 10])
def test_a_terminal_is_shown_at_most_all_and_names_as_they_are(total, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("probing [a]/[/b]", total=total, unit="rows") as bar:
        bar.advance(25)
        assert bar._bar.tasks[0].completed <= bar._bar.tasks[0].total
    assert "probing [a]/[/b]" in re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", terminal.getvalue())


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0, "0.0%"), (1e-12, "<0.1%"), (0.0002, "<0.1%"), (0.0006, "0.1%"), (0.5, "50.0%"), (0.9993, "99.9%"),
        (0.9998, ">99.9%"), (1, "100.0%"),
    ],
)  # fmt: skip
def test_a_percentage_is_0_or_100_only_where_it_is(share, shown):
    assert percent(share) == shown
    assert percent(0.004, 0) == "<1%"
