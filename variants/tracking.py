"""What is followed from step to step: how losses, masks and weights differ by position."""

from typing import Any

import torch
from torch import Tensor

from ..engine.config import SAEConfig
from ..engine.parts import BatchView, Part, part
from ..engine.sae import SparseAutoencoder
from ..kernels.masks import weights_at


@part("position_tracker")
class PositionTracker(Part):
    """Follows the squared error by position, and changes nothing (runs C2 to C9).

    Of every step: mean, max and min over positions of the mean squared error of a token there, positions without tokens
    apart. With each report also, by position, the mean mask weight over latents and the weight that the loss has; and the
    sharpness of the mask, the mean of |2 m - 1| over positions and latents m: 0 for a mask of 1/2, 1 for a hard one. The
    squared error of each position is among the metrics already (`train.log_positions`).
    """

    lines: Tensor
    weights: Tensor

    def __init__(self, settings: Any, sae: SAEConfig, positions: int, generator: torch.Generator):
        super().__init__(settings, sae, positions, generator)
        self.register_buffer("lines", torch.zeros(0, 3))  # a step each, since the last report
        self.register_buffer("weights", torch.ones(positions))  # [n_positions] from the first step on

    def initialise(self, sae: SparseAutoencoder, generator: torch.Generator) -> None:
        self._mask = (sae.mask,)  # in a tuple, so that it does not count as a module of this part

    def after(self, batch: BatchView) -> None:
        assert batch.squared_error is not None
        assert batch.count is not None
        of_position = batch.squared_error.detach() / batch.count
        has_tokens, zeros = batch.count > 0, torch.zeros_like(of_position)
        mean = torch.where(has_tokens, of_position, zeros).sum() / has_tokens.sum()
        most = torch.where(has_tokens, of_position, -torch.inf).amax()
        least = torch.where(has_tokens, of_position, torch.inf).amin()
        self.lines = torch.cat([self.lines, torch.stack([mean, most, least]).to(self.lines)[None]])
        weights = torch.ones_like(of_position) if batch.weights is None else batch.weights.detach()
        self.weights = weights.to(self.lines.dtype).clone()

    @torch.no_grad()
    def report(self) -> dict[str, Any]:
        mean, most, least = (_numbers(column) for column in self.lines.T)
        figures: dict[str, Any] = {"loss_mean": mean, "loss_max": most, "loss_min": least}
        self.lines = self.lines[:0].clone()
        (mask,) = self._mask
        m = mask.weights()
        if m is not None:
            everywhere = torch.arange(len(self.weights), device=self.weights.device)
            m = weights_at(m, mask.rows(everywhere)).float()
            figures["mask"] = _numbers(m.mean(1))
            figures["mask_sharpness"] = float((2 * m - 1).abs().mean())
        return {**figures, "weights": _numbers(self.weights)}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        for name in ("lines", "weights"):  # whose lengths follow the run
            if prefix + name in state_dict:
                setattr(self, name, getattr(self, name).new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _numbers(values: Tensor) -> list[float | None]:
    """Six digits; None for what is not finite, which JSON does not have."""
    finite = values.isfinite().tolist()
    return [
        float(f"{value:.6g}") if is_finite else None for value, is_finite in zip(values.tolist(), finite, strict=True)
    ]
