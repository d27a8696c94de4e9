"""Log E, self-aligning adversarial SAEs (`self_aligning`). E1 to E3 are cumulative."""

from .documented_run import Documented

ROWS = {"mode": "sequences"}
STRONG = ("adversary", {"strength": 0.2})
ONE = ("dilated_conv", {"dilations": (1,)})

RUNS: dict[str, Documented] = {
    "E1": Documented("dynamic margin", ("dynamic_margin",)),
    "E2": Documented("attribution-scaled adversary", ("dynamic_margin", "adversary", "selective_orthogonality")),
    "E3": Documented(
        "stronger adversary, spurious latents apart",
        ("dynamic_margin", STRONG, "selective_orthogonality", "spurious_contrast"),
    ),
    "E4": Documented("causal routing", ("causal_levels",)),
    "E5": Documented(
        "temporal-aware",
        (ONE, "self_attention", "velocity_gru", "temporal_consistency", "dynamic_margin"),
        stream=ROWS,
    ),
    "E6": Documented("temporal contrastive", ("temporal_contrast", "next_step"), stream=ROWS),
    "E7": Documented("attention routing", ("level_attention",)),
    "E8": Documented("residual gating", ("residual_gate",)),
    "E9": Documented("pruning and distillation", ("pruning", "distillation", "cross_layer")),
}
