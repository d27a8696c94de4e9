"""Fraction of variance unexplained (FVU) and L0, from sums over tokens."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..kernels.code import SparseCode
from .stream.buffer import Batch
from .stream.norm_filter import has_variance
from .unit_decoder import Dictionary, unit_decoder


def fvu(squared_error: Tensor, spread: Tensor) -> float:
    """sum |x - x_hat|^2 / sum |x - mu|^2, from these sums or parts of them. 1 - FVU is the explained variance.

    A dictionary that always predicts the mean mu scores 1.
    """
    return float(squared_error.sum() / spread.sum())


def per_token(total: Tensor, tokens: Tensor) -> float:
    """Mean over tokens, from sums and counts of tokens: L0 from latents above zero, L1 from activations; 0 of no tokens."""
    return float(total.sum()) / max(1.0, float(tokens.sum()))


def plain(value: Tensor) -> Any:
    """A number, or a list of numbers, with six digits. None if not finite, which JSON cannot hold."""
    numbers = value.detach().double().flatten().tolist()
    rounded = [float(f"{number:.6g}") if math.isfinite(number) else None for number in numbers]
    return rounded if value.ndim else rounded[0]


class HeldOutSums:
    """Sums in float64 over batches that a dictionary reconstructs; mu is the mean of these same tokens."""

    def __init__(self, d_out: int, device: torch.device):
        zeros = torch.zeros(4, dtype=torch.float64, device=device)
        self.squared_error, self.squares, self.active, self.tokens = zeros.unbind()
        self.total = torch.zeros(d_out, dtype=torch.float64, device=device)

    def add(self, target: Tensor, x_hat: Tensor, code: SparseCode) -> None:
        """Count a batch: target and x_hat [N, D_out], and the code of its N tokens."""
        self.squared_error += (target - x_hat).double().square().sum()
        self.squares += target.double().square().sum()
        self.total += target.double().sum(0)
        self.active += code.l0().sum()
        self.tokens += len(target)

    @property
    def spread(self) -> Tensor:
        """sum |x - mu|^2"""
        return self.squares - self.total.square().sum() / self.tokens

    @property
    def fvu(self) -> float:
        return fvu(self.squared_error, self.spread)

    @property
    def l0(self) -> float:
        return per_token(self.active, self.tokens)


@torch.no_grad()
def held_out_scores(sae: Dictionary, batches: Iterable[Batch]) -> dict[str, Any] | None:
    """Measure `explained_variance`, `fvu`, `l0` and `dead_fraction` of a dictionary on `tokens` held-out activations.

    `explained_variance` and `fvu` are None, with an entry in `warnings`, if activations are equal. None without tokens."""
    sae, sums = unit_decoder(sae), None
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    for batch in batches:
        x = batch.x.float()
        if sums is None:
            sae, fired, sums = sae.to(x.device), fired.to(x.device), HeldOutSums(x.shape[1], x.device)
        code = sae.encode_sparse(x, batch.pos)
        sums.add(x, sae.decode(code), code)
        fired[code.indices[code.live(code.values) > 0].long()] = True
    if sums is None or not sums.tokens:
        return None
    tokens = int(sums.tokens)
    scores = {"l0": sums.l0, "dead_fraction": float((~fired).double().mean()), "tokens": tokens}
    if not has_variance(float(sums.spread), float(sums.squares)):
        warning = f"the {tokens} held-out tokens don't vary; there is no variance to explain"
        return {"explained_variance": None, "fvu": None, **scores, "warnings": [warning]}
    return {"explained_variance": 1 - sums.fvu, "fvu": sums.fvu, **scores}
