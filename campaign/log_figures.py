"""The figures that logs A, B and E name."""

from collections.abc import Mapping, Sized
from functools import partial
from typing import Any

import numpy as np

from ..engine.process.progress import percent
from ..engine.storage.run_folder import HELD_OUT
from ..reporting.plots import COLOURS, SEVERAL, WORST
from . import figure_panels as panels
from .figure_panels import DrawnFigure, RunScores
from .seed_results import CampaignResults, NotMeasured, Seeds, score

COMPARED = ("B9", "B10")  # the runs that log B's figures compare


def unlearning_scores(saved: CampaignResults, log: str) -> DrawnFigure:
    """Draw the unlearning scores of a log's runs as bars, with their random controls."""
    all_scores = panels.scores_of_log(saved, log, partial(score, name="unlearning"))
    if not any(scores.trained for scores in all_scores if not scores.is_baseline):
        is_measured = "unlearning" in saved.campaign["evals"]
        reason = "no setting counts for any run" if is_measured else "it is not among the evals"
        raise NotMeasured(f"unlearning was not measured in this campaign: {reason}")
    label = "unlearning score (1 - lowest forget accuracy)"
    return _bars(saved, all_scores, label, f"Unlearning, runs of log {log}")


def training_curves(saved: CampaignResults, log: str) -> DrawnFigure:
    """Draw FVU over training, a line per run. Unlike training losses, FVU of different objectives can be compared."""
    runs = saved.runs_of(log)
    alive = {name: run for name, run in runs.items() if saved.folders(run)}
    try:
        measured_on = "held-out text"
        curve_by_run = {name: saved.curve(run, "fvu", file=HELD_OUT) for name, run in alive.items()}
    except NotMeasured:
        measured_on = "unseen batches"
        curve_by_run = {name: saved.curve(run, "fvu") for name, run in alive.items()}
    if not curve_by_run.keys() - saved.baselines.keys():
        raise NotMeasured("every run failed")
    text = {"ylabel": f"FVU on {measured_on}", "title": f"Error over training, runs of log {log}"}
    panel = partial(panels.curves, curve_by_run=curve_by_run, runs=runs, **text)
    return panels.with_legend(panels.arranged({"curves": panel}, 1, (panels.WIDE, 4.2)), panels.note(saved, "bands"))


def final_metrics(saved: CampaignResults, log: str) -> DrawnFigure:
    """Draw the final FVU of a log's runs as bars."""
    title = f"Error at the end, runs of log {log}"
    return _bars(saved, panels.final_errors(saved, log), panels.HELD_OUT_FVU, title, digits=3, most=WORST)


