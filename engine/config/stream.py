"""Settings of the activation stream: a language model, a hook in it and text, or a cache or an array instead."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ..errors import shown
from ..setting_types import Config
from .base import Count
from .world import WorldConfig


class StreamConfig(Config):
    """Source of activations x [N, D]: a language model, a hook in it, and text cut into rows of up to `context` tokens.
    A buffer mixes the tokens of many rows into batches, each token with its position.

        StreamConfig(model="smollm2", data="text.txt", context=256)
    """

    SECTION = "stream"

    model: str = Field(
        default="testbed",
        description="Language model: testbed (the embedded one), smollm2, a hub name such as google/gemma-2-2b, or a "
        "local Hugging Face folder.",
    )
    hook: str | None = Field(
        default=None,
        description="transformer_lens hook to read. Null: the residual stream after the middle layer.",
    )
    target: str | None = Field(
        default=None,
        description="Hook that a transcoder predicts from the activations at `hook`. Null: no transcoder.",
    )
    second: str | None = Field(
        default=None,
        description="Another hook of the same width, which the part cross_layer reads in training. Null: the same "
        "hook one layer earlier if a part needs it, else none.",
    )
    data: str | None = Field(
        default=None,
        description="Text: a .txt, .jsonl, .json, .csv, .tsv, .parquet, .arrow or .npy file, a folder of them or of a "
        "saved dataset, or a dataset's name. Null: the embedded language, for testbed only.",
    )
    cache: str | None = Field(
        default=None,
        description="Folder written by `temposae cache` to read activations from. It decides model, data, text_field, "
        "split, subset, context and bos; `hook` must be one of its hooks. Null: no cache.",
    )
    activations: str | None = Field(
        default=None,
        description="A .npy, .safetensors or .pt file of activations [M, D] or [R, T, D], used instead of a model. Null: "
        "no file.",
    )
    world: WorldConfig | None = Field(
        default=None,
        description="A synthetic world to draw activations from, instead of a model. Null: none.",
    )
    text_field: str | None = Field(
        default=None,
        description="Field or column with the text. Dots (messages.content) select nested fields. Null: text, else "
        "token ids in tokens or input_ids.",
    )
    split: str | None = Field(default=None, description="Split of a dataset. Null: train.")
    subset: str | None = Field(default=None, description="Subset (configuration) of a dataset. Null: the only one.")
    context: int = Field(
        default=128,
        ge=2,
        le=2**20,
        description="Largest number of tokens in a row. A row holds tokens of one document, and a longer document "
        "continues in the next row.",
    )
    bos: bool | None = Field(
        default=None,
        description="Put the tokenizer's BOS token in front of each row. Null: yes if the tokenizer has one.",
    )
    packing: bool | None = Field(
        default=None,
        description="Run rows of similar length through the model together, without padding beyond the longest, so that "
        "short documents cost no more per token than long ones. Each document still begins at position 0 and attends "
        "only to itself. Null: true for text.",
    )
    repeat: bool = Field(default=True, description="Start the text again when it ends; false ends the run instead.")
    drop_special: bool = Field(
        default=True,
        description="Exclude the tokenizer's special tokens from training and evaluation. Padding is always excluded.",
    )
    max_norm: Annotated[float, Field(gt=1, le=1e9)] | Literal["auto"] | None = Field(
        default="auto",
        description="Exclude massive activations (arXiv 2402.17762) from training and evaluation: tokens whose norm is "
        "above max_norm times the median norm. auto derives the limit from the spread of the norms; null or off "
        "excludes none.",
    )
    mode: Literal["tokens", "grouped", "sequences"] = Field(
        default="tokens",
        description="Contents of a batch: single tokens, single tokens in order of position (grouped), or whole rows "
        "(sequences).",
    )
    rows_per_forward: int = Field(
        default=32,
        ge=1,
        le=2**16,
        description="Rows per pass through the model. Unless given, fewer are used if 32 need more than memory_gb.",
    )
    memory_gb: float = Field(
        default=2.0,
        ge=1e-3,
        le=1e4,
        description="Memory in 10^9 bytes for a pass through the model, besides its weights. Logits of a large "
        "vocabulary are computed in parts that fit.",
    )
    attention: Literal["auto", "eager", "sdpa", "flex_attention"] = Field(
        default="auto",
        description="Attention implementation. auto: the fastest one that gives the same numbers.",
    )
    compile: bool = Field(default=False, description="Compile the model's layers with torch.compile.")
    buffer_tokens: Count | None = Field(
        default=None,
        description="Number of tokens in the buffer. Null: an eighth of the run, between 8192 and 65536 tokens and at "
        "least four batches.",
    )
    buffer_gb: Annotated[float, Field(ge=1e-6, le=1e4)] | None = Field(
        default=None,
        description="Size of the buffer in 10^9 bytes, instead of buffer_tokens. Null: buffer_tokens decides.",
    )
    buffer_dtype: Literal["float32", "bfloat16", "int8", "fp8"] = Field(
        default="bfloat16",
        description="dtype of activations in the buffer. int8 and fp8 (e4m3) take one byte per number and a scale per "
        "token. The metric buffer_error is the squared rounding error over the squared norm.",
    )

    @field_validator("max_norm", mode="before")
    @classmethod
    def _check_max_norm(cls, max_norm: Any) -> Any:
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
        """The known hooks among `hook` and `target`."""
        return tuple(hook for hook in (self.hook, self.target) if hook is not None)

    @property
    def read_hooks(self) -> tuple[str, ...]:
        """The hooks that training reads."""
        return (*self.hooks, *(() if self.second is None else (self.second,)))

    @model_validator(mode="after")
    def _check_combinations(self) -> "StreamConfig":
        if self.target is not None and self.target == self.hook:
            raise ValueError(f"target: {self.target} is not allowed; it must differ from hook")
        if self.second is not None and (self.second == self.hook or self.target is not None):
            raise ValueError(f"second: {self.second} is not allowed; it must differ from hook, and target must be null")
        if self.world is not None and self.activations is not None:
            raise ValueError(f"activations: {self.activations} is not allowed with a world; give one of the two")
        if self.buffer_tokens is not None and self.buffer_gb is not None:
            raise ValueError(f"buffer_gb: {self.buffer_gb} is not allowed with buffer_tokens; give one of the two")
        return self


class Layer(Config):
    """Selects the residual stream after a layer, instead of `stream.hook`."""

    SECTION = "stream"

    layer: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = Field(
        default=None,
        description="Read the residual stream after this layer (from 0), instead of a hook. Null: `hook` decides.",
    )
