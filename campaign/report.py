"""The report of a campaign."""

from pathlib import Path


def write(out: Path) -> Path:
    """Write report.md and report.html of the campaign's folder."""
    return out / "report.md"
