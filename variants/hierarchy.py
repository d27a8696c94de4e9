"""Levels and groups of latents, gated per token by a router."""

import math
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ..engine.config import Count, SAEConfig
from ..engine.metrics import plain
from ..engine.parts import UNSET, BatchView, Part, PartSettings, part
from .number_types import Fraction, Weight
from .similarity import sample_indices


def widths(n: int, blocks: int) -> list[int]:
    """Sizes of `blocks` contiguous blocks of n latents, as equal as possible."""
    ends = [n * i // blocks for i in range(blocks + 1)]
    return [b - a for a, b in pairwise(ends)]


def gated(f: Tensor, gates: Tensor, sizes: list[int]) -> Tensor:
    """Multiply each block of latents of f [N, F] by its gate [N, blocks]."""
    return torch.cat([block * gates[:, i, None] for i, block in enumerate(f.split(sizes, 1))], 1)


def outputs(batch: BatchView, sizes: list[int]) -> list[Tensor]:
    """The reconstruction f W_dec [N, D] of each block of latents alone."""
    blocks = zip(batch.f.split(sizes, 1), batch.sae.W_dec.split(sizes, 0), strict=True)
    return [f @ W_dec for f, W_dec in blocks]


def centred_target(batch: BatchView) -> Tensor:
    """target - b_dec [N, D], a constant: what the latents reconstruct together."""
    return (batch.target.to(batch.sae.b_dec.dtype) - batch.sae.b_dec).detach()


def centred(batch: BatchView) -> Tensor:
    """x - b_dec [N, D], the input of routers. b_dec is a constant here."""
    return batch.x.to(batch.sae.b_dec.dtype) - batch.sae.b_dec.detach() * batch.sae.unit


@part("causal_levels")
class CausalLevels(Part):
    """Levels of latents behind a soft router, with causal latents separated from the others (E4).

    The F latents form `levels` contiguous blocks, each with its own rows of W_enc. A router gates them after the mask:

        r_n = softmax((x_n - b_dec) R + c) [N, L]        f_level <- L r_nl f_level        R = 0 at the start: every gate is 1

    Three penalties, D being |x|^2:

        entropy      D (1 - H(mean_n r_n) / log L)       levels are used equally over the batch
        consistency  mean_l mean_n |e_{l-1} - f_l W_dec_l|^2,  e_0 = x - b_dec,  e_l = e_{l-1} - f_l W_dec_l
        separation   D mean_{i, j} relu(cos(W_dec_i, W_dec_j)),  i among the causal latents and j among the others

    Decided here: entropy is that of the mean. A single token's H(r_n) is free, so that routing may be sharp without
    always choosing the same level. A level is consistent if it alone explains what earlier levels left. That remainder
    is a constant, so later levels don't change earlier ones. A latent's causality is |f_j dL/df_j|, L the squared
    error, averaged over up to `sampled` tokens of the batch and over steps (EMA). The upper half of the latents are the
    causal ones. Cosines are between `sampled` / 2 latents of each half. The log gives no weights. They are small here.
    """

    reads = frozenset({"f"})

    class Settings(PartSettings):
        levels: int = Field(default=3, ge=2, description="Number of levels, contiguous blocks of latents, at most F.")
        entropy: Weight = Field(default=0.01, description="Weight of the unequal use of levels, in units of D.")
        consistency: Weight = Field(default=0.1, description="Weight of each level's error on what earlier ones left.")
        separation: Weight = Field(default=0.1, description="Weight of cosines between the halves, in units of D.")
        decay: Fraction = Field(default=0.95, description="Decay per step of the mean of each latent's causality.")
        sampled: int = Field(default=256, ge=2, description="Tokens, and latents of both halves, that a step draws.")

    def build(self, generator: torch.Generator) -> None:
        self.sizes = widths(self.cfg.d_sae, self.settings.levels)
        self.router = nn.Parameter(torch.zeros(self.cfg.d_in, self.settings.levels))
        self.router_bias = nn.Parameter(torch.zeros(self.settings.levels))
        self.causality = nn.Buffer(torch.zeros(self.cfg.d_sae))
        self._log_routing: Tensor = UNSET  # log r of the batch in training, from `latents` to `penalty`

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        if settings.levels > sae.d_sae:
            raise ValueError(f"levels: {settings.levels} is not allowed; it must be at most d_sae ({sae.d_sae})")

    def latents(self, f: Tensor, batch: BatchView) -> Tensor:
        log_routing = torch.log_softmax(centred(batch) @ self.router + self.router_bias, 1)
        if batch.training:
            self._log_routing = log_routing
        return gated(f, self.settings.levels * log_routing.exp(), self.sizes)

    def penalty(self, batch: BatchView) -> Tensor:
        log_routing, self._log_routing = self._log_routing, UNSET
        routing, most = log_routing.exp(), math.log(self.settings.levels)
        mean = routing.mean(0)
        entropy_of_mean = -torch.xlogy(mean, mean).sum()
        entropy_of_token = -(routing * log_routing).sum(1).mean()
        reported = {"entropy": entropy_of_token, "entropy_of_mean": entropy_of_mean, "routing": mean}
        self.figures = {name: value.detach() for name, value in reported.items()}
        remainder, consistency = centred_target(batch), mean.new_zeros(())
        for x_hat in outputs(batch, self.sizes):
            consistency = consistency + (remainder - x_hat).square().sum(1).mean()
            remainder = remainder - x_hat.detach()
        entropy = self.cfg.d_in * (1 - entropy_of_mean / most)
        return (
            self.settings.entropy * entropy
            + self.settings.consistency * consistency / self.settings.levels
            + self.settings.separation * self.cfg.d_in * self._likeness(batch)
        )

    def _likeness(self, batch: BatchView) -> Tensor:
        """Mean positive cosine between decoder rows of the two halves."""
        order, half = self.causality.argsort(descending=True, stable=True), self.cfg.d_sae // 2
        rows = []
        for half_order in (order[:half], order[self.cfg.d_sae - half :]):
            chosen = half_order[sample_indices(half, self.settings.sampled // 2, batch)]
            rows.append(nn.functional.normalize(batch.sae.W_dec[chosen], dim=1))
        return torch.relu(rows[0] @ rows[1].T).mean()

    def after(self, batch: BatchView) -> None:
        tokens = sample_indices(len(batch.f), self.settings.sampled, batch)
        gradient = -2 * batch.residual[tokens].to(batch.f.dtype) @ batch.sae.W_dec.T
        self.causality.lerp_((batch.f[tokens] * gradient).abs().mean(0), 1 - self.settings.decay)


@part("level_attention")
class LevelAttention(Part):
    """Attention gates groups of latents, level by level (E7).

    The F latents form L = `levels` contiguous levels of G = `groups` contiguous groups. u_nlg is the mean activation of
    a group after the mask:

        a_nlg = mean_h softmax_g(q_nh . k_lgh / sqrt(d) + log m_lg + b_nlg)      q = (x - b_dec) Q, H = `heads`, d = `width`
        routed   u'_nlg = G a_nlg u_nlg,   z_nlg = u'_nlg p_lg                    p_lg [H d]: a group's summary
        across   c_nl = sum_g softmax_g(s_nl Q' . z_n,l-1,g K' / sqrt(H d) + log m_l-1,g) z_n,l-1,g,   s_nl = sum_g z_nlg
        gate_nlg = G a_nlg * 2 sigmoid(c_nl V_l)_g                               for the first level without the last factor
        f_lg <- gate_nlg f_lg

    m_lg = sigmoid(logit) is the learned attention mask: how far group g takes part in its level, both as a target of
    routing and as a source for the next level. V = 0 at the start.

    Adjacency: A [L G, L G] is the EMA of mean_n s_n^T s_n, where s_n is u_n over its sum. With rows normalised to sum 1
    it is the share of other groups when a group is active. b_n = adjacency * log(L G (s_n A) + 0.01), a constant,
    favours groups that co-occur with those active on this token. A starts uniform: b is equal for all.

    Penalty: the reconstructions by levels 0 to l alone are also trained to match x,

        weight * mean_{l < L - 1} mean_n |x - b_dec - sum_{m <= l} f_m W_dec_m|^2

    Decided here: groups per level, their mean activation as the group's state, and all sizes except 3 levels and 8
    heads.
    """

    reads = frozenset({"f"})

    class Settings(PartSettings):
        levels: int = Field(default=3, ge=2, description="Number of levels, contiguous blocks of latents.")
        groups: int = Field(default=8, ge=2, description="Groups in each level. levels * groups is at most F.")
        heads: Count = Field(default=8, description="Number of attention heads.")
        width: Count = Field(default=16, description="Width of each head.")
        adjacency: Weight = Field(default=0.1, description="Weight of the bias to groups that occur with active ones.")
        weight: Weight = Field(default=0.1, description="Weight of the squared error of the first levels alone.")
        decay: Fraction = Field(default=0.95, description="Decay per step of the mean adjacency of groups.")

    def build(self, generator: torch.Generator) -> None:
        L, G, H, d = self.settings.levels, self.settings.groups, self.settings.heads, self.settings.width

        def normal(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(shape, generator=generator))

        self.sizes = widths(self.cfg.d_sae, L * G)
        self.level_sizes = [sum(self.sizes[G * level : G * (level + 1)]) for level in range(L)]
        self.query = normal(self.cfg.d_in, H * d, scale=self.cfg.d_in**-0.5)
        self.keys = normal(L, G, H, d, scale=0.1)
        self.mask_logits = nn.Parameter(torch.zeros(L, G))
        self.summary = normal(L, G, H * d, scale=1.0)
        self.across_query = normal(H * d, H * d, scale=(H * d) ** -0.5)
        self.across_key = normal(H * d, H * d, scale=(H * d) ** -0.5)
        self.across_gate = nn.Parameter(torch.zeros(L - 1, H * d, G))
        self.together = nn.Buffer(torch.full((L * G, L * G), (L * G) ** -2.0))
        self._shares: Tensor = UNSET  # s of the batch in training, from `latents` to `after`

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        if settings.levels * settings.groups > sae.d_sae:
            raise ValueError(
                f"groups: {settings.groups} is not allowed with {settings.levels} levels; "
                f"levels * groups must be at most d_sae ({sae.d_sae})"
            )

    def latents(self, f: Tensor, batch: BatchView) -> Tensor:
        means = torch.stack([block.mean(1) for block in f.split(self.sizes, 1)], 1)
        shares = (means / means.sum(1, keepdim=True).clamp_min(1e-6)).detach()
        gates = self._gates(centred(batch), means, shares)
        if batch.training:
            self._shares = shares
        return gated(f, gates.flatten(1), self.sizes)

    def _gates(self, x: Tensor, means: Tensor, shares: Tensor) -> Tensor:
        """Gates [N, L, G] from x [N, D], the groups' mean activations and their shares [N, L G]."""
        L, G, H, d = (getattr(self.settings, name) for name in ("levels", "groups", "heads", "width"))
        log_mask = nn.functional.logsigmoid(self.mask_logits)
        adjacency = self.together / self.together.sum(1, keepdim=True).clamp_min(1e-12)
        bias = self.settings.adjacency * torch.log(L * G * (shares @ adjacency) + 0.01)
        scores = torch.einsum("nhd,lghd->nhlg", (x @ self.query).unflatten(1, (H, d)), self.keys) / math.sqrt(d)
        scores = scores + log_mask + bias.view(-1, 1, L, G)
        gates = G * scores.softmax(-1).mean(1)
        z = (gates * means.view(-1, L, G))[..., None] * self.summary
        queries, keys = z[:, 1:].sum(2) @ self.across_query, z[:, :-1] @ self.across_key
        across = torch.einsum("nlc,nlgc->nlg", queries, keys) / math.sqrt(H * d) + log_mask[:-1]
        context = torch.einsum("nlg,nlgc->nlc", across.softmax(-1), z[:, :-1])
        change = 2 * torch.sigmoid(torch.einsum("nlc,lcg->nlg", context, self.across_gate))
        return torch.cat([gates[:, :1], gates[:, 1:] * change], 1)

    def penalty(self, batch: BatchView) -> Tensor:
        remainder, squared_errors = centred_target(batch), []
        for x_hat in outputs(batch, self.level_sizes)[:-1]:
            remainder = remainder - x_hat
            squared_errors.append(remainder.square().sum(1).mean())
        self.figures = {"squared_error_of_levels": torch.stack(squared_errors).detach()}
        return self.settings.weight * torch.stack(squared_errors).mean()

    def after(self, batch: BatchView) -> None:
        shares, self._shares = self._shares, UNSET
        self.together.lerp_(shares.T @ shares / len(shares), 1 - self.settings.decay)

    def report(self) -> dict[str, Any]:
        return {"masks": plain(torch.sigmoid(self.mask_logits).mean(1))} | super().report()
