"""sparsify: SparseCoder with topk."""

import sys
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .dead import among_dead, largest


class Coder:
    """SparseCoder. AuxK reaches the decoder alone, as there; its groupmax and multi_topk run through its own code."""

    def _is_plain(self: Any, x: Tensor) -> bool:
        hooked = self.encoder._forward_hooks or self.encoder._forward_pre_hooks or self.encoder._backward_hooks
        topk = self.cfg.activation == "topk" and not self.cfg.multi_topk and self.W_dec is not None
        return topk and not hooked and x.ndim == 2 and not x.is_cuda  # there its forward is under bfloat16 autocast

    def forward(
        self: Any, x: Tensor, y: Tensor | None = None, *, dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> Any:  # fmt: skip
        if not self._is_plain(x):
            return self.own.forward(self, x, y, dead_mask=dead_mask, total_variance=total_variance)
        W, b = self.encoder.weight.T, self.encoder.bias
        center = None if self.cfg.transcode else self.b_dec
        target = x if y is None else y
        values, indices = ops.encode_topk(x, W, b, self.cfg.k, center=center)
        x_hat = ops.decode(values, indices, self.W_dec, self.b_dec)
        if self.W_skip is not None:
            x_hat = x_hat + x.to(self.dtype) @ self.W_skip.mT
        e = target - x_hat
        if total_variance is None:
            total_variance = (target - target.mean(0)).pow(2).sum()
        nothing = x_hat.new_tensor(0.0)
        aux = nothing if dead_mask is None else self._dead_loss(x, e.detach(), dead_mask, total_variance)
        fvu = e.pow(2).sum() / total_variance
        output = sys.modules[self.own.__module__].ForwardOutput
        return output(x_hat, values.to(x.dtype), indices.long(), fvu, aux, nothing)

    def _dead_loss(self: Any, x: Tensor, e: Tensor, dead: Tensor, total_variance: Tensor) -> Tensor:
        """As sparsify's own, from the activations of the dead latents alone, which get no gradient there."""
        if (n := int(dead.sum())) == 0:
            return e.new_tensor(0.0)
        with torch.no_grad():
            given = x if self.cfg.transcode else x - self.b_dec
            acts = among_dead(given, self.encoder.weight.T, self.encoder.bias, dead).relu()
            acts = largest(acts, min(e.shape[-1] // 2, n))
        e_hat = acts.to(self.dtype) @ self.W_dec[dead]
        return min(n / (e.shape[-1] // 2), 1.0) * (e_hat - e).pow(2).sum() / total_variance
