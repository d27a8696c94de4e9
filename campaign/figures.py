"""Figures of a campaign, from its saved numbers: those that the logs name, in a folder for each log, and those of all runs
together."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..engine.errors import UserError
from ..engine.storage.sealed import read_json, write_json
from ..reporting.plots import remove_figure, save_figure
from . import log_figures, overview, position_figures
from .figure_panels import DrawnFigure
from .seed_results import CampaignResults, NotMeasured

MISSING = "missing.json"

#: by log: the names that the log has for its figures
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

#: by the name of its file: what a figure shows
CAPTIONS = {
    "overview": "Explained variance of all dictionaries beside their random controls.",
    "conditions": "FVU of every run in every condition, against L0 where that differs.",
    "unlearning_scores": "Unlearning score of each run beside its random control.",
    "loss_curves": "FVU over training, a line per run.",
    "final_metrics": "FVU of each run at the end.",
    "training_progression": "Steps that each run completed, and its FVU at the end.",
    "hyperparameters": "Learning rate and L1 coefficient of each run.",
    "position_analysis": "Squared error by position over training and at the end, and mask weights by position.",
    "position_weights": "Loss weights of positions over training, and beside the squared error of their position.",
    "sparsity_analysis": "L0 by position over training and at the end, and where latents are active.",
    "temporal_clustering": "Latents clustered by where in a row they are active.",
    "cluster_patterns": "Mean profile, likeness and specialization of each cluster of latents.",
    "comparative_analysis": "FVU and L0 of the log's runs, in all and by position.",
    "training_curves": "FVU over training, a line per run.",
    "feature_statistics": "Size of each dictionary, and how many of its latents are alive.",
}


def draw(out: Path) -> list[Path]:
    """Write into figures/ of a campaign's folder every figure that the logs of its runs name, an overview, and one of its
    conditions if there are several; returns where they are.

    A figure, or a panel of one, whose numbers were not measured is left out; figures/missing.json has the reason by the
    figure's name. Raises UserError where there is no campaign.json.
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
            remove_figure(path)  # one of other numbers may be there
            continue
        if drawing.lacks:
            reasons[name] = f"drawn without {'; without '.join(drawing.lacks)}"
        save_figure(drawing.figure, path)
        paths.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_json(folder / MISSING, reasons)
    except OSError as error:
        raise UserError(f"out: {folder} can't be written ({error.strerror})") from None
    return paths


def missing(out: Path) -> dict[str, str]:
    """Why figures of a campaign's folder, or panels of them, were not drawn, by the figure's name."""
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
