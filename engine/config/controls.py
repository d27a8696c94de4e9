"""Controls of a dictionary: the same, with random directions or activations, trained on the same batches."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sae import SAEConfig
    from .train import TrainConfig

#: what a control changes in the settings of its dictionary (arXiv 2602.14111), in the order of tables
CONTROLS: dict[str, dict[str, Any]] = {
    "random": {"decoder": "random"},
    "soft_frozen": {"decoder": "soft_frozen"},
    "frozen_encoder": {"encoder": "random", "apply_b_dec_to_input": False},
}


def is_learned(sae: "SAEConfig") -> bool:
    """Whether encoder and decoder are learned freely. Only such a dictionary has controls."""
    return sae.decoder == "learned" and sae.encoder == "learned"


def control_of(sae: "SAEConfig", name: str) -> "SAEConfig":
    """Settings of the control `name` of a dictionary."""
    return sae.model_copy(update=CONTROLS[name])


def control_names(train: "TrainConfig") -> tuple[str, ...]:
    """Names of the controls that a run trains."""
    return ("random",) * train.control + train.controls
