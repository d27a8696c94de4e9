"""Compare the default learning rate with a grid of others, over sources of activations, sizes, batches and run lengths."""

import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..engine.config import SAEConfig, StreamConfig, TrainConfig
from ..engine.errors import UserError, check_known, shown
from ..engine.metrics import held_out_scores
from ..engine.sae import SparseAutoencoder
from ..engine.storage.path_names import expand_path
from ..engine.stream import ActivationStream, Batch
from ..engine.synthetic.presets import PRESETS as WORLDS
from ..engine.train import train
from ..engine.training.schedules import default_lr
from .data import Shape
from .data import tokens as made_up
from .results import about, heading, markdown, read_unfinished

TOKENS = 100_000  # tokens of a source
HELD_OUT = 4096  # the last tokens, for evaluation
REACH = 2  # rates of the grid on either side of the best one


class Cell(NamedTuple):
    """A dictionary and a run length. With relu and jumprelu, K is `target_l0`."""

    activation: Literal["topk", "batchtopk", "relu", "jumprelu"]
    F: int
    K: int
    batch: int
    steps: int

    def configs(self, d_in: int, lr: float | None = None, seed: int = 0) -> tuple[SAEConfig, TrainConfig]:
        target = float(self.K) if self.activation in ("relu", "jumprelu") else None
        sae = SAEConfig(d_in=d_in, d_sae=self.F, k=self.K, activation=self.activation)
        tokens = self.batch * self.steps
        return sae, TrainConfig(tokens=tokens, batch=self.batch, lr=lr, target_l0=target, control=False, seed=seed)


SMALL = (
    Cell("topk", 512, 16, 256, 100), Cell("topk", 512, 16, 256, 300), Cell("topk", 512, 16, 256, 1000),
    Cell("topk", 512, 16, 1024, 100), Cell("topk", 2048, 16, 256, 300),
)  # fmt: skip
LARGE = (
    Cell("topk", 1024, 32, 256, 100), Cell("topk", 1024, 32, 256, 300), Cell("topk", 1024, 32, 1024, 100),
    Cell("topk", 4608, 32, 256, 100),
)  # fmt: skip
#: the cells of each source: synthetic:WIDTH or MODEL:LAYER
PRESETS: dict[str, dict[str, Sequence[Cell]]] = {
    "tiny": {"synthetic:16": [Cell("topk", 32, 4, 64, 8), Cell("batchtopk", 32, 4, 64, 8)]},
    "cpu": {"synthetic:64": SMALL, "testbed:1": SMALL},
    "pretrained": {"smollm2:9": LARGE},
}


def plan(
    preset: str, sources: Sequence[str] | None = None, cells: Sequence[str] | None = None,
    presets: dict[str, dict[str, Sequence[Cell]]] = PRESETS,
) -> dict[str, Sequence[Cell]]:  # fmt: skip
    """The cells of each source: those of a preset, or the given ones. Raises UserError for invalid ones."""
    check_known("preset", preset, presets)
    preset_cells = presets[preset]
    parsed_cells = [_parse(text) for text in cells or ()]
    for source in sources or ():
        _check_source(source)
    all_cells = tuple(dict.fromkeys(cell for source_cells in preset_cells.values() for cell in source_cells))
    return {source: parsed_cells or preset_cells.get(source, all_cells) for source in sources or preset_cells}


def _parse(text: str) -> Cell:
    activation, *numbers = text.split(",")
    if len(numbers) != 4 or not all(re.fullmatch("[0-9]{1,10}", number) for number in numbers):
        raise UserError(
            f"cell: {text} is not allowed; it must be ACTIVATION,F,K,BATCH,STEPS, as in topk,512,16,256,100"
        )
    cell = Cell(activation, *map(int, numbers))  # type: ignore[arg-type]
    cell.configs(1)  # refuses invalid dictionaries
    return cell


def _check_source(source: str) -> None:
    name, is_file, file = source.partition("=")
    if is_file:
        if not expand_path(file, "source").is_file():
            raise UserError(f"source: {shown(source)} is not allowed; {file} does not exist")
    elif not re.fullmatch(r".+:[0-9]{1,5}", name) or name == "synthetic:0":
        raise UserError(
            f"source: {shown(source)} is not allowed; it must be synthetic:WIDTH, world:SEED, MODEL:LAYER or "
            "NAME=FILE.npy"
        )


