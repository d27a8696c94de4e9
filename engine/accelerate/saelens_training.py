"""Training dictionaries of SAELens, and SAETrainer."""

import functools
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.code import SparseCode
from ..errors import UserError
from .common import among_dead, at_entries, decoded, largest, prefix_reconstructions, sparse_code
from .saelens import Coded, Dictionary, GatedSAE, StandardSAE, TopKSAE


class SAETrainer:
    def _components(self: Any) -> tuple[list[Any], list[Any]]:
        return [self.sae], [self.optimizer]


class _Training(Dictionary):
    """Mixin of all kinds. `_coded` returns None if dense products are faster. `_losses` has all but the squared error."""

    def training_forward_pass(self: Any, step_input: Any) -> Any:
        x = step_input.sae_in
        coded = self._coded_in_training(x) if self._is_plain(x) else None
        if coded is None:
            return self.library_class.training_forward_pass(self, step_input)
        x_hat = self._x_hat(coded)
        losses = {"mse_loss": self._squared_error(x_hat, x), **self._losses(step_input, coded, x_hat)}
        output = _output_class()(x, x_hat, self._acts(coded), self._later(x), sum(losses.values()), losses)
        self._after(output, coded)
        return output

    def _later(self: Any, x: Tensor) -> Callable[[], Tensor]:
        """A function that computes the pre-activations, as long as the parameters are unchanged."""
        versions = [(parameter, parameter._version) for parameter in self.parameters()]

        def hidden_pre() -> Tensor:
            if any(parameter._version != version for parameter, version in versions):
                raise UserError(
                    "hidden_pre: not available, because the parameters have changed since this step; read it before the "
                    "optimizer's step, or deaccelerate the dictionary"
                )
            return self.encode_with_hidden_pre(x)[1]

        return hidden_pre

    def _coded_in_training(self: Any, x: Tensor) -> Coded | None:
        return self._coded(x)

    def _after(self: Any, output: Any, coded: Coded) -> None:
        pass

    def _squared_error(self: Any, x_hat: Tensor, x: Tensor) -> Tensor:
        return self.mse_loss_fn(x_hat, x).sum(dim=-1).mean()


class TopKTrainingSAE(TopKSAE, _Training):
    def _losses(self: Any, step_input: Any, coded: Coded, x_hat: Tensor) -> dict[str, Tensor]:
        x, dead, aux_loss = step_input.sae_in, step_input.dead_neuron_mask, x_hat.new_tensor(0.0)
        if dead is not None and dead.any():
            if self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
                self.calculate_topk_aux_loss(x, x_hat, x, dead)  # raises the library's error
            aux_loss = self.cfg.aux_loss_coefficient * self._loss_of_dead(coded, (x - x_hat).detach(), dead)
        return {"auxiliary_reconstruction_loss": aux_loss}

    def _loss_of_dead(self: Any, coded: Coded, e: Tensor, dead: Tensor) -> Tensor:
        """SAELens' AuxK loss of dead latents for the residual e, from their pre-activations only."""
        n_dead, max_latents = int(dead.sum()), e.shape[-1] // 2
        aux = largest(among_dead(coded.sae_in.flatten(0, -2), coded.W, coded.b, dead), min(max_latents, n_dead))
        aux = aux if coded.norm is None else aux / coded.norm[dead]
        e_hat = (aux @ self.W_dec[dead]).view(e.shape)
        return min(n_dead / max_latents, 1.0) * (e_hat - e).pow(2).sum(dim=-1).mean()


