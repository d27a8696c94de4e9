"""What each library's own training code reaches on the same batches, at the best of a few learning rates.

All start from a seed's own weights, use Adam at a constant rate and their own losses, clip gradients where they do so by
default, and step through the same batches in the same order. So a difference is one of method: initialisation, scaling,
auxiliary loss, clipping.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from ..engine.config import StreamConfig, TrainConfig
from ..engine.errors import UserError, check_known
from ..engine.stream import Batch, WorldSource
from ..engine.synthetic.presets import PRESETS as WORLDS
from ..evals.recovery import recovery
from .data import Shape, Tokens
from .learning_rate import HELD_OUT, Cell, activations
from .providers import PROVIDERS
from .results import about, heading, markdown, read_unfinished
from .training_job import AnyDictionary, ProviderUnavailable, TrainingJob, fixes_l0

LIBRARIES = ("temposae", "SAELens", "dictionary_learning", "eai-sparsify")
#: rates on both sides of the best one
RATES = {"tiny": (1e-3, 2e-3), "cpu": (2e-3, 4e-3, 8e-3), "pretrained": (1e-3, 2e-3, 4e-3)}
PRESETS: dict[str, dict[str, Sequence[Cell]]] = {
    "tiny": {"world:0": [Cell("topk", 64, 4, 256, 8)]},
    "cpu": {"world:0": [Cell("topk", 512, 7, 1024, 400), Cell("batchtopk", 512, 7, 1024, 400)]},
    "pretrained": {"smollm2:9": [Cell("topk", 4608, 32, 512, 290), Cell("batchtopk", 4608, 32, 512, 290)]},
}
SCORES = ("fvu", "dead", "f1", "mcc", "seconds")


def measure(
    sources: dict[str, Sequence[Cell]], *, libraries: Sequence[str] = LIBRARIES, rates: Sequence[float] = RATES["cpu"],
    seeds: int = 3, data: str | None = None, done: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:  # fmt: skip
    """Train every cell of every source with every library that has its activation, at every rate and seed.

    Returns `rows`: source, the cell's sizes, library, lr, seed, and FVU and the share of latents that never fire on the last
    HELD_OUT activations; seconds of the steps; F1 and MCC (`evals.recovery`) where the source is a world, else None.

    `done`: earlier results, whose rows are not measured again. `keep` is called with the results after each row.
    """
    for library in libraries:
        check_known("library", library, LIBRARIES)
    for cell in (cell for cells in sources.values() for cell in cells):
        if not fixes_l0(cell.activation):
            raise UserError(f"cell: {cell.activation} is not allowed; it must be topk or batchtopk, which fix L0")
    result = done or about("cpu") | {"rows": [], "left_out": {}}
    known = {_label(row) for row in result["rows"]}
    planned = [
        (source, cell, library, rate, seed)
        for source, cells in sources.items() for cell in cells for library in libraries
        if cell.activation in PROVIDERS[library].activations and library not in result["left_out"]
        for rate in rates for seed in range(seeds)
    ]  # fmt: skip
    missing = [run for run in planned if (run[0].partition("=")[0], *run[1:]) not in known]
    x, loaded = torch.zeros(0), ""
    for number, (source, cell, library, rate, seed) in enumerate(missing, 1):
        if library in result["left_out"]:
            continue
        if source != loaded:
            x, loaded = activations(source, data), source
        name = source.partition("=")[0]
        print(f"run {number} of {len(missing)}: {library} on {name}, {cell}, lr {rate:g}, seed {seed}", file=sys.stderr)
        try:
            scores = _train(name, cell, library, rate, seed, x)
        except ProviderUnavailable as absent:
            result["left_out"][library] = f"{absent}; pip install 'temposae[peers]'"
            continue
        setting = {"source": name, **cell._asdict(), "library": library, "lr": rate, "seed": seed}
        result["rows"].append(setting | scores)
        keep(result)
    return result


def _label(row: dict[str, Any]) -> tuple[str, Cell, str, float, int]:
    cell = Cell(**{name: row[name] for name in Cell._fields})
    return row["source"], cell, row["library"], row["lr"], row["seed"]


def read(file: Path | None) -> dict[str, Any] | None:
    """Read a results file of this suite, if there is one. Raises UserError for other files."""
    return read_unfinished(file, "bench quality", lambda result: [_label(row) for row in result["rows"]])


def _train(source: str, cell: Cell, library: str, rate: float, seed: int, x: Tensor) -> dict[str, float | None]:
    shape = Shape(cell.batch, x.shape[1], cell.F, cell.K).check()
    batches = list(x[:-HELD_OUT].split(cell.batch))[: len(x[:-HELD_OUT]) // cell.batch]
    if not batches:
        raise UserError(
            f"cell: batch {cell.batch} is not allowed; {source} has {max(0, len(x) - HELD_OUT)} to train on"
        )
    mean_norm = float(batches[0].norm(dim=1).mean())
    pos = torch.zeros(cell.batch, dtype=torch.int64)
    tokens = Tokens([Batch.of(batch, pos) for batch in batches], batches, x[-HELD_OUT:], batches[0].mean(0), mean_norm)
    clip = TrainConfig().clip_norm
    job = TrainingJob(shape, "cpu", "fp32", rate, tokens, clip=clip, activation=cell.activation, seed=seed)
    run = PROVIDERS[library].build(job)
    began = time.perf_counter()
    for i in range(cell.steps):
        run.step(i)
    seconds = time.perf_counter() - began
    assert run.dictionary is not None
    return {"seconds": round(seconds, 2)} | _scores(source, run.dictionary, x[-HELD_OUT:], cell.batch)


@torch.no_grad()
def _scores(source: str, dictionary: AnyDictionary, x: Tensor, batch: int) -> dict[str, float | None]:
    """Batch by batch, because BatchTopK's selection depends on the batch."""
    fires, error = torch.zeros(len(dictionary.W_dec), dtype=torch.bool), 0.0
    for part in x.split(batch):
        f = dictionary.encode(part)
        fires |= (f > 0).any(0)
        error += float((part - dictionary.decode(f)).square().sum())
    scores = {"fvu": error / float((x - x.mean(0)).square().sum()), "dead": float((~fires).float().mean())}
    kind, _, number = source.rpartition(":")
    if kind != "world":
        return scores | {"f1": None, "mcc": None}
    world = StreamConfig(**WORLDS["small"]["stream"]).world
    assert world is not None
    found = recovery(WorldSource(world, seed=int(number)), {"sae": dictionary})["sae"]
    return scores | {"f1": found["f1"], "mcc": found["mcc"]}


