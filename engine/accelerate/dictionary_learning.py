"""Dictionaries of dictionary_learning."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.code import SparseCode
from .common import bias_for_centred, code_above, decoded, dense, magnitudes, may_pay, pays, product_dtype, sparse_code
from .eligibility import fits, takes, twice


class Dictionary:
    """Mixin of all kinds. `_encoder`, `_decoder` and `_center` return a kind's parameters under our names."""

    def _encoder(self: Any) -> tuple[Tensor, Tensor]:
        """W_enc [D, F] and b_enc."""
        return self.encoder.weight.T, self.encoder.bias

    def _decoder(self: Any) -> tuple[Tensor, Tensor]:
        """W_dec [F, D] and b_dec."""
        return self.decoder.weight.T, self.b_dec

    def _center(self: Any) -> Tensor | None:
        """The bias that is subtracted from x, if any."""
        return self._decoder()[1]

    def _acts_dtype(self: Any) -> torch.dtype:
        """The dtype of activations. nn.Linear uses autocast's."""
        return product_dtype(self._encoder()[0])

    def _is_plain(self: Any, x: Any) -> bool:
        """Whether our ops give the same results as the library for x."""
        if not takes(self, x):
            return False
        W, _ = self._encoder()
        return x.ndim == 2 and x.shape[1] == len(W) and fits(x, W, self._center() is not None)

    def _encoder_inputs(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (W, b), center = self._encoder(), self._center()
        if center is None:
            return x, W, b
        return x - center.detach(), W, bias_for_centred(b, center, W)

    def _encode_k(self: Any, encoder: Callable[..., Any], x: Tensor) -> SparseCode | None:
        """The code of the k largest activations per token. None if dense products are faster."""
        k = int(self.k)
        return sparse_code(encoder, *self._encoder_inputs(x), k) if pays(k, x, self._encoder()[0]) else None

    def _encode_above(self: Any, x: Tensor, limit: Tensor | None) -> SparseCode | None:
        """The code of activations above a nonnegative limit [F] or above 0. None if dense products are faster."""
        if not may_pay(self, x, self._encoder()[0]):
            return None
        x, W, b = self._encoder_inputs(x)
        return code_above(self, x, W, b, limit)

    def _decoded(self: Any, code: SparseCode) -> Tensor:
        return decoded(code, code.values, *self._decoder())

    def _acts(self: Any, x: Tensor, code: SparseCode) -> Tensor:
        return dense(code, code.values, self._acts_dtype())

    def forward(self: Any, x: Tensor, output_features: bool = False, *args: Any, **kwargs: Any) -> Any:
        code = self._encode_sparse(x) if not args and not kwargs and self._is_plain(x) else None
        if code is None:
            return self.library_class.forward(self, x, output_features, *args, **kwargs)
        outputs = [self._decoded(code), *([self._acts(x, code)] if output_features else [])]
        outputs = twice(self, outputs, x, lambda x: self.library_class.forward(self, x, True))
        return tuple(outputs) if output_features else outputs[0]

    def _encoded(self: Any, x: Tensor, code: SparseCode, *settings: Any) -> Tensor:
        """Dense activations, which can be differentiated twice. `settings` are further arguments of the library's encode."""
        return twice(self, [self._acts(x, code)], x, lambda x: [self.library_class.encode(self, x, *settings)])[0]


class AutoEncoderTopK(Dictionary):
    def _encode_sparse(self: Any, x: Tensor) -> SparseCode | None:
        return self._encode_k(ops.encode_topk, x)

    _encode_in_training = _encode_sparse

    def encode(self: Any, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        is_faster = x.is_cuda or torch.is_grad_enabled()
        use_ops = is_faster and not return_topk and not use_threshold and self._is_plain(x)
        code = self._encode_sparse(x) if use_ops else None
        if code is None:
            return self.library_class.encode(self, x, return_topk, use_threshold)
        return self._encoded(x, code)


class BatchTopKSAE(Dictionary):
    """After training, activations above the threshold are kept."""

    def _encode_sparse(self: Any, x: Tensor) -> SparseCode | None:
        """None until the threshold has been updated: half of all latents are above a negative one."""
        return self._encode_above(x, self.threshold.expand(self.dict_size)) if self.threshold > 0 else None

    def _encode_in_training(self: Any, x: Tensor) -> SparseCode | None:
        return self._encode_k(ops.encode_batch_topk, x)

    def encode(self: Any, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        use_ops = not return_active and not use_threshold and self._is_plain(x)
        code = self._encode_in_training(x) if use_ops else None
        if code is None:
            return self.library_class.encode(self, x, return_active, use_threshold)
        return self._encoded(x, code, return_active, use_threshold)


class _Matrices(Dictionary):
    """Kinds whose parameters are named W_enc, b_enc, W_dec and b_dec."""

    def _encoder(self: Any) -> tuple[Tensor, Tensor]:
        return self.W_enc, self.b_enc

    def _decoder(self: Any) -> tuple[Tensor, Tensor]:
        return self.W_dec, self.b_dec

    def _acts_dtype(self: Any) -> torch.dtype:
        return torch.promote_types(product_dtype(self.b_enc), self.b_enc.dtype)


class MatryoshkaBatchTopKSAE(_Matrices, BatchTopKSAE):
    """All groups must be active."""

    def _is_plain(self: Any, x: Any) -> bool:
        return Dictionary._is_plain(self, x) and self.active_groups == len(self.group_sizes)


class JumpReluAutoEncoder(_Matrices):
    """The threshold gets no gradient."""

    def _center(self: Any) -> Tensor | None:
        return self.b_dec if self.apply_b_dec_to_input else None

    def _encode_sparse(self: Any, x: Tensor) -> SparseCode | None:
        return self._encode_above(x, self.threshold.detach().clamp_min(0))


class AutoEncoder(Dictionary):
    def _decoder(self: Any) -> tuple[Tensor, Tensor]:
        return self.decoder.weight.T, self.bias

    def _encode_sparse(self: Any, x: Tensor) -> SparseCode | None:
        return self._encode_above(x, None)


class GatedAutoEncoder(Dictionary):
    """Magnitudes are computed from the gates, at entries with an open gate only. Gates have no gradient for gate_bias."""

    def _encoder(self: Any) -> tuple[Tensor, Tensor]:
        return self.encoder.weight.T, self.gate_bias.detach()

    def _decoder(self: Any) -> tuple[Tensor, Tensor]:
        return self.decoder.weight.T, self.decoder_bias

    def _acts_dtype(self: Any) -> torch.dtype:
        return torch.promote_types(product_dtype(self.mag_bias), self.mag_bias.dtype)

    def _magnitudes(self: Any, gates: SparseCode) -> SparseCode:
        return magnitudes(gates, self.gate_bias, self.r_mag, self.mag_bias)

    def _encode_sparse(self: Any, x: Tensor) -> SparseCode | None:
        gates = self._encode_above(x, None)
        return None if gates is None else self._magnitudes(gates)