class BatchTopKTrainingSAE(TopKTrainingSAE):
    def _is_plain(self: Any, x: Any) -> bool:
        if not Dictionary._is_plain(self, x):
            return False
        k = self.activation_fn.k
        return k == int(k)  # our op needs a whole number per token

    def encode(self: Any, x: Tensor) -> Tensor:
        return Dictionary.encode(self, x)

    def _select(self: Any, x: Tensor, W: Tensor, b: Tensor) -> SparseCode:
        return sparse_code(ops.encode_batch_topk, x, W, b, int(self.activation_fn.k))

    def _after(self: Any, output: Any, coded: Coded) -> None:
        self.update_topk_threshold(coded.code.live(coded.code.values))
        output.metrics["topk_threshold"] = self.topk_threshold


class MatryoshkaBatchTopKTrainingSAE(BatchTopKTrainingSAE):
    """One pass over the entries gives the reconstructions of all prefixes."""

    def _is_plain(self: Any, x: Any) -> bool:
        is_scaled = self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")
        return BatchTopKTrainingSAE._is_plain(self, x) and not is_scaled

    def _coded_in_training(self: Any, x: Tensor) -> Coded | None:
        coded, widths = self._coded(x), self.cfg.matryoshka_widths
        if coded is None:
            return None
        prefixes = prefix_reconstructions(coded.code, self._values(coded), self.W_dec, self.b_dec, widths)
        return coded._replace(beside=prefixes.view(-1, *x.shape))

    def _x_hat(self: Any, coded: Coded) -> Tensor:
        return TopKSAE._x_hat(self, coded) if coded.beside is None else self._finished(coded.beside[-1], coded)

    def _losses(self: Any, step_input: Any, coded: Coded, x_hat: Tensor) -> dict[str, Tensor]:
        x, widths = step_input.sae_in, self.cfg.matryoshka_widths
        if self.cfg.use_matryoshka_aux_loss and step_input.dead_neuron_mask is not None:
            losses = self._losses_of_levels(step_input, coded)
        else:
            losses = TopKTrainingSAE._losses(self, step_input, coded, x_hat)
        for width, prefix in zip(widths[:-1], coded.beside, strict=False):
            losses[f"inner_mse_loss_{width}"] = self._squared_error(prefix, x)
        return losses

    def _losses_of_levels(self: Any, step_input: Any, coded: Coded) -> dict[str, Tensor]:
        """AuxK of each level, for the residual of the levels up to it."""
        x, dead, aux_loss = step_input.sae_in, step_input.dead_neuron_mask, coded.sae_in.new_tensor(0.0)
        for prefix, (begin, end) in zip(coded.beside, pairwise([0, *self.cfg.matryoshka_widths]), strict=True):
            level_dead = torch.zeros_like(dead)
            level_dead[begin:end] = dead[begin:end]
            if level_dead.any():
                aux_loss = aux_loss + self._loss_of_dead(coded, (x - prefix).detach(), level_dead)
        return {"auxiliary_reconstruction_loss": self.cfg.aux_loss_coefficient * aux_loss}


class StandardTrainingSAE(StandardSAE, _Training):
    def _is_plain(self: Any, x: Any) -> bool:
        return Dictionary._is_plain(self, x) and self.cfg.lp_norm == 1

    def _losses(self: Any, step_input: Any, coded: Coded, x_hat: Tensor) -> dict[str, Tensor]:
        weighted = coded.code.values * at_entries(self.W_dec.norm(dim=1), coded.code)
        return {"l1_loss": step_input.coefficients["l1"] * weighted.sum() / coded.code.n_tokens}


class GatedTrainingSAE(GatedSAE, _Training):
    """The gate's reconstruction has the same entries."""

    def _is_plain(self: Any, x: Any) -> bool:
        is_scaled = self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")
        return Dictionary._is_plain(self, x) and not is_scaled

    def _losses(self: Any, step_input: Any, coded: Coded, x_hat: Tensor) -> dict[str, Tensor]:
        code, x = coded.beside, step_input.sae_in
        gates = code.values + at_entries(self.b_gate - self.b_gate.detach(), code)
        l1 = (gates * at_entries(self.W_dec.norm(dim=1), code)).sum() / code.n_tokens
        via_gate = decoded(code, gates, self.W_dec, self.b_dec).view(x.shape)
        return {
            "l1_loss": step_input.coefficients["l1"] * l1,
            "auxiliary_reconstruction_loss": (via_gate - x).pow(2).sum(dim=-1).mean(),
        }


