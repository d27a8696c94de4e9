"""Figures of training, of each eval's result, and of the dictionaries of a sweep."""

from pathlib import Path
from typing import Any

from ..engine.config.controls import CONTROLS
from ..reporting.plots import COLOURS, MARKERS, SEVERAL, WORST, frame, legend_below, new_axes, robust, save_figure

LABELS = {"sae": "dictionary", "llm": "LM activations"}
AUTOENCODER_COLOURS = COLOURS | {"shuffled": "#CC79A7", "llm": "#000000"}
SHAPES = {
    "sae": "o", "random": "s", "soft_frozen": "p", "frozen_encoder": "h", "lm_neurons": "^", "mean": "x", "shuffled": "v",
    "llm": "D",
}  # fmt: skip
RETAINED = 0.99  # retain accuracy that a setting of unlearning needs to count


def draw_evals(
    folder: Path, results: dict[str, dict[str, Any]], metrics: list[dict[str, Any]]
) -> dict[str, dict[str, str]]:
    """Write the figures of these results to `folder`; core's include a plot of the training `metrics`.

    Returns, for each eval, its figures' titles by file name. Figures without data are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    makers = {
        "core": lambda result: core_figures(metrics, result),
        "sparse_probing": _probing, "sae_probes": _sae_probes,
        "positions": _order, "ground_truth": _truth, "unlearning": _unlearning,
        "scr": _removed, "tpp": _perturbed, "clusters": _clusters,
    }  # fmt: skip
    drawn: dict[str, dict[str, str]] = {}
    for name in (name for name in makers if name in results):
        for file, figure in makers[name](results[name]).items():
            save_figure(figure, folder / f"{file}.png")
            drawn.setdefault(name, {})[f"{file}.png"] = figure.axes[0].get_title()
    return drawn


def draw_pareto(folder: Path, scores: dict[str, dict[str, Any]]) -> Path:
    """Write pareto.png: FVU over L0 of several dictionaries and their random controls, with the Pareto front.

    Colours stand for activation and hook, markers for F.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    def points(scores: list[dict[str, Any]]) -> list[tuple[float, float]]:
        known = [(score["l0"], score["explained_variance"]) for score in scores]
        return sorted((l0, 1 - variance) for l0, variance in known if None not in (l0, variance))

    dictionaries = [score for score in scores.values() if points([score])]
    groups: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = {}
    for score in dictionaries:
        groups.setdefault((score["activation"], score["hook"]), {}).setdefault(score["d_sae"], []).append(score)
    sizes = sorted({size for group in groups.values() for size in group})
    several_hooks = len({hook for _, hook in groups}) > 1
    figure, axes = new_axes(3.9)
    for i, ((activation, hook), group) in enumerate(groups.items()):
        for size in sorted(group):
            marker = MARKERS[sizes.index(size) % len(MARKERS)]
            style = {"color": SEVERAL[i % len(SEVERAL)], "marker": marker, "linestyle": ""}
            label = f"{activation}{f' at {hook}' if several_hooks else ''}, F = {size}"
            axes.plot(*zip(*points(group[size]), strict=True), label=label, **style)
    controls = points([score["controls"]["random"] for score in dictionaries if "random" in score["controls"]])
    if controls:
        style = {"color": COLOURS["mean"], "marker": "x", "linestyle": ""}
        axes.plot(*zip(*controls, strict=True), label="random control", zorder=1, **style)
    trained = points(dictionaries)
    front = [point for i, point in enumerate(trained) if all(point[1] < earlier[1] for earlier in trained[:i])]
    if front:
        axes.plot(*zip(*front, strict=True), color="#bbbbbb", linewidth=1, zorder=0)
    axes.set(
        xlabel="L0 (latents per token)", ylabel="fraction of variance unexplained", xscale="log", yscale="log",
        title="Error and sparsity on held-out text",
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    shown = [(trained, COLOURS["sae"]), (controls, COLOURS["mean"])]
    single_points = [((l0,), (fvu,), colour) for curve, colour in shown for l0, fvu in curve]
    frame(axes, single_points, x=robust([l0 for (l0,), *_ in single_points], log=True), y=(None, WORST))
    legend_below(figure, columns=2)
    return save_figure(figure, folder / "pareto.png")


def core_figures(metrics: list[dict[str, Any]], result: dict[str, Any]) -> dict[str, Any]:
    """Figures of core's result by name, with one of training if there are `metrics`."""
    figures = {"position_explained_variance": _positions(result), "firing_rates": _firing(result)}
    return figures | ({"loss_curve": _loss(metrics)} if metrics else {})


def _loss(metrics: list[dict[str, Any]]) -> Any:
    from matplotlib.ticker import EngFormatter

    figure, axes = new_axes(3.6)
    curves = {
        ("dictionary", COLOURS["sae"]): [(line["tokens"], line["fvu"]) for line in metrics],
    }
    curves |= {
        (f"{control.replace('_', ' ')} control", COLOURS[control]): [
            (line["tokens"], line[control]["fvu"]) for line in metrics if control in line
        ]
        for control in CONTROLS
    }
    lines = []
    for (label, colour), points in curves.items():
        if points:
            tokens, fvu = zip(*points, strict=True)
            axes.plot(tokens, fvu, color=colour, label=label)
            lines.append((tokens, fvu, colour))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="tokens", ylabel="fraction of variance unexplained", yscale="log", title="Training")
    frame(axes, lines, y=(None, WORST))
    legend_below(figure)
    return figure


