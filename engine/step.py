"""A TopK or BatchTopK training step straight through the kernels: what autograd, clipping and Adam do to a dictionary, with
the gradients of its two large weights never in memory."""

import torch
from torch import Tensor
from torch.profiler import record_function

from ..kernels.adam import Moments, Rates, adam, adam_rows, row_norms
from ..kernels.backend import choose
from ..kernels.code import LatentMajor, SparseCode
from ..kernels.decode import reconstruct
from ..kernels.encode import encode_topk
from ..kernels.loss import position_loss
from ..kernels.weight_grad import weight_grad
from .config import TrainConfig
from .sae import Objective, SparseAutoencoder, has_fired

LARGE = ("W_dec", "W_enc")  # the weights whose moments `TrainConfig.moments` narrows


def rounding_seed(name: str, step: int) -> int:
    """`Rates.seed` for the large weight `name` at a step. Multiples of 2^32 by the golden ratio keep their distance: about
    2^30 / F steps go by before a row has the random bits that some row had before, and that would do no harm."""
    nth = (len(LARGE) * step + LARGE.index(name)) * 0x9E3779B9
    return (nth + 2**31) % 2**32 - 2**31


def fits(sae: SparseAutoencoder) -> bool:
    """Whether `FusedStep` can train this dictionary, and its kernels run here."""
    known = sae.cfg.activation in ("topk", "batchtopk") and sae.mask.logits is None
    return known and choose("train_step", sae.W_enc) == "triton"


