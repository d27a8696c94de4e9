"""The figures that logs A, B and E name."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ..engine.process.progress import percent
from ..engine.storage.run_folder import HELD_OUT
from ..reporting.plots import COLOURS, SEVERAL, legend_below
from .figure_panels import (
    GREY,
    HELD_OUT_FVU,
    MOST,
    NARROW,
    WIDE,
    Draw,
    DrawnFigure,
    RunScores,
    arranged,
    bars,
    curves,
    name_runs,
    note,
    plain_ticks,
    scores_of_log,
    scores_without_values,
    whisker,
)
from .seed_results import CampaignResults, NotMeasured, SeedValues, final_fvu, score

COMPARED = ("B9", "B10")  # which log B's pictures are about


def unlearning_scores(saved: CampaignResults, log: str) -> DrawnFigure:
    """Bars of the runs' scores, with their random controls'."""
    all_scores = scores_of_log(saved, log, partial(score, name="unlearning"))
    if not any(scores.trained for scores in all_scores if not scores.is_baseline):
        is_measured = "unlearning" in saved.campaign["evals"]
        reason = "no setting counts for any run" if is_measured else "it is not among the evals"
        raise NotMeasured(f"unlearning was not measured in this campaign: {reason}")
    title = "Unlearning: 1 - least forget accuracy, while other answers are kept"
    return _bars(saved, all_scores, "unlearning score", title)


def training_curves(saved: CampaignResults, log: str) -> DrawnFigure:
    """Error over training, a line a run: training losses of different objectives can't be compared, FVU can."""
    all_runs = {**saved.baselines, **saved.trained(log)}
    alive = {name: run for name, run in all_runs.items() if saved.folders(run)}
    try:
        file, measured_on = HELD_OUT, "on held-out text"
        curve_by_run = {name: saved.curve(run, "fvu", file=file) for name, run in alive.items()}
    except NotMeasured:
        measured_on = "on batches not seen before"
        curve_by_run = {name: saved.curve(run, "fvu") for name, run in alive.items()}
    lines = {name: curve_by_run[name] for name in alive if name not in saved.baselines}
    if not lines:
        raise NotMeasured("every run failed")
    greys = {name: curve_by_run[name] for name in alive if name in saved.baselines}
    names = {scores.name: scores.label for scores in scores_without_values(all_runs)}
    title = f"Error over training, runs of log {log}"
    panel = lambda: curves(lines, greys, names, ylabel=f"FVU {measured_on}", title=title)
    drawing = arranged({title: panel}, 1, (WIDE, 4.2))
    legend_below(drawing.figure, note(saved, "bands"), columns=3)
    return drawing


def final_metrics(saved: CampaignResults, log: str) -> DrawnFigure:
    """Bars of what each run leaves unexplained at the end."""
    title = f"Error at the end, runs of log {log}"
    return _bars(saved, scores_of_log(saved, log, _fvu), HELD_OUT_FVU, title, digits=3, most=MOST)


