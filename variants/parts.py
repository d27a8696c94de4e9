"""Every mechanism that we have, by its name in settings: importing this makes them known to the engine."""

from . import embeddings, weights

__all__ = ["embeddings", "weights"]
