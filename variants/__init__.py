"""The mechanisms of the documented runs. Importing this package registers them as parts by name."""

from . import (  # noqa: F401 (each module registers its parts)
    adversary,
    competition,
    contrast,
    cross_layer,
    decoder_penalties,
    dynamics,
    embeddings,
    gating,
    hierarchy,
    loss_weights,
    norms,
    pruning,
    ranges,
    routing,
    similarity,
    sparsity,
    specialised_weights,
    temporal,
    tracking,
)