def _positions(result: dict[str, Any]) -> Any:
    figure, axes = new_axes(3.7)
    lines = []
    for name, scores in _autoencoders(result).items():
        columns = (scores["per_position"][key] for key in ("position", "explained_variance"))
        points = [(position, value) for position, value in zip(*columns, strict=True) if value is not None]
        if points:
            positions, values = zip(*points, strict=True)
            axes.plot(positions, values, color=COLOURS[name], label=LABELS.get(name, name), linewidth=1.2)
            lines.append((positions, values, COLOURS[name]))
    axes.set(xlabel="position in the context", ylabel="explained variance", title="Explained variance by position")
    axes.set_ylim(-0.05, 1.02)
    frame(axes, lines, y=(-0.05, None))
    legend_below(figure)
    return figure


def _firing(result: dict[str, Any]) -> Any:
    figure, axes = new_axes()
    rates = result["firing_rates"]
    axes.stairs(rates["latents"], rates["log10_edges"], fill=True, color=COLOURS["sae"])
    title = f"Firing rates ({rates['never']} never fire)"
    axes.set(xlabel="log10 of firing rate (share of tokens)", ylabel="latents", title=title)
    return figure


def _autoencoders(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"sae": result, **result["controls"]}


def _style(autoencoder: str) -> dict[str, Any]:
    return {"color": AUTOENCODER_COLOURS.get(autoencoder, "#777777"), "marker": SHAPES.get(autoencoder, ".")}


def _probing(result: dict[str, Any]) -> dict[str, Any]:
    ks = sorted(int(key.removeprefix("top_")) for key in result if key.removeprefix("top_").isdecimal())
    autoencoders = _autoencoders(result) | {"llm": result["llm"]}
    lines = {name: [scores.get(f"top_{k}") for k in ks] for name, scores in autoencoders.items()}
    labels = ("k (latents of the probe)", "test accuracy (0.5 is chance)", "Probes on k latents, mean over classes")
    return _curves("sparse_probing", ks, lines, None, 0.5, labels)


def _sae_probes(result: dict[str, Any]) -> dict[str, Any]:
    ks = result["protocol"]["k_values"]
    lines = {name: list(scores["auc"].values()) for name, scores in _autoencoders(result).items()}
    lines["llm"] = [result["llm"]["auc"]] * len(ks)  # a probe on all activations, whatever k
    labels = (
        "k (latents of the probe)",
        "test AUC (0.5 is chance)",
        "sae-probes: AUC on k latents, mean over data sets",
    )
    return _curves("sae_probes", ks, lines, None, 0.5, labels)


