"""Fraction of variance unexplained (FVU) and L0, from sums over tokens."""

import torch
from torch import Tensor

from ..kernels.code import SparseCode


def fvu(squared_error: Tensor, spread: Tensor) -> float:
    """sum |x - x_hat|^2 / sum |x - mu|^2, from these sums or parts of them. 1 - FVU is the explained variance.

    A dictionary that always predicts the mean mu scores 1.
    """
    return float(squared_error.sum() / spread.sum())


def per_token(total: Tensor, tokens: Tensor) -> float:
    """Mean over tokens, from sums and counts of tokens: L0 from latents above zero, L1 from activations; 0 of no tokens."""
    return float(total.sum()) / max(1.0, float(tokens.sum()))


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