def training_progression(saved: CampaignResults, log: str) -> DrawnFigure:
    """Draw how many steps each run of a log completed, and its final FVU."""
    runs = saved.runs_of(log)

    def completed(axes: Any) -> None:
        steps = panels.scores_of_log(saved, log, lambda run: (saved.steps(run),))
        panels.bars(axes, steps, "training steps", title="Steps completed", best=COMPARED)
        trains = {name: saved.settings(run)["train"] for name, run in runs.items()}
        planned = {name: -(-train["tokens"] // train["batch"]) for name, train in trains.items()}
        _marks(axes, runs, planned, "|", "steps planned")

    def errors(axes: Any) -> None:
        style = {"title": "Error at the end", "best": COMPARED, "most": WORST, "digits": 3}
        panels.bars(axes, panels.final_errors(saved, log), panels.HELD_OUT_FVU, **style)

    drawing = panels.arranged({"steps": completed, "error": errors}, 2, (panels.WIDE, _height(runs)))
    return _named_at_left(drawing, panels.note(saved), columns=4)


def hyperparameters(saved: CampaignResults, log: str) -> DrawnFigure:
    """Draw the learning rates and L1 coefficients of a log's runs, and what they changed to in training."""
    runs = saved.runs_of(log)

    def rates(axes: Any) -> None:
        rate_by_run = {name: run["lr"] for name, run in runs.items() if run["lr"]}
        paces = {name: _part_setting(saved, runs[name], "pace") for name in rate_by_run}
        paced_by_run = {name: rate_by_run[name] * pace for name, pace in paces.items() if pace != 1}
        _levels(axes, runs, rate_by_run, "peak learning rate", "Learning rate")
        _marks(axes, runs, paced_by_run, "D", "of its adapters")
        panels.plain_ticks(axes.xaxis, (1, 3))

    def penalties(axes: Any) -> None:
        known = {name: run["l1_coefficient"] for name, run in runs.items() if run["activation"] == "relu"}
        coefficient_by_run = {name: value for name, value in known.items() if value}  # a logarithmic axis has no 0
        factors = {name: _last_factor(saved, runs[name]) for name in coefficient_by_run}
        firsts = {name: _part_setting(saved, runs[name], "l1_from") for name in coefficient_by_run}
        first_by_run = {name: coefficient_by_run[name] * factor for name, factor in firsts.items() if factor != 1}
        final_by_run = {name: coefficient_by_run[name] * np.mean(last) for name, last in factors.items() if last}
        _levels(axes, runs, coefficient_by_run, "L1 coefficient", "Sparsity penalty")
        _marks(axes, runs, first_by_run, "D", "while its base is alone")
        _marks(axes, runs, final_by_run, "^", "at the end, adjusted to the target L0")
        panels.plain_ticks(axes.xaxis, (1,))

    drawing = panels.arranged({"rates": rates, "penalties": penalties}, 2, (panels.WIDE, _height(runs)))
    return _named_at_left(drawing, None, columns=3)


def feature_statistics(saved: CampaignResults, log: str) -> DrawnFigure:
    """Draw the size of each dictionary of a log, and how many of its latents are alive."""
    all_scores = panels.scores_of_log(
        saved, log, lambda run: (tuple(run["d_sae"] * (1 - dead) for dead in score(run, "dead_fraction")[0]),)
    )
    if not any(scores.trained for scores in all_scores):
        raise NotMeasured("core was not measured of any run")

    def draw(axes: Any) -> None:
        sizes = [scores.run["d_sae"] for scores in all_scores]
        style = {"linestyle": "", "gid": "d_sae", "markersize": 6, "mfc": "none", "color": panels.DARK}
        axes.plot(sizes, range(len(sizes)), marker="s", label="dictionary size F", **style)
        known = [(index, scores) for index, scores in enumerate(all_scores) if scores.trained]
        colours = [panels.GREY if scores.is_baseline else COLOURS["sae"] for _, scores in known]
        alive = [np.mean(scores.trained) for _, scores in known]
        axes.scatter(alive, [index for index, _ in known], s=22, color=colours, zorder=3, gid="alive")
        label = "latents alive on held-out text, and their share"
        axes.plot([], [], "o", color=COLOURS["sae"], markersize=4.5, label=label)
        for (index, scores), colour in zip(known, colours, strict=True):
            style = {"textcoords": "offset points", "ha": "right", "va": "center", "fontsize": 6.5}
            share = percent(float(np.mean(scores.trained)) / sizes[index], 0)
            axes.annotate(share, (min(scores.trained), index), (-6, 0), **style)
            panels.whisker(axes, index, scores.trained, colour, across=True)
        axes.grid(axis="x", alpha=0.25)
        axes.set(xlabel="latents", title=f"Dictionary sizes, runs of log {log}", xlim=(0, 1.08 * max(sizes)))
        panels.name_runs(axes, [panels.label_of(scores.run) for scores in all_scores], lying=True)

    drawing = panels.arranged({"sizes": draw}, 1, (panels.NARROW, _height(all_scores)))
    return panels.with_legend(drawing, panels.note(saved))


def _bars(saved: CampaignResults, all_scores: list[RunScores], label: str, title: str, **options: Any) -> DrawnFigure:
    panel = partial(panels.bars, all_scores=all_scores, label=label, title=title, **options)
    drawing = panels.arranged({title: panel}, 1, (panels.NARROW, _height(all_scores)))
    return panels.with_legend(drawing, panels.note(saved))


def _height(runs: Sized) -> float:
    return 1.3 + 0.165 * len(runs)


def _named_at_left(drawing: DrawnFigure, text: str | None, columns: int) -> DrawnFigure:
    """Name the runs beside the first panel only, and put one legend below all."""
    for axes in drawing.figure.axes[1:]:
        axes.tick_params(axis="y", labelleft=False)
    return panels.with_legend(drawing, text, columns)


def _levels(axes: Any, runs: Mapping[str, Any], value_by_run: Mapping[str, float], label: str, title: str) -> None:
    """Mark the setting of each run on a logarithmic axis, where bars would have no zero to start from."""
    for index, (name, run) in enumerate(runs.items()):
        if name in value_by_run:
            colour = panels.GREY if run["log"] is None else SEVERAL[1] if name in COMPARED else COLOURS["sae"]
            axes.plot(value_by_run[name], index, "o", color=colour, markersize=5.5, gid=name)
            _annotate(axes, value_by_run[name], index)
    axes.plot([], [], "o", color=COLOURS["sae"], label="setting")
    if set(COMPARED) & set(value_by_run):
        axes.plot([], [], "o", color=SEVERAL[1], label=f"setting of {' and '.join(COMPARED)}")
    axes.grid(axis="x", alpha=0.25)
    axes.set(xscale="log", xlabel=label, title=title)
    axes.margins(x=0.15)
    panels.name_runs(axes, [panels.label_of(run) for run in runs.values()], lying=True)


def _marks(axes: Any, runs: Mapping[str, Any], value_by_run: Mapping[str, float], marker: str, label: str) -> None:
    if not value_by_run:
        return
    indices = [list(runs).index(name) for name in value_by_run]
    size = 10 if marker == "|" else 4.5
    style = {"color": panels.DARK, "mfc": "none", "markersize": size, "linestyle": "", "label": label, "gid": label}
    axes.plot(list(value_by_run.values()), indices, marker=marker, **style)
    for value, index in zip(value_by_run.values(), indices, strict=True) if marker != "|" else ():
        _annotate(axes, value, index, before=marker == "D")


def _annotate(axes: Any, value: float, position: float, *, before: bool = False) -> None:
    offset, side = ((-5, 0), "right") if before else ((5, 0), "left")
    style = {"textcoords": "offset points", "fontsize": 6, "ha": side, "va": "center"}
    axes.annotate(f"{value:.2g}", (value, position), offset, **style)


def _part_setting(saved: CampaignResults, run: Mapping[str, Any], setting: str) -> float:
    """A factor in the settings of a run's parts; 1 if no part has it."""
    values = [section[setting] for section in saved.settings(run)["sae"]["parts"] if setting in section]
    return values[0] if values else 1.0


def _last_factor(saved: CampaignResults, run: Mapping[str, Any]) -> Seeds:
    """The final factor on L1, which training adjusts to reach `target_l0`."""
    try:
        return tuple(saved.curve(run, "sparsity").of_seeds[:, -1].tolist())
    except NotMeasured:
        return ()
