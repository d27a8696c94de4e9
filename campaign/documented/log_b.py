"""Log B, structured positional masking, second series (`masking_b`)."""

from .documented_run import Documented, parts

GAUSSIAN = {"kind": "gaussian"}  # sigma T / 8
UNMASKED_L1 = {"mask": GAUSSIAN, "parts": parts("l1_before_mask")}
# B5: L1 counts the output of layer norm. Before it, activations could shrink at no cost.
NORMED = {"mask": GAUSSIAN, "parts": parts("layer_norm", "l1_before_mask")}
RANGES = {"kind": "ranges", "ranges": 4}
# B10: the base alone for a quarter of the run, with half of L1, then a quarter in which adapters ramp up.
CURRICULUM = {"start": 0.25, "ramp": 0.25, "scale": 0.01, "pace": 0.3, "l1_from": 0.5}

RUNS = {
    "B1": Documented("position masks", sae={"mask": {"kind": "windows"}}),
    "B2": Documented("Gaussian masks", sae={"mask": GAUSSIAN}),
    "B3": Documented("L1 before the mask", sae=UNMASKED_L1),
    "B4": Documented("clipped, slow", sae=UNMASKED_L1, train={"clip_norm": 1.0, "lr": 3e-5}),
    "B5": Documented("layer norm", sae=NORMED, train={"clip_norm": 1.0}),
    "B6": Documented("progressive mask", sae={"mask": {**GAUSSIAN, "blend": True}}),
    "B7": Documented("range encoders", sae={"mask": RANGES, "parts": parts("range_encoders")}),
    "B8": Documented(
        "orthogonal range encoders",
        sae={
            "mask": RANGES,
            "parts": parts("orthogonal_start", ("range_encoders", {"scale": 0.1}), ("layer_norm", {"place": "pre"})),
        },
    ),
    "B9": Documented("hierarchical adaptation", sae={"parts": parts("orthogonal_start", "range_adapters")}),
    "B10": Documented("curriculum", sae={"parts": parts("orthogonal_start", ("range_adapters", CURRICULUM))}),
}