class FusedStep:
    """Updates a dictionary in place, as `sae.objective`, backward, `project_decoder_gradient`, clip_grad_norm_, Adam and
    `constrain` do one after the other, within rounding. Never waits for the device.

    `moments` are Adam's, by parameter; that of W_enc is [F, D]. With products in bfloat16, a bfloat16 copy of each large
    weight is kept beside the float32 one; `refresh` makes it anew after the weights were changed from outside.
    """

    def __init__(self, sae: SparseAutoencoder, moments: dict[str, Moments], config: TrainConfig, dtype: torch.dtype):
        self.sae, self.moments, self.config, self.dtype = sae, moments, config, dtype
        device = sae.b_dec.device
        self._shadows = {}
        if dtype != torch.float32:
            self._shadows = {w: torch.empty_like(w, dtype=dtype) for w in (sae.W_enc, sae.W_dec)}
        self._rates = [torch.zeros((), device=device) for _ in range(3)]
        rounded = LARGE if config.moments != "float32" else ()
        self._seeds = {name: torch.zeros((), dtype=torch.int32, device=device) for name in rounded}
        self.refresh()

    def refresh(self) -> None:
        for weight, shadow in self._shadows.items():
            shadow.copy_(weight.detach())

    @torch.no_grad()
    def __call__(
        self, x: Tensor, pos: Tensor, n_positions: int, dead: Tensor | None, *, lr: float, step: int
    ) -> tuple[Objective, Tensor]:
        """One step, the `step`-th, on x [N, D] at pos [N]; other arguments as in `sae.objective`. Gives the objective before
        it, and the norm of the gradient before clipping."""
        self.set_rates(lr, step)
        return self.run(x, pos, n_positions, dead)

    def set_rates(self, lr: float, step: int) -> None:
        """What changes from step to step besides the data, written where the kernels read it."""
        step_size, correction, _ = self._rates
        step_size.fill_(lr / (1 - self.config.beta1**step))
        correction.fill_((1 - self.config.beta2**step) ** 0.5)
        for name, seed in self._seeds.items():
            seed.fill_(rounding_seed(name, step))

    @torch.no_grad()
    def run(self, x: Tensor, pos: Tensor, n_positions: int, dead: Tensor | None) -> tuple[Objective, Tensor]:
        """The step itself; nothing in it depends on the host, so that a CUDA graph can hold it."""
        sae, n = self.sae, len(x)
        if sae.mask.fixed is not None:
            # Tokens side by side are then at few positions, and tiles that a mask over ranges empties are left out.
            pos, order = pos.sort(stable=True)
            x = x[order]
        x, rows, mask = sae.inputs(x, pos)
        W_enc, W_dec = (self._shadows.get(w, w).detach() for w in (sae.W_enc, sae.W_dec))
        with record_function("temposae::encode"):
            code, aux = encode_topk(
                x, W_enc, sae.b_enc, sae.cfg.k, center=sae.b_dec, mask=mask, pos=rows,
                aux_k=sae.aux_k(dead), aux_latents=dead, across_batch=sae.cfg.activation == "batchtopk",
            )  # fmt: skip
        with record_function("temposae::decode"):
            found = reconstruct(code, W_dec, sae.b_dec, x)
        with record_function("temposae::loss"):
            sums = position_loss(found.squared_error, code, pos, n_positions)
            loss, aux_loss = found.squared_error.sum() / n, None
        residual, entries = found.residual, [_weighed(code, found.projection, -2 / n, mask, rows)]
        if aux is not None:
            with record_function("temposae::aux"):
                left = reconstruct(aux, W_dec, torch.zeros_like(sae.b_dec), residual)
                weight = sae.aux_weight(x, residual)
                aux_loss = weight * left.squared_error.sum()
                entries.append(_weighed(aux, left.projection, -2 * weight, mask, rows))
                residual = torch.cat([residual, left.residual])  # the rows of the second code's N tokens
        with record_function("temposae::sort"):
            codes = [code] if aux is None else [code, aux]
            latents = torch.cat([c.live(c.indices, unused=c.n_latents).flatten() for c in codes])
            tokens = torch.cat([c.rows.flatten() + i * n for i, c in enumerate(codes)])
            by_latent = LatentMajor.of(latents, tokens, sae.cfg.d_sae)
            values, dpre = (torch.cat(parts) for parts in zip(*entries, strict=True))
        with record_function("temposae::update"):
            norm = self._update(x, found.residual, residual, by_latent, values, dpre)
        total = loss if aux_loss is None else loss + aux_loss
        return Objective(total, sums, has_fired(code), aux_loss, sae.least_kept(code)), norm

    def _update(
        self, x: Tensor, residual: Tensor, rows: Tensor, by_latent: LatentMajor, values: Tensor, dpre: Tensor,
    ) -> Tensor:  # fmt: skip
        """Gradients and Adam for all parameters; gives the norm of the gradient."""
        sae, config = self.sae, self.config
        W_enc, W_dec, learned = sae.W_enc.detach().T, sae.W_dec.detach(), sae.W_dec.requires_grad
        b_enc, b_dec = sae.b_enc.detach(), sae.b_dec.detach()
        db_enc = weight_grad(by_latent, dpre, dpre.new_ones(1, 1))[:, 0]
        # b_dec is the decoder's bias and the encoder's centre
        db_dec = residual.sum(0, dtype=torch.float32).mul_(-2 / len(x)).sub_(W_enc.T @ db_enc)

        step_size, correction, factor = self._rates
        factor.fill_(1)
        if config.clip_norm is not None:
            norms = [row_norms(by_latent, dpre, x, center=b_dec)]
            if learned:
                norms.append(row_norms(by_latent, values, rows, W=W_dec))
            norm = _total([*norms, db_enc.square(), db_dec.square()])
            torch.clamp(config.clip_norm / (norm + 1e-6), max=1, out=factor)  # as clip_grad_norm_ does
        rates = Rates(step_size, correction, factor, config.beta1, config.beta2)

        shadow = self._shadows.get(sae.W_enc)
        norms = [
            adam_rows(
                W_enc, by_latent, dpre, x, self.moments["W_enc"], rates._replace(seed=self._seeds.get("W_enc")),
                center=b_dec, shadow=None if shadow is None else shadow.T,
            )
        ]  # fmt: skip
        if learned:
            norms.append(
                adam_rows(
                    W_dec, by_latent, values, rows, self.moments["W_dec"], rates._replace(seed=self._seeds.get("W_dec")),
                    unit_norm=True, shadow=self._shadows.get(sae.W_dec),
                )
            )  # fmt: skip
        adam(b_enc, db_enc, self.moments["b_enc"], rates)
        adam(b_dec, db_dec, self.moments["b_dec"], rates)
        return _total([*norms, db_enc.square(), db_dec.square()])


def _weighed(
    code: SparseCode, projection: Tensor, scale: float | Tensor, mask: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What weighs each entry, flattened: its residual in the gradient of W_dec, and its x in that of W_enc."""
    dpre = scale * projection * (code.values > 0)
    if mask is not None and rows is not None:
        dpre = dpre * mask.reshape(-1)[rows.long()[code.rows] * mask.shape[1] + code.live(code.indices)]
    return (scale * code.values).flatten(), dpre.flatten()


def _total(squares: list[Tensor]) -> Tensor:
    return torch.stack([part.sum() for part in squares]).sum().sqrt()
