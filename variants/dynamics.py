"""Along a row of text: convolutions and attention before the encoder, and penalties on changes from token to token."""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..engine.config import Count, SAEConfig
from ..engine.parts import BatchView, Part, PartSettings, RowLayout, part
from .number_types import Factor, Weight
from .similarity import sample_indices

SMALL = 0.02  # initial taps of convolutions; the token itself has weight 1
TINY = 1e-6  # variances of codes are 0 or of the order of 1


def packed(rows: RowLayout) -> RowLayout:
    """Move the tokens of each row together to its beginning. Columns without a token come last, so that causal ops
    never see them.
    """
    number = rows.number
    n_rows, length = rows.shape
    first = torch.searchsorted(number, torch.arange(n_rows, device=number.device))
    layout = RowLayout(number, torch.arange(len(number), device=number.device) - first[number])
    layout.__dict__["shape"] = n_rows, length  # large enough, and known without waiting for the device
    return layout


def follows(rows: RowLayout) -> Tensor:
    """float [N - 1]: 1 if token n + 1 is at the next position of the same row as token n."""
    return ((rows.number.diff() == 0) & (rows.pos.diff() == 1)).float()


def mean_of(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of values where `counted` is 1; 0 if it is 0 everywhere."""
    return (values * counted).sum() / counted.sum().clamp_min(1)


@part("dilated_conv")
class DilatedConv(Part):
    """The encoder sees x after causal depth-wise convolutions along the row, one per dilation d, each a residual (D1,
    D2).

        y_t <- y_t + sum_{k < kernel} w_dk * y_{t - k d}              w_d [kernel, D], N(0, 0.02^2) at the start; y = x first

    Tokens before the row's first, and columns without a token, are 0 at every layer. Decided here: causal, so that a
    code doesn't depend on later tokens; in sequence, so that three layers of kernel 3 and dilations 1, 2, 4 look back
    14 tokens; linear, because the logs name no nonlinearity. The reconstruction target is x itself.
    """

    reads = frozenset({"rows"})

    class Settings(PartSettings):
        dilations: tuple[Count, ...] = Field(
            default=(1, 2, 4), min_length=1, description="Dilation of each convolution in positions, in order."
        )
        kernel: int = Field(default=3, ge=2, description="Taps of each convolution, its own token included.")

    def build(self, generator: torch.Generator) -> None:
        taps = len(self.settings.dilations), self.settings.kernel, self.cfg.d_in
        self.taps = nn.Parameter(SMALL * torch.randn(taps, generator=generator))

    def input(self, x: Tensor, batch: BatchView) -> Tensor:
        y, kept = batch.rows.spread(x), batch.rows.kept[:, :, None]
        length = y.shape[1]
        for dilation, taps in zip(self.settings.dilations, self.taps, strict=True):
            padding = dilation * (self.settings.kernel - 1)
            padded = nn.functional.pad(y, (0, 0, padding, 0))
            for k, tap in enumerate(taps):
                first = padding - k * dilation
                y = torch.addcmul(y, padded[:, first : first + length], tap)
            y = y * kept
        return batch.rows.gather(y)


@part("self_attention")
class SelfAttention(Part):
    """The encoder sees x plus causal multi-head self-attention along the row (E5).

        x_t <- x_t + sum_{s <= t} softmax_s(q_t . k_s / sqrt(d)) v_s W_o          q, k, v = layer_norm(x) W_qkv, in each head

    W_qkv [D, 3 H d], W_o [H d, D] with H = `heads` and H d about min(`width`, D), so that D = 2304 is affordable. W_o
    starts at a hundredth of the scale that preserves norms. Filtered tokens are not keys. Decided here: all sizes;
    causal attention, so that a code doesn't depend on later tokens; layer norm, because some tokens' norms are a
    hundred times others'; no position encoding. The reconstruction target is x itself.
    """

    reads = frozenset({"rows"})

    class Settings(PartSettings):
        heads: Count = Field(default=4, description="Number of attention heads, at most width and D.")
        width: Count = Field(
            default=256, description="Width of all heads together, at most D, rounded down to a multiple of heads."
        )

    def build(self, generator: torch.Generator) -> None:
        heads, D = self.settings.heads, self.cfg.d_in
        width = heads * (min(self.settings.width, D) // heads)
        self.W_qkv = nn.Parameter(torch.randn(D, 3 * width, generator=generator) / math.sqrt(D))
        self.W_o = nn.Parameter(0.01 * torch.randn(width, D, generator=generator) / math.sqrt(width))

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        most = min(settings.width, sae.d_in)
        if settings.heads > most:
            raise ValueError(f"heads: {settings.heads} is not allowed; it must be at most width and d_in ({most})")

    def input(self, x: Tensor, batch: BatchView) -> Tensor:
        rows = packed(batch.rows)
        qkv = nn.functional.layer_norm(x, x.shape[1:]) @ self.W_qkv
        heads = rows.spread(qkv).unflatten(2, (3, self.settings.heads, -1))  # [R, L, 3, H, d]
        q, k, v = (head.transpose(1, 2) for head in heads.unbind(2))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + rows.gather(attended.transpose(1, 2).flatten(2)) @ self.W_o


class _Projected(Part):
    """A penalty weight * D * term on u = f P, with P [F, h] random, N(0, 1 / h): |u| is about |f|. P is fixed, unless
    `is_learned`. `figure` names the term in reports."""

    reads = frozenset({"rows", "f"})
    is_learned, figure = False, "error"

    class Settings(PartSettings):
        weight: Weight = Field(default=0.01, description="Weight of the penalty, in units of D.")
        width: Count = Field(default=64, description="Width of the random projection of codes.")

    def build(self, generator: torch.Generator) -> None:
        h = self.settings.width
        gaussian = torch.randn(self.cfg.d_sae, h, generator=generator) / math.sqrt(h)
        self.projection = nn.Parameter(gaussian) if self.is_learned else nn.Buffer(gaussian)

    def projected(self, batch: BatchView) -> Tensor:
        """u [N, h], scaled to mean |u - mean u|^2 = 1, so that small codes don't make terms small."""
        u = batch.f @ self.projection
        return u / (u - u.mean(0)).square().sum(1).mean().clamp_min(TINY).sqrt()

    def weighted(self, term: Tensor) -> Tensor:
        """The penalty of a term, which the next report gives."""
        self.figures = {self.figure: term.detach()}
        return self.settings.weight * self.cfg.d_in * term


def _initialised(module: nn.Module, width: int, generator: torch.Generator) -> Any:
    """Initialise a module from the meta device as torch does, uniform within 1 / sqrt(width), without touching the
    global generator.
    """
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) / math.sqrt(width))
    return module