def activations(source: str, data: str | None = None) -> Tensor:
    """Activations x [TOKENS, D] float32 of a source: `synthetic:WIDTH` (`data.tokens`), `world:SEED` (samples of the preset
    `small` of `temposae synth`), `MODEL:LAYER` (the residual stream after that layer, on the text `data`), or
    `NAME=FILE.npy`. Raises UserError for other sources and unreadable files."""
    _check_source(source)
    name, is_file, file = source.partition("=")
    kind, _, number = name.rpartition(":")
    if is_file:
        try:
            return torch.from_numpy(np.load(expand_path(file, "source"), allow_pickle=False)).float()
        except (OSError, ValueError) as error:
            raise UserError(f"source: {source} can't be read ({error})") from None
    if kind == "synthetic":
        return made_up(Shape(TOKENS, int(number), 1, 1), "cpu", torch.float32, count=1).batches[0].x
    if kind == "world":
        stream = ActivationStream(
            StreamConfig(**WORLDS["small"]["stream"]), tokens=TOKENS, batch=1024, seed=int(number)
        )
    else:
        hook = f"blocks.{number}.hook_resid_post"
        stream = ActivationStream(StreamConfig(model=kind, hook=hook, data=data, buffer_dtype="float32"), tokens=TOKENS)
    batches = [stream.next(1024).flat().x.float().cpu().clone() for _ in range(-(-TOKENS // 1024))]
    return torch.cat(batches)[:TOKENS]


def score(cell: Cell, x: Tensor, lr: float | None, seeds: int = 1) -> dict[str, float]:
    """Train at peak rate `lr` (None: the default) on all but the last HELD_OUT tokens of x [M, D], and evaluate on those.
    Returns means over seeds of weights and order."""
    runs = (train(x[:-HELD_OUT], *cell.configs(x.shape[1], lr, seed)) for seed in range(seeds))
    seed_scores = [evaluate(run.sae, x[-HELD_OUT:]) for run in runs]
    return {name: sum(scores[name] for scores in seed_scores) / seeds for name in seed_scores[0]}


@torch.no_grad()
def evaluate(sae: SparseAutoencoder, x: Tensor) -> dict[str, float]:
    """`fvu`, `l0` and `dead` (share of latents never active) on x [M, D]. A batchtopk dictionary gets the threshold that
    keeps the M K largest activations of x, as in training."""
    if sae.cfg.activation == "batchtopk":
        sae.threshold.zero_()
        sae.threshold.fill_(float(sae.encode(x).flatten().topk(len(x) * sae.cfg.k).values[-1]))
    scores = held_out_scores(sae, [Batch.of(x, torch.zeros(len(x), dtype=torch.int64))])
    assert scores is not None
    fvu = math.nan if scores["fvu"] is None else scores["fvu"]
    return {"fvu": fvu, "l0": scores["l0"], "dead": scores["dead_fraction"]}


def grid(measure: Callable[[float], dict[str, float]], start: float) -> dict[float, dict[str, float]]:
    """Scores by learning rate, ascending: `start` times powers of two, at least REACH rates on either side of the best."""
    scores_by_power: dict[int, dict[str, float]] = {}

    def fvu(power: int) -> float:
        if power not in scores_by_power:
            scores_by_power[power] = measure(start * 2.0**power)
        return scores_by_power[power]["fvu"] if math.isfinite(scores_by_power[power]["fvu"]) else math.inf

    best = min((-1, 0, 1), key=fvu)
    while best != (best := min((best - 1, best, best + 1), key=fvu)):
        pass
    for power in range(best - REACH, best + REACH + 1):
        fvu(power)
    return {start * 2.0**power: scores_by_power[power] for power in sorted(scores_by_power)}


def measure(
    sources: dict[str, Sequence[Cell]], *, data: str | None = None, seeds: int = 1, done: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:  # fmt: skip
    """Score every cell of every source at the default rate and on a grid around the best one.

    `done`: earlier results, whose cells are not measured again. `keep` is called with the results after each cell.
    """
    result = done or about("cpu") | {"cells": []}
    measured = {(cell_result["source"], _cell(cell_result)) for cell_result in result["cells"]}
    planned = [(source, source.partition("=")[0], cell) for source, cells in sources.items() for cell in cells]
    missing = [(source, name, cell) for source, name, cell in planned if (name, cell) not in measured]
    x, loaded = torch.zeros(0), ""
    for n, (source, name, cell) in enumerate(missing, 1):
        if source != loaded:
            x, loaded = activations(source, data), source
        print(f"cell {n} of {len(missing)}: {name} {cell}", file=sys.stderr)  # each training has its own bar
        result["cells"].append({"source": name, "D": x.shape[1]} | _scores(cell, x, seeds))
        keep(result)
    return result


def _scores(cell: Cell, x: Tensor, seeds: int) -> dict[str, Any]:
    rate = default_lr(*cell.configs(x.shape[1]))
    start = 1e-3 * 2.0 ** round(math.log2(rate / 1e-3))  # so that the grid does not depend on the default
    by_lr = grid(lambda lr: score(cell, x, lr, seeds), start)
    return cell._asdict() | {
        "default_lr": rate,
        "seeds": seeds,
        "default": score(cell, x, None, seeds),
        "grid": [{"lr": lr} | scores for lr, scores in by_lr.items()],
    }


def _cell(cell_result: dict[str, Any]) -> Cell:
    return Cell(**{name: cell_result[name] for name in Cell._fields})


def read(file: Path | None) -> dict[str, Any] | None:
    """Read a results file of this suite, if there is one. Raises UserError for other files."""
    return read_unfinished(file, "bench lr", lambda result: [_cell(cell_result) for cell_result in result["cells"]])


def excess(cell_result: dict[str, Any]) -> float:
    """FVU at the default rate relative to the best of the grid, minus 1. Negative if the default is better."""
    return cell_result["default"]["fvu"] / min(point["fvu"] for point in cell_result["grid"]) - 1


def table(result: dict[str, Any]) -> str:
    """The measurement as Markdown, one line per cell."""
    sizes = ("source", "D", "activation", "F", "K", "batch", "steps")
    lines: list[tuple[str, ...]] = [(*sizes, "best lr", "FVU", "default lr", "FVU", "above the best")]
    for line in result["cells"]:
        best = min(line["grid"], key=lambda point: point["fvu"])
        rates = ((best["lr"], best["fvu"]), (line["default_lr"], line["default"]["fvu"]))
        cells = [cell for lr, fvu in rates for cell in (f"{lr:.2g}", f"{fvu:.4f}")]
        lines.append((*(str(line[name]) for name in sizes), *cells, f"{excess(line):+.1%}"))
    return "\n".join([heading(result), "", *markdown(lines), ""])
