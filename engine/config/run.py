"""Settings of a run, and of several runs on one stream."""

from typing import Any

from pydantic import Field, field_validator, model_validator

from ..errors import UserError
from ..plugins import UnknownPart
from ..registry import plugins_of
from ..setting_types import Config
from ..storage.path_names import FolderName, check_distinct
from .sae import SAEConfig
from .stream import StreamConfig
from .train import EvalConfig, TrainConfig


class RunConfig(Config):
    """Settings of a run, as in its `config.yaml`: one section each for stream, sae, train and eval. Training reads
    activations x [N, D] from `stream` and trains the dictionary `sae`.

        RunConfig(sae=SAEConfig(d_in=768, d_sae=4096), train=TrainConfig(tokens=2_000_000))
    """

    stream: StreamConfig = Field(default=StreamConfig(), description="Where activations come from.")
    sae: SAEConfig = Field(description="The dictionary.")
    train: TrainConfig = Field(default=TrainConfig(), description="How it is trained.")
    eval: EvalConfig = Field(default=EvalConfig(), description="How it is evaluated.")
    plugins: tuple[str, ...] = Field(
        default=(),
        description="Files or modules that define the parts that come from plugins, recorded automatically. They are "
        "never imported because a file names them: give --plugin to load such a run.",
    )

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**values)
        except UnknownPart as error:
            plugin_names = values.get("plugins")
            raise error.of(plugin_names if isinstance(plugin_names, list | tuple) else ()) from None

    @model_validator(mode="after")
    def _record_plugins(self) -> "RunConfig":
        object.__setattr__(self, "plugins", plugins_of(self.sae))  # the model is frozen
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> "RunConfig":
        sae, train = self.sae, self.train
        if train.k_start is not None and not sae.k <= train.k_start <= sae.d_sae:
            allowed = f"it must be between k ({sae.k}) and d_sae ({sae.d_sae})"
            raise UserError(f"train.k_start: {train.k_start} is not allowed; {allowed}")
        for name, activations in (
            ("k_start", ("topk", "batchtopk")), ("resample_every_steps", ("relu",)), ("target_l0", ("relu", "jumprelu"))
        ):  # fmt: skip
            value = getattr(train, name)
            if value is not None and sae.activation not in activations:
                allowed = " or ".join(activations)
                raise UserError(f"train.{name}: {value} is not allowed with {sae.activation}; it is for {allowed}")
        if train.target_l0 is not None and train.target_l0 > sae.d_sae:
            raise UserError(
                f"train.target_l0: {train.target_l0} is not allowed; it must be at most d_sae ({sae.d_sae})"
            )
        if "frozen_encoder" in train.controls and sae.parts:
            kinds = ", ".join(part_settings["kind"] for part_settings in sae.parts)
            raise UserError(f"train.controls: frozen_encoder is not allowed with sae.parts ({kinds})")
        if train.batch % train.accumulate:
            allowed = f"it must divide batch ({train.batch})"
            raise UserError(f"train.accumulate: {train.accumulate} is not allowed; {allowed}")
        return self

    def by_name(self) -> dict[str, "RunConfig"]:
        """Return the run under the name "", in the form of `SweepConfig.by_name`."""
        return {"": self}


class SweepConfig(Config):
    """Settings of several runs on one stream, as in the `config.yaml` above their folders. Every run reads the same
    batches [N, D]."""

    dictionaries: dict[FolderName, RunConfig] = Field(
        description="Settings of each run by the name of its folder. In a file for `temposae train` this is a list of "
        "sections with the settings that differ, and a section `sweep` holds lists of values to combine."
    )

    @field_validator("dictionaries")
    @classmethod
    def _check_names(cls, dictionaries: dict[str, RunConfig]) -> dict[str, RunConfig]:
        if not dictionaries:
            raise ValueError("dictionaries: {} is not allowed; it must hold at least one")
        check_distinct(dictionaries)
        return dictionaries

    def by_name(self) -> dict[str, RunConfig]:
        return self.dictionaries
