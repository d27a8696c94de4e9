"""Log E, self-aligning adversarial SAEs (`self_aligning`). E1 to E3 are cumulative."""

from .documented import Documented, parts

RUNS: dict[str, Documented] = {
    "E1": Documented("dynamic margin", sae={"parts": parts("dynamic_margin")}),
    "E2": Documented(
        "attribution-scaled adversary", sae={"parts": parts("dynamic_margin", "adversary", "selective_orthogonality")}
    ),
    "E3": Documented(
        "stronger adversary, spurious latents apart",
        sae={
            "parts": parts(
                "dynamic_margin", ("adversary", {"strength": 0.2}), "selective_orthogonality", "spurious_contrast"
            )
        },
    ),
}
