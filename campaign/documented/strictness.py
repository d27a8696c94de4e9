"""Strictness of masks: the ablation of hard against soft masks that logs A to C plan."""

from collections.abc import Mapping
from typing import Any

STRICTNESS = ("hard", "soft", "annealed")
HARD = ("random", "ranges", "windows")


def strict(mask: Mapping[str, Any], strictness: str) -> dict[str, Any] | None:
    """A mask's settings at another strictness, or None for a mask that has no hard and soft form.

    `soft` turns a hard mask into a learned one with the same start, `annealed` also lets its temperature fall from 5 to 0.1.
    `hard` turns a learned mask with uniform or normal logits into a random mask of half the places, and a Gaussian into
    windows of T / 4, which is two sigma.
    """
    kind, common = mask.get("kind", "none"), {k: v for k, v in mask.items() if k in ("positions", "beyond", "blend")}
    if kind == "gaussian":
        shape = {"kind": "windows"}
    elif kind == "soft":
        start = mask.get("start", "uniform")
        shape = {"kind": start if start in HARD else "random"}
    elif kind in HARD:
        shape = {k: v for k, v in mask.items() if k in ("kind", "fraction", "ranges", "width")}
    else:
        return None
    if strictness == "hard":
        return {**shape, **common}
    soft = {**shape, "kind": "soft", "start": shape["kind"], **common}
    if kind in ("gaussian", "soft") and strictness == "soft":
        return {k: v for k, v in mask.items() if k not in ("temperature", "temperature_end")}
    return {**soft, "temperature": 5.0, "temperature_end": 0.1} if strictness == "annealed" else soft
