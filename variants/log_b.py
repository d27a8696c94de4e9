"""Log B, structured positional masking, second series (`masking_b`)."""

from .documented import Documented

GAUSSIAN = {"kind": "gaussian"}  # sigma T / 8

RUNS = {
    "B1": Documented("position masks", sae={"mask": {"kind": "windows"}}),
    "B2": Documented("Gaussian masks", sae={"mask": GAUSSIAN}),
    "B6": Documented("progressive mask", sae={"mask": {**GAUSSIAN, "blend": True}}),
}
