"""Figures of a campaign, from its saved numbers."""

from pathlib import Path


def draw(out: Path) -> list[Path]:
    """Write every figure that the logs name into figures/ of the campaign's folder."""
    return []
