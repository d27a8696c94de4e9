"""sparsify's SparseCoder and Trainer."""

import sys
from typing import Any

import torch
from torch import Tensor

from ...kernels import ops
from .common import among_dead, bias_for_centred, decoded, largest, pays, product_dtype, sparse_code
from .eligibility import fits, takes, twice


class Trainer:
    def _components(self: Any) -> tuple[list[Any], list[Any]]:
        return list(self.saes.values()), list(self.optimizers)


class SparseCoder:
    """Only topk. AuxK trains only the decoder, as in sparsify. groupmax and multi_topk use sparsify's code."""

    def _is_plain(self: Any, x: Any) -> bool:
        topk = self.cfg.activation == "topk" and not self.cfg.multi_topk and self.W_dec is not None
        if not topk or not takes(self, x) or x.ndim != 2 or x.shape[1] != self.encoder.weight.shape[1]:
            return False
        W = self.encoder.weight.T
        return fits(x, W, not self.cfg.transcode) and pays(self.cfg.k, x, W)

    def forward(
        self: Any, x: Tensor, y: Tensor | None = None, *, dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> Any:  # fmt: skip
        library = lambda x: self.library_class.forward(self, x, y, dead_mask=dead_mask, total_variance=total_variance)
        are_constant = all(tensor is None or not tensor.requires_grad for tensor in (y, total_variance))
        if not are_constant or not self._is_plain(x):
            return library(x)
        # like the decorator of the library's forward
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=x.is_cuda and torch.cuda.is_bf16_supported()):
            output = self._forward(x, x if y is None else y, dead_mask, total_variance)
        return type(output)(*twice(self, output, x, library))

    def _forward(self: Any, x: Tensor, target: Tensor, dead: Tensor | None, total_variance: Tensor | None) -> Any:
        W, b, encoder_in = self.encoder.weight.T, self.encoder.bias, x
        if not self.cfg.transcode:
            encoder_in, b = x - self.b_dec.detach(), bias_for_centred(b, self.b_dec, W)
        code = sparse_code(ops.encode_topk, encoder_in, W, b, self.cfg.k)
        with torch.autocast(x.device.type, enabled=False):  # the library's decoder is a kernel in the weights' dtype
            x_hat = decoded(code, code.values, self.W_dec, self.b_dec)
        if self.W_skip is not None:
            x_hat = x_hat + x.to(self.dtype) @ self.W_skip.mT
        e = target - x_hat
        if total_variance is None:
            total_variance = (target - target.mean(0)).pow(2).sum()
        zero = x_hat.new_tensor(0.0)
        aux = zero if dead is None else self._dead_loss(encoder_in, e.detach(), dead, total_variance)
        acts = code.values.to(product_dtype(encoder_in))
        fvu = e.pow(2).sum() / total_variance
        return sys.modules[self.library_class.__module__].ForwardOutput(
            x_hat, acts, code.indices.long(), fvu, aux, zero
        )

    def _dead_loss(self: Any, encoder_in: Tensor, e: Tensor, dead: Tensor, total_variance: Tensor) -> Tensor:
        """sparsify's AuxK loss, from the activations of the dead latents only, which get no gradient."""
        if (n := int(dead.sum())) == 0:
            return e.new_tensor(0.0)
        with torch.no_grad():
            acts = among_dead(encoder_in, self.encoder.weight.T, self.encoder.bias, dead).relu()
            acts = largest(acts, min(e.shape[-1] // 2, n))
        e_hat = acts.to(self.dtype) @ self.W_dec[dead]
        return min(n / (e.shape[-1] // 2), 1.0) * (e_hat - e).pow(2).sum() / total_variance
