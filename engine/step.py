"""A training step straight through the kernels: what autograd, clipping and Adam do to a dictionary, with the gradients of
its two large weights never in memory."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from ..kernels.adam import Moments, Rates, adam, adam_rows, row_norms
from ..kernels.backend import choose
from ..kernels.code import LatentMajor, SparseCode
from ..kernels.decode import decode, decode_values_grad, reconstruct
from ..kernels.encode_sparse import encode_threshold, encode_topk
from ..kernels.loss import position_loss
from ..kernels.masks import Mask
from ..kernels.weight_grad import weight_grad
from .config import TrainConfig
from .functions import Band, gate_of, jumprelu_band, mask_gradient, matryoshka_residuals
from .sae import Objective, SparseAutoencoder, has_fired

# Of all latents, the share in use on a token from which on dense products take less time than gathers: 5 products of 2 D F
# FLOP at 660 TFLOP/s against 4 gathers of 2 D bytes for each latent in use at 5.5 TB/s (an H100; its rates as in
# bench/floors.py).
DENSE_FROM = 1 / 96
LARGE = ("W_dec", "W_enc")  # the weights whose moments `TrainConfig.moments` narrows


def rounding_seed(name: str, step: int) -> int:
    """`Rates.seed` for the large weight `name` at a step. Multiples of 2^32 by the golden ratio keep their distance: about
    2^30 / F steps go by before a row has the random bits that some row had before, and that would do no harm."""
    nth = (len(LARGE) * step + LARGE.index(name)) * 0x9E3779B9
    return (nth + 2**31) % 2**32 - 2**31


def fits(sae: SparseAutoencoder) -> bool:
    """Whether the kernels of `FusedStep` run here."""
    return choose("train_step", sae.W_enc) == "triton"


class Decoded(NamedTuple):
    """A code decoded. Of a Matryoshka dictionary with G prefixes, the code is parted: its token g * N + n owns what token n
    has in group g."""

    code: SparseCode
    rows: Tensor | None  # of the mask, for each of the code's tokens
    loss: Tensor
    squared_error: Tensor  # [N]
    residual: Tensor  # [N, D]
    of_entries: Tensor  # [N, D] or [G N, D]: the residual that the entries of each of the code's tokens see
    projection: Tensor  # of that on the entries' rows of W_dec


class Part(NamedTuple):
    """What a code contributes to the gradients: a weight for each entry, flattened, and the mask's gradient [T, F]."""

    of_row: Tensor  # of the entry's residual, in the gradient of W_dec
    of_x: Tensor  # of its x, in the gradient of W_enc
    dmask: Tensor | None


