"""Log E, self-aligning adversarial SAEs (`self_aligning`). E1 to E3 are cumulative."""

from .documented_run import Documented, parts

ROWS = {"mode": "sequences"}

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
    "E4": Documented("causal routing", sae={"parts": parts("causal_levels")}),
    "E5": Documented(
        "temporal-aware",
        sae={
            "parts": parts(
                ("dilated_conv", {"dilations": (1,)}),
                "self_attention",
                "velocity_gru",
                "temporal_consistency",
                "dynamic_margin",
            )
        },
        stream=ROWS,
    ),
    "E6": Documented("temporal contrastive", sae={"parts": parts("temporal_contrast", "next_step")}, stream=ROWS),
    "E7": Documented("attention routing", sae={"parts": parts("level_attention")}),
    "E8": Documented("residual gating", sae={"parts": parts("residual_gate")}),
    "E9": Documented("pruning and distillation", sae={"parts": parts("pruning", "distillation", "cross_layer")}),
}
