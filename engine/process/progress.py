"""A progress bar for all long commands."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def percent(share: float, digits: int = 1) -> str:
    """Format a share as a percentage. 0% and 100% are exact; 0.0002 gives "<0.1%" and 0.9998 gives ">99.9%"."""
    least = 10**-digits
    if 0 < share * 100 < least / 2:
        return f"<{least:g}%"
    if 1 > share > 1 - least / 200:
        return f">{100 - least:g}%"
    return f"{share:.{digits}%}"


class ProgressBar:
    """Shows progress, rate, named figures and the time left; without a `total`, the amount done. On a pipe it prints
    one line every 10 seconds. Work beyond the total (the rest of the last chunk) only counts towards the rate."""

    def __init__(self, title: str, total: int | None, unit: str, done: int = 0):
        self.title, self.total, self.unit = title, total, unit
        self.done, self.skipped, self.began, self.last_line = done, done, time.monotonic(), time.monotonic()
        self.figures: dict[str, str] = {}
        self._bar = self._task = None
        self._quiet = os.environ.get("RANK", "0") != "0"  # torchrun's first process reports for all
        if sys.stderr.isatty() and not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
            self._task = self._bar.add_task(title, total=total, figures="")

    def advance(self, count: int, **figures: str | None) -> None:
        self.done += count
        self.figures.update({k: v for k, v in figures.items() if v is not None})
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._within, figures=self._text())
        elif not self._quiet and time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            amount_done, time_left = f"{self.done:,} {self.unit}", ""
            if self.total is not None:
                pace = (self.last_line - self.began) / max(1, self.done - self.skipped)
                amount_done = f"{100 * self._within // max(1, self.total)}%"
                time_left = f"  {(self.total - self._within) * pace:.0f} s left"
            print(f"{self.title}: {amount_done}  {self._text()}{time_left}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a line that stays on the screen."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)

    @property
    def _within(self) -> int:
        """The amount done, at most the total."""
        return self.done if self.total is None else min(self.done, self.total)

    def _text(self) -> str:
        rate = (self.done - self.skipped) / max(1e-9, time.monotonic() - self.began)
        return "  ".join([f"{rate:,.0f} {self.unit}/s", *(f"{k} {v}" for k, v in self.figures.items())])


@contextmanager
def progress_bar(title: str, total: int | None, unit: str, done: int = 0) -> Iterator[ProgressBar]:
    bar = ProgressBar(title, total, unit, done)
    if bar._bar is None:
        yield bar
    else:
        with bar._bar:
            yield bar
