"""Every mechanism that we have, by its name in settings: importing this makes them known to the engine."""

from . import (
    competition,
    contrast,
    decoder_penalties,
    embeddings,
    norms,
    ranges,
    routing,
    sparsity,
    specialised,
    temporal,
    weights,
)

__all__ = [
    "competition",
    "contrast",
    "decoder_penalties",
    "embeddings",
    "norms",
    "ranges",
    "routing",
    "sparsity",
    "specialised",
    "temporal",
    "weights",
]
