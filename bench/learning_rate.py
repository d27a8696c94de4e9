"""The default learning rate beside a grid of others: over sources of activations, sizes, batches and lengths of run."""

import json
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
from ..engine.errors import UserError, shown
from ..engine.sae import SparseAutoencoder
from ..engine.storage.path_names import expand_path
from ..engine.stream import ActivationStream
from ..engine.train import train
from ..engine.training.schedules import default_lr
from .data import Shape
from .data import tokens as made_up
from .results import about

TOKENS = 100_000  # of a source
HELD_OUT = 4096  # the last ones, which scores are taken on
REACH = 2  # factors of two that the grid has on either side of the best rate


class Cell(NamedTuple):
    """A dictionary and a length of run: what a learning rate is chosen for. With relu and jumprelu, K is `target_l0`."""

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
#: What is measured of each source: WIDTH of made-up activations, or LAYER of a model
PRESETS: dict[str, dict[str, Sequence[Cell]]] = {
    "tiny": {"synthetic:16": [Cell("topk", 32, 4, 64, 8), Cell("batchtopk", 32, 4, 64, 8)]},
    "cpu": {"synthetic:64": SMALL, "testbed:1": SMALL},
    "pretrained": {"smollm2:9": LARGE},
}


def plan(
    preset: str, sources: Sequence[str] | None = None, cells: Sequence[str] | None = None
) -> dict[str, Sequence[Cell]]:
    """The cells of each source: a preset's, or these ones. Raises UserError for what is none."""
    if preset not in PRESETS:
        raise UserError(f"preset: {preset!r} is not allowed; there are {', '.join(PRESETS)}")
    preset_cells = PRESETS[preset]
    parsed_cells = [_parsed(text) for text in cells or ()]
    for source in sources or ():
        _check_source(source)
    all_cells = tuple(dict.fromkeys(cell for source_cells in preset_cells.values() for cell in source_cells))
    return {source: parsed_cells or preset_cells.get(source, all_cells) for source in sources or preset_cells}


def _parsed(text: str) -> Cell:
    activation, *numbers = text.split(",")
    if len(numbers) != 4 or not all(re.fullmatch("[0-9]{1,10}", number) for number in numbers):
        raise UserError(
            f"cell: {text} is not allowed; it must be ACTIVATION,F,K,BATCH,STEPS, as in topk,512,16,256,100"
        )
    cell = Cell(activation, *map(int, numbers))  # type: ignore[arg-type]
    cell.configs(1)  # which refuses what a dictionary can't be
    return cell


def _check_source(source: str) -> None:
    name, is_file, file = source.partition("=")
    if is_file:
        if not expand_path(file, "source").is_file():
            raise UserError(f"source: {shown(source)} is not allowed; {file} does not exist")
    elif not re.fullmatch(r".+:[0-9]{1,5}", name) or name == "synthetic:0":
        raise UserError(
            f"source: {shown(source)} is not allowed; it must be synthetic:WIDTH, MODEL:LAYER or NAME=FILE.npy"
        )