def _removed(result: dict[str, Any]) -> dict[str, Any]:
    lines = {name: list(scores["scr_metric"].values()) for name, scores in _autoencoders(result).items()}
    labels = ("n (latents ablated)", "share of the gap closed", "Spurious correlation removed by ablation of n latents")
    return _curves("scr", [int(n) for n in result["scr_metric"]], lines, result, 0, labels)


def _perturbed(result: dict[str, Any]) -> dict[str, Any]:
    lines = {name: [m["total_metric"] for m in d["tpp"].values()] for name, d in _autoencoders(result).items()}
    labels = ("n (latents ablated)", "accuracy lost: class - others", "Accuracy lost by ablation of n latents")
    return _curves("tpp", [int(n) for n in result["tpp"]], lines, result, 0, labels)


def _curves(
    name: str,
    xs: list[int],
    lines: dict[str, list[float | None]],
    spread_of: dict[str, Any] | None,
    base: float,
    labels: tuple[str, str, str],
) -> dict[str, Any]:
    """A line per autoencoder over numbers of latents, with a band from the `spread` of the result `spread_of`, and a
    horizontal line at `base`; empty if there is no figure. `labels`: x axis, y axis, title."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    if all(value is None for line in lines.values() for value in line):
        return {}
    spread = {} if spread_of is None else {a: list(s["spread"].values()) for a, s in _autoencoders(spread_of).items()}
    figure, axes = new_axes(3.7)
    axes.axhline(base, color="#bbbbbb", linewidth=1, zorder=0)
    drawn = []
    for autoencoder, line in lines.items():
        known = [(i, value) for i, value in enumerate(line) if value is not None]
        x, y = [xs[i] for i, _ in known], [value for _, value in known]
        style = _style(autoencoder)
        color, zorder = style["color"], 3 if autoencoder == "sae" else 2
        axes.plot(x, y, markersize=4.5, label=LABELS.get(autoencoder, autoencoder), zorder=zorder, **style)
        drawn.append((x, y, color))
        if spread:
            low, high = ([value + sign * (spread[autoencoder][i] or 0) for i, value in known] for sign in (-1, 1))
            axes.fill_between(x, low, high, alpha=0.18, linewidth=0, color=color, zorder=zorder)
    axes.set(xlabel=labels[0], ylabel=labels[1], title=labels[2], xscale="log")
    axes.xaxis.set_major_locator(FixedLocator(xs))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    frame(axes, drawn, y=(-1.0, 1.0))
    legend_below(figure, "band: one standard deviation over seeds" if spread else None)
    return {name: figure}


def _unlearning(result: dict[str, Any]) -> dict[str, Any]:
    figure, axes = new_axes(4.0)
    axes.axvspan(RETAINED, 1.005, color="#009E73", alpha=0.12, linewidth=0)
    axes.axvline(RETAINED, color="#009E73", linewidth=1, linestyle="--", label=f"settings count from {RETAINED}")
    kinds = list(dict.fromkeys((s["retain_threshold"], s["latents"]) for s in result["settings"]))
    for i, (threshold, n) in enumerate(kinds):
        settings = [s for s in result["settings"] if (s["retain_threshold"], s["latents"]) == (threshold, n)]
        x, y = ([s[f"{side}_accuracy"] for s in settings] for side in ("retain", "forget"))
        style = {"color": SEVERAL[i % len(SEVERAL)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        axes.plot(x, y, linewidth=1, label=f"{n} latents, threshold {threshold:g}", alpha=0.85, **style)
    for name, control in result["controls"].items():
        if (best := control["setting"]) is not None:
            point, label = (best["retain_accuracy"], best["forget_accuracy"]), f"{name}, best setting"
            axes.plot(*point, linestyle="", mfc="none", label=label, **_style(name))
    if (best := result["setting"]) is not None:
        point = best["retain_accuracy"], best["forget_accuracy"]
        axes.plot(*point, linestyle="", marker="o", markersize=12, mfc="none", mec="black", label="best setting")
    axes.set_xlim(right=1.005)
    axes.set(
        xlabel="retain accuracy (higher is better)", ylabel="forget accuracy (lower is better)",
        title="Unlearning settings; lines connect multipliers",
    )  # fmt: skip
    legend_below(figure, columns=2)
    return {"unlearning": figure}


def _truth(result: dict[str, Any]) -> dict[str, Any]:
    variables = sorted(result["variables"].items(), key=lambda item: (item[1]["recovered"] or 0, item[1]["f1"]))
    figure, axes = new_axes(1.3 + 0.15 * len(variables))
    lines = range(len(variables))
    shares, f1 = ([variable[key] for _, variable in variables] for key in ("recovered", "f1"))
    if None not in shares:  # as for a transcoder
        axes.hlines(lines, shares, f1, color="#dddddd", linewidth=1.2, zorder=1)
        axes.plot(shares, lines, "o", color=COLOURS["sae"], markersize=4.5, label="share recovered by 5 latents")
    axes.plot(f1, lines, "D", color=SEVERAL[1], markersize=3.5, label="F1 of the best latent")
    for key, linestyle, measure in (("recovered", "--", "share"), ("mean_f1", ":", "F1")):
        if (mean := result["controls"].get("random", {}).get(key)) is not None:
            style = {"color": COLOURS["random"], "linewidth": 1, "linestyle": linestyle, "zorder": 0}
            axes.axvline(mean, label=f"random's mean {measure}", **style)
    axes.set_yticks(lines, [name for name, _ in variables], fontsize=6.5)
    axes.set(xlim=(min(0, *(share or 0 for share in shares)) - 0.02, 1.02), ylim=(-1, len(variables)))
    axes.set(xlabel="share of the variable's effect, or F1", title="Known variables in the dictionary")
    legend_below(figure, columns=2)
    return {"ground_truth": figure}


def _order(result: dict[str, Any]) -> dict[str, Any]:
    probing = result.get("order_probing", {"skipped": ""})
    if "skipped" in probing:
        return {}
    tasks = {**probing["tasks"], "mean over tasks": probing}
    lines = [(task, reading) for task in tasks for reading in ("mean_pooled", "last_token")][::-1]
    figure, axes = new_axes(1.7 + 0.3 * len(lines))

    def points(label: str, values: list[float | None], **style: Any) -> None:
        axes.plot(values, range(len(lines)), linestyle="", label=label, **style)

    points("bag of words", [tasks[t]["bow"] for t, _ in lines], marker="|", color="#999999", markersize=14, mew=2)
    points("LM activations", [tasks[t]["lm"][r] for t, r in lines], marker="|", color="#000000", markersize=14, mew=2)
    for name, control in probing["controls"].items():
        means = [control[r] if t == "mean over tasks" else None for t, r in lines]
        points(name, means, markersize=5, **_style(name))
    points("1 latent", [tasks[t]["top_1"][r] for t, r in lines], marker="o", color=COLOURS["sae"], mfc="white")
    points(f"{probing['k']} latents", [tasks[t][r] for t, r in lines], marker="o", color=COLOURS["sae"], markersize=6.5)
    names = [f"{task}, {reading.replace('_', ' ')}" for task, reading in lines]
    axes.set_yticks(range(len(lines)), names, parse_math=False)
    axes.set(xlabel="test accuracy", ylim=(-0.6, len(lines) - 0.4), title="Probes of word order")
    legend_below(figure, columns=3)
    return {"order_probing": figure}


def _clusters(result: dict[str, Any]) -> dict[str, Any]:
    if not result["clusters"]:
        return {}
    figure, axes = new_axes(1.5 + 0.3 * len(result["clusters"]))
    profiles = [cluster["profile"] for cluster in result["clusters"]]
    image = axes.imshow(profiles, aspect="auto", cmap="Blues", vmin=0)
    axes.grid(False)
    sizes = [f"{i}: {cluster['size']:,} latents" for i, cluster in enumerate(result["clusters"], 1)]
    axes.set_yticks(range(len(sizes)), sizes)
    axes.set_xticks(range(0, len(profiles[0]), 2), [str(1 + i) for i in range(0, len(profiles[0]), 2)])
    axes.set(xlabel="position bin (sixteenths of a row)", title="Position profiles of the clusters")
    figure.colorbar(image, label="share of activity", pad=0.02)
    return {"clusters": figure}
