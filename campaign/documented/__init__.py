"""The documented runs, as compositions of the mechanisms in `variants`."""

from typing import Any

from ... import variants as variants  # registers the parts
from ...engine.errors import check_known
from . import baselines, log_a, log_b, log_c, log_d, log_e
from .documented_run import EACH, Documented

LOGS: dict[str, dict[str, Documented]] = {
    "A": log_a.RUNS, "B": log_b.RUNS, "C": log_c.RUNS, "D": log_d.RUNS, "E": log_e.RUNS
}  # fmt: skip

LOG_TITLES = {
    "A": "structured positional masking",
    "B": "structured positional masking, second series",
    "C": "position-aware SAEs for sequences",
    "D": "multi-scale temporal SAEs for unlearning",
    "E": "self-aligning adversarial SAEs",
}

#: the runs of the five logs by name
RUNS: dict[str, Documented] = {name: run for log in LOGS.values() for name, run in log.items()}
BASELINES = baselines.RUNS


def documented(run: str) -> Documented:
    """A run of the logs, or a baseline. Raises UserError, with close matches, for an unknown name."""
    known = RUNS | BASELINES
    check_known("run", run, known)
    return known[run]


def settings(run: str, activation: str | None = None, context: int = 128) -> dict[str, dict[str, Any]]:
    """The sections stream, sae and train of a documented run's config, for rows of `context` tokens.

    `activation` replaces the run's own. For an analysis, they are those of the run that it analyses.
    """
    definition = documented(run)
    sections = documented(definition.trained_as or run).sections()
    sections["stream"]["context"] = context
    if "mask" in sections["sae"]:
        mask = {"positions": context, **sections["sae"]["mask"]}
        sections["sae"]["mask"] = {**mask, "ranges": context} if mask.get("ranges") == EACH else mask
    if activation is not None:
        sections["sae"]["activation"] = activation
    return sections
