"""Read a dictionary with decoder rows of norm 1, so that measurements do not depend on the scale of its latents."""

import torch
from torch import Tensor, nn

from ..kernels.code import SparseCode
from .config import SAEConfig
from .sae import SparseAutoencoder

ROUNDING = 1e-5  # norms this close to 1 count as 1


class UnitDecoder(nn.Module):
    """The function of `sae`, with rows of W_dec [F, d_out] of norm 1 and without gradients.

        x_hat = sum_j f_j W_dec_j + b_dec = sum_j (f_j s_j) (W_dec_j / s_j) + b_dec     s_j = |W_dec_j|, 1 for zeros

    Latents are scaled after selection, because top-k and parts compare them with each other. W_enc and b_enc are scaled
    by s, for statistics of weights. If rows already have norm 1 (within `ROUNDING`), results have the same bits and
    W_dec is not copied. SAEBench 0.6.0 uses the same form.
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
        """[F, d_out], with rows of norm 1, or 0 if the row is zero"""
        return self.sae.W_dec.detach() if self._W_dec is None else self._W_dec

    @property
    def b_dec(self) -> Tensor:
        return self.sae.b_dec.detach()

    @torch.no_grad()
    def encode_sparse(self, x: Tensor, pos: Tensor | None = None) -> SparseCode:
        """Encode x [..., D] at positions pos [...] as a code over the flattened tokens."""
        code = self.sae.encode_sparse(x, pos)
        return code if self.scale is None else code.with_values(code.values * self._scale_of(code))

    @torch.no_grad()
    def encode(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """Return f [..., F], in the dtype of x."""
        f = self.sae.encode(x, pos)
        return f if self.scale is None else f * self.scale.to(f.dtype)

    @torch.no_grad()
    def decode(self, f: Tensor | SparseCode) -> Tensor:
        """Return x_hat: [..., d_out] from dense f, [N, d_out] from a SparseCode."""
        if self.scale is None:
            return self.sae.decode(f)
        if isinstance(f, SparseCode):
            return self.sae.decode(f.with_values(f.values / self._scale_of(f)))
        return self.sae.decode(f / self.scale.to(f.dtype))

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return self.decode(self.encode(x, pos))

    def _scale_of(self, code: SparseCode) -> Tensor:
        assert self.scale is not None
        return self.scale[code.live(code.indices).long()].to(code.values.dtype)


Dictionary = SparseAutoencoder | UnitDecoder


def unit_decoder(sae: Dictionary) -> UnitDecoder:
    """Wrap `sae` in a `UnitDecoder` unless it is one."""
    return sae if isinstance(sae, UnitDecoder) else UnitDecoder(sae)
