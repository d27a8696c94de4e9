"""Gradients of S dictionaries' weights in a fused step: from the entries of their codes, or by dense products."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.adam import BiasGradients, Moments, Rates, adam, adam_rows, row_norms
from ...kernels.code import LatentMajor, SparseCode
from ...kernels.fp8 import Fp8Rows
from ...kernels.weight_grad import latent_sums, sort_entries


class EntryWeights(NamedTuple):
    """Fields of `EntryLoss` of the same names."""

    dvalues: Tensor
    decoder_weights: Tensor
    along: Tensor


class Contribution(NamedTuple):
    """What a code contributes to the gradients: weights for each entry, and the mask's gradient."""

    code: SparseCode
    residual: Tensor  # [S N, D] or [G N, D], that the entries of each token see
    decoder_weights: Tensor  # of the entry's residual in the gradient of W_dec
    encoder_weights: Tensor  # of its x in the gradient of W_enc
    along: Tensor  # its part of the gradient of W_dec along the latent's row; see `EntryLoss`
    dmask: Tensor | None  # [T, F]


class EntryGradient(NamedTuple):
    """The gradient of a large weight W [S F, D] as entries, never in memory. With unit rows, only the part across them
    counts. The first pass over the entries of a centred encoder fills `biases`."""

    entries: LatentMajor
    values: Tensor
    vectors: Tensor
    W: Tensor
    unit_norm: bool
    shared: dict[str, Any]  # of the passes; see `adam_rows`
    center: Tensor | None = None
    biases: BiasGradients | None = None
    along: Tensor | None = None

    def squared_norms(self) -> Tensor:
        """[S F]"""
        return row_norms(
            self.entries, self.values, self.vectors, center=self.center, W=None if self.biases is None else self.W,
            along=self.along, biases=self.biases, shared=self.shared,
        )  # fmt: skip

    def update(
        self, moments: Moments, rates: Rates, shadow: Tensor | None, fp8: Fp8Rows | None, *, is_first_pass: bool
    ) -> None:
        """Take a step of Adam."""
        adam_rows(
            self.W, self.entries, self.values, self.vectors, moments, rates, center=self.center,
            unit_norm=self.unit_norm, shadow=shadow, fp8=fp8, biases=self.biases if is_first_pass else None,
            shared=self.shared,
        )  # fmt: skip


class DenseGradient(NamedTuple):
    """The same in memory, in the products' dtype."""

    grad: Tensor
    W: Tensor
    unit_norm: bool
    biases: BiasGradients | None = None

    def squared_norms(self) -> Tensor:
        """[S F]"""
        squares = torch.linalg.vector_norm(self.grad, dim=1, dtype=torch.float32).square()
        return squares if not self.unit_norm else (squares - (self.grad * self.W).sum(1).square()).clamp_min(0)

    def update(
        self, moments: Moments, rates: Rates, shadow: Tensor | None, fp8: Fp8Rows | None, *, is_first_pass: bool
    ) -> None:
        """Take a step of Adam."""
        adam(self.W, self.grad, moments, rates, unit_norm=self.unit_norm, shadow=shadow, fp8=fp8)


class SparseGradients:
    """Gradients from the entries of all contributions, sorted by latent. The second's tokens are numbered on from the
    first's, as their residuals are."""

    def __init__(self, contributions: Sequence[Contribution], n_tokens: int):
        """`n_tokens` is N."""
        self.contributions, codes = contributions, [contribution.code for contribution in contributions]
        latents = _joined([code.live(code.indices, unused=code.n_latents) for code in codes])
        tokens = codes[0].owners
        if len(codes) > 1:
            tokens = _joined([code.rows + first for code, first in zip(codes, (0, codes[0].n_tokens), strict=True)])
        residuals = [contribution.residual for contribution in contributions]
        self._residual = torch.cat(residuals) if len(codes) > 1 else residuals[0]
        self._encoder_weights, self._decoder_weights, self._along = (
            _joined([getattr(each, name) for each in contributions])
            for name in ("encoder_weights", "decoder_weights", "along")
        )
        self.entries, *self._shared = sort_entries(
            latents, tokens, codes[0].n_latents, self._encoder_weights, self._decoder_weights, self._along,
            (n_tokens, len(self._residual)),
        )  # fmt: skip

    def by_latent(self, values: Sequence[Tensor]) -> Tensor:
        """Sum values of the entries of each contribution by latent: float32 [S F]."""
        return latent_sums(self.entries, _joined(values))

    def encoder(self, x: Tensor, center: Tensor | None, W_enc: Tensor) -> EntryGradient:
        biases = None if center is None else BiasGradients.empty(len(W_enc), center)
        return EntryGradient(self.entries, self._encoder_weights, x, W_enc, False, self._shared[0], center, biases)

    def decoder(self, W_dec: Tensor) -> EntryGradient:
        return EntryGradient(
            self.entries, self._decoder_weights, self._residual, W_dec, True, self._shared[1], along=self._along
        )


class DenseGradients:
    """Gradients from codes spread out to [S, N, F], in the products' dtype."""

    def __init__(self, contributions: Sequence[Contribution], dictionaries: int, dtype: torch.dtype):
        self.contributions, self._dictionaries, self._dtype = contributions, dictionaries, dtype

    def _spread(self, contribution: Contribution, values: Tensor) -> Tensor:
        return dense_values(contribution.code, values, self._dictionaries, self._dtype)

    def by_latent(self, values: Sequence[Tensor]) -> Tensor:
        """Sum values of the entries of each contribution by latent: float32 [S F]."""
        pairs = zip(self.contributions, values, strict=True)
        sums = [self._spread(*pair).sum(1, dtype=torch.float32) for pair in pairs]
        return torch.stack(sums).sum(0).flatten()

    def encoder(self, x: Tensor, center: Tensor | None, W_enc: Tensor) -> DenseGradient:
        s, biases = self._dictionaries, None
        if center is not None:
            db_enc = self.by_latent([contribution.encoder_weights for contribution in self.contributions])
            products = torch.bmm(db_enc.view(s, 1, -1), W_enc.view(s, -1, x.shape[1]))
            biases = BiasGradients(db_enc, products[:, 0])
        centred = x.expand(s, -1, -1) if center is None else (x - center[:, None]).to(x.dtype)
        grad = _sum_of_products([(self._spread(c, c.encoder_weights), centred) for c in self.contributions])
        return DenseGradient(grad, W_enc, False, biases)

    def decoder(self, W_dec: Tensor) -> DenseGradient:
        s = self._dictionaries
        products = [
            (self._spread(c, c.decoder_weights), c.residual.view(s, len(c.residual) // s, -1))
            for c in self.contributions
        ]
        return DenseGradient(_sum_of_products(products), W_dec, True)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate the elements."""
    return tensors[0].flatten() if len(tensors) == 1 else torch.cat([tensor.flatten() for tensor in tensors])


def dense_values(code: SparseCode, values: Tensor, dictionaries: int, dtype: torch.dtype) -> Tensor:
    """Values of a code's entries as [S, N, F]."""
    f = code.n_latents // dictionaries
    code = replace(code, values=values.to(dtype), indices=code.indices % f, n_latents=f, layouts={})
    return code.to_dense().view(dictionaries, -1, f)


def _sum_of_products(products: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """sum a^T b [S F, D], of a [S, N, F] and b [S, N, D]."""
    (a, b), *others = products
    grad = torch.bmm(a.mT, b)
    for a, b in others:
        grad.baddbmm_(a.mT, b)
    return grad.flatten(0, 1)
