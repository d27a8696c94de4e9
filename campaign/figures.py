"""Draw a campaign's figures from its saved numbers: those that the logs name, in a folder per log, and those of all runs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..engine.storage.files import os_errors_named
from ..engine.storage.sealed import read_json, write_json
from ..reporting.plots import remove_figure, save_figure
from . import log_figures, overview, position_figures
from .figure_panels import DrawnFigure
from .seed_results import CampaignResults, NotMeasured

MISSING = "missing.json"

#: by log: the figures that it names
NAMED: dict[str, dict[str, Callable[[CampaignResults], DrawnFigure]]] = {
    "A": {
        "unlearning_scores": partial(log_figures.unlearning_scores, log="A"),
        "loss_curves": partial(log_figures.training_curves, log="A"),
        "final_metrics": partial(log_figures.final_metrics, log="A"),
    },
    "B": {
        "training_progression": partial(log_figures.training_progression, log="B"),
        "hyperparameters": partial(log_figures.hyperparameters, log="B"),
    },
    "C": {
        "position_analysis": position_figures.position_analysis,
        "position_weights": position_figures.position_weights,
        "sparsity_analysis": position_figures.sparsity_analysis,
        "temporal_clustering": position_figures.temporal_clustering,
        "cluster_patterns": position_figures.cluster_patterns,
        "comparative_analysis": position_figures.comparative_analysis,
    },
    "E": {
        "unlearning_scores": partial(log_figures.unlearning_scores, log="E"),
        "training_curves": partial(log_figures.training_curves, log="E"),
        "feature_statistics": partial(log_figures.feature_statistics, log="E"),
    },
}

#: by file name
CAPTIONS = {
    "overview": "Explained variance of all dictionaries beside their random controls.",
    "conditions": "FVU of every run in every condition, against L0 where that differs.",
    "unlearning_scores": "Unlearning score of each run beside its random control.",
    "loss_curves": "FVU over training, a line per run.",
    "final_metrics": "Final FVU of each run.",
    "training_progression": "Steps that each run completed, and its final FVU.",
    "hyperparameters": "Learning rate and L1 coefficient of each run.",
    "position_analysis": "Squared error by position over training and at the end, and mask weights by position.",
    "position_weights": "Loss weights by position over training, and against the squared error at the position.",
    "sparsity_analysis": "L0 by position over training and at the end, and where latents are active.",
    "temporal_clustering": "Latents clustered by where in a row they are active.",
    "cluster_patterns": "Mean profile, correlation and specialization of each cluster of latents.",
    "comparative_analysis": "FVU and L0 of the log's runs, and FVU and loss weights by position.",
    "training_curves": "FVU over training, a line per run.",
    "feature_statistics": "Size of each dictionary, and how many of its latents are alive.",
}


def draw(out: Path) -> list[Path]:
    """Draw the figures that the logs of a campaign's runs name, an overview, and its conditions if there are several.

    They are written to figures/ in the campaign's folder `out`. Returns their paths. A figure or panel whose numbers were
    not measured is left out, and figures/missing.json has the reason. Raises UserError without campaign.json.
    """
    saved, folder = CampaignResults(out), out / "figures"
    paths: list[Path] = []
    reasons: dict[str, str] = {}
    for name, make in _figure_makers(saved).items():
        path = folder / name
        try:
            drawing = make(saved)
        except NotMeasured as reason:
            reasons[name] = f"not drawn: {reason}"
            remove_figure(path)  # an earlier one has other numbers
            continue
        if drawing.lacks:
            reasons[name] = f"drawn without {'; without '.join(drawing.lacks)}"
        save_figure(drawing.figure, path)
        paths.append(path)
    with os_errors_named(f"out: {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MISSING, reasons)
    return paths


def missing(out: Path) -> dict[str, str]:
    """The reasons for missing figures and panels in a campaign's folder, by the figure's name."""
    path = out / "figures" / MISSING
    return read_json(path, "figures", f"temposae plot {out} makes it again") if path.is_file() else {}


def _figure_makers(saved: CampaignResults) -> dict[str, Callable[[CampaignResults], DrawnFigure]]:
    makers: dict[str, Callable[[CampaignResults], DrawnFigure]] = {"overview.png": overview.overview}
    if len(saved.campaign["conditions"]) > 1:
        makers["conditions.png"] = overview.conditions
    for log, figures in NAMED.items():
        if log in saved.logs:
            makers |= {f"log_{log.lower()}/{name}.png": make for name, make in figures.items()}
    return makers
