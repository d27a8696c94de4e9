"""A training step straight through the kernels: what autograd, clipping and Adam do to a dictionary, with the gradients of
its two large weights never in memory; of one dictionary, or of several of one size that share the batch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from ..kernels.adam import Moments, Rates, adam, adam_rows, row_norms
from ..kernels.autograd import jumprelu_band, matryoshka_residuals
from ..kernels.backend import choose
from ..kernels.code import LatentMajor, SparseCode
from ..kernels.decode import Reconstruction, decode, decode_values_grad, reconstruct
from ..kernels.encode_sparse import encode_threshold, encode_topk
from ..kernels.encoder_inputs import EncoderInputs
from ..kernels.gradients import Band, gate_of, mask_gradient
from ..kernels.loss import PositionSums, position_loss
from ..kernels.masks import GaussianMask, Mask
from ..kernels.weight_grad import weight_grad
from .config import TrainConfig
from .ranks import ALONE, Ranks
from .sae import SparseAutoencoder, has_fired, least_kept

# Of all latents, the share in use on a token from which on dense products take less time than gathers: 5 products of 2 D F
# FLOP at 660 TFLOP/s against 4 gathers of 2 D bytes for each latent in use at 5.5 TB/s (an H100; its rates as in
# bench/floors.py).
DENSE_FROM = 1 / 96
LARGE = ("W_dec", "W_enc")  # the weights whose moments `TrainConfig.moments` narrows


def rounding_seed(name: str, step: int, first_latent: int = 0) -> int:
    """`Rates.seed` for the large weight `name` from a row on, at a step. Multiples of 2^32 by the golden ratio keep their
    distance: about 2^30 / F steps go by before a row has the random bits that some row had before, and that would do no
    harm."""
    base_seed = (len(LARGE) * step + LARGE.index(name)) * 0x9E3779B9
    return (base_seed + first_latent + 2**31) % 2**32 - 2**31


def fits(sae: SparseAutoencoder) -> bool:
    """Whether the kernels of `FusedStep` run here."""
    return choose("train_step", sae.W_enc) == "triton" and not sae.cfg.parts and sae.mask.blend is None


@torch.no_grad()
def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one below the other. If there are several, they are views of that from now on."""
    if len(tensors) == 1:
        return tensors[0].detach()
    stacked = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, view in zip(tensors, stacked.chunk(len(tensors)), strict=True):
        tensor.data = view
    return stacked


def _moments(moments_per_sae: Sequence[Moments]) -> Moments:
    scales = [moments.scales for moments in moments_per_sae if moments.scales is not None]
    first, second = (
        side_by_side(averages)
        for averages in ([m.exp_avg for m in moments_per_sae], [m.exp_avg_sq for m in moments_per_sae])
    )
    return Moments(first, second, side_by_side(scales) if scales else None)


class Flag:
    """A bool on the device that the host looks at later, without waiting for what was launched in between."""

    def __init__(self, value: Tensor):
        self._value, self._event = value, None
        if value.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def __bool__(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._value)


class Outcome(NamedTuple):
    """What a step tells of S dictionaries, before their update."""

    loss: Tensor  # [S]
    aux_loss: Tensor | None  # [S], in the loss
    norm: Tensor  # [S], of the gradient before clipping; zero without
    sums: PositionSums  # [S, T]
    fired: Tensor  # [S, F]: which latents were active on some token
    least_kept: Tensor | None = None  # [S]; see `SparseAutoencoder.follow`
    entries: Tensor | None = None  # scalar: how many the code has, if it is ragged
    overflow: Flag | None = None  # whether they were more than it had room for, and nothing was updated


class Decoded(NamedTuple):
    """A code decoded. Of a Matryoshka dictionary with G prefixes, the code is parted: its token g * N + n owns what token n
    has in group g."""

    code: SparseCode
    mask_rows: Tensor | None  # of the mask, for each of the code's tokens
    squared_error: Tensor  # [S N], as in the loss
    reconstruction: Reconstruction  # of all latents; its projection is of the code's entries on what they see
    entry_residuals: Tensor  # [S N, D] or [G N, D]: the residual that the entries of each of the code's tokens see


