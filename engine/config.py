"""Typed, validated settings of a run. A wrong value names the field, the value, and what is allowed."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .errors import UserError, shown
from .plugins import UnknownPart
from .setting_types import Strict
from .storage.path_names import FolderName, check_distinct
from .storage.yaml_file import read_yaml as read_yaml

Count = Annotated[int, Field(ge=1, le=10**15)]
Latents = Annotated[int, Field(ge=1, lt=2**31)]  # a SparseCode's indices are int32
Positions = Annotated[int, Field(ge=1, le=2**20)]
Rows = Annotated[int, Field(ge=1, le=2**20)]
Share = Annotated[float, Field(ge=0, le=1)]
Coefficient = Annotated[float, Field(ge=0, le=1e6)]
Temperature = Annotated[float, Field(ge=1e-4, le=1e4)]


class Config(Strict):
    """Settings of one kind: frozen, without names that it doesn't have, strict (`setting_types.Strict`)."""

    @classmethod
    def section(cls) -> str:
        """Where in a file these settings are."""
        return _SECTION.get(cls.__name__, "")


class MaskConfig(Config):
    """Weights over positions: f = acts * mask[pos].

    `random`: each (position, latent) is on with probability `fraction`, fixed. `ranges`: latent j is on in one of
    `ranges` equal runs of positions. `windows`: in a run of `width` positions of its own, T / 4 unless given; the runs begin
    at evenly spread places, some before the context, so that every position has as many latents. `gaussian`:
    exp(-(p - centre_j)^2 / (2 sigma^2)), centres spread evenly, sigma T / 8 unless given. `soft`: sigmoid(logits /
    temperature), logits learned; they start from U(0, 1) (`uniform`), from N(0, 1) (`normal`), or as 2 and -2 where a hard
    mask is on and off (`start`).

    Over a run `temperature` falls to `temperature_end`, exponentially. With `blend`, the mask m counts as 1 - s + s m, where
    s = sigmoid(c) goes from almost 0 to almost 1: c is a learned number, which starts as 0, plus one that rises from -6 to
    6. `positions` is T; a config file that doesn't say has those of a row. Positions from T on follow `beyond`.
    """

    kind: Literal["none", "random", "ranges", "windows", "soft", "gaussian"] = "none"
    positions: Positions = 128
    fraction: Annotated[float, Field(ge=1e-6, le=1)] = 0.5
    ranges: Positions = 4
    width: Positions | None = None
    start: Literal["uniform", "normal", "random", "ranges", "windows"] = "uniform"
    temperature: Temperature = 1.0
    temperature_end: Temperature | None = None
    blend: bool = False
    sigma: Annotated[float, Field(ge=0.1, le=1e6)] | None = None
    beyond: Literal["clamp", "wrap", "error"] = "clamp"

    @model_validator(mode="after")
    def _fits(self) -> "MaskConfig":
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
        """What the mask looks like, and what a learned one starts as."""
        return self.kind, self.start if self.kind == "soft" else ""

    @property
    def is_learned(self) -> bool:
        return self.kind == "soft" or self.blend

    def check_context(self, positions: int) -> None:
        """Refuse contexts that the mask does not cover, unless `beyond` says what to do there."""
        if self.kind != "none" and self.beyond == "error" and positions > self.positions:
            raise UserError(
                f"sae.mask.positions: {self.positions} is not allowed; positions go up to {positions - 1} "
                f"(give at least {positions}, or set sae.mask.beyond to clamp or wrap)"
            )


