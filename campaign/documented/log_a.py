"""Log A, structured positional masking (`masking`)."""

from .documented_run import EACH, Documented

SOFT = {"kind": "soft"}
GROUPS = {"kind": "ranges", "ranges": EACH}  # F // T latents per position
WHOLE = {"mode": "sequences"}
# the router's position prior applies to the second half, the groups of position latents
ROUTER = ("attention_router", {"prior": 1.0, "free": 0.5})

RUNS = {
    "A1": Documented("hard masks", sae={"mask": {"kind": "random", "fraction": 0.5}}),
    "A2": Documented("soft masks", sae={"mask": SOFT}),
    "A3": Documented("soft masks, strong sparsity", sae={"mask": SOFT, "l1_coefficient": 0.2}),
    "A4": Documented(
        "position-aware loss scaling", ("specialised_weights",), sae={"mask": SOFT, "l1_coefficient": 0.1}
    ),
    "A5": Documented(
        "position feature groups", ("position_embedding", "linear_weights"), sae={"mask": GROUPS, "l1_coefficient": 0.1}
    ),
    "A6": Documented("attention routing", ("position_embedding", "attention_router")),
    "A7": Documented(
        "hierarchical global/position", ("position_embedding", ROUTER, "global_position", "linear_weights")
    ),
    "A8": Documented("contrastive", ("position_embedding", "position_contrast")),
    "A9": Documented("multi-scale", ("multi_scale", "scale_targets"), stream=WHOLE),
    "A10": Documented("residual position", ("residual_position",)),
}
