"""dictionary_learning: its dictionaries."""

from typing import Any

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.code import SparseCode
from .common import (
    active_per_token,
    at_entries,
    bias_for_centred,
    decoded,
    dense,
    may_pay,
    pays,
    product_dtype,
    sparse_code,
)
from .eligibility import fits, takes, twice


class Dictionary:
    """Of `self`: how each kind names its parameters, in our terms; what is encoded is x - b_dec, or x where that is None."""

    def _encoder(self: Any) -> tuple[Tensor, Tensor]:
        """W_enc [D, F] and b_enc."""
        return self.encoder.weight.T, self.encoder.bias

    def _decoder(self: Any) -> tuple[Tensor, Tensor]:
        """W_dec [F, D] and b_dec."""
        return self.decoder.weight.T, self.b_dec

    def _center(self: Any) -> Tensor | None:
        return self.b_dec

    def _acts_dtype(self: Any) -> torch.dtype:
        """Of activations: with nn.Linear, autocast's, else the parameters'."""
        return product_dtype(self._encoder()[0])

    def _is_plain(self: Any, x: Any) -> bool:
        """Whether our ops compute what is asked for."""
        if not takes(self, x):
            return False
        W, _ = self._encoder()
        return x.ndim == 2 and x.shape[1] == len(W) and fits(x, W, self._center() is not None)

    def _encoder_inputs(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the encoder multiplies with what, and adds."""
        (W, b), center = self._encoder(), self._center()
        if center is None:
            return x, W, b
        return x - center.detach(), W, bias_for_centred(b, center, W)

    def _encode_above(self: Any, x: Tensor, limit: Tensor | None) -> SparseCode | None:
        """The code of activations above a limit [F] that isn't negative, or above 0; None if products are faster dense."""
        if not may_pay(self, x, self._encoder()[0]):
            return None
        x, W, b = self._encoder_inputs(x)
        n_active = active_per_token(self, x, W, b, 0.0 if limit is None else limit)
        return None if n_active is None else sparse_code(ops.encode_threshold, x, W, b, limit, expected=n_active)

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
        """Dense activations, as often differentiable as the library's, whose `encode` has these settings."""
        return twice(self, [self._acts(x, code)], x, lambda x: [self.library_class.encode(self, x, *settings)])[0]


class TopK(Dictionary):
    """AutoEncoderTopK"""

    def _encode_sparse(self: Any, x: Tensor) -> SparseCode | None:
        k = int(self.k)
        return sparse_code(ops.encode_topk, *self._encoder_inputs(x), k) if pays(k, x, self._encoder()[0]) else None

    def encode(self: Any, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        use_ops = not (return_topk or use_threshold) and (
            x.is_cuda or torch.is_grad_enabled()
        )  # else theirs is as fast
        code = self._encode_sparse(x) if use_ops and self._is_plain(x) else None
        return (
            self.library_class.encode(self, x, return_topk, use_threshold) if code is None else self._encoded(x, code)
        )


class BatchTopK(Dictionary):
    """BatchTopKSAE: after training, what is above its threshold."""

    def _encode_sparse(self: Any, x: Tensor) -> SparseCode | None:
        """None as long as no threshold was followed: half of all latents are above a negative one."""
        return self._encode_above(x, self.threshold.expand(self.dict_size)) if self.threshold > 0 else None

    def _encode_batch(self: Any, x: Tensor) -> SparseCode | None:
        k = int(self.k)
        return (
            sparse_code(ops.encode_batch_topk, *self._encoder_inputs(x), k) if pays(k, x, self._encoder()[0]) else None
        )

    def encode(self: Any, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        needs_library = return_active or use_threshold
        code = self._encode_batch(x) if not needs_library and self._is_plain(x) else None
        if code is None:
            return self.library_class.encode(self, x, return_active, use_threshold)
        return self._encoded(x, code, return_active, use_threshold)


class _Matrices(Dictionary):
    """Kinds with W_enc, W_dec and biases of our names."""

    def _encoder(self: Any) -> tuple[Tensor, Tensor]:
        return self.W_enc, self.b_enc

    def _decoder(self: Any) -> tuple[Tensor, Tensor]:
        return self.W_dec, self.b_dec

    def _acts_dtype(self: Any) -> torch.dtype:
        return torch.promote_types(product_dtype(self.b_enc), self.b_enc.dtype)


class Matryoshka(_Matrices, BatchTopK):
    """MatryoshkaBatchTopKSAE with all groups active"""

    def _is_plain(self: Any, x: Any) -> bool:
        return Dictionary._is_plain(self, x) and self.active_groups == len(self.group_sizes)


class JumpReLU(_Matrices):
    """JumpReluAutoEncoder: the threshold only decides, and has no gradient."""

    def _center(self: Any) -> Tensor | None:
        return self.b_dec if self.apply_b_dec_to_input else None

    def _encode_sparse(self: Any, x: Tensor) -> SparseCode | None:
        return self._encode_above(x, self.threshold.detach().clamp_min(0))


class Standard(Dictionary):
    """AutoEncoder"""

    def _decoder(self: Any) -> tuple[Tensor, Tensor]:
        return self.decoder.weight.T, self.bias

    def _center(self: Any) -> Tensor | None:
        return self.bias

    def _encode_sparse(self: Any, x: Tensor) -> SparseCode | None:
        return self._encode_above(x, None)


class Gated(Dictionary):
    """GatedAutoEncoder. On entries with an open gate x W_enc is known, and with it their magnitude."""

    def _encoder(self: Any) -> tuple[Tensor, Tensor]:
        return self.encoder.weight.T, self.gate_bias.detach()

    def _decoder(self: Any) -> tuple[Tensor, Tensor]:
        return self.decoder.weight.T, self.decoder_bias

    def _center(self: Any) -> Tensor | None:
        return self.decoder_bias

    def _acts_dtype(self: Any) -> torch.dtype:
        return torch.promote_types(product_dtype(self.mag_bias), self.mag_bias.dtype)

    def _gates(self: Any, x: Tensor) -> SparseCode | None:
        """Gate activations, with gate_bias as a constant."""
        return self._encode_above(x, None)

    def _magnitudes(self: Any, gates: SparseCode) -> SparseCode:
        product = gates.values - at_entries(self.gate_bias.detach(), gates)
        values = product * at_entries(self.r_mag.exp(), gates) + at_entries(self.mag_bias, gates)
        return gates.with_values(values.relu())

    def _encode_sparse(self: Any, x: Tensor) -> SparseCode | None:
        gates = self._gates(x)
        return None if gates is None else self._magnitudes(gates)
