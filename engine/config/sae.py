"""Settings of a dictionary and its mask over positions."""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ..errors import UserError
from ..registry import check, complete_settings
from ..setting_types import Config
from .base import Coefficient, Count, Latents, Positions, Temperature


class MaskConfig(Config):
    """Weights over positions: f = acts * mask[pos], with mask [T, F]."""

    SECTION = "sae.mask"

    kind: Literal["none", "random", "ranges", "windows", "soft", "gaussian"] = Field(
        default="none",
        description="Shape of the mask; none is 1 everywhere. Hard masks are on at a random share `fraction` of "
        "positions (random), in one of `ranges` equal intervals (ranges) or in an interval of `width` positions "
        "(windows). gaussian is exp(-(p - centre)^2 / (2 sigma^2)) with evenly spaced centres; soft is sigmoid(logits "
        "/ temperature) with learned logits.",
    )
    positions: Positions = Field(
        default=128,
        description="T, the number of positions that the mask covers. In a config file it defaults to stream.context.",
    )
    fraction: float = Field(
        default=0.5, ge=1e-6, le=1, description="Probability that a latent is on at a position, for random masks."
    )
    ranges: Positions = Field(
        default=4,
        description="Number of equal intervals of positions, for ranges masks. Each has an equal share of the latents.",
    )
    width: Positions | None = Field(
        default=None,
        description="Length of a latent's window in positions. Null: T / 4. Windows start at evenly spaced places, "
        "some of them before position 0, so that every position has the same number of latents.",
    )
    start: Literal["uniform", "normal", "random", "ranges", "windows"] = Field(
        default="uniform",
        description="Initial logits of a soft mask. uniform draws them from U(0, 1), normal from N(0, 1). random, "
        "ranges and windows make them 2 where that mask is on and -2 where it is off.",
    )
    temperature: Temperature = Field(
        default=1.0, description="Divisor of a soft mask's logits. A smaller divisor gives a harder mask."
    )
    temperature_end: Temperature | None = Field(
        default=None,
        description="Temperature at the end of the run, reached exponentially (soft masks). Null: constant.",
    )
    blend: bool = Field(
        default=False,
        description="Introduce the mask m gradually over the run, as 1 - s + s m. s is the sigmoid of a learned number "
        "plus a ramp from -6 to 6.",
    )
    sigma: Annotated[float, Field(ge=0.1, le=1e6)] | None = Field(
        default=None, description="Standard deviation of a gaussian mask in positions. Null: T / 8."
    )
    beyond: Literal["clamp", "wrap", "error"] = Field(
        default="clamp",
        description="Weights at positions from T on: those of the last position (clamp), those of the position modulo T "
        "(wrap), or an error.",
    )

    @model_validator(mode="after")
    def _check_shape(self) -> "MaskConfig":
        if "ranges" in self.shapes and self.ranges > self.positions:
            raise ValueError(f"ranges: {self.ranges} is not allowed; it must be at most positions ({self.positions})")
        if self.width is not None and self.width > self.positions:
            raise ValueError(f"width: {self.width} is not allowed; it must be at most positions ({self.positions})")
        if self.temperature_end is not None and self.kind != "soft":
            raise ValueError(f"temperature_end: not allowed with kind {self.kind}; it is for soft")
        if self.blend and self.kind == "none":
            raise ValueError("blend: true is not allowed with kind none; there is no mask to blend in")
        return self

    @property
    def shapes(self) -> tuple[str, str]:
        """The kind of mask, and the kind that a soft mask starts from."""
        return self.kind, self.start if self.kind == "soft" else ""

    @property
    def is_learned(self) -> bool:
        return self.kind == "soft" or self.blend

    def check_context(self, positions: int) -> None:
        """Raise UserError if the mask does not cover a context of `positions` and `beyond` is error."""
        if self.kind != "none" and self.beyond == "error" and positions > self.positions:
            allowed = f"it must be at least {positions}, unless sae.mask.beyond is clamp or wrap"
            raise UserError(f"sae.mask.positions: {self.positions} is not allowed; {allowed}")