class JumpReLUTrainingSAE(StandardSAE, _Training):
    """Entries are all activations above their threshold minus half a bandwidth, which is as far as its straight-through
    gradient reaches. Pre-activations may be negative there, so half a bandwidth is added for encoding."""

    def training_forward_pass(self: Any, step_input: Any) -> Any:
        with torch.no_grad():
            self.threshold.data.clamp_(min=0.0)
        return _Training.training_forward_pass(self, step_input)

    def forward(self: Any, x: Tensor) -> Tensor:
        """Our ops run only without gradients, because the straight-through functions would differentiate them twice."""
        return self.library_class.forward(self, x) if torch.is_grad_enabled() else StandardSAE.forward(self, x)

    def _coded(self: Any, x: Tensor) -> Coded | None:
        """`beside` holds the pre-activations of the entries."""
        half_bandwidth = self.bandwidth / 2
        coded = self._coded_above(x, self.b_enc, self.threshold.detach(), half_bandwidth)
        if coded is None:
            return None
        pre = coded.code.values - half_bandwidth
        return coded._replace(code=coded.code.with_values(self._by_entry("JumpReLU", pre, coded.code)), beside=pre)

    def _by_entry(self: Any, name: str, pre: Tensor, code: SparseCode) -> Tensor:
        """Apply SAELens' straight-through function, with one entry per column."""
        function: Callable[..., Tensor] = getattr(sys.modules[self.library_class.__module__], name).apply
        threshold = at_entries(self.threshold, code).to(pre.dtype)
        return function(pre[None], threshold, self.bandwidth, self.cfg.jumprelu_ste_to_input)[0]

    def _losses(self: Any, step_input: Any, coded: Coded, x_hat: Tensor) -> dict[str, Tensor]:
        code, config, norm = coded.code, self.cfg, self.W_dec.norm(dim=1)
        if config.jumprelu_sparsity_loss_mode == "tanh":
            scaled = config.jumprelu_tanh_scale * code.values * at_entries(norm, code)
            penalty = torch.tanh(scaled).sum() / code.n_tokens
        else:
            active = self._by_entry("Step", coded.beside, code)
            penalty = active.sum() / code.n_tokens
            if config.jumprelu_sparsity_loss_mode == "quadratic":
                l0 = active.new_zeros(code.n_tokens).index_add(0, code.rows, active)  # ones: exact in any order
                penalty = (2 / config.target_l0 * (l0 - config.target_l0) ** 2).mean()
        losses = {"l0_loss": step_input.coefficients["l0"] * penalty}
        if config.pre_act_loss_coefficient is not None:
            dead, pre_act_loss = step_input.dead_neuron_mask, coded.sae_in.new_tensor(0.0)
            if dead is not None and dead.any():
                pre = among_dead(coded.sae_in.flatten(0, -2), coded.W, coded.b, dead)
                pre_act_loss = ((self.threshold[dead] - pre).relu() * norm[dead]).sum(dim=-1).mean()
            losses["pre_act_loss"] = config.pre_act_loss_coefficient * pre_act_loss
        return losses


@functools.cache
def _output_class() -> type:
    """TrainStepOutput that computes pre-activations only when they are read."""

    class Output(sys.modules["sae_lens.saes.sae"].TrainStepOutput):
        @property
        def hidden_pre(self) -> Any:
            return self._pre() if callable(self._pre) else self._pre

        @hidden_pre.setter
        def hidden_pre(self, value: Any) -> None:
            self._pre = value

        def __reduce__(self) -> Any:
            return Output.__base__, tuple(getattr(self, field.name) for field in fields(self))

    return Output