def activations(source: str, data: str | None = None) -> Tensor:
    """x [TOKENS, D] float32 of a source: `synthetic:WIDTH` (`data.tokens`), `MODEL:LAYER` (the residual stream after that
    layer, on the text `data`), or `NAME=FILE.npy`. Raises UserError for another, and for a file that is none."""
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
    hook = f"blocks.{number}.hook_resid_post"
    stream = ActivationStream(StreamConfig(model=kind, hook=hook, data=data, buffer_dtype="float32"), tokens=TOKENS)
    batches = [stream.next(1024).flat().x.float().cpu().clone() for _ in range(-(-TOKENS // 1024))]
    return torch.cat(batches)[:TOKENS]


def score(cell: Cell, x: Tensor, lr: float | None, seeds: int = 1) -> dict[str, float]:
    """Train at peak rate `lr` (None: the default) on all of x [M, D] but the last HELD_OUT tokens, and evaluate on those.
    Means over so many seeds of weights and order."""
    seed_scores = [
        evaluate(train(x[:-HELD_OUT], *cell.configs(x.shape[1], lr, seed)).sae, x[-HELD_OUT:]) for seed in range(seeds)
    ]
    return {name: sum(scores[name] for scores in seed_scores) / seeds for name in seed_scores[0]}


@torch.no_grad()
def evaluate(sae: SparseAutoencoder, x: Tensor) -> dict[str, float]:
    """`fvu`, `l0` and `dead` (share of latents never active) on x [M, D]. Of batchtopk, the M K largest activations of x
    count, as in training, so that its threshold plays no part; the dictionary keeps the one that gives so many."""
    if sae.cfg.activation == "batchtopk":
        sae.threshold.zero_()
        sae.threshold.fill_(float(sae.encode(x).flatten().topk(len(x) * sae.cfg.k).values[-1]))
    f = sae.encode(x)
    error = (x - sae.decode(f)).double().square().sum()
    return {
        "fvu": float(error / (x - x.mean(0)).double().square().sum()),
        "l0": float((f > 0).sum() / len(x)),
        "dead": float((~(f > 0).any(0)).double().mean()),
    }


def grid(measure: Callable[[float], dict[str, float]], start: float) -> dict[float, dict[str, float]]:
    """Scores by learning rate, ascending: `start` times powers of two, at least two of them on either side of the best."""
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
    """Every cell of every source: scores at the default rate and on a grid around the best one.

    `done`: results of before; cells in them are not measured again. `keep` takes what there is after each cell.
    """
    result = done or about("cpu") | {"cells": []}
    missing = [
        (source, cell) for source, cells in sources.items() for cell in cells if not _is_measured(result, source, cell)
    ]
    x, loaded = torch.zeros(0), ""
    for n, (source, cell) in enumerate(missing, 1):
        if source != loaded:
            x, loaded = activations(source, data), source
        name = source.partition("=")[0]
        print(f"cell {n} of {len(missing)}: {name} {cell}", file=sys.stderr)  # each training has its own bar
        result["cells"].append({"source": name, "D": x.shape[1]} | _scores(cell, x, seeds))
        keep(result)
    return result


def _scores(cell: Cell, x: Tensor, seeds: int) -> dict[str, Any]:
    rate = default_lr(*cell.configs(x.shape[1]))
    start = 1e-3 * 2.0 ** round(math.log2(rate / 1e-3))  # the grid's rates are the same whatever the default is
    by_lr = grid(lambda lr: score(cell, x, lr, seeds), start)
    return cell._asdict() | {
        "default_lr": rate,
        "seeds": seeds,
        "default": score(cell, x, None, seeds),
        "grid": [{"lr": lr} | scores for lr, scores in by_lr.items()],
    }


def _is_measured(result: dict[str, Any], source: str, cell: Cell) -> bool:
    name = source.partition("=")[0]
    return any(cell_result["source"] == name and _cell(cell_result) == cell for cell_result in result["cells"])


def _cell(cell_result: dict[str, Any]) -> Cell:
    return Cell(**{name: cell_result[name] for name in Cell._fields})


def read(file: Path) -> dict[str, Any]:
    """What a `--json` file holds. Raises UserError for one that this suite did not write."""
    try:
        result = json.loads(file.read_text())
        [_cell(cell_result) for cell_result in result["cells"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"json: {file} is not allowed; it holds something else than learning rates") from None
    return result


def excess(cell_result: dict[str, Any]) -> float:
    """How far FVU at the default is above the best of the grid, as a share of it; below zero where it is better."""
    return cell_result["default"]["fvu"] / min(point["fvu"] for point in cell_result["grid"]) - 1


def table(result: dict[str, Any]) -> str:
    """Markdown: what was measured on what, a line for each cell."""
    lines = [
        f"{result['device']}, torch {result['versions']['torch']}, commit {(result['commit'] or 'unknown')[:8]}",
        "",
        "| source | D | activation | F | K | batch | steps | best lr | FVU | default lr | FVU | above the best |",
        "| ------ | -: | ---------- | -: | -: | ----: | ----: | ------: | --: | ---------: | --: | -------------: |",
    ]
    for line in result["cells"]:
        best = min(line["grid"], key=lambda point: point["fvu"])
        lines.append(
            f"| {line['source']} | {line['D']} | {line['activation']} | {line['F']} | {line['K']} | {line['batch']} "
            f"| {line['steps']} | {best['lr']:.2g} | {best['fvu']:.4f} | {line['default_lr']:.2g} "
            f"| {line['default']['fvu']:.4f} | {excess(line):+.1%} |"
        )
    return "\n".join(lines) + "\n"
