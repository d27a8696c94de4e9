"""SAELens: TopK, in training and after it, and BatchTopK in training."""

import sys
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .dense import among_dead, largest, scattered, scattered_ragged


class _TopK:
    """Of `self`, a SAELens dictionary: cfg, W_enc [D, F], W_dec [F, D], biases, hook points."""

    def _is_plain(self: Any) -> bool:
        """Whether nobody looks at, or into, what our ops never make or make otherwise."""
        points = (self.hook_sae_acts_pre, self.hook_sae_acts_post)
        if any(point._forward_hooks or point._backward_hooks for point in points):
            return False
        return not getattr(self.cfg, "use_sparse_activations", False) and not torch.is_autocast_enabled(
            self.device.type
        )

    def _norm(self: Any) -> Tensor | None:
        return self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None

    def _encoder(self: Any, norm: Tensor | None) -> tuple[Tensor, Tensor]:
        return (self.W_enc, self.b_enc) if norm is None else (self.W_enc * norm, self.b_enc * norm)

    def _select(self: Any, x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return *ops.encode_topk(x, W, b, self.cfg.k), None

    def _coded(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Dense activations of the input's shape, and x_hat."""
        sae_in, norm = self.process_sae_in(x), self._norm()
        W, b = self._encoder(norm)
        values, indices, offsets = self._select(sae_in.flatten(0, -2), W, b)
        F = self.cfg.d_sae
        acts = scattered(values, indices, F) if offsets is None else scattered_ragged(values, indices, offsets, F)
        given = values if norm is None else values / norm[indices.long()]
        x_hat = ops.decode(given, indices, self.W_dec, self.b_dec, offsets=offsets)
        shape = sae_in.shape[:-1]
        out = self.run_time_activation_norm_fn_out(self.hook_sae_recons(x_hat.view(*shape, -1)))
        acts = acts.to(sae_in.dtype).view(*shape, -1)
        return acts, self.reshape_fn_out(out, self.d_head), values

    def encode(self: Any, x: Tensor) -> Tensor:
        if not self._is_plain():
            return self.own.encode(self, x)
        sae_in = self.process_sae_in(x)
        values, indices, offsets = self._select(sae_in.flatten(0, -2), *self._encoder(self._norm()))
        F = self.cfg.d_sae
        acts = scattered(values, indices, F) if offsets is None else scattered_ragged(values, indices, offsets, F)
        return acts.to(sae_in.dtype).view(*sae_in.shape[:-1], -1)

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self._is_plain() or self.use_error_term:
            return self.own.forward(self, x)
        return self.hook_sae_output(self._coded(x)[1])


class TopK(_TopK):
    """TopKSAE"""


class TopKTraining(_TopK):
    """TopKTrainingSAE"""

    def training_forward_pass(self: Any, step_input: Any) -> Any:
        if not self._is_plain():
            return self.own.training_forward_pass(self, step_input)
        x = step_input.sae_in
        acts, x_hat, _ = self._coded(x)
        mse = self.mse_loss_fn(x_hat, x).sum(dim=-1).mean()
        aux = self._dead_loss(x, x_hat, step_input.dead_neuron_mask)
        losses = {"mse_loss": mse, "auxiliary_reconstruction_loss": aux}
        return _output_class()(x, x_hat, acts, lambda: self.encode_with_hidden_pre(x)[1], mse + aux, losses)

    def _dead_loss(self: Any, x: Tensor, x_hat: Tensor, dead: Tensor | None) -> Tensor:
        """As SAELens' own, from the pre-activations of the dead latents alone."""
        n = 0 if dead is None else int(dead.sum())
        if dead is None or n == 0:
            return x_hat.new_tensor(0.0)
        if self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            return self.calculate_topk_aux_loss(x, x_hat, x, dead)  # which says that it can't
        norm = self._norm()
        W, b = self._encoder(norm)
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

    def _select(self: Any, x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return ops.encode_batch_topk(x, W, b, int(self.cfg.k))

    def training_forward_pass(self: Any, step_input: Any) -> Any:
        output = TopKTraining.training_forward_pass(self, step_input)
        if isinstance(output, _output_class()):  # else SAELens' own has done it
            self.update_topk_threshold(output.feature_acts)
            output.metrics["topk_threshold"] = self.topk_threshold
        return output


def _output_class() -> type:
    """TrainStepOutput, which works out pre-activations only if somebody asks for them."""
    if not _OUTPUT:
        base = sys.modules["sae_lens.saes.sae"].TrainStepOutput

        class Output(base):
            @property
            def hidden_pre(self) -> Any:
                return self._pre() if callable(self._pre) else self._pre

            @hidden_pre.setter
            def hidden_pre(self, value: Any) -> None:
                self._pre = value

        _OUTPUT.append(Output)
    return _OUTPUT[0]


_OUTPUT: list[type] = []
