"""SAELens: TopK, in training and after it, and BatchTopK in training."""

import functools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.code import SparseCode
from .. import ops
from .dead import among_dead, largest


class _Coded(NamedTuple):
    """What the encoder gets, and the code of its tokens one after the other; `norm` [F] of decoder rows, if latents count
    them."""

    sae_in: Tensor
    code: SparseCode
    norm: Tensor | None


class _TopK:
    """Of `self`, a SAELens dictionary: cfg, W_enc [D, F], W_dec [F, D], biases, hook points."""

    def _is_plain(self: Any) -> bool:
        """Whether nobody looks at, or into, what our ops never make or make otherwise."""
        points = (self.hook_sae_acts_pre, self.hook_sae_acts_post)
        if any(point._forward_hooks or point._backward_hooks for point in points):
            return False
        is_dense = not getattr(self.cfg, "use_sparse_activations", False)
        return is_dense and not torch.is_autocast_enabled(self.device.type)

    def _encoder(self: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """W_enc, b_enc and, where latents count the norm of their decoder row, with that in them, the norm."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            return self.W_enc, self.b_enc, None
        norm = self.W_dec.norm(dim=-1)
        return self.W_enc * norm, self.b_enc * norm, norm

    def _select(self: Any, x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return ops.encode_topk(x, W, b, self.cfg.k)

    def _coded(self: Any, x: Tensor) -> _Coded:
        sae_in = self.process_sae_in(x)
        W, b, norm = self._encoder()
        values, indices, *offsets = self._select(sae_in.flatten(0, -2), W, b)
        return _Coded(sae_in, SparseCode(values, indices, self.cfg.d_sae, offsets[0] if offsets else None), norm)

    def _acts(self: Any, coded: _Coded) -> Tensor:
        return coded.code.to_dense().to(coded.sae_in.dtype).view(*coded.sae_in.shape[:-1], -1)

    def _x_hat(self: Any, coded: _Coded) -> Tensor:
        code, values = coded.code, coded.code.values
        if coded.norm is not None:
            values = values / coded.norm[code.live(code.indices).long()]
        x_hat = ops.decode(values, code.indices, self.W_dec, self.b_dec, offsets=code.offsets)
        x_hat = self.hook_sae_recons(x_hat.view(*coded.sae_in.shape[:-1], -1))
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(x_hat), self.d_head)

    def encode(self: Any, x: Tensor) -> Tensor:
        return self._acts(self._coded(x)) if self._is_plain() else self.own.encode(self, x)

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self._is_plain() or self.use_error_term:
            return self.own.forward(self, x)
        return self.hook_sae_output(self._x_hat(self._coded(x)))


class TopK(_TopK):
    """TopKSAE"""


class TopKTraining(_TopK):
    """TopKTrainingSAE"""

    def training_forward_pass(self: Any, step_input: Any) -> Any:
        if not self._is_plain():
            return self.own.training_forward_pass(self, step_input)
        x = step_input.sae_in
        coded = self._coded(x)
        x_hat = self._x_hat(coded)
        mse = self.mse_loss_fn(x_hat, x).sum(dim=-1).mean()
        aux = self._dead_loss(x, x_hat, step_input.dead_neuron_mask)
        losses = {"mse_loss": mse, "auxiliary_reconstruction_loss": aux}
        pre = lambda: self.encode_with_hidden_pre(x)[1]
        return _output_class()(x, x_hat, self._acts(coded), pre, mse + aux, losses)

    def _dead_loss(self: Any, x: Tensor, x_hat: Tensor, dead: Tensor | None) -> Tensor:
        """As SAELens' own, from the pre-activations of the dead latents alone."""
        n = 0 if dead is None else int(dead.sum())
        if dead is None or n == 0:
            return x_hat.new_tensor(0.0)
        if self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            return self.calculate_topk_aux_loss(x, x_hat, x, dead)  # which says that it can't
        W, b, norm = self._encoder()
        pre = among_dead(self.process_sae_in(x).flatten(0, -2), W, b, dead)
        most = x.shape[-1] // 2
        aux = largest(pre, min(most, n))
        aux = aux if norm is None else aux / norm[dead]
        e_hat = (aux @ self.W_dec[dead]).view(x.shape)
        found = (e_hat - (x - x_hat).detach()).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * min(n / most, 1.0) * found


class BatchTopKTraining(TopKTraining):
    """BatchTopKTrainingSAE"""

    def _is_plain(self: Any) -> bool:
        return _TopK._is_plain(self) and self.cfg.k == int(self.cfg.k)  # ours keeps a whole number a token

    def _select(self: Any, x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return ops.encode_batch_topk(x, W, b, int(self.cfg.k))

    def training_forward_pass(self: Any, step_input: Any) -> Any:
        output = TopKTraining.training_forward_pass(self, step_input)
        if isinstance(output, _output_class()):  # else SAELens' own has done it
            self.update_topk_threshold(output.feature_acts)
            output.metrics["topk_threshold"] = self.topk_threshold
        return output


@functools.cache
def _output_class() -> type:
    """TrainStepOutput, which works out pre-activations only if somebody asks for them."""

    class Output(sys.modules["sae_lens.saes.sae"].TrainStepOutput):
        @property
        def hidden_pre(self) -> Any:
            return self._pre() if callable(self._pre) else self._pre

        @hidden_pre.setter
        def hidden_pre(self, value: Any) -> None:
            self._pre = value

    return Output
