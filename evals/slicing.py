"""Static slicing: untrained baselines whose latents are assigned to positions by a fixed mask.

    ranges    latent j is allowed in range floor(j R / F) of R equal ranges of positions; the maximal specialization
    random    each latent is allowed at a position with probability 1 / R, drawn once: as many latents per position
    none      every latent is allowed everywhere

All have the same parameters and the same K. They reach maximal specialization trivially, so specialization means nothing
without order probing, fidelity, explained variance and CE.
"""

from typing import Any

import torch

from ..engine.composed import dictionary
from ..engine.config import MaskConfig
from ..engine.errors import UserError
from ..engine.sae import SparseAutoencoder
from ..engine.unit_decoder import unit_decoder
from .evaluation import Evaluation, squared_distance
from .positions import BinnedTokens, held_out, information, summary

SHUFFLES = 5


@torch.no_grad()
def slicing(evaluation: Evaluation, *, rows: int = 1024, bins: int = 16) -> dict[str, dict[str, float | None]] | None:
    """Specialization, explained variance and L0 of the dictionary's `slicings` on `rows` held-out rows; None for a
    transcoder and a dictionary with a mask."""
    cfg = evaluation.sae.cfg
    if cfg.mask.kind != "none" or cfg.d_out is not None:
        return None
    collected, draw = held_out(evaluation, rows), evaluation.generator("slicing")
    drawn = BinnedTokens.of(evaluation, collected, bins, 0, draw)
    shuffled = [drawn.shuffled(draw) for _ in range(SHUFFLES)]
    spread = float(squared_distance(collected.x, collected.mean).sum())
    results: dict[str, dict[str, float | None]] = {}
    for name, sliced in slicings(evaluation.sae.sae, collected.tokens.shape[1], seed=evaluation.seed).items():
        # the unmasked copy is the dictionary, whose code of these rows is known
        sliced = evaluation.sae if name == "none" else unit_decoder(sliced)
        code = collected.code(sliced)
        figures: dict[str, Any] = summary(information(code, drawn, shuffled))
        error = float(squared_distance(collected.x, sliced.decode(code)).sum())
        results[name] = {
            "specialization": figures["specialization"],
            "explained_variance": 1 - error / spread if spread else None,
            "l0": float((code.values > 0).sum()) / len(collected.x),
        }
    return results


def slicings(sae: SparseAutoencoder, positions: int, *, ranges: int = 4, seed: int = 0) -> dict[str, SparseAutoencoder]:
    """Masked copies of a dictionary for rows of `positions` tokens, by the names above; `seed` draws the random mask.

    Raises UserError for a dictionary that has a mask, and for more ranges than positions.
    """
    if sae.cfg.mask.kind != "none":
        raise UserError(f"sae.mask.kind: {sae.cfg.mask.kind} is not allowed; slicing needs a dictionary without a mask")
    if not 1 <= ranges <= positions:
        raise UserError(f"ranges: {ranges} is not allowed; give 1 to {positions}, the number of positions in a row")
    masks = {
        "ranges": MaskConfig(kind="ranges", positions=positions, ranges=ranges),
        "random": MaskConfig(kind="random", positions=positions, fraction=1 / ranges),
        "none": MaskConfig(),
    }
    return {name: _masked(sae, mask, seed) for name, mask in masks.items()}


def _masked(sae: SparseAutoencoder, mask: MaskConfig, seed: int) -> SparseAutoencoder:
    masked = dictionary(sae.cfg.model_copy(update={"mask": mask}), seed=seed)
    masked.load_state_dict(masked.state_dict() | sae.state_dict())
    return masked.to(sae.b_dec.device)
