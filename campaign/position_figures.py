"""The figures that log C names: losses, weights and sparsity by position, and clusters of latents."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..reporting.plots import WORST, legend_below, new_figure
from . import figure_panels as panels
from .analyses import distance_to_last, early_to_late, rank_correlation
from .figure_panels import DrawnFigure, Panel, over_steps
from .seed_results import CampaignResults, Curve, NotMeasured, score

TRACKER = ("parts", "position_tracker")
SQUARED_ERROR = "squared error per token (|x|² ≈ D)"
CLUSTERS = [*panels.LINES, "#999999"]  # colours of the largest number of clusters
TOLERANCE = 1e-4  # a weight this close to 1 counts as 1
BINS, MASK_WEIGHT = "position (sixteenths of a row)", "mean mask weight of latents"
AT_END = "At the end of training"


def position_analysis(saved: CampaignResults) -> DrawnFigure:
    """Draw C4: the loss of C2 by position."""
    run = saved.weights_of("C2")
    loss: Callable[[], Curve] = lambda: saved.curve(run, "positions", "squared_error")
    title = "Mask weights: C2's loss has no weights by position"
    return _with_note(saved, panels.arranged({
        "loss over steps": lambda axes: over_steps(axes, loss(), SQUARED_ERROR, "Loss by position, C2", scale="log"),
        "loss at the end": lambda axes: panels.by_position(axes, {"C2": loss()[-1]}, SQUARED_ERROR, AT_END, log=True),
        "mask weights": lambda axes: over_steps(axes, saved.curve(run, *TRACKER, "mask"), MASK_WEIGHT, title),
    }, 2, (panels.WIDE, 5.0)))  # fmt: skip


def position_weights(saved: CampaignResults) -> DrawnFigure:
    """Draw C7: how the loss weights of C6 develop, and what they follow."""
    run = saved.weights_of("C6")
    weights: Callable[[], Curve] = lambda: saved.curve(run, *TRACKER, "weights")
    loss: Callable[[], Curve] = lambda: saved.curve(run, "positions", "squared_error")
    title = "Weights over time, C6"
    return _with_note(saved, panels.arranged({
        "weights over steps": lambda axes: over_steps(axes, weights(), "loss weight", title, scale="log"),
        "convergence": lambda axes: _convergence(axes, weights()),
        "weight and difficulty": lambda axes: _difficulty(axes, weights(), loss()),
    }, 2, (panels.WIDE, 5.0)))  # fmt: skip


def sparsity_analysis(saved: CampaignResults) -> DrawnFigure:
    """Draw C8: how many latents of C6 are active at each position, and which."""
    run = saved.weights_of("C6")
    l0: Callable[[], Curve] = lambda: saved.curve(run, "positions", "l0")
    return _with_note(saved, panels.arranged({
        "L0 over steps": lambda axes: over_steps(axes, l0(), panels.L0, "Sparsity by position, C6"),
        "L0 at the end": lambda axes: panels.by_position(axes, {"C6": l0()[-1]}, panels.L0, AT_END),
        "latents by position": lambda axes: _activity(axes, _clustered(saved, run), _which(saved)),
    }, 2, (panels.WIDE, 5.0)))  # fmt: skip


def temporal_clustering(saved: CampaignResults) -> DrawnFigure:
    """Draw C9: the clustering tree of C6's latents, above their activity by position in the tree's order."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import ListedColormap
    from scipy.cluster.hierarchy import dendrogram

    from ..evals.clusters import tree

    result = _clustered(saved, saved.weights_of("C6"))
    profiles, cluster = (np.array(result["sample"][key]) for key in ("profiles", "cluster"))
    tree_layout = dendrogram(tree(profiles), no_plot=True)
    order, n = tree_layout["leaves"], len(profiles)
    figure = new_figure(panels.WIDE, 4.4)
    above, strip, below = figure.subplots(3, 1, sharex=True, height_ratios=(1.1, 0.09, 1.6))
    corners = zip(tree_layout["icoord"], tree_layout["dcoord"], strict=True)
    links = [np.column_stack([np.array(x) / 10, y]) for x, y in corners]
    above.add_collection(LineCollection(links, colors="#444444", linewidths=0.6 if n < 200 else 0.35))
    above.set(xlim=(0, n), ylim=(0, 1.05 * max(map(max, tree_layout["dcoord"]))), ylabel="Jensen-Shannon\ndistance")
    above.spines[["top", "right", "bottom"]].set_visible(False)
    count_text = f"{n} of {result['latents']:,}" if n < result["latents"] else f"{n}"
    above.set_title(f"C6's latents by where in a row they are active ({count_text}{_which(saved)})")
    colours = ListedColormap([CLUSTERS[index % len(CLUSTERS)] for index in range(result["count"])])
    limits = {"vmin": -0.5, "vmax": result["count"] - 0.5}
    strip.pcolormesh(np.arange(n + 1), [0, 1], cluster[order][None], cmap=colours, **limits)
    strip.set_yticks([0.5], ["cluster"])
    strip.spines[:].set_visible(False)
    edges = np.arange(profiles.shape[1] + 1) + 0.5
    panels.heat(below, np.arange(n + 1), edges, profiles[order].T, "share of activity", scale="root")
    below.set(ylabel=BINS, xlabel="latents, in the order of the tree")
    below.spines[["top", "right"]].set_visible(False)
    for axes in (above, strip):
        axes.tick_params(axis="x", length=0, labelbottom=False)
    strip.tick_params(axis="y", length=0)
    for index, cluster_result in enumerate(result["clusters"]):
        label = f"{index + 1}: {cluster_result['size']:,} latents"
        strip.plot([], [], "s", color=CLUSTERS[index % len(CLUSTERS)], label=label)
    legend_below(figure, columns=4)
    return DrawnFigure(panels.polished(figure))


