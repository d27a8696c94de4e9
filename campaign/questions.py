"""The comparisons that the logs ask for: pairs of runs that differ in one mechanism."""

from collections.abc import Mapping
from typing import Any

from .significance import repeated, strictness

Pair = tuple[str, str]  # a run, and the one it is compared with

#: strictness of masks (of the first run, of the second) -> what the two differ in. A campaign's conditions may set it.
STRICTNESS_PAIRS = {
    ("soft", "hard"): "soft masks rather than hard",
    ("annealed", "soft"): "annealed masks rather than soft",
    ("annealed", "hard"): "annealed masks rather than hard",
}
#: what two documented runs differ in -> the pairs
QUESTIONS: dict[str, tuple[Pair, ...]] = {
    STRICTNESS_PAIRS["soft", "hard"]: (("A2", "A1"), ("B2", "B1")),
    STRICTNESS_PAIRS["annealed", "soft"]: (("C2", "C1"),),
    STRICTNESS_PAIRS["annealed", "hard"]: (),
    "a gradual mask rather than one from the start": (("B6", "B2"),),
    "more L1 on soft masks": (("A3", "A2"),),
    "reconstruction weighted by position (A4 has more L1, too)": (("A4", "A2"), ("C5", "C2")),
    "sparsity also weighted by position": (("C6", "C5"),),
    "a global half beside routed position groups": (("A7", "A6"),),
    "L1 before the mask rather than after": (("B3", "B2"),),
    "clipping and a tenth of the learning rate": (("B4", "B3"),),
    "layer norm (with clipping) before the mask": (("B5", "B3"),),
    "orthogonal range encoders rather than plain ones": (("B8", "B7"),),
    "a curriculum for the adapters": (("B10", "B9"),),
    "dilated convolutions with separation rather than without": (("D2", "D1"),),
    "an adversary on top of the dynamic margin": (("E2", "E1"),),
    "a stronger adversary, with spurious latents pushed apart": (("E3", "E2"),),
}


def pairs_by_question(campaign: Mapping[str, Any]) -> dict[str, list[Pair]]:
    """The pairs of runs in campaign.json for each question. A pair with the same numbers as another is left out."""
    names = {(run["run"], run["condition"]): name for name, run in campaign["runs"].items() if not run["trained_as"]}
    same = repeated(campaign)
    pairs: dict[str, dict[Pair, Pair]] = {about: {} for about in QUESTIONS}

    def add(about: str, name: str, other: str | None) -> None:
        if other is not None:
            pairs[about].setdefault((same.get(name, name), same.get(other, other)), (name, other))

    for (run, condition), name in names.items():
        level, rest = strictness(condition)
        for about, documented_pairs in QUESTIONS.items():
            if level is None or about not in STRICTNESS_PAIRS.values():
                add(about, name, names.get((dict(documented_pairs).get(run, ""), condition)))
        for (more, less), about in STRICTNESS_PAIRS.items():
            if level == more:
                add(about, name, names.get((run, f"{less}_{rest}" if rest else less)))
    return {about: list(distinct.values()) for about, distinct in pairs.items()}
