"""Settings of training and of the evaluation after it."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ..setting_types import Config
from .base import Count, Rows, Share


class TrainConfig(Config):
    """Settings of training: Adam on ceil(tokens / batch) batches [batch, D], with decoder rows of unit norm. Names say
    whether a count is in tokens or in steps.

        TrainConfig(tokens=10_000_000, batch=4096)
    """

    SECTION = "train"

    tokens: Count = Field(default=1_000_000, description="Tokens to train on. Excluded tokens don't count.")
    batch: Count = Field(default=1024, description="Tokens per step.")
    lr: Annotated[float, Field(gt=0, le=10)] | None = Field(
        default=None,
        description="Peak learning rate. Null: min(0.016, 0.65 (batch / F)^(1/6) / (D^(1/2) steps^(1/3))), see "
        "docs/learning-rate.md; with `init` at most 2e-4 sqrt(2^14 / F) (arXiv 2406.04093).",
    )
    k_start: Count | None = Field(
        default=None,
        description="Initial number of latents kept per token (topk, batchtopk), between k and d_sae. It falls to k in "
        "16 steps over the first k_anneal of the run. Null: k from the start.",
    )
    k_anneal: Share = Field(default=0.2, description="Share of the run over which k_start falls to k.")
    sparsity_warmup: Share = Field(
        default=0.0, description="Share of the run over which l1_coefficient and l0_coefficient rise linearly from 0."
    )
    target_l0: Annotated[float, Field(ge=0.01, lt=2**31)] | None = Field(
        default=None,
        description="Target for the mean number of active latents per token (relu, jumprelu), to compare dictionaries at "
        "the same sparsity. Every step adjusts the sparsity coefficient. Null: the coefficient is as given.",
    )
    beta1: float = Field(
        default=0.9, ge=0, lt=1, description="Adam's decay of the mean gradient per step (arXiv 1412.6980)."
    )
    beta2: float = Field(
        default=0.999, ge=0, lt=1, description="Adam's decay of the mean squared gradient per step (arXiv 1412.6980)."
    )
    warmup: Share = Field(
        default=0.05, description="Share of the run over which the learning rate rises linearly to its peak."
    )
    decay: Share = Field(
        default=0.3, description="Share of the run, at its end, over which the learning rate falls linearly to 0."
    )
    clip_norm: Annotated[float, Field(ge=1e-6, le=1e9)] | None = Field(
        default=1.0,
        description="Largest gradient norm over all parameters; a larger gradient is scaled down. Null: no clipping.",
    )
    accumulate: Count = Field(
        default=1,
        description="Process a batch in this many equal parts, to save memory. It must divide batch. batchtopk selects "
        "within each part.",
    )
    bias: Literal["mean", "geometric_median", "zero"] = Field(
        default="mean",
        description="Initial b_dec: the mean of the activations, their geometric median, or zero.",
    )
    resample_every_steps: Count | None = Field(
        default=None,
        description="Steps after which dead latents are reset to badly reconstructed tokens (relu; Bricken et al., "
        "Towards Monosemanticity, 2023). Null: never.",
    )
    init: str | None = Field(
        default=None,
        description="Dictionary to continue from: a run folder, a checkpoint, or a folder of another library. Null: "
        "new weights.",
    )
    held_out_rows: int = Field(
        default=0,
        ge=0,
        le=2**16,
        description="Rows of held-out text for FVU and L0 at the start and with every report, in held_out.jsonl. 0: "
        "none.",
    )
    log_positions: bool = Field(
        default=False, description="Add the squared error and the L0 of every position to the metrics."
    )
    log: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        default=(), description="Loggers to use besides metrics.jsonl."
    )
    dead_after_tokens: Count | None = Field(
        default=None,
        description="A latent is dead after this many tokens without an activation. Null: a tenth of the run, at least "
        "10 batches and at most 10M tokens.",
    )
    log_every_steps: Count | None = Field(
        default=None, description="Steps between two reports. Null: a twentieth of the run, at most 50 steps."
    )
    checkpoint_every_steps: Count | None = Field(
        default=None,
        description="Steps between two checkpoints. Null: one every ten minutes. The last step always has one.",
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="dtype of matrix products; weights are float32. Null: bfloat16 on a GPU, float32 elsewhere.",
    )
    moments: Literal["float32", "bfloat16", "8bit"] = Field(
        default="float32",
        description="dtype of Adam's two moments of W_enc and W_dec: 8, 4 or 2 bytes per parameter in total. bfloat16 "
        "and 8bit (after arXiv 2110.02861) are rounded stochastically. Moments of other parameters stay float32.",
    )
    fp8: bool = Field(
        default=False,
        description="Select a topk dictionary's latents with an e4m3 product, then compute the selected ones at full "
        "precision. Needs a GPU from sm_89 on.",
    )
    control: bool = Field(
        default=True,
        description="Also train a random control on the same batches: same settings, frozen random decoder.",
    )
    controls: tuple[Literal["soft_frozen", "frozen_encoder"], ...] = Field(
        default=(),
        description="Further controls on the same batches (arXiv 2602.14111). soft_frozen: decoder rows stay within cosine "
        "0.8 of their random start. frozen_encoder: frozen random encoder, trained decoder.",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of weights, text order and mixing.")

    @field_validator("controls")
    @classmethod
    def _check_controls(cls, controls: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(controls)) < len(controls):
            raise ValueError(f"controls: {list(controls)} is not allowed; each must be named once")
        return controls

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.batch)

    @property
    def report_steps(self) -> int:
        return self.log_every_steps or max(1, min(50, self.steps // 20))


class EvalConfig(Config):
    """Settings of the eval `core`: explained variance, L0 and dead latents on `rows` rows of held-out text [rows,
    context], CE and KL on the first `ce_rows` of them."""

    SECTION = "eval"

    rows: Rows | None = Field(
        default=None,
        description="Rows of held-out text for explained variance, L0 and dead latents. Null: as many as take a tenth "
        "of the run's passes through the model, between 32 and 256; 256 for testbed.",
    )
    ce_rows: Rows | None = Field(
        default=None,
        description="Number of these rows for CE and KL. Null: as many as take a tenth of the run's passes through the "
        "model, between 6 and 96; 96 for testbed.",
    )
    after_training: bool = Field(
        default=True, description="Evaluate at the end of training. If false, use `temposae eval` later."
    )
