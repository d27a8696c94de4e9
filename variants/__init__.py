"""The mechanisms of the documented runs. Importing this package registers them as parts by name."""

from . import (  # noqa: F401 (each module registers its parts)
    adversary,
    contrast,
    cross_layer,
    dynamics,
    embeddings,
    hierarchy,
    loss_weights,
    norms,
    pruning,
    ranges,
    routing,
    similarity,
    sparsity,
    tracking,
)
