"""A training step through the kernels: what autograd, clipping and Adam do to a dictionary, without the gradients of its two
large weights ever in memory; for one dictionary, or for several of one size that share the batch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from ..kernels.autograd import jumprelu_band, matryoshka_residuals
from ..kernels.backend import choose, decided
from ..kernels.code import SparseCode
from ..kernels.decode import Reconstruction, decode, decode_values_grad, reconstruct
from ..kernels.encode_sparse import encode_threshold, encode_topk
from ..kernels.encoder_inputs import EncoderInputs
from ..kernels.gradients import Band, gate_of, mask_gradient
from ..kernels.loss import EntryLoss, PositionSums, batch_sums, entry_loss
from ..kernels.masks import GaussianMask, Mask
from .sae import SparseAutoencoder
from .training.gradients import Contribution, DenseGradients, EntryWeights, SparseGradients, dense_values
from .training.objective import least_kept
from .training.stacked_weights import StackedWeights


def fits(sae: SparseAutoencoder) -> bool:
    """Whether the kernels of `FusedStep` run for this dictionary."""
    return choose("train_step", sae.W_enc) == "triton" and not sae.cfg.parts and sae.mask.blend is None


class Flag:
    """A bool on the device that the host reads later, without waiting for what was launched in between."""

    def __init__(self, value: Tensor):
        self._value, self._event = value, None
        if value.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(value, non_blocking=True)
            self._event = torch.cuda.current_stream(value.device).record_event()

    def __bool__(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._value)


class Outcome(NamedTuple):
    """Figures of a step of S dictionaries, from before their update."""

    loss: Tensor  # [S]
    aux_loss: Tensor | None  # [S], included in the loss
    norm: Tensor  # [S], of the gradient before clipping; zero without clipping
    sums: PositionSums  # [S, T]
    fired: Tensor  # [S, F]: which latents were active on some token
    least_kept: Tensor | None = None  # [S]; see `SparseAutoencoder.follow`
    entries: Tensor | None = None  # scalar: the size of the code, if it is ragged
    overflow: Flag | None = None  # whether the code had more entries than room, so that nothing was updated
    recomputed: Tensor | None = None  # [S]; see `SparseCode`
    spread: Tensor | None = None  # [S]: squared distance of the targets from a mean, if it came for free


class Decoded(NamedTuple):
    """A decoded code. For a Matryoshka dictionary with G prefixes, the code is grouped: its token g * N + n owns what
    token n has in group g."""

    code: SparseCode
    mask_rows: Tensor | None  # the mask's row of each of the code's tokens
    residual: Tensor  # [S N, D], from all latents
    entry_residuals: Tensor  # [S N, D] or [G N, D]: the residual that the entries of each of the code's tokens see
    parts: Reconstruction  # of these, in parts: squared error, the entries' projections, and spread


class FusedStep:
    """Update S dictionaries of one configuration in place, each as `sae.objective`, backward, `project_decoder_gradient`,
    clip_grad_norm_, Adam and `constrain` would, within rounding. Nothing waits for the device, unless the code of a jumprelu
    or relu dictionary is given no `capacity`.

    Their weights and moments are `stacked`. Token s N + n of the joint code is token n as the s-th dictionary sees it.

    `dense` replaces gathers from a code and its transpose by dense products [S, N, F]. The gradients of the large weights
    are then in memory, in the products' dtype.

    With several `ranks`, S is 1 and the dictionary is this process's share of the latents (`SparseAutoencoder.shard`). All
    see the same batch and hold the whole b_dec. In a step they exchange candidates for the code (topk, batchtopk), partial
    reconstructions [N, D] in float32, and a few sums of size D and T.
    """

    def __init__(self, saes: Sequence[SparseAutoencoder], stacked: StackedWeights):
        self.sae, self.stacked, self.dense = saes[0], stacked, False
        self.backend = choose("train_step", self.sae.W_enc)  # of every kernel in the step
        self.count, self.dtype, self.ranks = stacked.count, stacked.dtype, stacked.ranks
        self._masks = [sae.mask for sae in saes]
        self._fixed_mask = None
        if self.count > 1 and saes[0].mask.fixed is not None:  # they don't change
            self._fixed_mask = torch.cat([mask.fixed for mask in self._masks if mask.fixed is not None], 1)
        prefixes = self.sae.cfg.prefixes
        self.ends = None if prefixes is None else torch.tensor(prefixes, device=self.sae.b_dec.device)

    @property
    def _center(self) -> Tensor | None:
        """What each dictionary subtracts from x [S, D]."""
        return self.stacked["b_dec"] if self.sae.center is not None else None

    @torch.no_grad()
    def __call__(
        self, x: Tensor, pos: Tensor, n_positions: int, dead: Tensor | None, expected: int, capacity: int | None = None,
        *, lrs: Sequence[float], step: int, target: Tensor | None = None, mean: Tensor | None = None,
    ) -> Outcome:  # fmt: skip
        """Step number `step`, with a learning rate for each dictionary. For the rest see `run`."""
        self.stacked.set_rates(lrs, step)
        with decided(self.backend):
            return self.run(x, pos, n_positions, dead, expected, capacity, target, mean)

    @torch.no_grad()
    def run(
        self, x: Tensor, pos: Tensor, n_positions: int, dead: Tensor | None, expected: int = 64,
        capacity: int | None = None, target: Tensor | None = None, mean: Tensor | None = None,
    ) -> Outcome:  # fmt: skip
        """The step itself, on x [N, D] at pos [N], and for transcoders `target` [N, d_out]. `mean` [D] is for the spread.

        `dead` bool [S, F]: the latents for AuxK, or None for no AuxK; a dictionary without dead latents has no AuxK.
        `expected` and `capacity` (of all dictionaries together) as in `encode_threshold`. If some entries don't fit, the
        step changes nothing. With a capacity, and for topk and batchtopk in any case, nothing depends on the host, so that
        a CUDA graph can hold the step.
        """
        sae, s = self.sae, self.count
        if sae.mask.fixed is not None:
            # Neighbouring tokens are then at few positions, and tiles that a mask over ranges empties are skipped.
            pos, order = pos.sort(stable=True)
            x, target = x[order], None if target is None else target[order]
        x, mask_rows, mask = sae.inputs(x, pos)
        mask, target = self._joint_mask(mask), x if target is None else target
        W_enc, W_dec = self.stacked.for_products("W_enc"), self.stacked.for_products("W_dec")
        with record_function("temposae::encode"):
            code, aux, band = self._encode(x, W_enc.T, mask, mask_rows, dead, expected, capacity)
        overflow = None if code.overflow is None else Flag(code.overflow)
        token_mask_rows = None if mask_rows is None else mask_rows.repeat(s)
        with record_function("temposae::decode"):
            decoded = self._decode(code, W_dec, target, token_mask_rows, mean if self.backend == "triton" else None)
        scale = -2 / len(x)
        with record_function("temposae::loss"):
            entries = entry_loss(
                decoded.code, decoded.parts.squared_error, decoded.parts.projection, scale,
                spread=decoded.parts.spread, active_only=band is None,
            )  # fmt: skip
            loss, sums, spread, penalty = self._loss(entries, pos, n_positions)
        contributions, aux_loss = [
            self._contribution(decoded.code, decoded.entry_residuals, entries, mask, decoded.mask_rows, penalty, band)
        ], None  # fmt: skip
        if aux is not None and dead is not None:
            with record_function("temposae::aux"):
                aux_loss, contribution = self._aux(aux, dead, W_dec, decoded.residual, target, mask, token_mask_rows)
                contributions.append(contribution)
                loss = loss + aux_loss
        with record_function("temposae::sort"):
            gradients = (
                DenseGradients(contributions, s, self.dtype) if self.dense else SparseGradients(contributions, len(x))
            )
        with record_function("temposae::update"):
            small_gradients = {}
            if band is not None:
                _, dthreshold = band.gradients(entries.dvalues, penalty)
                small_gradients["threshold"] = gradients.by_latent([dthreshold])
            if sae.mask.logits is not None and isinstance(mask, Tensor):
                dmask = sum(contribution.dmask for contribution in contributions if contribution.dmask is not None)
                small_gradients["mask.logits"] = dmask * mask * (1 - mask) / sae.mask.temperature
            norm = self.stacked.update(gradients, small_gradients, x, self._center, code.overflow)
        least_activation = self.ranks.least_(least_kept(code, s)) if sae.cfg.activation == "batchtopk" else None
        return Outcome(
            loss, aux_loss, norm, sums, entries.fired.view(s, -1), least_activation,
            None if code.offsets is None else code.offsets[-1], overflow, code.recomputed, spread,
        )  # fmt: skip

    def _joint_mask(self, mask: Mask | None) -> Mask | None:
        """The mask of all dictionaries, given the first one's."""
        if self._fixed_mask is not None:
            return self._fixed_mask
        if isinstance(mask, GaussianMask) and self.count > 1:
            return mask._replace(centre=torch.cat([mask.centre for mask in self._masks if mask.centre is not None]))
        return mask

    def _encode(
        self, x: Tensor, W_enc: Tensor, mask: Mask | None, mask_rows: Tensor | None, dead: Tensor | None, expected: int,
        capacity: int | None,
    ) -> tuple[SparseCode, SparseCode | None, Band | None]:  # fmt: skip
        """The code, the code of AuxK, and JumpReLU's band."""
        sae, b_enc, center = self.sae, self.stacked["b_enc"], self._center
        if sae.cfg.activation == "jumprelu":
            band = jumprelu_band(
                EncoderInputs(x, W_enc, b_enc, center, mask, mask_rows), self.stacked["threshold"],
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
            across_batch=across_batch, fp8=self.stacked.fp8, dictionaries=self.count,
        )  # fmt: skip
        code = self.ranks.keep_largest(code, sae.k * (len(x) if across_batch else 1))
        return code, None if aux is None else self.ranks.keep_largest(aux, sae.cfg.aux_k), None

    def _decode(
        self, code: SparseCode, W_dec: Tensor, target: Tensor, mask_rows: Tensor | None, mean: Tensor | None
    ) -> Decoded:
        """Residual, and what loss and gradients need of it.

        With g the groups between the ends of a Matryoshka dictionary's prefixes and r_g the residual of the g-th prefix, the
        loss is mean_g |r_g|^2 / N. An entry of group g sees sum_{h >= g} r_h / G in place of the residual."""
        b_dec = self.stacked["b_dec"]
        if self.ends is None:
            parts = self._reconstruct(code, W_dec, b_dec, target, mean, in_parts=True)
            return Decoded(code, mask_rows, parts.residual, parts.residual, parts)
        grouped_code, _ = code.grouped(self.ends)
        residuals = matryoshka_residuals(self._decode_all_ranks, grouped_code, W_dec, b_dec[0], target)
        squared_errors = residuals.square().sum(-1)
        entry_residuals = (residuals.flip(0).cumsum(0).flip(0) / len(self.ends)).flatten(0, 1).to(target.dtype)
        projection = decode_values_grad(grouped_code, W_dec, entry_residuals)
        parts = Reconstruction(entry_residuals, squared_errors.view(1, -1), projection[None])
        mask_rows = None if mask_rows is None else mask_rows.repeat(len(self.ends))
        return Decoded(grouped_code, mask_rows, residuals[-1].to(target.dtype), entry_residuals, parts)

    def _loss(
        self, entries: EntryLoss, pos: Tensor, n_positions: int
    ) -> tuple[Tensor, PositionSums, Tensor | None, float | Tensor]:
        """The loss without AuxK [S], sums per position [S, T], the spread [S] if it is known, and the factor of L1 or L0 in
        the loss."""
        s, n, loss = self.count, len(pos), None
        if self.ends is not None:
            squared_errors, l1, l0 = (sums.view(len(self.ends), n) for sums in entries[:3])
            loss = squared_errors.mean(0).view(s, n).sum(1) / n
            entries = entries._replace(squared_error=squared_errors[-1], l1=l1.sum(0), l0=l0.sum(0))
        sums, squared_error, spread = batch_sums(entries, pos, n_positions, s)
        for position_sums in (sums.l1, sums.l0):
            self.ranks.sum_(position_sums)
        loss, penalty = squared_error / n if loss is None else loss, self.sae.sparsity_coefficient / n
        if self.sae.cfg.activation in ("relu", "jumprelu"):
            loss = loss + penalty * (sums.l1 if self.sae.cfg.activation == "relu" else sums.l0).sum(1)
        return loss, sums, spread, penalty

    def _aux(
        self, aux: SparseCode, dead: Tensor, W_dec: Tensor, residual: Tensor, target: Tensor, mask: Mask | None,
        mask_rows: Tensor | None,
    ) -> tuple[Tensor, Contribution]:  # fmt: skip
        """AuxK's loss [S] and what it contributes to the gradients."""
        s, n = self.count, len(target)
        reconstruction = self._reconstruct(aux, W_dec, torch.zeros_like(self.stacked["b_dec"]), residual)
        any_dead = self.ranks.sum_(dead.sum(1, keepdim=True)) > 0
        weight = self.sae.aux_weight(target, residual.view(s, n, -1), any_dead)
        scale = -2 * weight.repeat_interleave(n)
        scale = scale[aux.rows] if aux.ragged else scale[:, None]
        active, decoder_weights = aux.values > 0, scale * aux.values
        weights = EntryWeights(
            scale * reconstruction.projection * active, decoder_weights, decoder_weights * reconstruction.projection
        )
        contribution = self._contribution(aux, reconstruction.residual, weights, mask, mask_rows)
        return weight * reconstruction.squared_error.view(s, n).sum(1), contribution

    def _reconstruct(
        self, code: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor, mean: Tensor | None = None, *,
        in_parts: bool = False,
    ) -> Reconstruction:  # fmt: skip
        """`reconstruct`, from the latents of all ranks, and by dense products if `dense`; then without the spread."""
        if self.ranks.size == 1 and not self.dense:
            return reconstruct(code, W_dec, b_dec, target, mean=mean, in_parts=in_parts)
        if self.dense:
            whole = self._reconstruct_densely(code, W_dec, b_dec, target)
        else:
            zeros = target.new_zeros((1, target.shape[1]), dtype=torch.float32).expand(len(target), -1)
            residual = target - b_dec + self._decode_all_ranks(code, W_dec, torch.zeros_like(b_dec), target=zeros)
            squared_error = residual.square().sum(1)
            residual = residual.to(target.dtype)
            whole = Reconstruction(residual, squared_error, decode_values_grad(code, W_dec, residual))
        if not in_parts:
            return whole
        return Reconstruction(whole.residual, whole.squared_error[None], whole.projection[None])

    def _reconstruct_densely(self, code: SparseCode, W_dec: Tensor, b_dec: Tensor, target: Tensor) -> Reconstruction:
        s, (f, d) = self.count, (self.sae.cfg.d_sae, target.shape[1])
        centred_target, W_dec = target.view(-1, code.n_tokens // s, d) - b_dec.view(s, 1, d), W_dec.view(s, f, d)
        residual = torch.baddbmm(
            centred_target.to(target.dtype), dense_values(code, code.values, s, self.dtype), W_dec, alpha=-1
        )
        projection = torch.bmm(residual, W_dec.mT).flatten()[code.rows * f + code.live(code.indices) % f]
        squared_error = torch.linalg.vector_norm(residual, dim=2, dtype=torch.float32).square()
        return Reconstruction(residual.flatten(0, 1), squared_error.flatten(), code.live(projection.float()))

    def _decode_all_ranks(self, code: SparseCode, W_dec: Tensor, b_dec: Tensor, *, target: Tensor) -> Tensor:
        """`decode` from the latents of all ranks, for a `b_dec` and a `target` of zeros."""
        return self.ranks.sum_(decode(code, W_dec, b_dec, target=target))

    def _contribution(
        self, code: SparseCode, residual: Tensor, entries: EntryLoss | EntryWeights, mask: Mask | None,
        mask_rows: Tensor | None, l1: float | Tensor = 0.0, band: Band | None = None,
    ) -> Contribution:  # fmt: skip
        """What a code contributes to the gradients. `entries` has the gradient of the squared error with respect to its
        values, `l1` is that of the penalty on the values of a relu dictionary."""
        dmask, has_learned_mask, dpre = None, self.sae.mask.logits is not None, entries.dvalues
        dmask_entries = None
        if band is not None:
            dpre, _ = band.gradients(entries.dvalues, None)
            dmask_entries = entries.dvalues * band.pre * band.is_open if has_learned_mask else None
        else:
            if self.sae.cfg.activation == "relu":
                dpre = dpre + l1 * (code.values > 0)
            if mask is not None and mask_rows is not None:
                gate = gate_of(code, mask, mask_rows)
                dmask_entries = torch.where(code.values > 0, dpre * code.values / gate, 0) if has_learned_mask else None
                dpre = dpre * gate
        if dmask_entries is not None and isinstance(mask, Tensor) and mask_rows is not None:
            dmask = mask_gradient(code, dmask_entries, mask, mask_rows)
        return Contribution(code, residual, entries.decoder_weights, dpre, entries.along, dmask)