def cluster_patterns(saved: CampaignResults) -> DrawnFigure:
    """Draw C9: mean profile, correlation and specialization of the clusters of C6's latents."""
    result = _clustered(saved, saved.weights_of("C6"))
    drawing = panels.arranged({
        "profiles": partial(_mean_profiles, result=result),
        "correlation": partial(_correlations, result=result),
        "specialization": partial(_specialized, result=result),
    }, 3, (panels.WIDE, 3.1))  # fmt: skip
    legend_below(drawing.figure, f"clusters of C6's latents{_which(saved)}", columns=4)
    return drawing


def comparative_analysis(saved: CampaignResults) -> DrawnFigure:
    """Draw error, sparsity, error by position and loss weights of the runs of log C that have weights of their own."""
    errors = panels.final_errors(saved, "C")
    active = panels.scores_of_log(saved, "C", lambda run: score(run, "l0")[:1])
    panel_by_name: dict[str, Panel] = {
        "error": lambda axes: panels.bars(axes, errors, panels.HELD_OUT_FVU, title="Error", most=WORST, short=True),
        "sparsity": lambda axes: panels.bars(axes, active, panels.L0, title="Sparsity", short=True),
        "error by position": partial(_errors, saved=saved),
        "weights by position": partial(_weights, saved=saved),
    }
    names = ", ".join(map(panels.label_of, saved.trained("C").values()))
    return _with_note(saved, panels.arranged(panel_by_name, 2, (panels.WIDE, 5.0)), "whiskers and bands", names)


def _with_note(saved: CampaignResults, drawing: DrawnFigure, shown: str = "band", *lines: str) -> DrawnFigure:
    text = [line for line in (*lines, panels.note(saved, shown)) if line]
    if text:
        drawing.figure.supxlabel("\n".join(text), fontsize=7.5)
    return drawing


def _convergence(axes: Any, weights: Curve) -> None:
    """Draw the mean distance of the weights from the final ones."""
    if len(weights.steps) < 3:
        raise NotMeasured("there are fewer than three reports")
    apart = Curve(weights.steps[:-1], distance_to_last(weights.of_seeds)[:, :-1])
    axes.plot(apart.steps, apart.mean, color=panels.LINES[0], linewidth=1.3, gid="distance")
    panels.band(axes, apart, panels.LINES[0])
    axes.grid(alpha=0.25)
    axes.set(xlabel="training step", ylabel="mean |w - w at the end|", ylim=(0, None))
    axes.set_title("Distance to the final weights")


def _difficulty(axes: Any, weights: Curve, error: Curve) -> None:
    """Draw final weights against squared errors, a point per position, with the rank correlation."""
    w, e = weights.mean[-1], error.mean[-1]
    known, rho = np.isfinite(w) & np.isfinite(e), rank_correlation(w, e)
    if rho is None:
        raise NotMeasured("weights or errors are the same at all positions, or fewer than three positions have tokens")
    points = axes.scatter(e[known], w[known], c=np.flatnonzero(known), cmap="viridis", s=11, linewidth=0)
    axes.figure.colorbar(points, ax=axes, pad=0.02, aspect=30).set_label(panels.POSITION, fontsize=7.5)
    axes.grid(alpha=0.25)
    axes.set(xlabel=f"{SQUARED_ERROR} at the end", ylabel="weight at the end", xscale="log")
    panels.plain_ticks(axes.xaxis)
    axes.set_title(f"Weight and difficulty, Spearman's ρ = {rho:.2f}")


