"""Log A, structured positional masking: masks per (position, latent)."""

from typing import Any

RUNS: dict[str, dict[str, Any]] = {
    "A0": {},  # the unmasked baseline
    "A1": {"mask": {"kind": "random", "fraction": 0.5}},  # hard masks, half of all (position, latent) pairs on
    "A2": {"mask": {"kind": "soft"}},  # learned masks, logits from U(0, 1), through a sigmoid
    "A3": {"mask": {"kind": "soft"}, "l1_coefficient": 0.2},  # A2 with strong sparsity
}
