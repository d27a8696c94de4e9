"""Log B, structured positional masking, second series: contiguous ranges and Gaussians."""

from typing import Any

RUNS: dict[str, dict[str, Any]] = {
    "B0": {},  # the unmasked baseline
    "B1": {"mask": {"kind": "ranges", "ranges": 4}},  # each latent owns a contiguous range of positions
    "B2": {"mask": {"kind": "gaussian"}},  # a centre per latent, sigma = T / 8
}
