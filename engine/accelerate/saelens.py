"""Inference dictionaries and transcoders of SAELens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels import ops
from ...kernels.code import SparseCode
from .common import at_entries, bias_for_centred, code_above, decoded, dense, magnitudes, may_pay, pays, sparse_code
from .eligibility import takes, twice


class Coded(NamedTuple):
    """The encoder's input, weights and bias, and the code of its flattened tokens."""

    sae_in: Tensor
    W: Tensor
    b: Tensor
    code: SparseCode
    norm: Tensor | None = None  # [F] of decoder rows, if they scale the activations
    beside: Any = None  # further values for a kind's training


def in_rows(flat: Tensor, x: Tensor) -> Tensor:
    """flat [N, M] reshaped to the leading dimensions of x."""
    return flat if x.ndim == 2 else flat.view(*x.shape[:-1], -1)


class Dictionary:
    """Mixin of all SAELens dictionaries. W_enc is [D, F], W_dec [F, D]."""

    def _is_plain(self: Any, x: Any) -> bool:
        """Whether our ops give the same results as the library. x may have any dtype, and is cast to the parameters'."""
        if not takes(self, x) or self.dtype != self.W_enc.dtype or getattr(self, "hook_z_reshaping_mode", False):
            return False
        is_known = isinstance(self.activation_fn, nn.ReLU) or type(self.activation_fn).__name__ in ("TopK", "BatchTopK")
        return is_known and x.shape[-1] == len(self.W_enc) and not getattr(self.cfg, "use_sparse_activations", False)

    def _encoder_inputs(self: Any, x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        sae_in = self.process_sae_in(x)
        if x.requires_grad or not self.cfg.apply_b_dec_to_input:
            return sae_in, b
        return sae_in.detach(), bias_for_centred(b, self.b_dec, W)

    def _coded_above(self: Any, x: Tensor, b: Tensor, limit: Tensor | None = None, shift: float = 0.0) -> Coded | None:
        """x coded by its pre-activations + shift above a limit [F] or above 0. None if dense products are faster."""
        if not may_pay(self, x.flatten(0, -2), self.W_enc):
            return None
        sae_in, b = self._encoder_inputs(x, self.W_enc, b)
        code = code_above(self, sae_in.flatten(0, -2), self.W_enc, b + shift if shift else b, limit)
        return None if code is None else Coded(sae_in, self.W_enc, b, code)

    def _acts(self: Any, coded: Coded) -> Tensor:
        return in_rows(dense(coded.code, coded.code.values, coded.sae_in.dtype), coded.sae_in)

    def _x_hat(self: Any, coded: Coded) -> Tensor:
        return self._finished(decoded(coded.code, self._values(coded), self.W_dec, self.b_dec), coded)

    def _values(self: Any, coded: Coded) -> Tensor:
        """The values that the decoder multiplies."""
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
        coded = self._coded(x) if self._is_plain(x) and not getattr(self, "use_error_term", False) else None
        if coded is None:
            return self.library_class.forward(self, x)
        return twice(self, [self._output(coded, x)], x, lambda x: [self.library_class.forward(self, x)])[0]

    def _output(self: Any, coded: Coded, x: Tensor) -> Tensor:
        return self._x_hat(coded)


class TopKSAE(Dictionary):
    def _encoder(self: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """W_enc, b_enc and None or, if activations are rescaled by decoder norms, both times the norms, and the norms."""
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
        """On a CPU our ops are faster only with gradients."""
        use_ops = x.is_cuda or torch.is_grad_enabled()
        return Dictionary.encode(self, x) if use_ops else self.library_class.encode(self, x)


class StandardSAE(Dictionary):
    """`encode` is left to the library, because it returns all activations. JumpReLU's threshold gets no gradient."""

    def encode(self: Any, x: Tensor) -> Tensor:
        return self.library_class.encode(self, x)

    def _coded(self: Any, x: Tensor) -> Coded | None:
        limit = self.threshold.detach().clamp_min(0) if hasattr(self, "threshold") else None
        return self._coded_above(x, self.b_enc, limit)


class GatedSAE(Dictionary):
    """Magnitudes are computed from the gates at entries with an open gate: one product instead of two."""

    def _coded(self: Any, x: Tensor) -> Coded | None:
        """`beside` holds the gates, x @ W_enc + b_gate above 0, without a gradient for b_gate."""
        gates = self._coded_above(x, self.b_gate.detach())
        if gates is None:
            return None
        code = magnitudes(gates.code, self.b_gate, self.r_mag, self.b_mag)
        return gates._replace(code=code, beside=gates.code)


class Transcoder(StandardSAE):
    """A skip transcoder has W_skip."""

    def _finished(self: Any, x_hat: Tensor, coded: Coded) -> Tensor:
        return in_rows(x_hat, coded.sae_in)

    def _output(self: Any, coded: Coded, x: Tensor) -> Tensor:
        y_hat = self._x_hat(coded)
        return y_hat + x @ self.W_skip.T if hasattr(self, "W_skip") else y_hat


JumpReLUSAE = StandardSAE
SkipTranscoder = JumpReLUTranscoder = JumpReLUSkipTranscoder = Transcoder
