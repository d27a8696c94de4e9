"""SAELens: dictionaries after training, and transcoders."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.code import SparseCode
from .. import ops
from .common import at_entries, bias_for_centred, coded, decoded, dense, kept_of, may_pay, pays


class Coded(NamedTuple):
    """What the encoder gets, with what it multiplies and adds to it, and the code of its tokens one after the other."""

    sae_in: Tensor
    W: Tensor
    b: Tensor
    code: SparseCode
    norm: Tensor | None = None  # [F] of decoder rows, if latents count them
    beside: Any = None  # what a kind's training needs, too


class Dictionary:
    """Of `self`, a SAELens dictionary: cfg, W_enc [D, F], W_dec [F, D], biases, hook points."""

    def _is_plain(self: Any) -> bool:
        """Whether nobody looks at, or into, what our ops never make or make otherwise."""
        points = (self.hook_sae_input, self.hook_sae_acts_pre, self.hook_sae_acts_post)
        if any(point._forward_hooks or point._backward_hooks for point in points):
            return False
        known = isinstance(self.activation_fn, nn.ReLU) or type(self.activation_fn).__name__ in ("TopK", "BatchTopK")
        return known and not getattr(self.cfg, "use_sparse_activations", False)

    def _given(self: Any, x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder gets of x, and a bias for it."""
        sae_in = self.process_sae_in(x)
        if x.requires_grad or not self.cfg.apply_b_dec_to_input:
            return sae_in, b
        return sae_in.detach(), bias_for_centred(b, self.b_dec, W)

    def _acts(self: Any, coded: Coded) -> Tensor:
        found = dense(coded.code, coded.code.values, coded.sae_in.dtype)
        return found.view(*coded.sae_in.shape[:-1], -1)

    def _x_hat(self: Any, coded: Coded) -> Tensor:
        return self._finished(decoded(coded.code, self._values(coded), self.W_dec, self.b_dec), coded)

    def _values(self: Any, coded: Coded) -> Tensor:
        """What the decoder multiplies."""
        values = coded.code.values
        return values if coded.norm is None else values / at_entries(coded.norm, coded.code)

    def _finished(self: Any, x_hat: Tensor, coded: Coded) -> Tensor:
        x_hat = self.hook_sae_recons(x_hat.view(*coded.sae_in.shape[:-1], -1))
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(x_hat), self.d_head)

    def encode(self: Any, x: Tensor) -> Tensor:
        coded = self._coded(x) if self._is_plain() else None
        return self.own.encode(self, x) if coded is None else self._acts(coded)

    def forward(self: Any, x: Tensor) -> Tensor:
        coded = self._coded(x) if self._is_plain() and not self.use_error_term else None
        if coded is None:
            return self.own.forward(self, x)
        return self.hook_sae_output(self._x_hat(coded))


class TopK(Dictionary):
    """TopKSAE"""

    def _encoder(self: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """W_enc, b_enc and, where latents count the norm of their decoder row, with that in them, the norm."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            return self.W_enc, self.b_enc, None
        norm = self.W_dec.norm(dim=-1)
        return self.W_enc * norm, self.b_enc * norm, norm

    def _select(self: Any, x: Tensor, W: Tensor, b: Tensor) -> SparseCode:
        return coded(ops.encode_topk, x, W, b, self.activation_fn.k)

    def _coded(self: Any, x: Tensor) -> Coded | None:
        if not pays(self.activation_fn.k, x.flatten(0, -2), self.W_enc):
            return None
        W, b, norm = self._encoder()
        sae_in, b = self._given(x, W, b)
        return Coded(sae_in, W, b, self._select(sae_in.flatten(0, -2), W, b), norm)

    def encode(self: Any, x: Tensor) -> Tensor:
        """On a CPU ours is faster for its gradients alone."""
        ours = x.is_cuda or torch.is_grad_enabled()
        return Dictionary.encode(self, x) if ours else self.own.encode(self, x)


class Standard(Dictionary):
    """StandardSAE; its encode, all of whose activations are asked for, stays its own."""

    def encode(self: Any, x: Tensor) -> Tensor:
        return self.own.encode(self, x)

    def _limit(self: Any) -> Tensor | None:
        return None

    def _coded(self: Any, x: Tensor) -> Coded | None:
        if not may_pay(self, x.flatten(0, -2), self.W_enc):
            return None
        sae_in, b = self._given(x, self.W_enc, self.b_enc)
        flat, limit = sae_in.flatten(0, -2), self._limit()
        kept = kept_of(self, flat, self.W_enc, b, 0.0 if limit is None else limit)
        if kept is None:
            return None
        code = coded(ops.encode_threshold, flat, self.W_enc, b, limit, expected=kept)
        return Coded(sae_in, self.W_enc, b, code)


class JumpReLU(Standard):
    """JumpReLUSAE: the threshold only decides, and has no gradient."""

    def _limit(self: Any) -> Tensor | None:
        return self.threshold.detach().clamp_min(0)


class Gated(Dictionary):
    """GatedSAE. On entries with an open gate x W_enc is known, and with it their magnitude: one product instead of two."""

    def _coded(self: Any, x: Tensor) -> Coded | None:
        """Beside it, the gates: x @ W_enc + b_gate where that is above 0, with b_gate as a constant."""
        if not may_pay(self, x.flatten(0, -2), self.W_enc):
            return None
        sae_in, b = self._given(x, self.W_enc, self.b_gate.detach())
        flat = sae_in.flatten(0, -2)
        kept = kept_of(self, flat, self.W_enc, b)
        if kept is None:
            return None
        gates = coded(ops.encode_threshold, flat, self.W_enc, b, expected=kept)
        product = gates.values - at_entries(self.b_gate.detach(), gates)
        magnitudes = (product * at_entries(self.r_mag.exp(), gates) + at_entries(self.b_mag, gates)).relu()
        return Coded(sae_in, self.W_enc, b, gates.with_values(magnitudes), beside=gates)


class Transcoder(Standard):
    """Transcoder, and with W_skip SkipTranscoder"""

    def _finished(self: Any, x_hat: Tensor, coded: Coded) -> Tensor:
        return self.hook_sae_recons(x_hat.view(*coded.sae_in.shape[:-1], -1))

    def forward(self: Any, x: Tensor) -> Tensor:
        coded = self._coded(x) if self._is_plain() else None
        if coded is None:
            return self.own.forward(self, x)
        y_hat = self._x_hat(coded)
        return y_hat + x @ self.W_skip.T.to(x.device) if hasattr(self, "W_skip") else y_hat


class JumpReLUTranscoder(Transcoder):
    """JumpReLUTranscoder, and with W_skip JumpReLUSkipTranscoder"""

    def _limit(self: Any) -> Tensor | None:
        return self.threshold.detach().clamp_min(0)
