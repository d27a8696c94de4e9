"""Figures of all runs together: each beside its random control, and error against sparsity in every condition."""

from typing import Any

import numpy as np

from ..reporting.plots import COLOURS, MARKERS, SEVERAL, WORST, frame, legend_below, new_figure
from . import figure_panels as panels
from .figure_panels import DrawnFigure, RunScores
from .seed_results import CampaignResults, NotMeasured, final_fvu, score
from .significance import ALIKE

LOG_COLOURS = dict(zip("ABCDE", SEVERAL, strict=False))
LEAST = -0.25  # explained variance below this is marked here, with its number


def overview(saved: CampaignResults) -> DrawnFigure:
    """Draw the explained variance of every run beside that of its random control, log by log."""
    runs = {"Baselines": saved.baselines, **{f"Log {log}": saved.trained(log) for log in saved.logs}}
    groups = {
        name: [RunScores(run, *score(run, "explained_variance")) for run in group.values()]
        for name, group in runs.items() if group
    }  # fmt: skip
    all_scores = [scores for group in groups.values() for scores in group]
    if not any(scores.trained for scores in all_scores):
        raise NotMeasured("core was not measured of any run")
    figure = new_figure(panels.NARROW, 1.1 + 0.155 * (len(all_scores) + len(groups)))
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    at, ticks, labels = 0.0, [], []
    analyses = [run for runs in saved.logs.values() for run in runs.values() if run["trained_as"]]
    for name, group in groups.items():
        axes.text(0, at, name, fontsize=7.5, fontweight="bold", va="center", transform=axes.get_yaxis_transform())
        for scores in group:
            at += 1
            _dumbbell(axes, at, scores)
            ticks.append(at)
            analysed_by = ", ".join(run["run"] for run in analyses if run["trained_as"] == scores.name)
            labels.append(panels.label_of(scores.run) + (f" ({analysed_by})" if analysed_by else ""))
        at += 1.4
    axes.plot([], [], "o", color=panels.DARK, markersize=4.5, label="dictionary")
    axes.plot([], [], "o", color=COLOURS["random"], mfc="white", markersize=4.5, label="random control")
    if any(map(_is_worse, all_scores)):
        axes.plot([], [], color=COLOURS["random"], linewidth=1.6, label="no better than its control")
    axes.set_yticks(ticks, labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set(xlabel="explained variance on held-out text", ylim=(at - 0.4, -0.8))
    axes.set_xlim(left=max(LEAST, axes.get_xlim()[0]))
    panels.polished(figure)
    axes.tick_params(axis="y", labelsize=6.5)
    legend_below(figure, panels.note(saved))
    return DrawnFigure(figure)


def conditions(saved: CampaignResults) -> DrawnFigure:
    """Draw the error of every run in every condition: against L0, or run by run where L0 is the same for all."""
    every = [run for kind in ("baselines", "runs") for run in saved.campaign[kind].values() if not run["trained_as"]]
    known = [run for run in every if final_fvu(run) and score(run, "l0")[0]]
    if not known:
        raise NotMeasured("core was not measured of any run")
    markers = {name: MARKERS[at % len(MARKERS)] for at, name in enumerate(saved.campaign["conditions"])}
    sparsity = [float(np.mean(score(run, "l0")[0])) for run in known]
    is_matched = 0 < max(sparsity) <= ALIKE * min(sparsity)
    names, order = list(dict.fromkeys(run["run"] for run in known)), list(markers)

    def draw(axes: Any) -> None:
        points = []
        for run, l0 in zip(known, sparsity, strict=True):
            fvu, colour = final_fvu(run), LOG_COLOURS.get(run["log"], panels.DARK)
            beside = 0.15 * (order.index(run["condition"]) - (len(order) - 1) / 2)  # conditions side by side
            x = names.index(run["run"]) + beside if is_matched else l0
            style = {"linestyle": "", "markersize": 5, "alpha": 0.85, "mew": 0.4, "mec": "white", "gid": run["run"]}
            axes.plot(x, np.mean(fvu), marker=markers[run["condition"]], color=colour, **style)
            panels.whisker(axes, x, fvu, colour)
            points.append(((x,), (float(np.mean(fvu)),), colour))
        for log in dict.fromkeys(run["log"] for run in known):
            label = "baselines" if log is None else f"log {log}"
            axes.plot([], [], "s", color=LOG_COLOURS.get(log or "", panels.DARK), markersize=6, label=label)
        for name, marker in markers.items():
            label = name.replace("_", " ") or "as documented"
            axes.plot([], [], marker=marker, linestyle="", color=panels.GREY, markersize=5, label=label)
        axes.grid(alpha=0.25)
        axes.set(ylabel=panels.HELD_OUT_FVU, yscale="log")
        frame(axes, points, y=(None, WORST))
        panels.plain_ticks(axes.yaxis)
        if is_matched:
            panels.name_runs(axes, names)
            axes.set_title(f"Error of every run in every condition, at the same L0 ({max(sparsity):.3g})")
        else:
            axes.set(xlabel=panels.L0, xscale="log", title="Sparsity against error, every run in every condition")
            panels.plain_ticks(axes.xaxis)

    drawing = panels.arranged({"conditions": draw}, 1, (panels.WIDE, 4.2))
    return panels.with_legend(drawing, panels.note(saved), columns=4)


def _dumbbell(axes: Any, at: float, scores: RunScores) -> None:
    if not scores.trained:
        style = {"fontsize": 6.5, "color": panels.GREY, "va": "center", "transform": axes.get_yaxis_transform()}
        axes.text(0.01, at, scores.absence, **style)
        return
    colour, red = LOG_COLOURS.get(scores.run["log"], panels.DARK), COLOURS["random"]
    ends = [(scores.trained, colour, colour, scores.name)]
    if scores.random:
        ends.append((scores.random, red, "white", f"{scores.name} random"))
        style = {"color": red if _is_worse(scores) else "#cccccc", "linewidth": 1.6, "zorder": 1}
        axes.plot([max(LEAST, np.mean(seeds)) for seeds, *_ in ends], [at, at], gid=f"{scores.name} gap", **style)
    for seeds, edge, face, gid in ends:
        mean = float(np.mean(seeds))
        is_far = mean < LEAST
        style = {"color": edge, "mfc": face, "markersize": 4.5, "zorder": 4, "gid": gid, "clip_on": not is_far}
        axes.plot(max(LEAST, mean), at, "<" if is_far else "o", **style)
        if is_far:
            style = {"fontsize": 6, "va": "center", "bbox": {"facecolor": "white", "linewidth": 0, "pad": 0.8}}
            axes.annotate(f"{mean:.2g}", (LEAST, at), (6, 0), textcoords="offset points", **style)
        else:
            panels.whisker(axes, at, seeds, edge, across=True)


def _is_worse(scores: RunScores) -> bool:
    return bool(scores.trained and scores.random and np.mean(scores.trained) <= np.mean(scores.random))