def table(result: dict[str, Any]) -> str:
    """Each library at its best rate by mean FVU over seeds, as Markdown. `minus temposae` is the paired difference in FVU
    with its standard error over seeds."""
    groups: dict[tuple[str, Cell], dict[str, dict[float, list[dict[str, Any]]]]] = {}
    for row in sorted(result["rows"], key=lambda row: row["seed"]):
        source, cell, library, lr, _ = _label(row)
        groups.setdefault((source, cell), {}).setdefault(library, {}).setdefault(lr, []).append(row)
    lines: list[tuple[str, ...]] = [
        ("source", *Cell._fields, "library", "lr", "seeds", "FVU", "minus temposae", "dead", "F1", "MCC", "seconds")
    ]
    for (source, cell), by_library in groups.items():
        best = {library: min(by_rate.values(), key=_mean_fvu) for library, by_rate in by_library.items()}
        for library, rows in best.items():
            means = {key: _mean(row[key] for row in rows) for key in SCORES}
            shown = ("-" if means[key] is None else f"{means[key]:.3f}" for key in ("f1", "mcc"))
            lines.append((
                source, *map(str, cell), library, f"{rows[0]['lr']:.2g}", str(len(rows)), f"{means['fvu']:.4f}",
                _difference(rows, best.get("temposae", [])) if library != "temposae" else "",
                f"{means['dead']:.1%}", *shown, f"{means['seconds']:.1f}",
            ))  # fmt: skip
    left_out = [f"{library} was left out: {reason}" for library, reason in result["left_out"].items()]
    return "\n".join([heading(result), "", *markdown(lines), "", *left_out])


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _mean_fvu(rows: list[dict[str, Any]]) -> float:
    mean = fmean(row["fvu"] for row in rows)
    return mean if math.isfinite(mean) else math.inf


def _difference(rows: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str:
    reference = {row["seed"]: row["fvu"] for row in ours}
    differences = [row["fvu"] - reference[row["seed"]] for row in rows if row["seed"] in reference]
    if not differences:
        return "-"
    error = f" ± {stdev(differences) / len(differences) ** 0.5:.4f}" if len(differences) > 1 else ""
    return f"{fmean(differences):+.4f}{error}"