@part("velocity_gru")
class VelocityGRU(_Projected):
    """A two-layer GRU along the row predicts the change of codes (E5).

        u = f P [N, h],   v_t = u_{t+1} - u_t,   penalty = weight D sum_t |v_t - W GRU(u_1, ..., u_t)|^2 / sum_t |v_t|^2

    over tokens t with a next token t + 1. P is fixed and random, and size and speed cancel, so only predictable codes
    make the penalty small. Decided here: h = `width`, also in the GRU's layers, P, and the denominator. A filtered
    token is not a step of the GRU. "error" is the quotient: 1 for predicting no change.
    """

    def build(self, generator: torch.Generator) -> None:
        super().build(generator)
        h = self.settings.width
        self.gru = _initialised(nn.GRU(h, h, num_layers=2, batch_first=True, device="meta"), h, generator)
        self.head = _initialised(nn.Linear(h, h, device="meta"), h, generator)

    def penalty(self, batch: BatchView) -> Tensor:
        u, counted, rows = self.projected(batch), follows(batch.rows), packed(batch.rows)
        velocity = u[1:] - u[:-1]
        states, _ = self.gru(rows.spread(u))
        error = (velocity - self.head(rows.gather(states))[:-1]).square().sum(1)
        return self.weighted(mean_of(error, counted) / mean_of(velocity.square().sum(1), counted).clamp_min(TINY))


