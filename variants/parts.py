"""Every mechanism that we have, by its name in settings: importing this makes them known to the engine."""

from . import competition, decoder_penalties, embeddings, norms, ranges, sparsity, temporal, weights

__all__ = ["competition", "decoder_penalties", "embeddings", "norms", "ranges", "sparsity", "temporal", "weights"]
