"""What a documented run is: settings of a dictionary and of its training, as sections of a run's config."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: what all logs have in common: a ReLU dictionary with L1, Adam at 3e-4, less than a million tokens; no clipping but where a
#: run is about it
COMMON: dict[str, dict[str, Any]] = {
    "sae": {"d_sae": 2304, "activation": "relu", "l1_coefficient": 0.04},
    "train": {"lr": 3e-4, "tokens": 500_000, "clip_norm": None},
    "stream": {"context": 128},
}


EACH = "each"  # in place of a number of ranges: each position is one


@dataclass(frozen=True)
class Documented:
    """A run: its name in the logs and what is particular to it.

    `sae`, `train` and `stream` are settings on top of `COMMON`. An analysis has `trained_as`: the run whose weights it looks
    at.
    """

    title: str
    sae: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    stream: Mapping[str, Any] = field(default_factory=dict)
    trained_as: str | None = None

    def sections(self) -> dict[str, dict[str, Any]]:
        """Sections stream, sae and train of a config."""
        return {name: {**common, **getattr(self, name)} for name, common in COMMON.items()}


def parts(*mechanisms: str | tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The setting `parts`, from names or (name, settings)."""
    return [
        {"kind": mechanism} if isinstance(mechanism, str) else {"kind": mechanism[0], **mechanism[1]}
        for mechanism in mechanisms
    ]
