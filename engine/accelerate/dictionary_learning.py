"""dictionary_learning: TopK and BatchTopK, and their trainers' losses."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.code import SparseCode
from .. import ops
from .dead import among_dead, largest


class _Linear:
    """Of `self`: encoder and decoder (nn.Linear), b_dec, k, threshold."""

    def _is_plain(self: Any, x: Tensor) -> bool:
        """Whether no hook looks into the layers, and no autocast changes what they compute."""
        layers = (self.encoder, self.decoder)
        hooked = any(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks for layer in layers)
        return not hooked and x.ndim == 2 and not torch.is_autocast_enabled(x.device.type)

    def _coded(self: Any, encoder: Callable[..., Any], x: Tensor, *settings: Any, **others: Any) -> SparseCode:
        """The code of x [N, D] by one of our encoders."""
        W, b = self.encoder.weight.T, self.encoder.bias
        values, indices, *offsets = encoder(x, W, b, *settings, center=self.b_dec, **others)
        return SparseCode(values, indices, self.dict_size, offsets[0] if offsets else None)

    def _decoded(self: Any, code: SparseCode) -> Tensor:
        W_dec = self.decoder.weight.T.contiguous()  # rows are gathered many times over, and in memory they are columns
        return ops.decode(code.values, code.indices, W_dec, self.b_dec, offsets=code.offsets)

    def forward(self: Any, x: Tensor, output_features: bool = False) -> Any:
        code = self._kept(x) if self._is_plain(x) else None
        if code is None:
            return self.own.forward(self, x, output_features)
        x_hat = self._decoded(code)
        return (x_hat, code.to_dense().to(x.dtype)) if output_features else x_hat


class TopK(_Linear):
    """AutoEncoderTopK"""

    def _kept(self: Any, x: Tensor) -> SparseCode:
        return self._coded(ops.encode_topk, x, int(self.k))

    def encode(self: Any, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        if return_topk or use_threshold or not self._is_plain(x):  # they need all activations
            return self.own.encode(self, x, return_topk, use_threshold)
        return self._kept(x).to_dense().to(x.dtype)


class BatchTopK(_Linear):
    """BatchTopKSAE: after training, what is above its threshold."""

    def _kept(self: Any, x: Tensor) -> SparseCode | None:
        if self.threshold <= 0:  # none was followed yet, and half of all latents are above it
            return None
        return self._coded(ops.encode_threshold, x, self.threshold.expand(self.dict_size), expected=4 * int(self.k))

    def _batch(self: Any, x: Tensor) -> SparseCode:
        return self._coded(ops.encode_batch_topk, x, int(self.k))

    def encode(self: Any, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        code = None
        if not return_active and self._is_plain(x):
            code = self._kept(x) if use_threshold else self._batch(x)
        if code is None:
            return self.own.encode(self, x, return_active, use_threshold)
        return code.to_dense().to(x.dtype)


class _Trainer:
    """Of `self`: ae, counts of idle tokens, settings of AuxK and of the threshold. Each kind has `_code` of a batch, what of
    it the threshold follows (`_chosen`), and which entries count as having fired (`_fired`)."""

    def loss(self: Any, x: Tensor, step: Any = None, logging: bool = False) -> Any:
        if logging or not self.ae._is_plain(x):
            return self.own.loss(self, x, step=step, logging=logging)
        code = self._code(x)
        if step > self.threshold_start_step:
            self.update_threshold(self._chosen(code))
        e = x - self.ae._decoded(code)
        self.effective_l0 = self.k
        fired = torch.zeros_like(self.num_tokens_since_fired, dtype=torch.bool)
        fired[code.indices[self._fired(code)].long()] = True
        self.num_tokens_since_fired += len(x)
        self.num_tokens_since_fired[fired] = 0
        l2_loss = e.pow(2).sum(dim=-1).mean()
        if self.auxk_alpha <= 0:
            return l2_loss
        return l2_loss + self.auxk_alpha * self._dead_loss(x, e.detach())

    def _dead_loss(self: Any, x: Tensor, residual: Tensor) -> Tensor:
        """As the library's own, from the activations of the dead latents alone."""
        dead = self.num_tokens_since_fired >= self.dead_feature_threshold
        self.dead_features = int(dead.sum())
        if self.dead_features == 0:
            self.pre_norm_auxk_loss = -1
            return torch.tensor(0, dtype=residual.dtype, device=residual.device)
        encoder, W_dec = self.ae.encoder, self.ae.decoder.weight.T
        acts = among_dead(x - self.ae.b_dec, encoder.weight.T, encoder.bias, dead).relu()
        e_hat = largest(acts, min(self.top_k_aux, self.dead_features)) @ W_dec[dead]
        self.pre_norm_auxk_loss = (residual.float() - e_hat.float()).pow(2).sum(dim=-1).mean()
        spread = (residual.float() - residual.mean(dim=0).float()).pow(2).sum(dim=-1).mean()
        return (self.pre_norm_auxk_loss / spread).nan_to_num(0.0)


class TopKTraining(_Trainer):
    """TopKTrainer, in which a zero among the k has fired."""

    def _code(self: Any, x: Tensor) -> SparseCode:
        return self.ae._kept(x)

    def _chosen(self: Any, code: SparseCode) -> Tensor:
        return code.values

    def _fired(self: Any, code: SparseCode) -> Tensor:
        return torch.ones_like(code.values, dtype=torch.bool)


class BatchTopKTraining(_Trainer):
    """BatchTopKTrainer"""

    def _code(self: Any, x: Tensor) -> SparseCode:
        return self.ae._batch(x)

    def _chosen(self: Any, code: SparseCode) -> Tensor:
        return code.live(code.values)

    def _fired(self: Any, code: SparseCode) -> Tensor:
        return code.live(code.values) > 0
