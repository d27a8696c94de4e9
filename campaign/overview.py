"""Figures of all runs together: each beside its random control, and error against sparsity in every condition."""

from collections.abc import Mapping
from typing import Any

from ..reporting.plots import COLOURS, MARKERS, SEVERAL, WORST, frame, legend_below
from .figure_panels import (
    GREY,
    HELD_OUT_FVU,
    L0,
    NARROW,
    WIDE,
    DrawnFigure,
    RunScores,
    arranged,
    name_runs,
    new_figure,
    note,
    plain_ticks,
    polished,
    scores_of_run,
    whisker,
)
from .seed_results import CampaignResults, NotMeasured, SeedValues, final_fvu, score
from .significance import ALIKE

LOG_COLOURS = dict(zip("ABCDE", SEVERAL, strict=False))
LEAST = -0.25  # explained variance: where what is still worse is put, with its figure


def overview(saved: CampaignResults) -> DrawnFigure:
    """Explained variance of every run beside its random control's, log by log."""
    groups = {"Baselines": [scores_of_run(*each, _explained, is_baseline=True) for each in saved.baselines.items()]}
    for log in saved.logs:
        groups[f"Log {log}"] = [scores_of_run(*each, _explained) for each in saved.trained(log).items()]
    if not any(row.trained for group in groups.values() for row in group):
        raise NotMeasured("core was not measured of any run")
    groups = {name: group for name, group in groups.items() if group}
    count = sum(map(len, groups.values()))
    figure = new_figure(NARROW, 1.1 + 0.155 * (count + len(groups)))
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    at, ticks, labels = 0.0, [], []
    analyses = [run for runs in saved.logs.values() for run in runs.values() if run["trained_as"]]
    for name, group in groups.items():
        axes.text(0, at, name, fontsize=7.5, fontweight="bold", va="center", transform=axes.get_yaxis_transform())
        for row in group:
            at += 1
            colour = LOG_COLOURS.get(row.name[0], "#222222") if not row.is_baseline else "#222222"
            _dumbbell(axes, at, row, colour)
            ticks.append(at)
            looked_at = ", ".join(run["run"] for run in analyses if run["trained_as"] == row.name)
            labels.append(f"{row.label} ({looked_at})" if looked_at else row.label)
        at += 1.4
    axes.plot([], [], "o", color="#222222", markersize=4.5, label="dictionary")
    axes.plot([], [], "o", color=COLOURS["random"], mfc="white", markersize=4.5, label="random control")
    if any(_is_worse(row) for group in groups.values() for row in group):
        axes.plot([], [], color=COLOURS["random"], linewidth=1.6, label="no better than its control")
    axes.set_yticks(ticks, labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set(xlabel="explained variance on held-out text", ylim=(at - 0.4, -0.8))
    axes.set_xlim(left=max(LEAST, axes.get_xlim()[0]))
    polished(figure)
    axes.tick_params(axis="y", labelsize=6.5)
    legend_below(figure, note(saved))
    return DrawnFigure(figure)


def conditions(saved: CampaignResults) -> DrawnFigure:
    """Error of every run in every condition: against sparsity, or where that is the same for all, side by side."""
    baselines, runs = saved.campaign["baselines"].values(), saved.campaign["runs"].values()
    every = [*baselines, *(run for run in runs if not run["trained_as"])]
    known = [run for run in every if final_fvu(run) and score(run, "l0")[0]]
    if not known:
        raise NotMeasured("core was not measured of any run")
    markers = {name: MARKERS[at % len(MARKERS)] for at, name in enumerate(saved.campaign["conditions"])}
    sparsity = [score(run, "l0")[0].mean for run in known]
    is_matched = 0 < max(sparsity) <= ALIKE * min(sparsity)
    names = list(dict.fromkeys(run["run"] for run in known))

    def draw(axes: Any) -> None:
        for run, l0 in zip(known, sparsity, strict=True):
            fvu, colour = final_fvu(run), LOG_COLOURS.get(run["log"], "#222222")
            x = names.index(run["run"]) if is_matched else l0
            style = {"linestyle": "", "markersize": 5, "alpha": 0.85, "mew": 0.4, "mec": "white"}
            axes.plot(x, fvu.mean, marker=markers[run["condition"]], color=colour, gid=run["run"], **style)
            if len(fvu.values) > 1:
                whisker(axes, x, fvu, colour)
        for log, colour in {"baselines": "#222222", **LOG_COLOURS}.items():
            if log == "baselines" or any(run["log"] == log for run in known):
                axes.plot([], [], "s", color=colour, markersize=6, label=log if log == "baselines" else f"log {log}")
        for name, marker in markers.items():
            style = {
                "linestyle": "",
                "color": GREY,
                "markersize": 5,
                "label": name.replace("_", " ") or "as documented",
            }
            axes.plot([], [], marker=marker, **style)
        axes.grid(alpha=0.25)
        axes.set(ylabel=HELD_OUT_FVU, yscale="log")
        places = [names.index(run["run"]) if is_matched else l0 for run, l0 in zip(known, sparsity, strict=True)]
        colours = [LOG_COLOURS.get(run["log"], "#222222") for run in known]
        errors = [final_fvu(run).mean for run in known]
        points = [((x,), (error,), colour) for x, error, colour in zip(places, errors, colours, strict=True)]
        frame(axes, points, y=(None, WORST))
        plain_ticks(axes.yaxis)
        if is_matched:
            name_runs(axes, names)
            axes.set_title(f"Error of every run in every condition, at the same L0 ({max(sparsity):.3g})")
        else:
            axes.set(xlabel=L0, xscale="log")
            plain_ticks(axes.xaxis)
            axes.set_title("Sparsity against error, every run in every condition")

    drawing = arranged({"conditions": lambda: draw}, 1, (WIDE, 4.2))
    legend_below(drawing.figure, note(saved), columns=4)
    return drawing


def _dumbbell(axes: Any, at: float, row: RunScores, colour: str) -> None:
    if not row.trained:
        why = "failed" if row.has_failed else "none"
        axes.text(0.01, at, why, fontsize=6.5, color=GREY, va="center", transform=axes.get_yaxis_transform())
        return
    ends = [(row.trained, colour, colour, row.name)]
    if row.random:
        ends.append((row.random, COLOURS["random"], "white", f"{row.name} random"))
        style = {"color": COLOURS["random"] if _is_worse(row) else "#cccccc", "linewidth": 1.6, "zorder": 1}
        axes.plot([max(LEAST, seeds.mean) for seeds, *_ in ends], [at, at], gid=f"{row.name} gap", **style)
    for seeds, edge, face, gid in ends:
        if seeds.mean < LEAST:
            axes.plot(LEAST, at, "<", color=edge, mfc=face, markersize=4.5, zorder=4, gid=gid, clip_on=False)
            style = {"fontsize": 6, "va": "center", "bbox": {"facecolor": "white", "linewidth": 0, "pad": 0.8}}
            axes.annotate(f"{seeds.mean:.2g}", (LEAST, at), (6, 0), textcoords="offset points", **style)
            continue
        axes.plot(seeds.mean, at, "o", color=edge, mfc=face, markersize=4.5, zorder=4, gid=gid)
        if len(seeds.values) > 1:
            whisker(axes, at, seeds, edge, across=True)


def _is_worse(row: RunScores) -> bool:
    return bool(row.trained and row.random and row.trained.mean <= row.random.mean)


def _explained(run: Mapping[str, Any]) -> tuple[SeedValues, SeedValues]:
    return score(run, "explained_variance")
