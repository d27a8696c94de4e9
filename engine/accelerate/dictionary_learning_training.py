"""Losses of dictionary_learning's trainers."""

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.code import SparseCode
from .common import among_dead, at_entries, code_above, decoded, largest, may_pay, prefix_reconstructions
from .eligibility import is_as_made, trains


class Training:
    """Mixin of all trainers. Each kind's `_loss` returns the loss of a batch, or None if dense products are faster."""

    def _components(self: Any) -> tuple[list[Any], list[Any]]:
        return [self.ae], [self.optimizer]

    def loss(self: Any, x: Tensor, step: Any = None, logging: bool = False, **options: Any) -> Any:
        use_ops = not logging and not options and trains(self, self.ae, x)
        loss = self._loss(x, step) if use_ops else None
        return self.library_class.loss(self, x, step=step, logging=logging, **options) if loss is None else loss

    def update(self: Any, step: int, x: Tensor) -> Any:
        return (_update_of(self.library_class) if is_as_made(self) else self.library_class.update)(self, step, x)


@functools.cache
def _update_of(cls: Any) -> Callable[..., Any]:
    """The library's `update` with our projection of the decoder's gradient. The library's takes half of a step on a CPU."""
    update = cls.update
    namespace = {**update.__globals__, "remove_gradient_parallel_to_decoder_directions": _without_parallel}
    return types.FunctionType(update.__code__, namespace, update.__name__, update.__defaults__, update.__closure__)


@torch.no_grad()
def _without_parallel(W: Tensor, grad: Tensor, activation_dim: int, d_sae: int) -> Tensor:
    """Subtract from grad [D, F] in place its part along each column w of W, <grad, u> u with u = w / (|w| + 1e-6)."""
    coefficients = torch.linalg.vecdot(grad, W, dim=0) / (torch.linalg.vector_norm(W, dim=0) + 1e-6).square()
    return grad.addcmul_(W, coefficients, value=-1)


class TopKTrainer(Training):
    """A selected latent counts as fired even if it is 0."""

    def _fired_latents(self: Any, code: SparseCode) -> Tensor:
        return code.indices

    def _residual_and_loss(self: Any, x: Tensor, code: SparseCode) -> tuple[Tensor, Tensor]:
        e = x - self.ae._decoded(code)
        return e, e.pow(2).sum(dim=-1).mean()

    def _loss(self: Any, x: Tensor, step: int) -> Tensor | None:
        code = self.ae._encode_in_training(x)
        if code is None:
            return None
        if step > self.threshold_start_step:
            self.update_threshold(code.live(code.values))
        e, loss = self._residual_and_loss(x, code)
        self.effective_l0 = self.k
        self.num_tokens_since_fired += len(x)
        self.num_tokens_since_fired[self._fired_latents(code).long()] = 0
        return loss + self.auxk_alpha * self._dead_loss(x, e.detach()) if self._has_aux() else loss

    def _has_aux(self: Any) -> bool:
        return self.auxk_alpha > 0

    def _dead_loss(self: Any, x: Tensor, residual: Tensor) -> Tensor:
        """The library's AuxK loss, from the activations of the dead latents only."""
        dead = self.num_tokens_since_fired >= self.dead_feature_threshold
        self.dead_features = int(dead.sum())
        if self.dead_features == 0:
            self.pre_norm_auxk_loss = -1
            return torch.tensor(0, dtype=residual.dtype, device=residual.device)
        W_dec, _ = self.ae._decoder()
        encoder_in, W, b = self.ae._encoder_inputs(x)
        acts = among_dead(encoder_in, W, b, dead).relu()
        e_hat = largest(acts, min(self.top_k_aux, self.dead_features)) @ W_dec[dead]
        self.pre_norm_auxk_loss = (residual.float() - e_hat.float()).pow(2).sum(dim=-1).mean()
        variance = (residual.float() - residual.mean(dim=0).float()).pow(2).sum(dim=-1).mean()
        return (self.pre_norm_auxk_loss / variance).nan_to_num(0.0)


