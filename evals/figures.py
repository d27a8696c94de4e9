"""Figures of a run, from its saved numbers. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

from pathlib import Path
from typing import Any

COLOURS = {"sae": "#0072B2", "random": "#D55E00", "mean": "#999999"}


def draw(folder: Path, metrics: list[dict[str, Any]], result: dict[str, Any]) -> list[Path]:
    """Write loss_curve.png, position_explained_variance.png and firing_rates.png to `folder`; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"position_explained_variance": _positions(result), "firing_rates": _firing(result)}
    if metrics:
        drawn["loss_curve"] = _loss(metrics)
    paths = []
    for name, figure in drawn.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=160)
        paths.append(path)
    return paths


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _loss(metrics: list[dict[str, Any]]) -> Any:
    from matplotlib.ticker import EngFormatter

    figure, axes = _axes()
    tokens = [line["tokens"] for line in metrics]
    axes.plot(tokens, [line["fvu"] for line in metrics], color=COLOURS["sae"], label="dictionary")
    if "random" in metrics[0]:
        axes.plot(tokens, [line["random"]["fvu"] for line in metrics], color=COLOURS["random"], label="random control")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="tokens", ylabel="fraction of variance unexplained", yscale="log", title="Training")
    axes.legend(frameon=False)
    return figure


def _positions(result: dict[str, Any]) -> Any:
    figure, axes = _axes()
    every = {"sae": result, **result["controls"]}
    labels = {"sae": "dictionary", "random": "random control", "mean": "mean control"}
    for name, scores in every.items():
        at = scores["per_position"]
        points = [(p, v) for p, v in zip(at["position"], at["explained_variance"], strict=True) if v is not None]
        axes.plot(*zip(*points, strict=True), color=COLOURS[name], label=labels[name], linewidth=1.2)
    axes.set(
        xlabel="position in the context", ylabel="explained variance", ylim=(-0.05, 1.02), title="Where it explains"
    )
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.5))
    return figure


def _firing(result: dict[str, Any]) -> Any:
    figure, axes = _axes()
    rates = result["firing_rates"]
    axes.stairs(rates["latents"], rates["log10_edges"], fill=True, color=COLOURS["sae"])
    axes.set(
        xlabel="log10 of firing rate (share of tokens)",
        ylabel="latents",
        title=f"Firing rates ({rates['never']} never fire)",
    )
    return figure
