"""Typed, validated settings of a run. A wrong value names the field, the value, and what is allowed."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import UserError, one_line

Count = Annotated[int, Field(ge=1, lt=2**63)]
Latents = Annotated[int, Field(ge=1, lt=2**31)]  # a SparseCode's indices are int32
Share = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise one_line(error, _SECTION.get(type(self).__name__, ""), type(self).model_fields) from None


class MaskConfig(Config):
    """Weights over positions: f = acts * mask[pos].

    `random`: each (position, latent) is on with probability `fraction`, fixed. `ranges`: latent j is on in one of
    `ranges` equal runs of positions. `soft`: sigmoid(logits / temperature), logits learned, drawn from U(0, 1).
    `gaussian`: exp(-(p - centre_j)^2 / (2 sigma^2)), centres spread evenly, sigma T / 8 unless given.
    Positions from `positions` on follow `beyond`.
    """

    kind: Literal["none", "random", "ranges", "soft", "gaussian"] = "none"
    positions: Count = 128
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    ranges: Count = 4
    temperature: Annotated[float, Field(gt=0)] = 1.0
    sigma: Annotated[float, Field(gt=0)] | None = None
    beyond: Literal["clamp", "wrap", "error"] = "clamp"

    @model_validator(mode="after")
    def _ranges_fit(self) -> "MaskConfig":
        if self.kind == "ranges" and self.ranges > self.positions:
            raise ValueError(f"ranges: {self.ranges} is not allowed; it must be at most positions ({self.positions})")
        return self

    def check_context(self, positions: int) -> None:
        """Refuse contexts that the mask does not cover, unless `beyond` says what to do there."""
        if self.kind != "none" and self.beyond == "error" and positions > self.positions:
            raise UserError(
                f"sae.mask.positions: {self.positions} is not allowed; positions go up to {positions - 1} "
                f"(give at least {positions}, or set sae.mask.beyond to clamp or wrap)"
            )


class SAEConfig(Config):
    """One dictionary. `d_in` is D, `d_sae` is F.

    `topk`: relu, then the `k` largest per token; `batchtopk`: as many in all, wherever in the batch they fall, and beyond
    training those above a running threshold. In both `aux_k` dead latents model the residual, weighted `aux_coefficient`.
    `relu`: every positive activation, with `l1_coefficient` times their sum in the loss.
    `jumprelu`: activations above a learned threshold for each latent, with `l0_coefficient` times their number in the loss.
    Thresholds begin at `initial_threshold`, or where 4 `k` activations per token of the first batch exceed them, and learn
    from activations within `bandwidth` / 2 of them. The three are in units of the activations' mean norm (the coefficient
    of its square), which training scales to about sqrt(D).
    `prefixes` (Matryoshka; Bussmann et al., arXiv 2503.17547; topk and batchtopk): ascending numbers of latents, the last
    one d_sae; the loss is the mean over prefixes of the squared error with no more than the first so many latents.
    `decoder="random"` freezes the random unit-norm decoder: the control.
    """

    d_in: Latents
    d_sae: Latents
    activation: Literal["topk", "batchtopk", "relu", "jumprelu"] = "topk"
    k: Count = 32
    l1_coefficient: Annotated[float, Field(ge=0)] = 0.04
    l0_coefficient: Annotated[float, Field(ge=0)] = 0.001
    initial_threshold: Annotated[float, Field(gt=0)] | None = None
    bandwidth: Annotated[float, Field(gt=0)] = 0.1
    aux_k: Annotated[int, Field(ge=0)] = 64
    aux_coefficient: Annotated[float, Field(ge=0)] = 1 / 32
    prefixes: tuple[Latents, ...] | None = None
    decoder: Literal["learned", "random"] = "learned"
    mask: MaskConfig = MaskConfig()

    @model_validator(mode="after")
    def _k_fits(self) -> "SAEConfig":
        if self.activation != "relu" and self.k > self.d_sae:
            raise ValueError(f"k: {self.k} is not allowed; it must be at most d_sae ({self.d_sae})")
        return self

    @model_validator(mode="after")
    def _prefixes_fit(self) -> "SAEConfig":
        ends = self.prefixes
        if ends is None:
            return self
        if self.activation not in ("topk", "batchtopk"):
            raise ValueError(f"prefixes: not allowed with activation {self.activation}; it must be topk or batchtopk")
        if not ends or ends[-1] != self.d_sae or any(a >= b for a, b in pairwise(ends)):
            raise ValueError(f"prefixes: {list(ends)} is not allowed; it must ascend and end with d_sae ({self.d_sae})")
        return self


class StreamConfig(Config):
    """Where activations come from: a language model, a place in it, and text.

    `model`: `testbed`, `smollm2`, a hub name or a local Hugging Face folder. `hook`: a transformer_lens hook name; the
    residual stream after the middle layer unless given. `data`: a .txt or .jsonl file, a dataset's name or folder;
    the embedded language for `testbed`. `buffer_tokens`: what is mixed at a time; as many as the run has, between 2048
    and 65536, unless given.
    """

    model: str = "testbed"
    hook: str | None = None
    data: str | None = None
    context: Annotated[int, Field(ge=2)] = 128
    rows_per_forward: Count = 32
    buffer_tokens: Count | None = None
    buffer_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    drop_bos: bool = True


class TrainConfig(Config):
    """How a dictionary is trained. Counts are in tokens or in steps of `batch` tokens, as their names say.

    `lr`: 2e-4 * sqrt(2^14 / F) unless given. `dead_after_tokens`: a latent that has not fired for so many tokens is dead;
    a tenth of the run, at least 10 batches, at most 10M, unless given. `log_every_steps`: a twentieth of the run, at most
    50, unless given. `warmup` and `decay` are shares of the run. `dtype`: of the products; bfloat16 on a GPU and
    float32 elsewhere, unless given. Weights are float32. `moments`: what holds Adam's two moments of W_enc and W_dec, 8, 4
    or 2 bytes a parameter in all; narrow ones are rounded stochastically (`kernels.adam.Moments`), and the other parameters'
    stay float32. `fp8` looks for a topk dictionary's latents by a product in e4m3 and works out those again that it finds
    (`kernels.encode_sparse.encode_topk`); on a GPU from sm_89 on.
    """

    tokens: Count = 1_000_000
    batch: Count = 1024
    lr: Annotated[float, Field(gt=0)] | None = None
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    warmup: Share = 0.05
    decay: Share = 0.3
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    dead_after_tokens: Count | None = None
    log_every_steps: Count | None = None
    checkpoint_every_steps: Count = 500
    dtype: Literal["float32", "bfloat16"] | None = None
    moments: Literal["float32", "bfloat16", "8bit"] = "float32"
    fp8: bool = False
    control: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.batch)

    @property
    def report_steps(self) -> int:
        return self.log_every_steps or max(1, min(50, self.steps // 20))


class RunConfig(Config):
    """A whole run, as `config.yaml` holds it."""

    stream: StreamConfig = StreamConfig()
    sae: SAEConfig
    train: TrainConfig = TrainConfig()


_SECTION = {"SAEConfig": "sae", "StreamConfig": "stream", "TrainConfig": "train", "MaskConfig": "sae.mask"}


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; a missing or malformed file is a UserError."""
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"config: {path} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config: {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise UserError(f"config: {path} must hold sections (stream, sae, train), not {type(found).__name__}")
    return _text_keys(found)


def _text_keys(value: Any) -> Any:
    """YAML has keys that are numbers; settings have names."""
    return {str(k): _text_keys(v) for k, v in value.items()} if isinstance(value, dict) else value
