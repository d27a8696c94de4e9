"""Consistency between a dictionary's codes at two layers."""

from typing import Any

from pydantic import Field
from torch import Tensor

from ..engine.config import Count, SAEConfig
from ..engine.parts import BatchView, Part, PartSettings, part
from ..engine.registry import find
from .number_types import Weight
from .similarity import sample_indices

TINY = 1e-12
ENCODING = ("input", "pre", "acts", "latents")  # methods that change codes


def to_units_of(x: Tensor, second: Tensor) -> Tensor:
    """Shift and scale `second` [N, D] to the mean of x, and to x's mean squared distance from it."""
    mean, second_mean = x.mean(0), second.mean(0)
    spread, second_spread = ((values - center).square().sum() for values, center in ((x, mean), (second, second_mean)))
    return mean + (second - second_mean) * (spread / second_spread.clamp_min(TINY)).sqrt()


@part("cross_layer")
class CrossLayer(Part):
    """The same token has the same latents at two layers (E9; needs `stream.second`).

        consistency  consistency D mean_n |f(x_n) - f(x'_n)|^2 / mean_n (|f(x_n)|^2 + |f(x'_n)|^2)
        alignment    alignment D (1 - cos(G, G')),   G = sum_n f(x_n)^T (x_n - x_hat_n) [F, D],  G' of x' likewise

    x' are the activations at the second hook, shifted and scaled to x's mean and spread over the batch. f(x') uses the
    same encoder, mask, parts and selection. -2 G is the gradient of the squared error with respect to W_dec. It is
    never formed: <G, G'> = sum_nm (f_n . f'_m)(r_n . r'_m), with r = x - x_hat, needs only [n, n], over `tokens` tokens
    drawn from the batch. Decided here: 0.1 weights the consistency; its denominator is a constant, which makes it a
    share of its maximum; the gradient is that with respect to W_dec; the weight of the alignment; x' is converted to
    x's units.
    """

    reads = frozenset({"f", "second"})

    class Settings(PartSettings):
        consistency: Weight = Field(default=0.1, description="Weight of the difference between codes, in units of D.")
        alignment: Weight = Field(default=0.01, description="Weight of 1 - cosine of decoder gradients, in units of D.")
        tokens: Count = Field(default=256, description="Tokens drawn from each batch for both penalties.")

    @classmethod
    def check(cls, settings: Any, sae: SAEConfig) -> None:
        for part_class in (find(section["kind"]) for section in sae.parts):
            if "rows" in part_class.reads and any(
                getattr(part_class, method) is not getattr(Part, method) for method in ENCODING
            ):
                raise ValueError(
                    f"parts: cross_layer is not allowed with {part_class.kind}, which needs whole rows; it samples tokens"
                )

    def penalty(self, batch: BatchView) -> Tensor:
        sae, x = batch.sae, batch.x.to(batch.f.dtype)
        tokens = sample_indices(len(x), self.settings.tokens, batch)
        x, second = x[tokens], to_units_of(x, batch.second.to(x.dtype))[tokens]
        f, f2 = batch.f[tokens], sae.latents_of(second.to(batch.x.dtype), batch.pos[tokens])
        size = (f.square().sum() + f2.square().sum()).detach().clamp_min(TINY)
        consistency = (f - f2).square().sum() / size
        r, r2 = x - (f @ sae.W_dec + sae.b_dec), second - (f2 @ sae.W_dec + sae.b_dec)
        product, first_square, second_square = (
            (a @ b.T * (c @ d.T)).sum() for a, b, c, d in ((f, f2, r, r2), (f, f, r, r), (f2, f2, r2, r2))
        )
        cosine = product / (first_square.clamp_min(TINY) * second_square.clamp_min(TINY)).sqrt()
        self.figures = {"consistency": consistency.detach(), "cosine": cosine.detach()}
        return self.cfg.d_in * (self.settings.consistency * consistency + self.settings.alignment * (1 - cosine))
