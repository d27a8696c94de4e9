"""Figures of the report: roofline, step times and scaling. Figures without measurements are grey and say so."""

from typing import Any

from ..campaign.figure_panels import plain_ticks
from ..reporting.plots import SEVERAL, legend_below, new_figure
from .data import HEADLINE, Shape
from .floors import FLOOR_NAMES, KNOWN, Rates, step_floors
from .results import activation

COLOURS = dict(
    zip(("temposae", "torch", "SAELens", "dictionary_learning", "torch.compile", "eai-sparsify"), SEVERAL, strict=False)
)


def _axes(n: int = 1) -> tuple[Any, list[Any]]:
    figure = new_figure(max(5.6, 4.6 * n), 3.8)
    axes = figure.subplots(1, n, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, list(axes)


def _rates(result: dict[str, Any]) -> Rates:
    return Rates(**(result["rates"] | {"flops": {int(size): rate for size, rate in result["rates"]["flops"].items()}}))


def roofline(measured: list[dict[str, Any]]) -> Any:
    """Plot FLOP/s over FLOP per byte: the roofs of each device and the measured ops. Without measurements, the floors of the
    ops on an H100."""
    from .ops import OPS, work

    roofs: dict[str, tuple[Rates, int]] = {}
    points: list[tuple[str, float, float]] = []  # op, FLOP per byte, FLOP/s
    for result in measured:
        rates = _rates(result)
        for case in result["cases"]:
            if case["op"] in OPS and case["flops"]:
                roofs[f"{rates.device} {case['dtype']}"] = rates, _itemsize(case)
                points.append((case["op"], case["flops"] / case["bytes"], 1e3 * case["flops"] / case["ms"]))
    title, colour = "Ops, measured", COLOURS["temposae"]
    if not points:
        title, colour, rates = "Where ops could be on an H100 (not measured)", "#999999", KNOWN["H100"]
        roofs = {"H100 bf16": (rates, 2)}
        for name in OPS:
            cost = work(name, HEADLINE, "bf16", "cpu", rates, backend="triton")
            if cost.flops:
                points.append((name, cost.flops / cost.bytes, 1e3 * cost.flops / cost.floor_ms))
    figure, (axes,) = _axes()
    for name, (rates, itemsize) in roofs.items():
        top = rates.flops[itemsize]
        corner = top / rates.bytes_per_s
        ends = [corner / 2**12, corner, corner * 2**6]
        reached = [min(top, rates.bytes_per_s * x) for x in ends]
        axes.plot(ends, reached, label=name, linewidth=1.2, color="#333333", linestyle="-" if itemsize == 2 else "--")
    markers = dict(zip(dict.fromkeys(name for name, *_ in points), "osD^v<>PX*hp" * 9, strict=False))
    for name, marker in markers.items():
        coordinates = [(x, y) for op, x, y in points if op == name]
        axes.plot(*zip(*coordinates, strict=True), marker, markersize=4, color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="FLOP/s", title=title)
    legend_below(figure)
    return figure


def _itemsize(case: dict[str, Any]) -> int:
    return 4 if case["dtype"] == "fp32" else 2


def _steps(measured: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(result, case) for result in measured for case in result["cases"] if case["op"] == "train_step"]


def bars(measured: list[dict[str, Any]]) -> Any:
    """Plot median step times with p20 to p80 and floors, one panel per device and shape. Floors only if none is measured."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for result, case in _steps(measured):
        shape = Shape(*(case[name] for name in "NDFK"))
        activation_text = "" if activation(case) == "topk" else f", {activation(case)}"
        panels.setdefault(f"{result['device']}\n{shape}{activation_text}", []).append(case)
    if not panels:
        figure, axes = _axes(len(KNOWN))
        for axis, (card, rates) in zip(axes, KNOWN.items(), strict=True):
            axis.bar(list(FLOOR_NAMES.values()), step_floors(*HEADLINE, rates=rates), color="#999999")
            axis.tick_params(axis="x", labelrotation=25, labelsize=7)
            axis.set(ylabel="ms", title=f"{card}, {HEADLINE}\nfloors (not measured)")
        return figure
    panels = dict(list(panels.items())[:6])
    figure, axes = _axes(len(panels))
    for axis, (title, cases) in zip(axes, panels.items(), strict=True):
        cases = sorted(cases, key=lambda case: case["ms"], reverse=True)
        names = [case["provider"] + (", own" if case.get("settings") == "own" else "") for case in cases]
        times = [case["ms"] for case in cases]
        spread = [[abs(case.get(key, case["ms"]) - case["ms"]) for case in cases] for key in ("ms_p20", "ms_p80")]
        axis.barh(names, times, xerr=spread, color=[COLOURS.get(case["provider"], "#999999") for case in cases])
        axis.axvline(min(case["floor_ms"] for case in cases), color="#333333", linestyle=":", label="floor (fused)")
        axis.tick_params(axis="y", labelsize=7)
        axis.set(xlabel="ms a step", title=title)
        axis.title.set_fontsize(8)
        axis.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return figure


def scaling(measured: list[dict[str, Any]]) -> Any:
    """Plot TopK's step time over F, with floors as lines, at the most frequent N, D and K of the measurements."""
    figure, (axes,) = _axes()
    steps = [step for step in _steps(measured) if step[1].get("settings") != "own" and activation(step[1]) == "topk"]
    shapes = [(case["N"], case["D"], case["K"]) for _, case in steps]
    n, d, k = max(set(shapes), key=shapes.count) if shapes else (HEADLINE.N, HEADLINE.D, HEADLINE.K)
    shown = [(result, case) for result, case in steps if (case["N"], case["D"], case["K"]) == (n, d, k)]
    rates, itemsize = (_rates(shown[0][0]), _itemsize(shown[0][1])) if shown else (KNOWN["H100"], 2)
    measured_F = sorted({case["F"] for _, case in shown}) or [2**14, 2**20]
    first, last = measured_F[0] / 2, measured_F[-1] * 2
    sizes = [round(first * (last / first) ** (i / 30)) for i in range(31)]
    styles = {"dense": ":", "materialised": "--", "fused": "-"}
    for field, style in styles.items():
        times = [getattr(step_floors(n, d, size, k, rates, itemsize), field) for size in sizes]
        axes.plot(sizes, times, label=f"floor: {FLOOR_NAMES[field]}", color="#999999", linestyle=style)
    for provider in dict.fromkeys(case["provider"] for _, case in shown):
        points = sorted((case["F"], case["ms"]) for _, case in shown if case["provider"] == provider)
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=provider, color=COLOURS.get(provider))
    device = shown[0][0]["device"] if shown else "H100 (not measured)"
    axes.set(xscale="log", yscale="log", xlabel="F", ylabel="ms a step", title=f"{device}, N = {n}, D = {d}, K = {k}")
    axes.title.set_fontsize(9)
    plain_ticks(axes.xaxis)
    legend_below(figure)
    return figure
