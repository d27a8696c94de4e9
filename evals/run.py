"""Evaluate a checkpoint where it stands: its own stream, its own control, results and figures into its run folder."""

import json
from pathlib import Path
from typing import Any

from ..engine.checkpoint import Checkpoint
from ..engine.sae import SparseAutoencoder
from ..engine.stream import ActivationStream
from ..engine.train import read_metrics, train
from .core import check_fits, core
from .figures import draw


def evaluate(found: Checkpoint, stream: ActivationStream, run: Path | None) -> dict[str, Any]:
    """Core metrics of a checkpoint and its controls; with `run`, also written there as evals/core.json and figures/.

    The random control is the one trained beside the dictionary; where there is none, it is trained now on as many tokens.
    """
    sae = found.dictionary()
    check_fits("sae", sae, stream)
    controls = {} if sae.cfg.decoder == "random" else {"random": _control(found, sae, stream)}
    result = core(stream, sae, controls)
    if run is not None:
        (run / "evals").mkdir(exist_ok=True)
        (run / "evals" / "core.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(run / "figures", read_metrics(run), result)
    return result


def _control(found: Checkpoint, sae: SparseAutoencoder, stream: ActivationStream) -> SparseAutoencoder:
    if "random" in found.dictionaries:
        return found.dictionary("random")
    config = found.run.train if found.run is not None else None
    return train(stream, sae.cfg.model_copy(update={"decoder": "random"}), config).sae
