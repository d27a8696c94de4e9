"""Log C, position-aware SAEs for sequences (`temporal_lens`). C3 and C4 analyse C2, C7 to C9 analyse C6."""

from .documented_run import Documented

SOFT = {"kind": "soft", "start": "normal"}
ANNEALED = {"mask": {**SOFT, "temperature": 5.0, "temperature_end": 0.1}}
POSITIONS = {"log_positions": True}  # squared error and L0 by position, for the figures
L1_WEIGHTS = ("adaptive_weights", {"l1": True})

RUNS = {
    "C1": Documented("positional SAE", sae={"mask": SOFT}, train=POSITIONS),
    "C2": Documented("temperature annealing", ("position_tracker",), ANNEALED, POSITIONS),
    "C3": Documented("position-wise loss", trained_as="C2"),
    "C4": Documented("position-wise loss picture", trained_as="C2"),
    "C5": Documented("adaptive loss weights", ("position_tracker", "adaptive_weights"), ANNEALED, POSITIONS),
    "C6": Documented("position-dependent sparsity", ("position_tracker", L1_WEIGHTS), ANNEALED, POSITIONS),
    "C7": Documented("weight evolution", trained_as="C6"),
    "C8": Documented("sparsity analysis", trained_as="C6"),
    "C9": Documented("temporal clustering", trained_as="C6"),
}