class BatchTopKTrainer(TopKTrainer):
    def _fired_latents(self: Any, code: SparseCode) -> Tensor:
        return code.indices[code.live(code.values) > 0]

    def _has_aux(self: Any) -> bool:
        return True  # counts dead latents even if AuxK has no weight


class MatryoshkaBatchTopKTrainer(BatchTopKTrainer):
    """One pass over the entries gives the reconstructions of all prefixes."""

    def _residual_and_loss(self: Any, x: Tensor, code: SparseCode) -> tuple[Tensor, Tensor]:
        ends = [int(end) for end in self.ae.group_indices[1:]]
        residuals = x - prefix_reconstructions(code, code.values, self.ae.W_dec, self.ae.b_dec, ends)
        group_losses = residuals.pow(2).sum(dim=-1).mean(dim=-1)
        return residuals[-1], (group_losses * group_losses.new_tensor(self.group_weights)).mean()


class JumpReluTrainer(Training):
    """Applies the library's straight-through functions to the entries within their reach. If a threshold is within half a
    bandwidth of 0, they reach every zero, and the library's code runs."""

    def _loss(self: Any, x: Tensor, step: int) -> Tensor | None:
        ae, half_bandwidth = self.ae, self.bandwidth / 2
        if not may_pay(self, x, ae.W_enc) or bool((ae.threshold <= half_bandwidth).any()):
            return None
        x, limit = x.to(ae.W_enc.dtype), ae.threshold.detach() - half_bandwidth
        code = code_above(self, x, ae.W_enc, ae.b_enc, limit)
        if code is None:
            return None
        library, threshold = sys.modules[self.library_class.__module__], at_entries(ae.threshold, code)
        values = library.JumpReLUFunction.apply(code.values, threshold, self.bandwidth)
        active = library.StepFunction.apply(values, threshold, self.bandwidth)  # 1 for active entries
        code = code.with_values(values)
        self.num_tokens_since_fired += len(x)
        self.num_tokens_since_fired[code.indices[values > 0].long()] = 0
        self.dead_features = int((self.num_tokens_since_fired > self.dead_feature_threshold).sum())
        squared_error = (x - ae._decoded(code)).pow(2).sum(dim=-1).mean()
        excess = active.sum() / len(x) / self.target_l0 - 1
        return squared_error + self.sparsity_coefficient * excess.pow(2) * self.sparsity_warmup_fn(step)


class StandardTrainer(Training):
    def _penalty(self: Any, code: SparseCode) -> Tensor:
        return code.values.sum()

    def _loss(self: Any, x: Tensor, step: int) -> Tensor | None:
        code = self.ae._encode_sparse(x)
        if code is None:
            return None
        if getattr(self, "steps_since_active", None) is not None:
            self.steps_since_active += 1
            self.steps_since_active[code.indices.long()] = 0
        squared_error = (x - self.ae._decoded(code)).pow(2).sum(dim=-1).mean()
        return squared_error + self.l1_penalty * self.sparsity_warmup_fn(step) * self._penalty(code) / len(x)


class StandardTrainerAprilUpdate(StandardTrainer):
    def _penalty(self: Any, code: SparseCode) -> Tensor:
        return (code.values * at_entries(self.ae.decoder.weight.norm(p=2, dim=0), code)).sum()


class GatedSAETrainer(Training):
    """The gate's reconstruction has the same entries."""

    def _loss(self: Any, x: Tensor, step: int) -> Tensor | None:
        ae = self.ae
        code = ae._encode_above(x, None)  # the gates
        if code is None:
            return None
        gates = code.values + at_entries(ae.gate_bias - ae.gate_bias.detach(), code)
        squared_error = (x - ae._decoded(ae._magnitudes(code))).pow(2).sum(dim=-1).mean()
        sparsity = gates.sum() / len(x)
        W_dec, b_dec = ae._decoder()
        via_gate = decoded(code, gates, W_dec.detach(), b_dec.detach())
        aux = (x - via_gate).pow(2).sum(dim=-1).mean()
        return squared_error + self.l1_penalty * sparsity * self.sparsity_warmup_fn(step) + aux
