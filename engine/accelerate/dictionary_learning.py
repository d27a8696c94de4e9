"""dictionary_learning: TopK and BatchTopK, and their trainers' losses."""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .dense import among_dead, largest, scattered, scattered_ragged, used_rows


class _Linear:
    """Of `self`: encoder and decoder (nn.Linear), b_dec, k, threshold."""

    def _is_plain(self: Any, x: Tensor) -> bool:
        """Whether no hook looks into the layers, and no autocast changes what they compute."""
        layers = (self.encoder, self.decoder)
        hooked = any(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks for layer in layers)
        return not hooked and x.ndim == 2 and not torch.is_autocast_enabled(x.device.type)

    def _decoded(self: Any, values: Tensor, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
        W_dec = self.decoder.weight.T.contiguous()  # rows are gathered many times over, and in memory they are columns
        return ops.decode(values, indices, W_dec, self.b_dec, offsets=offsets)

    def forward(self: Any, x: Tensor, output_features: bool = False) -> Any:
        code = self._kept(x) if self._is_plain(x) else None
        if code is None:
            return self.own.forward(self, x, output_features)
        x_hat = self._decoded(*code)
        return (x_hat, _dense(code, self.dict_size).to(x.dtype)) if output_features else x_hat


class TopK(_Linear):
    """AutoEncoderTopK"""

    def _kept(self: Any, x: Tensor) -> tuple[Tensor, Tensor, None]:
        values, indices = ops.encode_topk(x, self.encoder.weight.T, self.encoder.bias, int(self.k), center=self.b_dec)
        return values, indices, None

    def encode(self: Any, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        if return_topk or use_threshold or not self._is_plain(x):  # they need all activations
            return self.own.encode(self, x, return_topk, use_threshold)
        return _dense(self._kept(x), self.dict_size).to(x.dtype)


class BatchTopK(_Linear):
    """BatchTopKSAE: after training, what is above its threshold."""

    def _kept(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.threshold <= 0:  # none was followed yet: half of all latents
            return None
        W, b = self.encoder.weight.T, self.encoder.bias
        threshold = self.threshold.expand(self.dict_size)
        return ops.encode_threshold(x, W, b, threshold, center=self.b_dec, expected=4 * int(self.k))

    def _batch(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.encode_batch_topk(x, self.encoder.weight.T, self.encoder.bias, int(self.k), center=self.b_dec)

    def encode(self: Any, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        code = None
        if not return_active and self._is_plain(x):
            code = self._kept(x) if use_threshold else self._batch(x)
        if code is None:
            return self.own.encode(self, x, return_active, use_threshold)
        return _dense(code, self.dict_size).to(x.dtype)


class _Trainer:
    """Of `self`: ae, counts of idle tokens, settings of AuxK and of the threshold."""

    def _codes(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        raise NotImplementedError

    def loss(self: Any, x: Tensor, step: Any = None, logging: bool = False) -> Any:
        if logging or not self.ae._is_plain(x):
            return self.own.loss(self, x, step=step, logging=logging)
        code = self._codes(x)
        values, indices, offsets = code
        used = torch.ones_like(values, dtype=torch.bool) if offsets is None else used_rows(values, offsets)[0]
        if step > self.threshold_start_step:
            self.update_threshold(values if offsets is None else values[used])
        e = x - self.ae._decoded(*code)
        self.effective_l0 = self.k
        fired = torch.zeros_like(self.num_tokens_since_fired, dtype=torch.bool)
        fired[indices[used & self._counts(values)].long()] = True
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
    """TopKTrainer"""

    def _codes(self: Any, x: Tensor) -> tuple[Tensor, Tensor, None]:
        return self.ae._kept(x)

    def _counts(self, values: Tensor) -> Tensor:
        return torch.ones_like(values, dtype=torch.bool)  # a zero among the k has fired, there


class BatchTopKTraining(_Trainer):
    """BatchTopKTrainer"""

    def _codes(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.ae._batch(x)

    def _counts(self, values: Tensor) -> Tensor:
        return values > 0


def _dense(code: tuple[Tensor, Tensor, Tensor | None], F: int) -> Tensor:
    values, indices, offsets = code
    return scattered(values, indices, F) if offsets is None else scattered_ragged(values, indices, offsets, F)
