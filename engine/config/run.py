"""Settings of a whole run, and of several runs on one stream."""

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
    """A whole run, as `config.yaml` holds it: a section for each of stream, sae, train and eval. Training reads x [N, D] as
    `stream` says, and `sae` is what it trains.

        RunConfig(sae=SAEConfig(d_in=768, d_sae=4096), train=TrainConfig(tokens=2_000_000))
    """

    stream: StreamConfig = Field(default=StreamConfig(), description="Where activations come from.")
    sae: SAEConfig = Field(description="The dictionary.")
    train: TrainConfig = Field(default=TrainConfig(), description="How it is trained.")
    eval: EvalConfig = Field(default=EvalConfig(), description="What is measured of it.")
    plugins: tuple[str, ...] = Field(
        default=(),
        description="Files or modules that define the parts that no installed package has. They follow from the "
        "parts, and are never imported because a file names them: give --plugin when the run is loaded.",
    )

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**values)
        except UnknownPart as error:
            plugin_names = values.get("plugins")
            raise error.of(plugin_names if isinstance(plugin_names, list | tuple) else ()) from None

    @model_validator(mode="after")
    def _plugins_are_of_the_parts(self) -> "RunConfig":
        object.__setattr__(self, "plugins", plugins_of(self.sae))  # it is frozen
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
    """Several runs on one stream, as the `config.yaml` above their folders holds them. Every run reads the same batches
    [N, D].

        SweepConfig(dictionaries={"small": RunConfig(...), "large": RunConfig(...)})
    """

    dictionaries: dict[FolderName, RunConfig] = Field(
        description="The settings of each run, by the name of its folder. In a file for `temposae train` this is a "
        "list of sections with the settings that differ, and a section `sweep` holds lists of values to combine."
    )

    @field_validator("dictionaries")
    @classmethod
    def _are_apart(cls, dictionaries: dict[str, RunConfig]) -> dict[str, RunConfig]:
        if not dictionaries:
            raise ValueError("dictionaries: {} is not allowed; it must hold at least one")
        check_distinct(dictionaries)
        return dictionaries

    def by_name(self) -> dict[str, RunConfig]:
        return self.dictionaries
