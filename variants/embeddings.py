"""Position embeddings for the encoder, at one scale and at several, and normalisation by position."""

from itertools import pairwise
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..engine.config import Count
from ..engine.parts import BatchView, Part, PartSettings, RowLayout, part
from ..kernels.numerics import sum_by
from .number_types import Fraction, Weight
from .running_mean import Averaging, RunningMean, means


@part("position_embedding")
class PositionEmbedding(Part):
    """The encoder sees x + P[pos], P [T, D] learned (A5 to A8).

    P starts as N(0, scale^2), small compared to x, whose entries are about 1.
    """

    class Settings(PartSettings):
        scale: Weight = Field(default=0.1, description="Initial standard deviation. Entries of x are about 1.")

    def build(self, generator: torch.Generator) -> None:
        self.embedding = nn.Parameter(
            self.settings.scale * torch.randn(self.positions, self.cfg.d_in, generator=generator)
        )

    def input(self, x: Tensor, batch: BatchView) -> Tensor:
        return x + self.embedding[batch.sae.mask.rows(batch.pos)]


SCALES = 3  # local, medium, global


def widths(positions: int) -> tuple[int, ...]:
    """The window of each scale in positions: 1, T / 16 (at least 2) and T / 4 (at least 4), rounded up."""
    return 1, max(2, -(-positions // 16)), max(4, -(-positions // 4))


def joined(progress: float) -> list[float]:
    """How far each scale has been added: medium over a run's second quarter, global over its third."""
    return [1.0, *(min(1.0, max(0.0, 4 * progress - s)) for s in range(1, SCALES))]


def thirds(f: Tensor) -> list[Tensor]:
    """Views of f [N, F] by scale: latents j with 3 j // F = s."""
    ends = [-(-s * f.shape[1] // SCALES) for s in range(SCALES + 1)]
    return [f[:, start:end] for start, end in pairwise(ends)]


@part("multi_scale")
class MultiScale(Part):
    """The encoder sees x + sum_s mix_s[pos] E_s[pos // w_s], position embeddings of three scales (A9).

        mix_s[p] = joined_s a_s[p] u_s / (sum over scales of the same)     a[p] = softmax(logits[p]), logits [T, 3]

    E_s [T / w_s, D] are learned: local, medium and global (`widths`). Scales are added one after the other (`joined`).
    u_s is the running share of the activation that the latents of scale s have (`thirds`), at least 0.01, so the mix
    adapts to the latents.
    """

    reads = frozenset({"f"})

    class Settings(PartSettings):
        scale: Weight = Field(default=0.1, description="Initial standard deviation. Entries of x are about 1.")
        decay: Fraction = Field(default=0.99, description="Decay per step of each scale's mean share of activation.")

    def build(self, generator: torch.Generator) -> None:
        self.widths = widths(self.positions)
        self.embeddings = nn.ParameterList(
            self.settings.scale * torch.randn(-(-self.positions // width), self.cfg.d_in, generator=generator)
            for width in self.widths
        )
        self.logits = nn.Parameter(torch.zeros(self.positions, SCALES))
        self.share = nn.Buffer(torch.full((SCALES,), 1 / SCALES))

    def mix(self, progress: float) -> Tensor:
        """[T, 3]"""
        weights = torch.softmax(self.logits, 1) * self.share.clamp_min(0.01)
        weights = torch.stack(
            [share * column for share, column in zip(joined(progress), weights.unbind(1), strict=True)], 1
        )
        return weights / weights.sum(1, keepdim=True)

    def input(self, x: Tensor, batch: BatchView) -> Tensor:
        position, mix = torch.arange(self.positions, device=x.device), self.mix(batch.progress)
        embedded = [embedding[position // width] for embedding, width in zip(self.embeddings, self.widths, strict=True)]
        embedded = (mix[:, :, None] * torch.stack(embedded, 1)).sum(1)
        return x + embedded[batch.sae.mask.rows(batch.pos)]

    def after(self, batch: BatchView) -> None:
        activity = torch.stack([of_scale.sum() for of_scale in thirds(batch.f.detach())])
        total = activity.sum()
        share = torch.where(total > 0, activity / total, self.share)
        self.share.lerp_(share.to(self.share.dtype), 1 - self.settings.decay)

    def report(self) -> dict[str, Any]:
        return {"share": [float(value) for value in self.share]}


def window_means(x: Tensor, rows: RowLayout, width: int) -> Tensor:
    """Mean of x over the tokens of each token's row and window [N, D]. Windows start at multiples of `width`."""
    if width == 1:
        return x
    window = rows.pos // width
    begins = (rows.number.diff() != 0) | (window.diff() != 0)
    window_index = torch.cat([begins.new_zeros(1), begins]).cumsum(0)
    total = sum_by(window_index, x, len(x))
    return (total / sum_by(window_index, torch.ones_like(x[:, :1]), len(x)).clamp_min(1))[window_index]


@part("scale_targets")
class ScaleTargets(Part):
    """The latents of each scale alone reconstruct the activations at that scale (A9).

        penalty = coefficient * sum_s joined_s mean_n |mean_w(x)_n - b_dec - f_s W_dec_s|^2

    f_s is the third of the latents of scale s (`thirds`), and mean_w(x) the mean of x over the token's window of w_s
    positions in its row (`window_means`; w_s and joined_s as in `multi_scale`). Decided here: adjacent windows, those
    of the embeddings; `coefficient` 0.1, because latents whose sum reconstructs x cannot meet all three targets.
    """

    reads = frozenset({"f", "rows"})
    least_latents = SCALES

    class Settings(PartSettings):
        coefficient: Weight = Field(default=0.1, description="Weight of the squared error of each scale's latents.")

    def penalty(self, batch: BatchView) -> Tensor | None:
        sae, x = batch.sae, batch.x
        loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        decoders = [W.T for W in thirds(sae.W_dec.T)]
        scales = zip(widths(self.positions), joined(batch.progress), thirds(batch.f), decoders, strict=True)
        for width, share, f, W_dec in scales:
            if share > 0:
                target = window_means(x.to(loss.dtype), batch.rows, width)
                x_hat = torch.addmm(sae.b_dec.to(x.dtype), f.to(x.dtype), W_dec.to(x.dtype))
                loss = loss + share * (target - x_hat).square().sum() / len(x)
        return self.settings.coefficient * loss


@part("residual_position")
class ResidualPosition(Averaging):
    """Pre-activations are normalised by position, and a gated prediction from the position is added (A10).

        pre_n  <- c_p pre_n + sigmoid(a * s_n + c) * r_p     p = pos_n,  r = P R,  P [T, d_p], R [d_p, F],  a, c [F]

    Normalisation: c_p = gain_p * std / std_p. std_p^2 is a running mean, over the tokens at p, of the variance of pre_n
    over latents, and std^2 its mean over positions. gain = exp(log_gain [T]) is learned. Gate: s_n is the root mean
    square of c_p pre_n, a constant. It starts with a = 0 and c = -2, so that an eighth of r passes.

    The pathway of P and R is isolated: r is a constant above, and P and R learn only from a term of their own, in which
    c_p pre is a constant. In it r_p predicts how pre-activations at p differ from those at all positions:

        penalty = D / F * mean_n (|r_p - (c_p pre_n - mean over the batch)|^2 + regulariser * |r_p|^2)

    up to a constant (it is computed from means at positions, [T, F]). R starts at 0, so that r has no effect at first.
    Decided here: the deviation in place of the mean itself, which b_enc models; the gain, without which norms that
    differ by position could not be reconstructed; a gate per latent.
    """

    class Settings(PartSettings):
        width: Count = Field(default=32, description="d_p, the width of the position embedding.")
        regulariser: Weight = Field(default=0.01, description="Weight of |r_p|^2 in the pathway's own loss.")
        decay: Fraction = Field(default=0.99, description="Decay per step of the mean variance at each position.")

    def build(self, generator: torch.Generator) -> None:
        self.embedding = nn.Parameter(torch.randn(self.positions, self.settings.width, generator=generator))
        self.map = nn.Parameter(torch.zeros(self.settings.width, self.cfg.d_sae))
        self.log_gain = nn.Parameter(torch.zeros(self.positions))
        self.slope = nn.Parameter(torch.zeros(self.cfg.d_sae))
        self.offset = nn.Parameter(torch.full((self.cfg.d_sae,), -2.0))
        self.variance = RunningMean(self.settings.decay, self.positions)
        self._term: Tensor | None = None

    def pre(self, pre: Tensor, batch: BatchView) -> Tensor:
        mask_position = batch.sae.mask.rows(batch.pos)
        factor = self.log_gain.exp() * self.variance.relative().clamp_min(1e-4).rsqrt()
        normal = pre * factor[mask_position][:, None]
        r = self.embedding @ self.map
        if batch.training:
            self._set_term(pre.detach(), normal.detach(), r, mask_position)
        size = normal.detach().square().mean(1, keepdim=True).sqrt()
        return torch.addcmul(
            normal, torch.sigmoid(torch.addcmul(self.offset, size, self.slope)), r.detach()[mask_position]
        )

    def _set_term(self, pre: Tensor, normal: Tensor, r: Tensor, mask_position: Tensor) -> None:
        """Set the pathway's term, and the running variances. pre and normal [N, F] are constants."""
        count = sum_by(mask_position, pre.new_ones(len(pre)), self.positions)
        self.variance.later(*means(sum_by(mask_position, pre.var(1, correction=0), self.positions), count))
        deviation = sum_by(mask_position, normal, self.positions) / count.clamp_min(1)[:, None] - normal.mean(0)
        of_position = (r - deviation).square().sum(1) + self.settings.regulariser * r.square().sum(1)
        self._term = self.cfg.d_in / self.cfg.d_sae * (count * of_position).sum() / len(pre)

    def penalty(self, batch: BatchView) -> Tensor | None:
        term, self._term = self._term, None
        return term