@part("temporal_consistency")
class TemporalConsistency(_Projected):
    """Codes change little from one token to the next (E5).

        u = f P,   penalty = weight D mean_t |u_{t+1} - u_t|^2 / (2 mean_n |u_n - mean u|^2)

    over tokens t with a next token t + 1. It is weight D if neighbours are no more alike than other tokens. Small codes
    don't make it small. Decided here: the scale, and P as in `velocity_gru`.
    """

    def penalty(self, batch: BatchView) -> Tensor:
        u = self.projected(batch)
        return self.weighted(mean_of((u[1:] - u[:-1]).square().sum(1), follows(batch.rows)) / 2)


@part("next_step")
class NextStep(_Projected):
    """An MLP predicts the next token's code (E6).

        u = f P,   penalty = weight D mean_t |u_{t+1} - W_2 relu(W_1 u_t + b_1) - b_2|^2 / mean_n |u_n - mean u|^2

    over tokens t with a next token t + 1; W_1 [2 h, h]. Decided here: P is fixed and random as in `velocity_gru`,
    because a learned one could select what is predictable; and one hidden layer. "error" is the quotient: 1 for
    predicting the mean.
    """

    def build(self, generator: torch.Generator) -> None:
        super().build(generator)
        h = self.settings.width
        self.hidden = _initialised(nn.Linear(h, 2 * h, device="meta"), h, generator)
        self.head = _initialised(nn.Linear(2 * h, h, device="meta"), 2 * h, generator)

    def penalty(self, batch: BatchView) -> Tensor:
        u = self.projected(batch)
        error = (u[1:] - self.head(torch.relu(self.hidden(u[:-1])))).square().sum(1)
        return self.weighted(mean_of(error, follows(batch.rows)))


@part("temporal_contrast")
class TemporalContrast(_Projected):
    """Codes of neighbouring tokens are distinguished from those of other rows (E6).

        z = f Q / |f Q|,   penalty = weight D mean_a -log(exp(z_a . z_{a+1} / tau) / sum_b exp(z_a . z_{b+1} / tau)) / log A

    Q [F, h] is learned. Anchors a are A = `anchors` tokens drawn from the batch, and count if they have a next token a
    + 1. b is a itself and the anchors of other rows. Decided here: h = `width`, tau = `temperature`, A, and log A,
    which makes the penalty about weight D by chance.
    """

    is_learned, figure = True, "loss"

    class Settings(_Projected.Settings):
        weight: Weight = Field(default=0.01, description="Weight of the contrastive loss, in units of D.")
        width: Count = Field(default=64, description="Width of the learned projection of codes.")
        temperature: Factor = Field(default=0.1, description="Divisor of cosines between projections in the softmax.")
        anchors: int = Field(default=256, ge=2, description="Tokens drawn from each batch as anchors.")

    def penalty(self, batch: BatchView) -> Tensor:
        z = nn.functional.normalize(batch.f @ self.projection, dim=1)
        anchors = sample_indices(len(z) - 1, self.settings.anchors, batch)
        row_number, counted = batch.rows.number[anchors], follows(batch.rows)[anchors]
        scores = z[anchors] @ z[anchors + 1].T / self.settings.temperature
        is_compared = (row_number[:, None] != row_number) & (counted > 0)  # only next tokens that exist
        is_compared.fill_diagonal_(True)
        scores = scores.masked_fill(~is_compared, -torch.inf)
        loss = mean_of(scores.logsumexp(1) - scores.diagonal(), counted)
        return self.weighted(loss / math.log(self.settings.anchors))
