"""A documented run: settings of a dictionary and of its training, as sections of a run's config."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: common to all logs: a ReLU dictionary with L1, Adam at 3e-4, less than a million tokens, no clipping
COMMON: dict[str, dict[str, Any]] = {
    "sae": {"d_sae": 2304, "activation": "relu", "l1_coefficient": 0.04},
    "train": {"lr": 3e-4, "tokens": 500_000, "clip_norm": None},
    "stream": {"context": 128},
}
EACH = "each"  # as the number of ranges: one per position


@dataclass(frozen=True)
class Documented:
    """A run: its title in the logs, and its settings, which replace those of `COMMON`.

    `parts` are those of the dictionary: names, or pairs (name, settings). An analysis has `trained_as`, the run whose
    weights it analyses.
    """

    title: str
    parts: tuple[str | tuple[str, dict[str, Any]], ...] = ()
    sae: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    stream: Mapping[str, Any] = field(default_factory=dict)
    trained_as: str | None = None

    def sections(self) -> dict[str, dict[str, Any]]:
        """The sections stream, sae and train of a config."""
        sections = {name: {**common, **getattr(self, name)} for name, common in COMMON.items()}
        if self.parts:
            pairs = [(part, {}) if isinstance(part, str) else part for part in self.parts]
            sections["sae"]["parts"] = [{"kind": kind, **settings} for kind, settings in pairs]
        return sections