class FusedStep:
    """Updates a dictionary in place, as `sae.objective`, backward, `project_decoder_gradient`, clip_grad_norm_, Adam and
    `constrain` do one after the other, within rounding. Waits for the device only to know how many latents of a relu or
    jumprelu dictionary are active.

    `moments` are Adam's, by parameter; that of W_enc is [F, D]. `paces` are factors on the learning rate. With products in
    bfloat16, a bfloat16 copy of each large weight is kept beside the float32 one; `refresh` makes it anew after the weights
    were changed from outside.
    """

    def __init__(
        self, sae: SparseAutoencoder, moments: dict[str, Moments], paces: dict[str, float],
        config: TrainConfig, dtype: torch.dtype,
    ):  # fmt: skip
        self.sae, self.moments, self.paces, self.config, self.dtype = sae, moments, paces, config, dtype
        device = sae.b_dec.device
        self._shadows = {}
        if dtype != torch.float32:
            self._shadows = {w: torch.empty_like(w, dtype=dtype) for w in (sae.W_enc, sae.W_dec)}
        self.ends = None if sae.cfg.prefixes is None else torch.tensor(sae.cfg.prefixes, device=device)
        self._rates = [torch.zeros((), device=device) for _ in range(3)]
        rounded = LARGE if config.moments != "float32" else ()
        self._seeds = {name: torch.zeros((), dtype=torch.int32, device=device) for name in rounded}
        self.refresh()

    def refresh(self) -> None:
        for weight, shadow in self._shadows.items():
            shadow.copy_(weight.detach())

    @torch.no_grad()
    def __call__(
        self, x: Tensor, pos: Tensor, n_positions: int, dead: Tensor | None, expected: int, *, lr: float, step: int
    ) -> tuple[Objective, Tensor]:
        """One step, the `step`-th, on x [N, D] at pos [N]; other arguments as in `sae.objective`, and `expected` as in
        `encode_threshold`. Gives the objective before it, and the norm of the gradient before clipping."""
        self.set_rates(lr, step)
        return self.run(x, pos, n_positions, dead, expected)

    def set_rates(self, lr: float, step: int) -> None:
        """What changes from step to step besides the data, written where the kernels read it."""
        step_size, correction, _ = self._rates
        step_size.fill_(lr / (1 - self.config.beta1**step))
        correction.fill_((1 - self.config.beta2**step) ** 0.5)
        for name, seed in self._seeds.items():
            seed.fill_(rounding_seed(name, step))

    @torch.no_grad()
    def run(
        self, x: Tensor, pos: Tensor, n_positions: int, dead: Tensor | None, expected: int = 64
    ) -> tuple[Objective, Tensor]:
        """The step itself. For topk and batchtopk nothing in it depends on the host, so that a CUDA graph can hold it."""
        sae, n = self.sae, len(x)
        if sae.mask.fixed is not None:
            # Tokens side by side are then at few positions, and tiles that a mask over ranges empties are left out.
            pos, order = pos.sort(stable=True)
            x = x[order]
        x, rows, mask = sae.inputs(x, pos)
        W_enc, W_dec = (self._shadows.get(w, w).detach() for w in (sae.W_enc, sae.W_dec))
        with record_function("temposae::encode"):
            code, aux, band = self._encode(x, W_enc, mask, rows, dead, expected)
        with record_function("temposae::decode"):
            found = self._decode(code, W_dec, x, rows)
        with record_function("temposae::loss"):
            sums = position_loss(found.squared_error, code, pos, n_positions)
            loss, aux_loss, scale, penalty = found.loss, None, -2 / n, 0.0
            if sae.cfg.activation == "relu":
                penalty = sae.cfg.l1_coefficient / n
                loss = loss + penalty * sums.l1.sum()
            elif band is not None:
                penalty = sae.cfg.l0_coefficient * sae.cfg.d_in / n
                loss = loss + penalty * band.is_open.sum()
        residuals, codes = found.of_entries, [found.code]
        parts = [self._part(found.code, scale, found.projection, mask, found.rows, 0.0 if band else penalty, band)]
        if aux is not None:
            with record_function("temposae::aux"):
                left = reconstruct(aux, W_dec, torch.zeros_like(sae.b_dec), found.residual)
                weight = sae.aux_weight(x, found.residual)
                aux_loss = weight * left.squared_error.sum()
                parts.append(self._part(aux, -2 * weight, left.projection, mask, rows))
                codes.append(aux)
                residuals = torch.cat([residuals, left.residual])  # what the second code's N tokens name
        with record_function("temposae::sort"):
            latents = torch.cat([c.live(c.indices, unused=c.n_latents).flatten() for c in codes])
            tokens = torch.cat([c.rows.flatten() + i * len(found.of_entries) for i, c in enumerate(codes)])
            by_latent = LatentMajor.of(latents, tokens, sae.cfg.d_sae)
        with record_function("temposae::update"):
            small = {}
            if band is not None:
                _, moved = band.gradients(scale * found.projection, penalty)
                small["threshold"] = weight_grad(by_latent, moved, moved.new_ones(1, 1))[:, 0]
            if sae.mask.logits is not None and isinstance(mask, Tensor):
                dmask = sum(part.dmask for part in parts if part.dmask is not None)
                small["mask.logits"] = dmask * mask * (1 - mask) / sae.mask.temperature
            norm = self._update(x, residuals, by_latent, parts, small)
            sae.constrain_threshold()
        total = loss if aux_loss is None else loss + aux_loss
        return Objective(total, sums, has_fired(code), aux_loss, sae.least_kept(code)), norm

    def _encode(
        self, x: Tensor, W_enc: Tensor, mask: Mask | None, rows: Tensor | None, dead: Tensor | None, expected: int
    ) -> tuple[SparseCode, SparseCode | None, Band | None]:
        """The code, that of AuxK, and JumpReLU's band."""
        sae = self.sae
        if sae.cfg.activation == "jumprelu":
            band = jumprelu_band(
                x, W_enc, sae.b_enc, sae.threshold.detach(), sae.b_dec, mask, rows,
                bandwidth=sae.bandwidth, expected=expected,
            )  # fmt: skip
            return band.code, None, band
        if sae.cfg.activation == "relu":
            code = encode_threshold(x, W_enc, sae.b_enc, center=sae.b_dec, mask=mask, pos=rows, expected=expected)
            return code, None, None
        code, aux = encode_topk(
            x, W_enc, sae.b_enc, sae.cfg.k, center=sae.b_dec, mask=mask, pos=rows,
            aux_k=sae.aux_k(dead), aux_latents=dead, across_batch=sae.cfg.activation == "batchtopk", fp8=self.config.fp8,
        )  # fmt: skip
        return code, aux, None

    def _decode(self, code: SparseCode, W_dec: Tensor, x: Tensor, rows: Tensor | None) -> Decoded:
        """Loss and residual, and what gradients need of them. With g the groups between the ends of a Matryoshka
        dictionary's prefixes, and r_g what the g-th prefix leaves, the loss is mean_g |r_g|^2 / N; an entry of group g sees
        sum_{h >= g} r_h / G where that of another dictionary sees the residual."""
        n, b_dec = len(x), self.sae.b_dec.detach()
        if self.ends is None:
            found = reconstruct(code, W_dec, b_dec, x)
            loss = found.squared_error.sum() / n
            return Decoded(code, rows, loss, found.squared_error, found.residual, found.residual, found.projection)
        parted, _ = code.grouped(self.ends)
        residuals = matryoshka_residuals(decode, parted, W_dec, b_dec, x)
        squared_errors = residuals.square().sum(-1)
        seen = (residuals.flip(0).cumsum(0).flip(0) / len(self.ends)).flatten(0, 1).to(x.dtype)
        return Decoded(
            parted, None if rows is None else rows.repeat(len(self.ends)), squared_errors.mean(0).sum() / n,
            squared_errors[-1], residuals[-1].to(x.dtype), seen, decode_values_grad(parted, W_dec, seen),
        )  # fmt: skip

    def _part(
        self, code: SparseCode, scale: float | Tensor, projection: Tensor, mask: Mask | None, rows: Tensor | None,
        l1: float = 0.0, band: Band | None = None,
    ) -> Part:  # fmt: skip
        """`scale` * projection is the squared error's gradient in the values; `l1` that of a penalty on their sum."""
        dvalues, active = scale * projection + l1, code.values > 0
        dmask, learned = None, self.sae.mask.logits is not None
        if band is not None:
            dpre, _ = band.gradients(dvalues, None)
            moved = dvalues * band.pre * band.is_open if learned else None
        else:
            dpre, moved = dvalues * active, None
            if mask is not None and rows is not None:
                gate = gate_of(code, mask, rows)
                moved = torch.where(active, dvalues * code.values / gate, 0) if learned else None
                dpre = dpre * gate
        if moved is not None and isinstance(mask, Tensor) and rows is not None:
            dmask = mask_gradient(code, moved, mask, rows)
        return Part((scale * code.values).flatten(), dpre.flatten(), dmask)

    def _update(
        self, x: Tensor, rows: Tensor, by_latent: LatentMajor, parts: list[Part], small: dict[str, Tensor]
    ) -> Tensor:  # fmt: skip
        """Gradients and Adam for all parameters; gives the norm of the gradient. `rows` are residuals, the first N of them
        those that b_dec sees; `small` has the gradients of the parameters that only some dictionaries have."""
        sae, config = self.sae, self.config
        of_row, of_x = (torch.cat(parts) for parts in list(zip(*parts, strict=True))[:2])
        W_enc, W_dec, learned = sae.W_enc.detach().T, sae.W_dec.detach(), sae.W_dec.requires_grad
        b_dec = sae.b_dec.detach()
        small["b_enc"] = weight_grad(by_latent, of_x, of_x.new_ones(1, 1))[:, 0]
        # b_dec is the decoder's bias and the encoder's centre
        small["b_dec"] = rows[: len(x)].sum(0, dtype=torch.float32).mul_(-2 / len(x)).sub_(W_enc.T @ small["b_enc"])
        squares = [grad.square() for grad in small.values()]

        step_size, correction, factor = self._rates
        factor.fill_(1)
        if config.clip_norm is not None:
            norms = [row_norms(by_latent, of_x, x, center=b_dec)]
            if learned:
                norms.append(row_norms(by_latent, of_row, rows, W=W_dec))
            norm = _total([*norms, *squares])
            torch.clamp(config.clip_norm / (norm + 1e-6), max=1, out=factor)  # as clip_grad_norm_ does
        rates = Rates(step_size, correction, factor, config.beta1, config.beta2)

        shadow = self._shadows.get(sae.W_enc)
        norms = [
            adam_rows(
                W_enc, by_latent, of_x, x, self.moments["W_enc"], rates._replace(seed=self._seeds.get("W_enc")),
                center=b_dec, shadow=None if shadow is None else shadow.T,
            )
        ]  # fmt: skip
        if learned:
            norms.append(
                adam_rows(
                    W_dec, by_latent, of_row, rows, self.moments["W_dec"],
                    rates._replace(seed=self._seeds.get("W_dec")),
                    unit_norm=True, shadow=self._shadows.get(sae.W_dec),
                )
            )  # fmt: skip
        for name, grad in small.items():
            pace = self.paces[name]
            paced = rates if pace == 1 else rates._replace(step_size=pace * step_size)
            adam(sae.get_parameter(name).detach(), grad, self.moments[name], paced)
        return _total([*norms, *squares])


def _total(squares: list[Tensor]) -> Tensor:
    return torch.stack([part.sum() for part in squares]).sum().sqrt()
