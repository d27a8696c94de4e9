"""Every mechanism that we have, by its name in settings: importing this makes them known to the engine."""

from . import (
    adversary,
    competition,
    contrast,
    decoder_penalties,
    embeddings,
    norms,
    ranges,
    routing,
    similarity,
    sparsity,
    specialised,
    temporal,
    tracking,
    weights,
)

__all__ = [
    "adversary",
    "competition",
    "contrast",
    "decoder_penalties",
    "embeddings",
    "norms",
    "ranges",
    "routing",
    "similarity",
    "sparsity",
    "specialised",
    "temporal",
    "tracking",
    "weights",
]
