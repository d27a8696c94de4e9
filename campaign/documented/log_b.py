"""Log B, structured positional masking, second series (`masking_b`)."""

from .documented_run import Documented

GAUSSIAN = {"mask": {"kind": "gaussian"}}  # sigma T / 8
RANGES = {"mask": {"kind": "ranges", "ranges": 4}}
# B10: the base alone for a quarter of the run, with half of L1, then a quarter in which adapters ramp up.
CURRICULUM = {"start": 0.25, "ramp": 0.25, "scale": 0.01, "pace": 0.3, "l1_from": 0.5}

RUNS = {
    "B1": Documented("position masks", sae={"mask": {"kind": "windows"}}),
    "B2": Documented("Gaussian masks", sae=GAUSSIAN),
    "B3": Documented("L1 before the mask", ("l1_before_mask",), GAUSSIAN),
    "B4": Documented("clipped, slow", ("l1_before_mask",), GAUSSIAN, train={"clip_norm": 1.0, "lr": 3e-5}),
    # L1 counts the output of layer norm. Before it, activations could shrink at no cost.
    "B5": Documented("layer norm", ("layer_norm", "l1_before_mask"), GAUSSIAN, train={"clip_norm": 1.0}),
    "B6": Documented("progressive mask", sae={"mask": {"kind": "gaussian", "blend": True}}),
    "B7": Documented("range encoders", ("range_encoders",), RANGES),
    "B8": Documented(
        "orthogonal range encoders",
        ("orthogonal_start", ("range_encoders", {"scale": 0.1}), ("layer_norm", {"place": "pre"})),
        RANGES,
    ),
    "B9": Documented("hierarchical adaptation", ("orthogonal_start", "range_adapters")),
    "B10": Documented("curriculum", ("orthogonal_start", ("range_adapters", CURRICULUM))),
}