def _clustered(saved: CampaignResults, run: Mapping[str, Any]) -> dict[str, Any]:
    """The clusters of the first seed. Clusters of different seeds do not correspond."""
    result = saved.results(run, "clusters")[0]
    if not result["clusters"]:
        raise NotMeasured(f"too few latents of {run['run']} fire often enough to be clustered")
    if "sample" not in result:
        raise NotMeasured(f"the clusters of {run['run']} were measured by an earlier version, without single latents")
    return result


def _which(saved: CampaignResults) -> str:
    return ", seed 0" if saved.campaign["seeds"] > 1 else ""


def _activity(axes: Any, result: dict[str, Any], which: str) -> None:
    """Draw the activity of latents by position, sorted from early to late."""
    profiles = early_to_late(np.array(result["sample"]["profiles"]))
    edges = np.arange(profiles.shape[1] + 1) + 0.5
    panels.heat(axes, edges, np.arange(len(profiles) + 1), profiles, "share of a latent's activity", scale="root")
    axes.set(xlabel=BINS, ylabel="latents, early to late", title=f"Where latents are active{which}")


def _mean_profiles(axes: Any, result: dict[str, Any]) -> None:
    for index, cluster in enumerate(result["clusters"]):
        profile = cluster["profile"]
        label = f"{index + 1}: {cluster['size']:,} latents"
        style = {"color": CLUSTERS[index % len(CLUSTERS)], "linewidth": 1.4}
        axes.plot(range(1, len(profile) + 1), profile, label=label, gid=f"cluster {index + 1}", **style)
    axes.grid(alpha=0.25)
    axes.set(xlabel=BINS, ylabel="share of activity", title="Mean profile", ylim=(0, None))
    axes.set_xticks(range(1, len(result["clusters"][0]["profile"]) + 1, 3))


def _correlations(axes: Any, result: dict[str, Any]) -> None:
    values = np.array(result["correlation"], dtype=float)
    count = len(values)
    image = axes.imshow(values, cmap="cividis", vmin=min(0.0, float(np.nanmin(values))), vmax=1)
    axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=25, shrink=0.75, location="bottom", label="mean Pearson r")
    middle = (image.norm.vmin + 1) / 2
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value) and count <= 6:
            colour = "black" if value > middle else "white"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    names = [str(1 + index) for index in range(count)]
    axes.set_xticks(range(count), names)
    axes.set_yticks(range(count), names)
    axes.set(xlabel="cluster", ylabel="cluster", title="Likeness of profiles")


def _specialized(axes: Any, result: dict[str, Any]) -> None:
    keys = ("whislo", "q1", "med", "q3", "whishi")
    boxes = [dict(zip(keys, cluster["specialization"], strict=True)) for cluster in result["clusters"]]
    drawn_boxes = axes.bxp(boxes, showfliers=False, patch_artist=True, widths=0.6, medianprops={"color": "black"})
    for index, box in enumerate(drawn_boxes["boxes"]):
        box.set(facecolor=CLUSTERS[index % len(CLUSTERS)], alpha=0.75, linewidth=0.7)
    axes.grid(axis="y", alpha=0.25)
    axes.set(xlabel="cluster", ylabel="1 - entropy / log 16", title="Specialization", ylim=(0, 1.02))


def _errors(axes: Any, saved: CampaignResults) -> None:
    """Draw the FVU of every run at every position of held-out text."""
    runs = {name: run for name, run in saved.runs_of("C").items() if saved.folders(run)}
    values = np.stack([1 - saved.per_position(run, "explained_variance").mean for run in runs.values()])
    edges = np.arange(values.shape[1] + 1) - 0.5
    panels.heat(axes, edges, np.arange(len(values) + 1) - 0.5, values, panels.HELD_OUT_FVU, scale="log")
    axes.set_yticks(range(len(values)), list(runs))
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel=panels.POSITION, title="Error by position")
    axes.invert_yaxis()


def _weights(axes: Any, saved: CampaignResults) -> None:
    """Draw the final weights by position of the runs that have weights other than 1."""
    weights_by_run: dict[str, Curve] = {}
    for name, run in saved.trained("C").items():
        try:
            final = saved.curve(run, *TRACKER, "weights")[-1]
        except NotMeasured:
            continue
        if np.nanmax(np.abs(final.of_seeds - 1)) > TOLERANCE:
            weights_by_run[name] = final
    if not weights_by_run:
        raise NotMeasured("no run of this campaign recorded weights other than 1")
    axes.axhline(1, color=panels.GREY, linewidth=0.9, linestyle="--", zorder=0)
    panels.by_position(axes, weights_by_run, "weight in the loss", "Weights at the end (other runs: 1)")
