"""What a command measured, and what it did not, with the reason and the option that supplies what is missing."""

from collections.abc import Mapping
from typing import Any


def not_measured(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Evals and parts of evals ("positions, order probing") that were skipped, and why."""
    reasons: dict[str, str] = {}
    for name, result in results.items():
        if "skipped" in result:
            reasons[name] = str(result["skipped"])
            continue
        for part, section in result.items():
            if isinstance(section, Mapping) and isinstance(section.get("skipped"), str):
                reasons[f"{name}, {part.replace('_', ' ')}"] = section["skipped"]
    return reasons


def summary(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines for the end of `eval all`: the evals that were measured, and the others with their reasons."""
    measured = [name for name, result in results.items() if "skipped" not in result]
    lines = [f"measured: {', '.join(measured) or 'nothing'}"]
    reasons = not_measured(results)
    if reasons:
        width = max(map(len, reasons))
        lines += ["not measured, and what supplies it:", *(f"  {name:{width}}  {why}" for name, why in reasons.items())]
    return lines
