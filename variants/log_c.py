"""Log C, position-aware SAEs for sequences (`temporal_lens`). C3 and C4 look at C2, C7 to C9 at C6."""

from .documented import Documented

SOFT = {"kind": "soft", "start": "normal"}
ANNEALED = {**SOFT, "temperature": 5.0, "temperature_end": 0.1}

RUNS = {
    "C1": Documented("positional SAE", sae={"mask": SOFT}),
    "C2": Documented("temperature annealing", sae={"mask": ANNEALED}),
    "C3": Documented("position-wise loss", trained_as="C2"),
    "C4": Documented("position-wise loss picture", trained_as="C2"),
}
