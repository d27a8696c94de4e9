"""SAELens: dictionaries after training, and transcoders."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels import ops
from ...kernels.code import SparseCode
from .common import active_per_token, at_entries, bias_for_centred, decoded, dense, may_pay, pays, sparse_code
from .eligibility import takes, twice


class Coded(NamedTuple):
    """What the encoder gets, with what it multiplies and adds to it, and the code of its tokens one after the other."""

    sae_in: Tensor
    W: Tensor
    b: Tensor
    code: SparseCode
    norm: Tensor | None = None  # [F] of decoder rows, if latents count them
    beside: Any = None  # what a kind's training needs, too


def in_rows(flat: Tensor, x: Tensor) -> Tensor:
    """flat [N, M] in the leading shape of x."""
    return flat if x.ndim == 2 else flat.view(*x.shape[:-1], -1)


class Dictionary:
    """Of `self`, a SAELens dictionary: cfg, W_enc [D, F], W_dec [F, D], biases, hook points."""

    def _is_plain(self: Any, x: Any) -> bool:
        """Whether our ops compute what is asked for; x may have any dtype, since it is cast to that of the parameters."""
        if not takes(self, x) or self.dtype != self.W_enc.dtype or getattr(self, "hook_z_reshaping_mode", False):
            return False
        is_known = isinstance(self.activation_fn, nn.ReLU) or type(self.activation_fn).__name__ in ("TopK", "BatchTopK")
        return is_known and x.shape[-1] == len(self.W_enc) and not getattr(self.cfg, "use_sparse_activations", False)

    def _encoder_inputs(self: Any, x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder gets of x, and a bias for it."""
        sae_in = self.process_sae_in(x)
        if x.requires_grad or not self.cfg.apply_b_dec_to_input:
            return sae_in, b
        return sae_in.detach(), bias_for_centred(b, self.b_dec, W)

    def _acts(self: Any, coded: Coded) -> Tensor:
        return in_rows(dense(coded.code, coded.code.values, coded.sae_in.dtype), coded.sae_in)

    def _x_hat(self: Any, coded: Coded) -> Tensor:
        return self._finished(decoded(coded.code, self._values(coded), self.W_dec, self.b_dec), coded)

    def _values(self: Any, coded: Coded) -> Tensor:
        """What the decoder multiplies."""
        values = coded.code.values
        return values if coded.norm is None else values / at_entries(coded.norm, coded.code)

    def _finished(self: Any, x_hat: Tensor, coded: Coded) -> Tensor:
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(in_rows(x_hat, coded.sae_in)), self.d_head)

    def encode(self: Any, x: Tensor) -> Tensor:
        coded = self._coded(x) if self._is_plain(x) else None
        if coded is None:
            return self.library_class.encode(self, x)
        return twice(self, [self._acts(coded)], x, lambda x: [self.library_class.encode(self, x)])[0]

    def forward(self: Any, x: Tensor) -> Tensor:
        coded = self._coded(x) if self._is_plain(x) and not self.use_error_term else None
        return self.library_class.forward(self, x) if coded is None else self._finally(coded, x)

    def _finally(self: Any, coded: Coded, x: Tensor) -> Tensor:
        """x_hat, as often differentiable as the library's."""
        return twice(self, [self._x_hat(coded)], x, lambda x: [self.library_class.forward(self, x)])[0]


class TopK(Dictionary):
    """TopKSAE"""

    def _encoder(self: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """W_enc, b_enc and, where latents count the norm of their decoder row, with that in them, the norm."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            return self.W_enc, self.b_enc, None
        norm = self.W_dec.norm(dim=-1)
        return self.W_enc * norm, self.b_enc * norm, norm

    def _select(self: Any, x: Tensor, W: Tensor, b: Tensor) -> SparseCode:
        return sparse_code(ops.encode_topk, x, W, b, self.activation_fn.k)

    def _coded(self: Any, x: Tensor) -> Coded | None:
        if not pays(self.activation_fn.k, x.flatten(0, -2), self.W_enc):
            return None
        W, b, norm = self._encoder()
        sae_in, b = self._encoder_inputs(x, W, b)
        return Coded(sae_in, W, b, self._select(sae_in.flatten(0, -2), W, b), norm)

    def encode(self: Any, x: Tensor) -> Tensor:
        """On a CPU ours is faster for its gradients alone."""
        use_ops = x.is_cuda or torch.is_grad_enabled()
        return Dictionary.encode(self, x) if use_ops else self.library_class.encode(self, x)


class Standard(Dictionary):
    """StandardSAE; its encode, all of whose activations are asked for, stays its own."""

    def encode(self: Any, x: Tensor) -> Tensor:
        return self.library_class.encode(self, x)

    def _limit(self: Any) -> Tensor | None:
        return None

    def _coded(self: Any, x: Tensor) -> Coded | None:
        if not may_pay(self, x.flatten(0, -2), self.W_enc):
            return None
        sae_in, b = self._encoder_inputs(x, self.W_enc, self.b_enc)
        flat, limit = sae_in.flatten(0, -2), self._limit()
        n_active = active_per_token(self, flat, self.W_enc, b, 0.0 if limit is None else limit)
        if n_active is None:
            return None
        code = sparse_code(ops.encode_threshold, flat, self.W_enc, b, limit, expected=n_active)
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
        sae_in, b = self._encoder_inputs(x, self.W_enc, self.b_gate.detach())
        flat = sae_in.flatten(0, -2)
        n_active = active_per_token(self, flat, self.W_enc, b)
        if n_active is None:
            return None
        gates = sparse_code(ops.encode_threshold, flat, self.W_enc, b, expected=n_active)
        product = gates.values - at_entries(self.b_gate.detach(), gates)
        magnitudes = (product * at_entries(self.r_mag.exp(), gates) + at_entries(self.b_mag, gates)).relu()
        return Coded(sae_in, self.W_enc, b, gates.with_values(magnitudes), beside=gates)


class Transcoder(Standard):
    """Transcoder, and with W_skip SkipTranscoder"""

    def _finished(self: Any, x_hat: Tensor, coded: Coded) -> Tensor:
        return in_rows(x_hat, coded.sae_in)

    def _finally(self: Any, coded: Coded, x: Tensor) -> Tensor:
        y_hat = self._x_hat(coded)
        y_hat = y_hat + x @ self.W_skip.T if hasattr(self, "W_skip") else y_hat
        return twice(self, [y_hat], x, lambda x: [self.library_class.forward(self, x)])[0]

    def forward(self: Any, x: Tensor) -> Tensor:
        coded = self._coded(x) if self._is_plain(x) else None
        return self.library_class.forward(self, x) if coded is None else self._finally(coded, x)


class JumpReLUTranscoder(Transcoder):
    """JumpReLUTranscoder, and with W_skip JumpReLUSkipTranscoder"""

    def _limit(self: Any) -> Tensor | None:
        return self.threshold.detach().clamp_min(0)