def training_progression(saved: CampaignResults, log: str) -> DrawnFigure:
    """How far each run of the log came, and its error there."""

    def steps(run: Mapping[str, Any]) -> tuple[SeedValues, SeedValues]:
        return saved.steps(run), SeedValues(())

    def completed() -> Draw:
        all_scores, title = scores_of_log(saved, log, steps), "Steps completed"
        draw = bars(all_scores, "training steps", title=title, best=COMPARED, lying=True)
        runs = {**saved.baselines, **saved.trained(log)}
        trains = {name: saved.settings(run)["train"] for name, run in runs.items()}
        planned = {name: -(-train["tokens"] // train["batch"]) for name, train in trains.items()}

        def with_plan(axes: Any) -> None:
            draw(axes)
            _marks(axes, runs, planned, "|", "steps planned")

        return with_plan

    def ends() -> Draw:
        style = {"title": "Error at the end", "best": COMPARED, "most": MOST, "digits": 3}
        return bars(scores_of_log(saved, log, _fvu), HELD_OUT_FVU, lying=True, **style)

    drawing = arranged({"steps": completed, "error": ends}, 2, (WIDE, _height(saved, log)))
    _one_legend(drawing, note(saved))
    return drawing


def hyperparameters(saved: CampaignResults, log: str) -> DrawnFigure:
    """Learning rates and L1 coefficients, and what they were beside what the settings say."""
    runs = {**saved.baselines, **saved.trained(log)}

    def rates(axes: Any) -> None:
        rate_by_run = {name: run["lr"] for name, run in runs.items() if run["lr"]}
        paces = {name: _part_setting(saved, runs[name], "pace") for name in rate_by_run}
        paced_by_run = {name: rate_by_run[name] * pace for name, pace in paces.items() if pace != 1}
        _levels(axes, runs, rate_by_run, "peak learning rate", "Learning rate")
        _marks(axes, runs, paced_by_run, "D", "of its adapters")
        axes.margins(x=0.15)
        plain_ticks(axes.xaxis, (1, 3))

    def penalties(axes: Any) -> None:
        known = {name: run["l1_coefficient"] for name, run in runs.items() if run["activation"] == "relu"}
        coefficient_by_run = {name: value for name, value in known.items() if value}  # a logarithmic axis has no 0
        factors = {name: _last_factor(saved, runs[name]) for name in coefficient_by_run}
        firsts = {name: _part_setting(saved, runs[name], "l1_from") for name in coefficient_by_run}
        first_by_run = {name: coefficient_by_run[name] * factor for name, factor in firsts.items() if factor != 1}
        _levels(axes, runs, coefficient_by_run, "L1 coefficient", "Sparsity penalty")
        _marks(axes, runs, first_by_run, "D", "while its base is alone")
        final_by_run = {name: coefficient_by_run[name] * factor.mean for name, factor in factors.items() if factor}
        _marks(axes, runs, final_by_run, "^", "at the end, moved to reach the L0 asked for")
        axes.margins(x=0.15)
        plain_ticks(axes.xaxis, (1,))

    drawing = arranged({"rates": lambda: rates, "penalties": lambda: penalties}, 2, (WIDE, _height(saved, log)))
    _one_legend(drawing, None, columns=3)
    return drawing


def feature_statistics(saved: CampaignResults, log: str) -> DrawnFigure:
    """Sizes of the dictionaries, and how many of their latents are alive."""
    runs = {**saved.baselines, **saved.trained(log)}
    all_scores = scores_of_log(saved, log, lambda run: (_alive(run), SeedValues(())))
    if not any(scores.trained for scores in all_scores):
        raise NotMeasured("core was not measured of any run")

    def prepare() -> Draw:
        def draw(axes: Any) -> None:
            sizes = [run["d_sae"] for run in runs.values()]
            style = {"linestyle": "", "gid": "d_sae", "markersize": 6, "mfc": "none", "color": "#222222"}
            axes.plot(range(len(sizes)), sizes, marker="s", label="dictionary size F", **style)
            known = [(index, scores) for index, scores in enumerate(all_scores) if scores.trained]
            colours = [GREY if scores.is_baseline else COLOURS["sae"] for _, scores in known]
            alive = [scores.trained.mean for _, scores in known]
            axes.scatter([index for index, _ in known], alive, s=22, color=colours, zorder=3, gid="alive")
            label = "latents alive on held-out text, and their share"
            axes.plot([], [], "o", color=COLOURS["sae"], markersize=4.5, label=label)
            for (index, scores), colour in zip(known, colours, strict=True):
                text = percent(scores.trained.mean / sizes[index], 0)
                low = (index, scores.trained.mean - scores.trained.reach[0])
                axes.annotate(text, low, (0, -5), textcoords="offset points", ha="center", va="top", fontsize=6.5)
                if len(scores.trained.values) > 1:
                    whisker(axes, index, scores.trained, colour)
            axes.grid(axis="y", alpha=0.25)
            axes.set(ylabel="latents", title=f"Dictionary sizes, runs of log {log}")
            axes.set_ylim(0, 1.08 * max(sizes))
            name_runs(axes, [scores.label for scores in all_scores])

        return draw

    drawing = arranged({"sizes": prepare}, 1, (_width(len(all_scores)), 3.4))
    legend_below(drawing.figure, note(saved))
    return drawing


def _fvu(run: Mapping[str, Any]) -> tuple[SeedValues, SeedValues]:
    return final_fvu(run), SeedValues(())


def _alive(run: Mapping[str, Any]) -> SeedValues:
    return SeedValues(tuple(run["d_sae"] * (1 - dead) for dead in score(run, "dead_fraction")[0].values))


def _bars(saved: CampaignResults, all_scores: list[RunScores], ylabel: str, title: str, **options: Any) -> DrawnFigure:
    panels = {title: lambda: bars(all_scores, ylabel, title=title, **options)}
    drawing = arranged(panels, 1, (_width(len(all_scores)), 3.4))
    legend_below(drawing.figure, note(saved))
    return drawing


def _width(count: int) -> float:
    """Of a figure with a bar for each run."""
    return WIDE if count > 7 else NARROW


def _height(saved: CampaignResults, log: str) -> float:
    """Of a figure with a line for each run."""
    return 1.3 + 0.165 * (len(saved.baselines) + len(saved.trained(log)))


def _one_legend(drawing: DrawnFigure, text: str | None, columns: int = 4) -> None:
    """What several panels name, once; and names of runs at the left of the first only."""
    named = set[str]()
    for index, axes in enumerate(drawing.figure.axes):
        for artist in axes.get_legend_handles_labels()[0]:
            label = artist.get_label()
            artist.set_label(f"_{label}" if label in named else label)
            named.add(label)
        if index:
            axes.tick_params(axis="y", labelleft=False)
    legend_below(drawing.figure, text, columns=columns)


def _levels(axes: Any, runs: Mapping[str, Any], value_by_run: Mapping[str, float], label: str, title: str) -> None:
    """A mark for each run's setting, on a logarithmic axis, where bars would have no beginning."""
    all_scores = scores_without_values(runs)
    for index, scores in enumerate(all_scores):
        if scores.name in value_by_run:
            colour = GREY if scores.is_baseline else SEVERAL[1] if scores.name in COMPARED else COLOURS["sae"]
            axes.plot(value_by_run[scores.name], index, "o", color=colour, markersize=5.5, gid=scores.name)
            _annotate(axes, value_by_run[scores.name], index)
    axes.plot([], [], "o", color=COLOURS["sae"], label="as the settings say")
    if set(COMPARED) & set(value_by_run):
        axes.plot([], [], "o", color=SEVERAL[1], label=f"{' and '.join(COMPARED)}'s")
    axes.grid(axis="x", alpha=0.25)
    axes.set(xscale="log", xlabel=label, title=title)
    name_runs(axes, [scores.label for scores in all_scores], lying=True)


def _marks(axes: Any, runs: Mapping[str, Any], value_by_run: Mapping[str, float], marker: str, label: str) -> None:
    if value_by_run:
        indices = [list(runs).index(name) for name in value_by_run]
        size = 10 if marker == "|" else 4.5
        style = {"color": "#222222", "mfc": "none", "markersize": size, "linestyle": "", "label": label, "gid": label}
        axes.plot(list(value_by_run.values()), indices, marker=marker, **style)
        if marker != "|":
            for point in zip(value_by_run.values(), indices, strict=True):
                _annotate(axes, *point, before=marker == "D")


def _annotate(axes: Any, value: float, position: float, *, before: bool = False) -> None:
    """Its number, beside a mark."""
    offset, side = ((-5, 0), "right") if before else ((5, 0), "left")
    style = {"textcoords": "offset points", "fontsize": 6, "ha": side, "va": "center"}
    axes.annotate(f"{value:.2g}", (value, position), offset, **style)


def _part_setting(saved: CampaignResults, run: Mapping[str, Any], setting: str) -> float:
    """What a run's parts have for a setting that is a factor; 1 where none has it."""
    values = [section[setting] for section in saved.settings(run)["sae"]["parts"] if setting in section]
    return values[0] if values else 1.0


def _last_factor(saved: CampaignResults, run: Mapping[str, Any]) -> SeedValues:
    """The factor on L1 that training ended with, to have the L0 that was asked for."""
    try:
        return SeedValues(tuple(float(value) for value in saved.curve(run, "sparsity").of_seeds[:, -1]))
    except NotMeasured:
        return SeedValues(())
