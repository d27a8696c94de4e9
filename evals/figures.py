"""Figures of a run, from its saved numbers. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

import itertools
from pathlib import Path
from typing import Any

SEVERAL = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = "os^Dv<>p*h"
COLOURS = {"sae": "#0072B2", "random": "#D55E00", "lm_neurons": "#E69F00", "mean": "#999999"}


def core_figures(metrics: list[dict[str, Any]], result: dict[str, Any]) -> dict[str, Any]:
    """Figures of core's result, by name, and of training where there are its `metrics`."""
    found = {"position_explained_variance": _positions(result), "firing_rates": _firing(result)}
    return found | ({"loss_curve": _loss(metrics)} if metrics else {})


def draw_pareto(folder: Path, scores: dict[str, dict[str, Any]]) -> Path:
    """Write pareto.png: L0 against FVU of several dictionaries and their random controls, a colour for each activation and
    hook, a marker for each F, and a line through those that no other is better than in both."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = new_axes()
    scores = {name: one for name, one in scores.items() if None not in (one["l0"], one["explained_variance"])}
    several_hooks = len({one["hook"] for one in scores.values()}) > 1
    kinds = list(dict.fromkeys((one["activation"], one["hook"]) for one in scores.values()))
    sizes = sorted({one["d_sae"] for one in scores.values()})

    def points(ones: list[dict[str, Any]]) -> list[tuple[float, float]]:
        return sorted((one["l0"], 1 - one["explained_variance"]) for one in ones)

    for (i, (activation, hook)), (j, size) in itertools.product(enumerate(kinds), enumerate(sizes)):
        alike = [s for s in scores.values() if (s["activation"], s["hook"], s["d_sae"]) == (activation, hook, size)]
        if alike:
            style = {"color": SEVERAL[i % len(SEVERAL)], "marker": MARKERS[j % len(MARKERS)], "linestyle": ""}
            label = f"{activation}{f' at {hook}' if several_hooks else ''}, F = {size}"
            axes.plot(*zip(*points(alike), strict=True), label=label, **style)
    controls = [one["controls"]["random"] for one in scores.values() if "random" in one["controls"]]
    controls = [one for one in controls if None not in (one["l0"], one["explained_variance"])]
    if controls:
        style = {"color": COLOURS["mean"], "marker": "x", "linestyle": ""}
        axes.plot(*zip(*points(controls), strict=True), label="random control", zorder=1, **style)
    every = points(list(scores.values()))
    front = [point for i, point in enumerate(every) if all(point[1] < other[1] for other in every[:i])]
    if front:
        axes.plot(*zip(*front, strict=True), color="#bbbbbb", linewidth=1, zorder=0)
    axes.set(
        xlabel="L0 (latents per token)", ylabel="fraction of variance unexplained", xscale="log", yscale="log",
        title="Sparsity against error, on held-out text",
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(folder / "pareto.png", dpi=160)
    return folder / "pareto.png"


def new_axes(height: float = 3.4) -> tuple[Any, Any]:
    """A figure, so many inches high, and its axes."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def legend_below(figure: Any, note: str | None = None, columns: int = 3) -> None:
    """The legend, and a note, below the axes, where they cover nothing."""
    figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, fontsize=7.5, title=note, title_fontsize=7.5
    )


def _loss(metrics: list[dict[str, Any]]) -> Any:
    from matplotlib.ticker import EngFormatter

    figure, axes = new_axes()
    tokens = [line["tokens"] for line in metrics]
    axes.plot(tokens, [line["fvu"] for line in metrics], color=COLOURS["sae"], label="dictionary")
    if beside := [(line["tokens"], line["random"]["fvu"]) for line in metrics if "random" in line]:
        axes.plot(*zip(*beside, strict=True), color=COLOURS["random"], label="random control")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="tokens", ylabel="fraction of variance unexplained", yscale="log", title="Training")
    axes.legend(frameon=False)
    return figure


def _positions(result: dict[str, Any]) -> Any:
    figure, axes = new_axes()
    every = {"sae": result, **result["controls"]}
    labels = {
        "sae": "dictionary",
        "random": "random control",
        "lm_neurons": "K largest neurons",
        "mean": "mean control",
    }
    for name, scores in every.items():
        at = scores["per_position"]
        points = [(p, v) for p, v in zip(at["position"], at["explained_variance"], strict=True) if v is not None]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=COLOURS[name], label=labels[name], linewidth=1.2)
    axes.set(
        xlabel="position in the context", ylabel="explained variance", ylim=(-0.05, 1.02), title="Where it explains"
    )
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.5))
    return figure


def _firing(result: dict[str, Any]) -> Any:
    figure, axes = new_axes()
    rates = result["firing_rates"]
    axes.stairs(rates["latents"], rates["log10_edges"], fill=True, color=COLOURS["sae"])
    axes.set(
        xlabel="log10 of firing rate (share of tokens)",
        ylabel="latents",
        title=f"Firing rates ({rates['never']} never fire)",
    )
    return figure