class SAEConfig(Config):
    """One dictionary. `d_in` is D, `d_sae` is F. With `d_out` it is a transcoder: from activations at one place it gives
    those at another, of that width, and nothing is taken from x before the encoder; nor is it where `apply_b_dec_to_input`
    is false.

    `topk`: relu, then the `k` largest per token; `batchtopk`: as many in all, wherever in the batch they fall, and after
    training those above a threshold that keeps `k` per token of a sample of the run (`run_sample.RunSample`). In both,
    `aux_k` dead latents model the residual, weighted `aux_coefficient`.
    `relu`: every positive activation, with `l1_coefficient` times their sum in the loss.
    `jumprelu`: activations above a learned threshold for each latent, with `l0_coefficient` times their number in the loss.
    Thresholds begin at `initial_threshold`, at most 1, above which no activation comes, or where 4 `k` activations per token
    of the first batch exceed them, and learn from activations within `bandwidth` / 2 of them. The three are in units of the
    activations' mean norm (the coefficient of its square), which training scales to about sqrt(D).
    `prefixes` (Matryoshka; Bussmann et al., arXiv 2503.17547; topk and batchtopk): ascending numbers of latents, the last
    one d_sae; the loss is the mean over prefixes of the squared error with no more than the first so many latents.
    `decoder="random"` freezes the random unit-norm decoder: the control.
    `parts`: further mechanisms by name, each with its settings (`parts.Part`); not with jumprelu, d_out or prefixes.

        SAEConfig(d_in=768, d_sae=16384, activation="batchtopk", k=32)
    """

    d_in: Latents
    d_sae: Latents
    d_out: Latents | None = None
    activation: Literal["topk", "batchtopk", "relu", "jumprelu"] = "topk"
    k: Count = 32
    l1_coefficient: Coefficient = 0.04
    l0_coefficient: Coefficient = 0.001
    initial_threshold: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    bandwidth: Annotated[float, Field(ge=1e-6, le=1e4)] = 0.1
    aux_k: Annotated[int, Field(ge=0, lt=2**31)] = 64
    aux_coefficient: Coefficient = 1 / 32
    prefixes: tuple[Latents, ...] | None = None
    apply_b_dec_to_input: bool = True
    decoder: Literal["learned", "random"] = "learned"
    mask: MaskConfig = MaskConfig()
    parts: tuple[dict[str, Any], ...] = ()

    @field_validator("parts")
    @classmethod
    def _parts_are_known(cls, parts: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        from .parts import complete_settings

        return complete_settings(parts) if parts else parts

    @model_validator(mode="after")
    def _parts_fit(self) -> "SAEConfig":
        if not self.parts:
            return self
        from .parts import check

        kinds = ", ".join(part_settings["kind"] for part_settings in self.parts)
        for name, default in (("d_out", None), ("prefixes", None), ("apply_b_dec_to_input", True)):
            if getattr(self, name) is not default:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed with parts ({kinds})")
        if self.activation == "jumprelu":
            raise ValueError(
                f"activation: jumprelu is not allowed with parts ({kinds}); it must be relu, topk or batchtopk"
            )
        check(self)
        return self

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
    residual stream after the middle layer unless given. `target`: of a transcoder, the hook whose value it is to give for
    that at `hook`. `second`: another hook, of the same width, that a part of the dictionary looks at in training.
    `data`: a .txt, .jsonl, .json, .csv, .tsv, .parquet, .arrow or .npy file, a folder of them or of a saved dataset, or a
    dataset's name; the embedded language for `testbed`. Documents are in the field `text_field`, which may be a path with
    dots (`messages.content`); unless it is given in `text`, or tokenised already in `tokens` or `input_ids`. `split` and
    `subset` (the configuration) of a dataset: `train`, and the only one, unless given. A row holds up to `context` tokens of
    one document, a long one going on in the next row; `bos` says whether the tokenizer's `<bos>` is put in front of each
    (unless given, if it has one). With `packing`, on by default for text, rows of similar length go through the model
    together, cut to the longest, so that short documents cost no more per token than long ones; each still begins at
    position 0 and sees no other. A text that ends begins again (`repeat`), or ends the run. Left out, from training as from
    every measurement, are padding, the tokenizer's special tokens (`drop_special`) and massive activations: those whose norm
    is above `max_norm` times the median; "auto" finds the limit from how widely norms spread (`stream.norms.NormFilter`),
    off leaves out none.

    `mode`: batches of single tokens; the same in order of position (`grouped`); or whole rows (`sequences`).
    `buffer_tokens` or `buffer_gb` (10^9 bytes): what is mixed at a time; an eighth of the run, between 8192 and 65536
    tokens and at least four batches, unless given. `buffer_dtype` int8 and fp8 (e4m3) take one byte, with a scale for each
    activation; metrics tell the error (`buffer_error`). `attention` of the language model: the fastest that gives the same
    numbers, unless given.
    `compile` the part of it that is needed with torch.compile. `memory_gb` (10^9 bytes) is what a pass through the model may
    take beside its weights: where `rows_per_forward` isn't given, fewer than 32 rows go through at once if 32 would take
    more, and logits of a large vocabulary are worked out in parts.

    `cache`: a folder that `temposae cache` made. Activations are read from there, and it decides model, data, text_field,
    split, subset, context and bos; `hook` is one of those that it holds. The model and its text are loaded for evaluation
    only.
    `activations`: a .npy, .safetensors or .pt file of activations from anywhere, [M, D] or [R, T, D], in place of a model.

        StreamConfig(model="smollm2", data="text.txt", context=256)
    """

    model: str = "testbed"
    hook: str | None = None
    target: str | None = None
    second: str | None = None
    data: str | None = None
    cache: str | None = None
    activations: str | None = None
    text_field: str | None = None
    split: str | None = None
    subset: str | None = None
    context: Annotated[int, Field(ge=2, le=2**20)] = 128
    bos: bool | None = None
    packing: bool | None = None
    repeat: bool = True
    drop_special: bool = True
    max_norm: float | Literal["auto"] | None = "auto"
    mode: Literal["tokens", "grouped", "sequences"] = "tokens"
    rows_per_forward: Annotated[int, Field(ge=1, le=2**16)] = 32
    memory_gb: Annotated[float, Field(ge=1e-3, le=1e4)] = 2.0
    attention: Literal["auto", "eager", "sdpa", "flex_attention"] = "auto"
    compile: bool = False
    buffer_tokens: Count | None = None
    buffer_gb: Annotated[float, Field(ge=1e-6, le=1e4)] | None = None
    buffer_dtype: Literal["float32", "bfloat16", "int8", "fp8"] = "bfloat16"

    @field_validator("max_norm", mode="before")
    @classmethod
    def _norms(cls, max_norm: Any) -> Any:
        if max_norm is None or max_norm is False or max_norm == "off":  # YAML reads off as false
            return None
        if max_norm == "auto":
            return max_norm
        if isinstance(max_norm, bool) or not isinstance(max_norm, int | float) or not 1 < max_norm <= 1e9:
            allowed = "it must be auto, off, or a number greater than 1 and at most 1e9"
            raise ValueError(f"max_norm: {shown(max_norm)} is not allowed; {allowed}")
        return float(max_norm)

    @property
    def hooks(self) -> tuple[str, ...]:
        """Those that a dictionary looks at, where they are known."""
        return tuple(hook for hook in (self.hook, self.target) if hook is not None)

    @property
    def read_hooks(self) -> tuple[str, ...]:
        """Those that it is trained on."""
        return (*self.hooks, *(() if self.second is None else (self.second,)))

    @model_validator(mode="after")
    def _goes_together(self) -> "StreamConfig":
        if self.target is not None and self.target == self.hook:
            raise ValueError(f"target: {self.target} is not allowed; it is the hook itself")
        if self.second is not None and (self.second == self.hook or self.target is not None):
            raise ValueError(f"second: {self.second} is not allowed; it must be another hook, and not beside a target")
        if self.buffer_tokens is not None and self.buffer_gb is not None:
            raise ValueError(f"buffer_gb: {self.buffer_gb} is not allowed with buffer_tokens; give one of the two")
        return self


class Layer(Config):
    """The residual stream after this layer, in place of `stream.hook`; which layers there are, the model knows."""

    layer: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None


class TrainConfig(Config):
    """How a dictionary is trained. Counts are in tokens or in steps of `batch` tokens, as their names say.

    `lr`: the peak learning rate; min(0.016, 0.65 (batch / F)^(1/6) / (D^(1/2) steps^(1/3))) unless given, and with `init` at
    most 2e-4 sqrt(2^14 / F) (docs/learning-rate.md). `dead_after_tokens`: a latent that has not fired for so many tokens is
    dead; a tenth of the run, at least 10 batches, at most 10M, unless given. `log_every_steps`: a twentieth of the run, at
    most 50, unless given. `checkpoint_every_steps`: every ten minutes unless given, and at the end. `warmup` and `decay` are
    shares of the run. `dtype`: of the products; bfloat16 on a GPU and float32 elsewhere, unless given. Weights are float32.
    `moments`: what holds Adam's two moments of W_enc and W_dec, 8, 4 or 2 bytes a parameter in all; narrow ones are rounded
    stochastically (`kernels.adam.Moments`), and the other parameters' stay float32. `fp8` looks for a topk dictionary's
    latents by a product in e4m3 and works out those again that it finds (`kernels.encode_sparse.encode_topk`); on a GPU
    from sm_89 on.

    `k_start`: topk and batchtopk keep so many in the beginning, and go down to k in 16 steps over the first `k_anneal` of
    the run. `sparsity_warmup`: share of the run over which l1_coefficient and l0_coefficient rise from zero. `target_l0`
    (relu, jumprelu): from step to step those coefficients change, so that about so many latents are active on a token, as
    makes dictionaries comparable (`learner.Learner`).
    `accumulate`: a batch is gone through in so many parts, to save memory (batchtopk selects in each). `bias`: what b_dec
    starts from. `resample_every_steps` (relu; Bricken et al., Towards Monosemanticity, 2023): after so many steps dead
    latents begin again as tokens that are reconstructed badly. `init`: go on from this dictionary, a run or a checkpoint.
    `held_out_rows`: on so many rows that training never sees, FVU and L0 are measured at the start and with every report, in
    held_out.jsonl. `log_positions`: metrics tell squared error and L0 of every position.
    `log`: where metrics go besides metrics.jsonl.

        TrainConfig(tokens=10_000_000, batch=4096)
    """

    tokens: Count = 1_000_000
    batch: Count = 1024
    lr: Annotated[float, Field(gt=0, le=10)] | None = None
    k_start: Count | None = None
    k_anneal: Share = 0.2
    sparsity_warmup: Share = 0.0
    target_l0: Annotated[float, Field(ge=0.01, lt=2**31)] | None = None
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    warmup: Share = 0.05
    decay: Share = 0.3
    clip_norm: Annotated[float, Field(ge=1e-6, le=1e9)] | None = 1.0
    accumulate: Count = 1
    bias: Literal["mean", "geometric_median", "zero"] = "mean"
    resample_every_steps: Count | None = None
    init: str | None = None
    held_out_rows: Annotated[int, Field(ge=0, le=2**16)] = 0
    log_positions: bool = False
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    dead_after_tokens: Count | None = None
    log_every_steps: Count | None = None
    checkpoint_every_steps: Count | None = None
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


class EvalConfig(Config):
    """What `core` measures, after training (unless `after_training` is false) and later: explained variance, L0 and dead
    latents on `rows` rows of held-out text, CE and KL on the first `ce_rows` of them. Unless given, as many as cost a fifth
    of the run's passes through the model, between 32 and 256, and 8 and 96 (`evals.budget`)."""

    rows: Rows | None = None
    ce_rows: Rows | None = None
    after_training: bool = True


class RunConfig(Config):
    """A whole run, as `config.yaml` holds it. `plugins`: the files or modules that define its parts, where those are not
    temposae's; they follow from the parts, and are to be named again when the run is loaded (`plugins`).

        RunConfig(sae=SAEConfig(d_in=768, d_sae=4096), train=TrainConfig(tokens=2_000_000))
    """

    stream: StreamConfig = StreamConfig()
    sae: SAEConfig
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    plugins: tuple[str, ...] = ()

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**values)
        except UnknownPart as error:
            plugin_names = values.get("plugins")
            raise error.of(plugin_names if isinstance(plugin_names, list | tuple) else ()) from None

    @model_validator(mode="after")
    def _plugins_are_of_the_parts(self) -> "RunConfig":
        from .parts import plugins_of

        object.__setattr__(self, "plugins", plugins_of(self.sae) if self.sae.parts else ())  # it is frozen
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> "RunConfig":
        sae, train = self.sae, self.train
        if train.k_start is not None and not sae.k <= train.k_start <= sae.d_sae:
            bounds = f"it must be between k ({sae.k}) and d_sae ({sae.d_sae})"
            raise UserError(f"train.k_start: {train.k_start} is not allowed; {bounds}")
        for name, activations in (
            ("k_start", ("topk", "batchtopk")), ("resample_every_steps", ("relu",)), ("target_l0", ("relu", "jumprelu"))
        ):  # fmt: skip
            value = getattr(train, name)
            if value is not None and sae.activation not in activations:
                allowed = " or ".join(activations)
                raise UserError(f"train.{name}: {value} is not allowed with {sae.activation}; it is for {allowed}")
        if train.target_l0 is not None and train.target_l0 > sae.d_sae:
            raise UserError(
                f"train.target_l0: {train.target_l0} is not allowed; it must be at most d_sae ({sae.d_sae}), all latents"
            )
        if train.batch % train.accumulate:
            raise UserError(
                f"train.accumulate: {train.accumulate} is not allowed; it must divide batch ({train.batch})"
            )
        return self

    def by_name(self) -> dict[str, "RunConfig"]:
        """The one dictionary, as `SweepConfig` has several."""
        return {"": self}


class SweepConfig(Config):
    """Several runs on one stream, by name, as the `config.yaml` above their folders holds them."""

    dictionaries: dict[FolderName, RunConfig]

    @field_validator("dictionaries")
    @classmethod
    def _are_apart(cls, dictionaries: dict[str, RunConfig]) -> dict[str, RunConfig]:
        if not dictionaries:
            raise ValueError("dictionaries: {} is not allowed; it must hold at least one")
        check_distinct(dictionaries)
        return dictionaries

    def by_name(self) -> dict[str, RunConfig]:
        return self.dictionaries


_SECTION = {
    "SAEConfig": "sae",
    "StreamConfig": "stream",
    "Layer": "stream",
    "TrainConfig": "train",
    "EvalConfig": "eval",
    "MaskConfig": "sae.mask",
}


def section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of settings, empty where it is left out or null. Raises UserError for what is none."""
    values = settings.get(name)
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{name}: {shown(values)} is not allowed; it must be a section of settings")
    return values