class SAEConfig(Config):
    """Settings of a dictionary: f = activation((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec. With `d_out` it is
    a transcoder. W_enc [d_in, d_sae], W_dec [d_sae, d_out or d_in].

        SAEConfig(d_in=768, d_sae=16384, activation="batchtopk", k=32)
    """

    SECTION = "sae"

    d_in: Latents = Field(
        description="D, the width of the activations. In a config file it defaults to the width at the hook."
    )
    d_sae: Latents = Field(description="F, the number of latents. In a config file it defaults to 8 D.")
    d_out: Latents | None = Field(
        default=None,
        description="Width of the activations that a transcoder predicts. In a config file it follows from "
        "stream.target. Null: an autoencoder, which reconstructs its input.",
    )
    activation: Literal["topk", "batchtopk", "relu", "jumprelu"] = Field(
        default="topk",
        description="Which activations are kept. topk: the k largest of each token (arXiv 2406.04093). batchtopk: the "
        "N k largest in a batch of N tokens, and after training those above a threshold that keeps k per token on a "
        "sample of the run (arXiv 2412.06410); relu: all positive ones, with an L1 penalty; jumprelu: those above a "
        "learned threshold per latent, with an L0 penalty (arXiv 2407.14435).",
    )
    k: Count = Field(
        default=32,
        description="Latents kept per token by topk, and on average by batchtopk. For jumprelu see initial_threshold.",
    )
    l1_coefficient: Coefficient = Field(
        default=0.04,
        description="Weight of the sum of a token's activations in the loss (relu). Training scales activations to a "
        "mean norm of about sqrt(D), so its meaning does not depend on the model.",
    )
    l0_coefficient: Coefficient = Field(
        default=0.001,
        description="Weight of the number of a token's active latents in the loss (jumprelu), in units of the square "
        "of the activations' mean norm.",
    )
    initial_threshold: Annotated[float, Field(ge=1e-6, le=1)] | None = Field(
        default=None,
        description="Initial threshold of all latents (jumprelu), in units of the activations' mean norm. Null: "
        "the threshold that 4 k activations per token of the first batch exceed.",
    )
    bandwidth: float = Field(
        default=0.1,
        ge=1e-6,
        le=1e4,
        description="A threshold learns from activations within bandwidth / 2 of it (jumprelu; arXiv 2407.14435), in "
        "units of the activations' mean norm.",
    )
    aux_k: int = Field(
        default=64,
        ge=0,
        lt=2**31,
        description="Number of dead latents per token that model the residual in the AuxK loss (topk, batchtopk; "
        "arXiv 2406.04093). 0: no AuxK.",
    )
    aux_coefficient: Coefficient = Field(default=1 / 32, description="Weight of the AuxK loss. 0: no AuxK.")
    prefixes: tuple[Latents, ...] | None = Field(
        default=None,
        description="Prefixes of a Matryoshka dictionary (topk, batchtopk; arXiv 2503.17547): ascending numbers of "
        "latents, the last one d_sae. The loss is the mean over prefixes of the squared error with only the latents of "
        "the prefix. Null: no prefixes.",
    )
    apply_b_dec_to_input: bool = Field(
        default=True, description="Subtract b_dec from x before the encoder. A transcoder never subtracts it."
    )
    decoder: Literal["learned", "random", "soft_frozen"] = Field(
        default="learned",
        description="random freezes W_dec with random rows of unit norm, as in the control. soft_frozen lets each row move "
        "within cosine 0.8 of its random start (arXiv 2602.14111).",
    )
    encoder: Literal["learned", "random"] = Field(
        default="learned",
        description="random freezes W_enc with random columns of unit norm, and b_enc (relu: only W_enc, since b_enc sets "
        "L0). Needs apply_b_dec_to_input: false, or d_out. Not allowed with parts.",
    )
    mask: MaskConfig = Field(default=MaskConfig(), description="Weights of latents over positions.")
    parts: tuple[dict[str, Any], ...] = Field(
        default=(),
        description="Further mechanisms, each a section with its kind and its settings. Parts that act at the same "
        "place act in this order. Not allowed with jumprelu, d_out, prefixes or apply_b_dec_to_input: false.",
    )

    @field_validator("parts")
    @classmethod
    def _complete_parts(cls, parts: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return complete_settings(parts)

    @model_validator(mode="after")
    def _check_parts(self) -> "SAEConfig":
        if not self.parts:
            return self
        kinds = ", ".join(part_settings["kind"] for part_settings in self.parts)
        for name, default in (("d_out", None), ("prefixes", None), ("apply_b_dec_to_input", True)):
            if getattr(self, name) is not default:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed with parts ({kinds})")
        if self.activation == "jumprelu":
            raise ValueError(f"activation: jumprelu is not allowed with parts ({kinds}); give relu, topk or batchtopk")
        if self.encoder != "learned":
            raise ValueError(f"encoder: {self.encoder} is not allowed with parts ({kinds}); it must be learned")
        check(self)
        return self

    @model_validator(mode="after")
    def _check_encoder(self) -> "SAEConfig":
        if self.encoder == "random" and self.d_out is None and self.apply_b_dec_to_input:
            raise ValueError("encoder: random is not allowed with apply_b_dec_to_input: true, since b_dec is learned")
        return self

    @model_validator(mode="after")
    def _check_k(self) -> "SAEConfig":
        if self.activation != "relu" and self.k > self.d_sae:
            raise ValueError(f"k: {self.k} is not allowed; it must be at most d_sae ({self.d_sae})")
        return self

    @model_validator(mode="after")
    def _check_prefixes(self) -> "SAEConfig":
        ends = self.prefixes
        if ends is None:
            return self
        if self.activation not in ("topk", "batchtopk"):
            raise ValueError(f"prefixes: not allowed with activation {self.activation}; it must be topk or batchtopk")
        if not ends or ends[-1] != self.d_sae or any(a >= b for a, b in pairwise(ends)):
            raise ValueError(f"prefixes: {list(ends)} is not allowed; it must ascend and end with d_sae ({self.d_sae})")
        return self
