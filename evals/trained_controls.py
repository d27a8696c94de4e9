"""Controls of a dictionary that are trained: those in its checkpoint, and those that are trained for an evaluation."""

import sys
from collections.abc import Sequence

from ..engine.config import RunConfig, SAEConfig, TrainConfig
from ..engine.config.controls import CONTROLS, control_of, is_learned
from ..engine.errors import UserError, check_known
from ..engine.sae import SparseAutoencoder
from ..engine.storage.checkpoint import Checkpoint
from ..engine.stream import ActivationStream
from ..engine.train import train_together


class TrainedControls:
    """The controls of a checkpoint's dictionary: `saved` are in the checkpoint, `untrained` are asked for besides."""

    def __init__(self, checkpoint: Checkpoint, sae: SparseAutoencoder, wanted: Sequence[str]):
        """Raises UserError for unknown names among those `wanted`, and for one that the dictionary can't have."""
        self._checkpoint, self._sae = checkpoint, sae
        self.saved = [name for name in CONTROLS if name in checkpoint.dictionaries]
        self.untrained = _untrained(sae.cfg, wanted, self.saved)

    def __len__(self) -> int:
        return len(self.saved) + len(self.untrained)

    @property
    def origin(self) -> dict[str, str]:
        """What a result says of controls that are not the checkpoint's."""
        keys = {"random": "control"}
        return {keys.get(name, name): "trained for evaluation" for name in self.untrained}

    def get(self, stream: ActivationStream, *, train: bool) -> dict[str, SparseAutoencoder]:
        """All controls by name. Those that are untrained are left out unless `train`."""
        controls = {name: self._checkpoint.dictionary(name) for name in self.saved}
        if train and self.untrained:
            controls |= _train(self._checkpoint, self._sae, stream, self.untrained)
        return {name: controls[name] for name in CONTROLS if name in controls}


def without_control(checkpoint: Checkpoint) -> str | None:
    """Why a dictionary has no random control; None if it has one, or is one."""
    settings = checkpoint.manifest["dictionaries"]["sae"]
    is_control = any(settings.get(side, "learned") != "learned" for side in ("decoder", "encoder"))
    if "random" in checkpoint.dictionaries or is_control:
        return None
    if checkpoint.run is not None and not checkpoint.run.train.control:
        return "train.control: false"
    return f"{checkpoint.folder.name} has none"


def _untrained(sae: SAEConfig, wanted: Sequence[str], saved: Sequence[str]) -> list[str]:
    """The controls to train for an evaluation: those that are `wanted` and not saved with the dictionary."""
    for name in wanted:
        check_known("controls", name, CONTROLS)
    if not is_learned(sae):
        return []
    names = [name for name in CONTROLS if name in wanted and name not in saved]
    if "frozen_encoder" in names and sae.parts:
        kinds = ", ".join(part_settings["kind"] for part_settings in sae.parts)
        raise UserError(f"controls: frozen_encoder is not allowed with sae.parts ({kinds})")
    return names


def _train(
    checkpoint: Checkpoint, sae: SparseAutoencoder, stream: ActivationStream, names: Sequence[str]
) -> dict[str, SparseAutoencoder]:
    """Train controls of a dictionary on the batches of one stream."""
    config = TrainConfig() if checkpoint.run is None else checkpoint.run.train
    title = "a random control" if list(names) == ["random"] else f"controls ({', '.join(names)})"
    print(f"control: training {title} on {config.tokens:,} tokens", file=sys.stderr, flush=True)
    changes = {"control": False, "controls": (), "init": None, "held_out_rows": 0, "log": ()}
    config = config.model_copy(update=changes)
    runs = {name: RunConfig(stream=stream.config, sae=control_of(sae.cfg, name), train=config) for name in names}
    return {name: run.sae for name, run in train_together(stream, runs).items()}