class Contribution(NamedTuple):
    """What a code contributes to the gradients: a weight for each entry and the mask's gradient [T, F]."""

    code: SparseCode
    residual: Tensor
    decoder_weights: Tensor  # of the entry's residual, in the gradient of W_dec
    encoder_weights: Tensor  # of its x, in the gradient of W_enc
    dmask: Tensor | None


class FusedStep:
    """Updates S dictionaries of one configuration in place, each as `sae.objective`, backward, `project_decoder_gradient`,
    clip_grad_norm_, Adam and `constrain` do one after the other, within rounding. Nothing waits for the device, unless a
    jumprelu or relu dictionary's code is given no `capacity`.

    `leaves` are each dictionary's learned parameters and `moments` Adam's, by name; that of W_enc is [F, D]. Parameters and
    moments of several dictionaries become views of tensors that hold them all, latents s F to (s + 1) F being those of the
    s-th; token s N + n of their code is token n as it sees it. `paces` are factors on the learning rate. With products in
    bfloat16, a bfloat16 copy of each large weight is kept beside the float32 one; `refresh` makes it anew after the weights
    were changed from outside.

    `dense` replaces gathers from a code and its transpose by dense products [S, N, F]; the gradients of the large weights
    are then in memory, in the products' dtype.

    With several `ranks`, S is 1 and the dictionary this process's share of the latents (`SparseAutoencoder.shard`); all see
    the same batch, and b_dec is everyone's. What they tell each other in a step: their candidates for the code
    (topk, batchtopk), what they reconstruct [N, D] in float32, and a few sums of a width of D and T.
    """

    def __init__(
        self, saes: Sequence[SparseAutoencoder], leaves: Sequence[Mapping[str, Tensor]],
        moments: Sequence[Mapping[str, Moments]], paces: Mapping[str, float], config: TrainConfig, dtype: torch.dtype,
        ranks: Ranks = ALONE,
    ):  # fmt: skip
        self.sae, self.paces, self.config, self.dtype, self.dense = saes[0], paces, config, dtype, False
        self.ranks, self.count, device = ranks, len(saes), saes[0].b_dec.device
        self._weights = {name: side_by_side([parameters[name] for parameters in leaves]) for name in leaves[0]}
        if "W_dec" not in self._weights:  # a random one
            self._weights["W_dec"] = side_by_side([sae.W_dec for sae in saes])
        if self.count > 1:
            for sae, parameters in zip(saes, leaves, strict=True):
                sae.W_enc.data = parameters["W_enc"].detach().T
        self._weights["b_dec"] = self._weights["b_dec"].view(self.count, -1)
        self.moments = {name: _moments([named_moments[name] for named_moments in moments]) for name in moments[0]}
        self.moments["b_dec"] = Moments(*(m.view(self.count, -1) for m in self.moments["b_dec"][:2]))
        self._masks = [sae.mask for sae in saes]
        self._fixed_mask = None
        if self.count > 1 and saes[0].mask.fixed is not None:  # they don't change
            self._fixed_mask = torch.cat([mask.fixed for mask in self._masks if mask.fixed is not None], 1)
        self._shadows = {}
        if dtype != torch.float32:
            self._shadows = {name: torch.empty_like(self._weights[name], dtype=dtype) for name in LARGE}
        self.ends = None if self.sae.cfg.prefixes is None else torch.tensor(self.sae.cfg.prefixes, device=device)
        self._rates = [torch.zeros(self.count, device=device) for _ in range(3)]
        rounded_names = LARGE if config.moments != "float32" else ()
        self._seeds = {name: torch.zeros(self.count, dtype=torch.int32, device=device) for name in rounded_names}
        self.refresh()

    @property
    def _center(self) -> Tensor | None:
        """What each dictionary takes from x [S, D]."""
        return self._weights["b_dec"] if self.sae.center is not None else None

    def refresh(self) -> None:
        for name, shadow in self._shadows.items():
            shadow.copy_(self._weights[name])

    @torch.no_grad()
    def __call__(
        self, x: Tensor, pos: Tensor, n_positions: int, dead: Tensor | None, expected: int, capacity: int | None = None,
        *, lrs: Sequence[float], step: int, target: Tensor | None = None,
    ) -> Outcome:  # fmt: skip
        """One step, the `step`-th, with a learning rate for each dictionary; the rest as in `run`."""
        self.set_rates(lrs, step)
        return self.run(x, pos, n_positions, dead, expected, capacity, target)

    def set_rates(self, lrs: Sequence[float], step: int) -> None:
        """What changes from step to step besides the data, written where the kernels read it."""
        step_size, correction, _ = self._rates
        step_size.copy_(torch.tensor([lr / (1 - self.config.beta1**step) for lr in lrs]), non_blocking=True)
        correction.fill_((1 - self.config.beta2**step) ** 0.5)
        for name, seed in self._seeds.items():
            seed.fill_(rounding_seed(name, step, self.ranks.rank * self.sae.cfg.d_sae))

    @torch.no_grad()
    def run(
        self, x: Tensor, pos: Tensor, n_positions: int, dead: Tensor | None, expected: int = 64,
        capacity: int | None = None, target: Tensor | None = None,
    ) -> Outcome:  # fmt: skip
        """The step itself, on x [N, D] at pos [N] and, of transcoders, `target` [N, d_out].

        `dead` bool [S, F]: the latents for AuxK, or None for no AuxK; a dictionary without any has none. `expected` and
        `capacity` (of all dictionaries together) as in `encode_threshold`; entries that don't fit make the step one that
        changes nothing. With a capacity, and for topk and batchtopk in any case, nothing depends on the host, so that a CUDA
        graph can hold it.
        """
        sae, s, n = self.sae, self.count, len(x)
        if sae.mask.fixed is not None:
            # Tokens side by side are then at few positions, and tiles that a mask over ranges empties are left out.
            pos, order = pos.sort(stable=True)
            x, target = x[order], None if target is None else target[order]
        x, mask_rows, mask = sae.inputs(x, pos)
        mask, target = self._joint_mask(mask), x if target is None else target
        weights = {name: self._shadows.get(name, weight) for name, weight in self._weights.items()}
        with record_function("temposae::encode"):
            code, aux, band = self._encode(x, weights["W_enc"].T, mask, mask_rows, dead, expected, capacity)
        overflow = None if code.overflow is None else Flag(code.overflow)
        token_mask_rows = None if mask_rows is None else mask_rows.repeat(s)
        with record_function("temposae::decode"):
            decoded = self._decode(code, weights["W_dec"], target, token_mask_rows)
        with record_function("temposae::loss"):
            position_offsets = torch.arange(s, device=pos.device)[:, None] * n_positions
            sums = position_loss(
                decoded.reconstruction.squared_error, code, (pos + position_offsets).flatten(), s * n_positions
            )
            for position_sums in (sums.l1, sums.l0):
                self.ranks.sum_(position_sums)
            sums = PositionSums(*(total.view(s, n_positions) for total in sums))
            loss, aux_loss, scale, penalty = decoded.squared_error.view(s, n).sum(1) / n, None, -2 / n, 0.0
            if sae.cfg.activation == "relu":
                penalty = sae.pressure * sae.cfg.l1_coefficient / n
                loss = loss + penalty * sums.l1.sum(1)
            elif band is not None:
                penalty = sae.pressure * sae.cfg.l0_coefficient * sae.cfg.d_in / n
                loss = loss + penalty * sums.l0.sum(1)
        projection = decoded.reconstruction.projection
        l1 = 0.0 if band else penalty
        contributions = [
            self._contribution(
                decoded.code, decoded.entry_residuals, scale, projection, mask, decoded.mask_rows, l1, band
            )
        ]
        if aux is not None and dead is not None:
            with record_function("temposae::aux"):
                residual = decoded.reconstruction.residual
                aux_reconstruction = self._reconstruct(
                    aux, weights["W_dec"], torch.zeros_like(self._weights["b_dec"]), residual
                )
                any_dead = self.ranks.sum_(dead.sum(1, keepdim=True)) > 0
                weight = sae.aux_weight(target, residual.view(s, n, -1), any_dead)
                aux_loss = weight * aux_reconstruction.squared_error.view(s, n).sum(1)
                aux_scale = -2 * weight.repeat_interleave(n)
                aux_scale = aux_scale[aux.rows] if aux.ragged else aux_scale[:, None]
                contributions.append(
                    self._contribution(
                        aux,
                        aux_reconstruction.residual,
                        aux_scale,
                        aux_reconstruction.projection,
                        mask,
                        token_mask_rows,
                    )
                )
        with record_function("temposae::sort"):
            latent_major = None if self.dense else self._sort_by_latent(contributions)
        with record_function("temposae::update"):
            small_gradients = {}
            if band is not None:
                _, dthreshold = band.gradients(scale * projection, penalty)
                small_gradients["threshold"] = self._sum_by_latent(latent_major, contributions, [dthreshold])
            if sae.mask.logits is not None and isinstance(mask, Tensor):
                dmask = sum(contribution.dmask for contribution in contributions if contribution.dmask is not None)
                small_gradients["mask.logits"] = dmask * mask * (1 - mask) / sae.mask.temperature
            norm = self._update(x, latent_major, contributions, small_gradients, code.overflow)
        if aux_loss is not None:
            loss = loss + aux_loss
        least_activation = self.ranks.least_(least_kept(code, s)) if sae.cfg.activation == "batchtopk" else None
        entries = None if code.offsets is None else code.offsets[-1]
        return Outcome(loss, aux_loss, norm, sums, has_fired(code).view(s, -1), least_activation, entries, overflow)

    def _joint_mask(self, mask: Mask | None) -> Mask | None:
        """That of all dictionaries, given the first one's."""
        if self._fixed_mask is not None:
            return self._fixed_mask
        if isinstance(mask, GaussianMask) and self.count > 1:
            return mask._replace(
                centre=torch.cat(
                    [position_mask.centre for position_mask in self._masks if position_mask.centre is not None]
                )
            )
        return mask

    def _encode(
        self, x: Tensor, W_enc: Tensor, mask: Mask | None, mask_rows: Tensor | None, dead: Tensor | None, expected: int,
        capacity: int | None,
    ) -> tuple[SparseCode, SparseCode | None, Band | None]:  # fmt: skip
        """The code, that of AuxK, and JumpReLU's band."""
        sae, b_enc, center = self.sae, self._weights["b_enc"], self._center
        if sae.cfg.activation == "jumprelu":
            band = jumprelu_band(
                EncoderInputs(x, W_enc, b_enc, center, mask, mask_rows), self._weights["threshold"],
                bandwidth=sae.bandwidth, expected=expected, capacity=capacity, dictionaries=self.count,
            )  # fmt: skip
            return band.code, None, band
        if sae.cfg.activation == "relu":
            code = encode_threshold(
                x, W_enc, b_enc, center=center, mask=mask, pos=mask_rows, expected=expected, capacity=capacity,
                dictionaries=self.count,
            )  # fmt: skip
            return code, None, None
        across_batch, aux_k = sae.cfg.activation == "batchtopk", sae.aux_k(dead)
        code, aux = encode_topk(
            x, W_enc, b_enc, min(sae.k, sae.cfg.d_sae), center=center, mask=mask, pos=mask_rows,
            aux_k=aux_k, aux_latents=None if dead is None else dead.flatten(),
            across_batch=across_batch, fp8=self.config.fp8, dictionaries=self.count,
        )  # fmt: skip
        code = self.ranks.keep_largest(code, sae.k * (len(x) if across_batch else 1))
        return code, None if aux is None else self.ranks.keep_largest(aux, sae.cfg.aux_k), None

    def _decode(self, code: SparseCode, W_dec: Tensor, target: Tensor, mask_rows: Tensor | None) -> Decoded:
        """Loss and residual, and what gradients need of them. With g the groups between the ends of a Matryoshka
        dictionary's prefixes, and r_g what the g-th prefix leaves, the loss is mean_g |r_g|^2 / N; an entry of group g sees
        sum_{h >= g} r_h / G where that of another dictionary sees the residual."""
        b_dec = self._weights["b_dec"]
        if self.ends is None:
            reconstruction = self._reconstruct(code, W_dec, b_dec, target)
            return Decoded(code, mask_rows, reconstruction.squared_error, reconstruction, reconstruction.residual)
        grouped_code, _ = code.grouped(self.ends)
        residuals = matryoshka_residuals(self._decode_all_ranks, grouped_code, W_dec, b_dec[0], target)
        squared_errors = residuals.square().sum(-1)
        entry_residuals = (residuals.flip(0).cumsum(0).flip(0) / len(self.ends)).flatten(0, 1).to(target.dtype)
        reconstruction = Reconstruction(
            residuals[-1].to(target.dtype), squared_errors[-1], decode_values_grad(grouped_code, W_dec, entry_residuals)
        )
        mask_rows = None if mask_rows is None else mask_rows.repeat(len(self.ends))
        return Decoded(grouped_code, mask_rows, squared_errors.mean(0), reconstruction, entry_residuals)

    def _reconstruct(self, code: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor) -> Reconstruction:
        """`reconstruct`, by all ranks, with dense products if they are asked for."""
        if self.ranks.size > 1:
            zeros = target.new_zeros((1, target.shape[1]), dtype=torch.float32).expand(len(target), -1)
            residual = target - b_dec + self._decode_all_ranks(code, W_dec, torch.zeros_like(b_dec), target=zeros)
            squared_error = residual.square().sum(1)
            residual = residual.to(target.dtype)
            return Reconstruction(residual, squared_error, decode_values_grad(code, W_dec, residual))
        if not self.dense:
            return reconstruct(code, W_dec, b_dec, target)
        s, (f, d) = self.count, (self.sae.cfg.d_sae, target.shape[1])
        centred_target, W_dec = target.view(-1, code.n_tokens // s, d) - b_dec.view(s, 1, d), W_dec.view(s, f, d)
        residual = torch.baddbmm(
            centred_target.to(target.dtype), self._dense_values(code, code.values), W_dec, alpha=-1
        )
        projection = torch.bmm(residual, W_dec.mT).flatten()[code.rows * f + code.live(code.indices) % f]
        squared_error = torch.linalg.vector_norm(residual, dim=2, dtype=torch.float32).square()
        return Reconstruction(residual.flatten(0, 1), squared_error.flatten(), code.live(projection.float()))

    def _decode_all_ranks(self, code: SparseCode, W_dec: Tensor, b_dec: Tensor, *, target: Tensor) -> Tensor:
        """`decode` of everyone's latents, for a `b_dec` and a `target` of zeros."""
        return self.ranks.sum_(decode(code, W_dec, b_dec, target=target))

    def _dense_values(self, code: SparseCode, values: Tensor) -> Tensor:
        """Values of the code's entries as [S, N, F], in the products' dtype."""
        f = self.sae.cfg.d_sae
        local_code = replace(code, values=values.to(self.dtype), indices=code.indices % f, n_latents=f, layouts={})
        return local_code.to_dense().view(self.count, -1, f)

    def _contribution(
        self, code: SparseCode, residual: Tensor, scale: float | Tensor, projection: Tensor, mask: Mask | None,
        mask_rows: Tensor | None, l1: float | Tensor = 0.0, band: Band | None = None,
    ) -> Contribution:  # fmt: skip
        """`scale` * projection is the squared error's gradient in the values; `l1` that of a penalty on their sum."""
        dvalues, is_active = scale * projection + l1, code.values > 0
        dmask, has_learned_mask = None, self.sae.mask.logits is not None
        if band is not None:
            dpre, _ = band.gradients(dvalues, None)
            dmask_entries = dvalues * band.pre * band.is_open if has_learned_mask else None
        else:
            dpre, dmask_entries = dvalues * is_active, None
            if mask is not None and mask_rows is not None:
                gate = gate_of(code, mask, mask_rows)
                dmask_entries = torch.where(is_active, dvalues * code.values / gate, 0) if has_learned_mask else None
                dpre = dpre * gate
        if dmask_entries is not None and isinstance(mask, Tensor) and mask_rows is not None:
            dmask = mask_gradient(code, dmask_entries, mask, mask_rows)
        return Contribution(code, residual, scale * code.values, dpre, dmask)

    def _sort_by_latent(self, contributions: Sequence[Contribution]) -> LatentMajor:
        """The entries of all contributions. The second's tokens are numbered on from the first's, as their residuals are."""
        first_tokens = [0, contributions[0].code.n_tokens]
        latents = torch.cat(
            [
                contribution.code.live(contribution.code.indices, unused=contribution.code.n_latents).flatten()
                for contribution in contributions
            ]
        )
        tokens = torch.cat(
            [
                contribution.code.rows.flatten() + first_token
                for contribution, first_token in zip(contributions, first_tokens, strict=False)
            ]
        )
        return LatentMajor.of(latents, tokens, contributions[0].code.n_latents)

    def _sum_by_latent(
        self, latent_major: LatentMajor | None, contributions: Sequence[Contribution], values: Sequence[Tensor]
    ) -> Tensor:  # fmt: skip
        """[S F]: the sums over each latent's entries of all contributions, in float32."""
        if latent_major is None:
            sums = [
                self._dense_values(contribution.code, entry_values).sum(1, dtype=torch.float32)
                for contribution, entry_values in zip(contributions, values, strict=True)
            ]
            return torch.stack(sums).sum(0).flatten()
        flat_values = torch.cat([entry_values.flatten() for entry_values in values])
        return weight_grad(latent_major, flat_values, flat_values.new_ones(1, 1))[:, 0]

    def _update(
        self, x: Tensor, latent_major: LatentMajor | None, contributions: Sequence[Contribution],
        small_gradients: dict[str, Tensor], overflow: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Gradients and Adam for all parameters; gives the norms of the gradients. `small_gradients` has those of the
        parameters that only some dictionaries have."""
        s, config, has_learned_decoder = self.count, self.config, "W_dec" in self.moments
        W_enc, center = self._weights["W_enc"], self._center
        small_gradients["b_enc"] = self._sum_by_latent(
            latent_major, contributions, [contribution.encoder_weights for contribution in contributions]
        )
        # b_dec is the decoder's bias and, but for transcoders, the encoder's centre
        residual_sum = contributions[0].residual[: s * len(x)].view(s, len(x), -1).sum(1, dtype=torch.float32)
        small_gradients["b_dec"] = residual_sum.mul_(-2 / len(x))
        if center is not None:
            dcenter = torch.bmm(small_gradients["b_enc"].view(s, 1, -1), W_enc.view(s, -1, x.shape[1]))[:, 0]
            small_gradients["b_dec"] -= self.ranks.sum_(dcenter)

        gradients: dict[str, _Sparse | _Dense] = {}
        if latent_major is None:
            centred = x.expand(s, -1, -1) if center is None else (x - center[:, None]).to(x.dtype)
            gradients = {
                "W_enc": _Dense(
                    [
                        (self._dense_values(contribution.code, contribution.encoder_weights), centred)
                        for contribution in contributions
                    ],
                    None,
                )
            }
            if has_learned_decoder:
                decoder_products = [
                    (
                        self._dense_values(contribution.code, contribution.decoder_weights),
                        contribution.residual.view(s, len(x), -1),
                    )
                    for contribution in contributions
                ]
                gradients["W_dec"] = _Dense(decoder_products, self._weights["W_dec"])
        else:
            encoder_weights = torch.cat([contribution.encoder_weights.flatten() for contribution in contributions])
            gradients = {"W_enc": _Sparse(latent_major, encoder_weights, x, center, None)}
            if has_learned_decoder:
                decoder_weights = torch.cat([contribution.decoder_weights.flatten() for contribution in contributions])
                residuals = (
                    torch.cat([contribution.residual for contribution in contributions])
                    if len(contributions) > 1
                    else contributions[0].residual
                )
                gradients["W_dec"] = _Sparse(latent_major, decoder_weights, residuals, None, self._weights["W_dec"])

        step_size, correction, factor = self._rates
        norm = factor.fill_(1).new_zeros(s)
        if config.clip_norm is not None:
            all_squared_norms = [grad.norms() for grad in gradients.values()]
            all_squared_norms += [grad.square() for name, grad in small_gradients.items() if name != "b_dec"]
            latent_norms = torch.stack([squared_norms.view(s, -1).sum(1) for squared_norms in all_squared_norms]).sum(0)
            norm = (self.ranks.sum_(latent_norms) + small_gradients["b_dec"].square().sum(1)).sqrt()
            torch.clamp(config.clip_norm / (norm + 1e-6), max=1, out=factor)  # as clip_grad_norm_ does
        rates = Rates(step_size, correction, factor, config.beta1, config.beta2, skip=overflow)
        for name, grad in gradients.items():
            rounded_rates = rates._replace(seed=self._seeds.get(name))
            grad.update(self._weights[name], self.moments[name], rounded_rates, self._shadows.get(name))
        for name, grad in small_gradients.items():
            paced_rates = rates if self.paces[name] == 1 else rates._replace(step_size=self.paces[name] * step_size)
            adam(self._weights[name], grad, self.moments[name], paced_rates)
        if "threshold" in small_gradients:
            self._weights["threshold"].clamp_min_(0)
        return norm


class _Sparse(NamedTuple):
    """The gradient of a large weight [S F, D] by its entries; with W, of unit rows, only what is across them counts.
    `norms` are squared, [S F]."""

    entries: LatentMajor
    values: Tensor
    vectors: Tensor
    center: Tensor | None
    W: Tensor | None

    def norms(self) -> Tensor:
        return row_norms(self.entries, self.values, self.vectors, center=self.center, W=self.W)

    def update(self, weight: Tensor, moments: Moments, rates: Rates, shadow: Tensor | None) -> None:
        adam_rows(
            weight, self.entries, self.values, self.vectors, moments, rates,
            center=self.center, unit_norm=self.W is not None, shadow=shadow,
        )  # fmt: skip


class _Dense:
    """The same as a sum of products a^T b, of a [S, N, F] and b [S, N, D]."""

    def __init__(self, products: Sequence[tuple[Tensor, Tensor]], W: Tensor | None):
        (a, b), *more_products = products
        grad = torch.bmm(a.mT, b)
        for a, b in more_products:
            grad.baddbmm_(a.mT, b)
        self.grad, self.W = grad.flatten(0, 1), W

    def norms(self) -> Tensor:
        squares = torch.linalg.vector_norm(self.grad, dim=1, dtype=torch.float32).square()
        return squares if self.W is None else (squares - (self.grad * self.W).sum(1).square()).clamp_min(0)

    def update(self, weight: Tensor, moments: Moments, rates: Rates, shadow: Tensor | None) -> None:
        adam(weight, self.grad, moments, rates, unit_norm=self.W is not None, shadow=shadow)
