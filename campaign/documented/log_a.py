"""Log A, structured positional masking (`masking`)."""

from .documented_run import EACH, Documented, parts

SOFT = {"kind": "soft"}
GROUPS = {"kind": "ranges", "ranges": EACH}  # F // T latents per position
WHOLE = {"mode": "sequences"}

RUNS = {
    "A1": Documented("hard masks", sae={"mask": {"kind": "random", "fraction": 0.5}}),
    "A2": Documented("soft masks", sae={"mask": SOFT}),
    "A3": Documented("soft masks, strong sparsity", sae={"mask": SOFT, "l1_coefficient": 0.2}),
    "A4": Documented(
        "position-aware loss scaling",
        sae={"mask": SOFT, "parts": parts("specialised_weights"), "l1_coefficient": 0.1},
    ),
    "A5": Documented(
        "position feature groups",
        sae={"mask": GROUPS, "parts": parts("position_embedding", "linear_weights"), "l1_coefficient": 0.1},
    ),
    "A6": Documented("attention routing", sae={"parts": parts("position_embedding", "attention_router")}),
    "A7": Documented(
        "hierarchical global/position",
        # the router's position prior applies to the second half, the groups of position latents
        sae={
            "parts": parts(
                "position_embedding",
                ("attention_router", {"prior": 1.0, "free": 0.5}),
                "global_position",
                "linear_weights",
            )
        },
    ),
    "A8": Documented("contrastive", sae={"parts": parts("position_embedding", "position_contrast")}),
    "A9": Documented("multi-scale", sae={"parts": parts("multi_scale", "scale_targets")}, stream=WHOLE),
    "A10": Documented("residual position", sae={"parts": parts("residual_position")}),
}
