"""Train plain and position-aware dictionaries on a synthetic world with position-bound features and on one without."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..engine.config import MaskConfig, RunConfig, SAEConfig, StreamConfig, TrainConfig, WorldConfig
from ..engine.errors import check_known
from ..engine.stream import ActivationStream, WorldSource
from ..engine.train import train_together
from ..engine.unit_decoder import unit_decoder
from ..evals.recovery import recovery
from .results import about, heading, markdown, read_unfinished

POSITIONS, INTERVALS, SIZE, K, BATCH, SAMPLES = 32, 4, 256, 4, 512, 100_000
#: as many features as latents in a fifth of the dimensions, about K of them active
WORLD: dict[str, Any] = {
    "features": SIZE, "width": 48, "roots": 0, "firing_min": 4e-3, "firing_max": 0.2, "positions": POSITIONS,
    "intervals": INTERVALS,
}  # fmt: skip
#: share of features that fire in one of the intervals only
SHARES = {"positional": 0.9, "no positions": 0.0}
#: what differs between dictionaries
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "range_adapters": {"parts": ({"kind": "range_adapters", "ranges": INTERVALS},)},
    # the same adapter without positions, as large as those of all ranges together
    "one_adapter": {"parts": ({"kind": "range_adapters", "ranges": 1, "hidden": 32 * INTERVALS},)},
    "ranges": {"mask": {"kind": "ranges", "ranges": INTERVALS}},
    "soft": {"mask": {"kind": "soft"}},
    "cold_soft": {"mask": {"kind": "soft", "temperature": 0.1}},  # logits count ten times
    "position_embedding": {"parts": ({"kind": "position_embedding"},)},
    "random": {"decoder": "random"},
}
SCORES = ("f1", "mcc", "r2")


def measure(
    seeds: int, kinds: Sequence[str] | None = None, tokens: int | None = None, *, done: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:  # fmt: skip
    """Train and score each kind in both worlds, all kinds of a seed on the same samples. `plain` is always among them.

    `done`: earlier results, whose rows are not measured again. `keep` is called with the results after each world and seed.
    Raises UserError for unknown kinds.
    """
    for kind in kinds or ():
        check_known("kind", kind, KINDS)
    names = [name for name in KINDS if kinds is None or name in kinds or name == "plain"]
    result = done or about("cpu") | {"rows": []}
    for seed in range(seeds):
        for world in SHARES:
            known = {row["kind"] for row in result["rows"] if (row["world"], row["seed"]) == (world, seed)}
            missing = [name for name in names if name not in known]
            if not missing:
                continue
            print(f"world {world}, seed {seed}: {', '.join(missing)}", file=sys.stderr, flush=True)
            result["rows"] += _trained(world, seed, missing, tokens or SAMPLES)
            keep(result)
    return result


def _trained(world: str, seed: int, kinds: Sequence[str], tokens: int) -> list[dict[str, Any]]:
    """Rows of dictionaries that were trained together on the samples of one seed."""
    settings: dict[str, Any] = {**WORLD, "positional": SHARES[world]}
    config = WorldConfig(**settings)
    stream = ActivationStream(StreamConfig(world=config, buffer_dtype="float32"), tokens=tokens, batch=BATCH, seed=seed)
    training = TrainConfig(tokens=tokens, batch=BATCH, control=False, seed=seed)
    runs = {kind: RunConfig(stream=stream.config, sae=_settings(**KINDS[kind]), train=training) for kind in kinds}
    trained = {kind: unit_decoder(run.sae) for kind, run in train_together(stream, runs).items()}
    scores = recovery(WorldSource(config, seed=seed), trained)
    return [
        {"world": world, "seed": seed, "kind": kind, "tokens": tokens, "l0": scores[kind]["l0"]}
        | {key: scores[kind][key] for key in (*SCORES, "dead")}
        | {"recovered": {name: of_kind["recovered"] for name, of_kind in scores[kind]["kinds"].items()}}
        for kind in kinds
    ]


def _settings(mask: dict[str, Any] | None = None, **changes: Any) -> SAEConfig:
    return SAEConfig(
        d_in=WORLD["width"], d_sae=SIZE, k=K, activation="batchtopk",
        mask=MaskConfig(positions=POSITIONS, **(mask or {})), **changes,
    )  # fmt: skip


def read(file: Path | None) -> dict[str, Any] | None:
    """Read a results file of this suite, if there is one."""
    return read_unfinished(file, "synth positions", lambda result: [_figures(row) for row in result["rows"]])


def _figures(row: dict[str, Any]) -> dict[str, float]:
    """The scores of a row. `recovered` is the share of positional features, or of all where there are none."""
    recovered = row["recovered"]
    return {
        "recovered": recovered["positional" if "positional" in recovered else "plain"],
        **{key: row[key] for key in SCORES},
    }


def differences(result: dict[str, Any], world: str, kind: str) -> dict[str, tuple[float, float | None]]:
    """By score: the mean over seeds of a kind's difference from plain on the same samples, and half of its 95% interval
    (Student's t over seeds; None with one seed)."""
    from scipy.stats import t

    rows = {(row["kind"], row["seed"]): _figures(row) for row in result["rows"] if row["world"] == world}
    seeds = sorted(seed for name, seed in rows if name == kind and ("plain", seed) in rows)
    found = {}
    for score in ("recovered", *SCORES):
        values = [rows[kind, seed][score] - rows["plain", seed][score] for seed in seeds]
        half = None
        if len(values) > 1:
            half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
        found[score] = fmean(values), half
    return found


def table(result: dict[str, Any]) -> str:
    """The results as Markdown: for each world, means and standard deviations over seeds, and differences from plain."""
    blocks = [heading(result)]
    for world, share in SHARES.items():
        lines: list[tuple[str, ...]] = [
            ("dictionary", "recovered", "F1", "MCC", "R2", "L0", "dead", "F1 minus plain (95%)")
        ]
        for kind in KINDS:
            rows = [row for row in result["rows"] if (row["world"], row["kind"]) == (world, kind)]
            if not rows:
                continue
            figures = list(map(_figures, rows))
            cells = [_spread([figure[score] for figure in figures]) for score in figures[0]]
            l0, dead = fmean(row["l0"] for row in rows), fmean(row["dead"] for row in rows)
            difference = "" if kind == "plain" else _difference(*differences(result, world, kind)["f1"])
            lines.append((kind, *cells, f"{l0:.1f}", f"{dead:.0f}", difference))
        what = "positional features" if share else "features"
        title = (
            f"{world}: {share:.0%} of features fire in one of {INTERVALS} intervals only; recovered: share of {what}"
        )
        blocks += ["", title, "", *markdown(lines)]
    return "\n".join([*blocks, ""])


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _difference(mean: float, half: float | None) -> str:
    return f"{mean:+.3f}" if half is None else f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"
