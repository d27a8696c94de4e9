"""A dictionary read with decoder rows of norm 1, so that what is measured of it does not depend on how it is written.

With s_j = |W_dec_j| (1 for a row of zeros), the same function has latents f_j s_j and decoder rows W_dec_j / s_j:

    x_hat = sum_j f_j W_dec_j + b_dec = sum_j (f_j s_j) (W_dec_j / s_j) + b_dec

relu and jumprelu commute with s_j > 0, so there W_enc, b_enc and thresholds could be multiplied instead. Top-k does not: it
compares latents with each other, and so do the parts of a composed dictionary. The factor therefore goes onto the latents
that the dictionary has selected, which is exact for every activation. SAEBench 0.6.0 reads dictionaries in this form, too.
"""

import torch
from torch import Tensor, nn

from ..kernels.code import SparseCode
from .config import SAEConfig
from .sae import SparseAutoencoder

ROUNDING = 1e-5  # of norms: rows that are this near to 1 are taken as they are


class UnitDecoder(nn.Module):
    """The dictionary `sae` with rows of W_dec [F, d_out] of norm 1 and latents f_j |W_dec_j|. Nothing here has gradients.

    The encoder's selection is that of `sae`. A dictionary whose rows have norm 1 already, to `ROUNDING`, is passed through:
    same bits, no copy of W_dec. W_enc and b_enc are multiplied by the norms, for figures about weights.
    """

    scale: Tensor | None
    _W_dec: Tensor | None

    def __init__(self, sae: SparseAutoencoder):
        super().__init__()
        self.sae = sae
        W_dec = sae.W_dec.detach()
        norm = W_dec.norm(dim=1)
        norm = torch.where(norm > 0, norm, 1)
        is_unit = bool(((norm - 1).abs() <= ROUNDING).all())
        self.register_buffer("scale", None if is_unit else norm, persistent=False)
        self.register_buffer("_W_dec", None if is_unit else W_dec / norm[:, None], persistent=False)

    @property
    def cfg(self) -> SAEConfig:
        return self.sae.cfg

    @property
    def device(self) -> torch.device:
        return self.sae.device

    @property
    def looks_along_rows(self) -> bool:
        return self.sae.looks_along_rows

    @property
    def W_enc(self) -> Tensor:
        """[D, F]"""
        W_enc = self.sae.W_enc.detach()
        return W_enc if self.scale is None else W_enc * self.scale

    @property
    def b_enc(self) -> Tensor:
        b_enc = self.sae.b_enc.detach()
        return b_enc if self.scale is None else b_enc * self.scale

    @property
    def W_dec(self) -> Tensor:
        """[F, d_out], rows of norm 1; of norm 0 where a latent has no direction"""
        return self.sae.W_dec.detach() if self._W_dec is None else self._W_dec

    @property
    def b_dec(self) -> Tensor:
        return self.sae.b_dec.detach()

    @torch.no_grad()
    def encode_sparse(self, x: Tensor, pos: Tensor | None = None) -> SparseCode:
        """The latents of x [..., D] at positions pos [...], over the flattened tokens."""
        code = self.sae.encode_sparse(x, pos)
        return (
            code if self.scale is None else code.with_values(code.values * self._scale_of(code).to(code.values.dtype))
        )

    @torch.no_grad()
    def encode(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """f [..., F], in the dtype of x."""
        f = self.sae.encode(x, pos)
        return f if self.scale is None else f * self.scale.to(f.dtype)

    @torch.no_grad()
    def decode(self, f: Tensor | SparseCode) -> Tensor:
        """x_hat: [..., d_out] from dense f, [N, d_out] from a SparseCode."""
        if self.scale is None:
            return self.sae.decode(f)
        if isinstance(f, SparseCode):
            return self.sae.decode(f.with_values(f.values / self._scale_of(f).to(f.values.dtype)))
        return self.sae.decode(f / self.scale.to(f.dtype))

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """x_hat [..., d_out], as that of `sae`."""
        return self.decode(self.encode(x, pos))

    def _scale_of(self, code: SparseCode) -> Tensor:
        """The factor of each entry."""
        assert self.scale is not None
        return self.scale[code.live(code.indices).long()]


Dictionary = SparseAutoencoder | UnitDecoder


def unit_decoder(sae: Dictionary) -> UnitDecoder:
    """`sae` read with decoder rows of norm 1; one that is read so already is returned as it is."""
    return sae if isinstance(sae, UnitDecoder) else UnitDecoder(sae)
