"""Record how losses, masks and weights differ by position."""

from typing import Any

import torch
from torch import Tensor, nn

from ..engine.metrics import plain
from ..engine.parts import BatchView, Part, part
from ..engine.sae import SparseAutoencoder
from ..kernels.masks import weights_at


@part("position_tracker")
class PositionTracker(Part):
    """Record the squared error, mask and loss weight by position, without changing training (C2 to C9).

    At every step: mean, max and min over positions of the mean squared error per token, for positions with tokens. With
    each report, by position: the mean mask weight over latents and the loss weight; and the sharpness of the mask, the
    mean of |2 m - 1| over positions and latents, which is 0 for a mask of 1/2 and 1 for a hard one. The metrics have
    the squared error by position already (`train.log_positions`).
    """

    def build(self, generator: torch.Generator) -> None:
        self.lines = nn.Buffer(torch.zeros(0, 3))  # one line per step since the last report
        self.weights = nn.Buffer(torch.ones(self.positions))  # [n_positions] from the first step on

    def initialise(self, sae: SparseAutoencoder, generator: torch.Generator) -> None:
        self._mask = (sae.mask,)  # in a tuple, so that it is not a submodule of this part

    def after(self, batch: BatchView) -> None:
        error = batch.squared_error.detach() / batch.count
        has_tokens, zeros = batch.count > 0, torch.zeros_like(error)
        mean = torch.where(has_tokens, error, zeros).sum() / has_tokens.sum()
        most = torch.where(has_tokens, error, -torch.inf).amax()
        least = torch.where(has_tokens, error, torch.inf).amin()
        self.lines = torch.cat([self.lines, torch.stack([mean, most, least]).to(self.lines)[None]])
        weights = torch.ones_like(error) if batch.weights is None else batch.weights.detach()
        self.weights = weights.to(self.lines.dtype).clone()

    @torch.no_grad()
    def report(self) -> dict[str, Any]:
        mean, most, least = (plain(column) for column in self.lines.T)
        figures: dict[str, Any] = {"loss_mean": mean, "loss_max": most, "loss_min": least}
        self.lines = self.lines[:0].clone()
        (mask,) = self._mask
        m = mask.weights()
        if m is not None:
            everywhere = torch.arange(len(self.weights), device=self.weights.device)
            m = weights_at(m, mask.rows(everywhere)).float()
            figures["mask"] = plain(m.mean(1))
            figures["mask_sharpness"] = float((2 * m - 1).abs().mean())
        return {**figures, "weights": plain(self.weights)}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        for name in ("lines", "weights"):  # their lengths change during a run
            if prefix + name in state_dict:
                setattr(self, name, getattr(self, name).new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
