"""Train dictionaries of every kind on a synthetic world, next to SAELens' own training, and score all against the truth."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..engine.config import RunConfig, SAEConfig, StreamConfig, TrainConfig, WorldConfig
from ..engine.errors import UserError, check_known
from ..engine.stream import ActivationStream, WorldSource
from ..engine.synthetic.presets import PRESETS, preset
from ..engine.train import train, train_together
from ..engine.unit_decoder import unit_decoder
from ..evals.recovery import Encoder, recovery
from .libraries import load, sae_lens_dictionary
from .results import about, heading, markdown, read_unfinished

KINDS = ("batchtopk", "matryoshka", "jumprelu", "relu", "topk")
LIBRARIES = ("temposae", "sae_lens")
SCORES = ("f1", "mcc", "uniqueness", "r2", "shrinkage")
L0S = {"small": (5, 7), "synthsaebench": (20, 25)}
PREFIXES = (32, 8, 2, 1)  # F over the prefixes of a Matryoshka dictionary, as published: 128, 512, 2048 of 4096
PEER_RATES = {"small": 3e-3, "synthsaebench": 3e-4}  # of SAELens; the second is the published one
#: arXiv 2602.14687, as in SAELens' documentation: (kind, L0) -> F1, MCC, uniqueness, R2, each within 0.007 of 5 seeds
PUBLISHED = {
    ("batchtopk", 20): (0.8183, 0.7526, 0.9760, 0.7889), ("batchtopk", 25): (0.7316, 0.7574, 0.9837, 0.7923),
    ("matryoshka", 20): (0.8601, 0.7455, 0.9874, 0.7699), ("matryoshka", 25): (0.8793, 0.7927, 0.9987, 0.7792),
    ("jumprelu", 20): (0.8241, 0.7434, 0.9781, 0.7906), ("jumprelu", 25): (0.7317, 0.7527, 0.9885, 0.7951),
    ("relu", 20): (0.5777, 0.5834, 0.8528, 0.7501), ("relu", 25): (0.5562, 0.6039, 0.8976, 0.7654),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A dictionary to train: its kind, target L0 and seed, on `tokens` samples of a preset's world."""

    preset: str
    kind: str
    l0: int
    seed: int
    tokens: int

    @property
    def label(self) -> tuple[str, int, int]:
        return self.kind, self.l0, self.seed

    @property
    def world(self) -> WorldConfig:
        return WorldConfig(**PRESETS[self.preset]["stream"]["world"])

    @property
    def d_sae(self) -> int:
        return PRESETS[self.preset]["sae"]["d_sae"]

    @property
    def batch(self) -> int:
        return PRESETS[self.preset]["train"]["batch"]

    def open(self) -> ActivationStream:
        """The cell's stream, with some batches more for SAELens, which estimates the activations' norm first."""
        tokens = self.tokens + 16 * self.batch
        stream = StreamConfig(**PRESETS[self.preset]["stream"])
        return ActivationStream(stream, tokens=tokens, batch=self.batch, seed=self.seed)

    def configs(self) -> tuple[SAEConfig, TrainConfig]:
        target = float(self.l0) if self.kind in ("relu", "jumprelu") else None
        prefixes = tuple(self.d_sae // share for share in PREFIXES) if self.kind == "matryoshka" else None
        sae = SAEConfig(
            d_in=self.world.width, d_sae=self.d_sae, k=self.l0, prefixes=prefixes,
            activation="batchtopk" if self.kind == "matryoshka" else self.kind,  # type: ignore[arg-type]
        )  # fmt: skip
        recipe = PRESETS[self.preset]["train"] | {"tokens": self.tokens, "target_l0": target, "seed": self.seed}
        return sae, TrainConfig(**recipe, control=False)


def cells(name: str, seeds: int, kinds: Sequence[str] | None = None, tokens: int | None = None) -> list[Cell]:
    """The cells of a preset, seeds outermost. Raises UserError for unknown names."""
    samples = preset(name)["train"]["tokens"] if tokens is None else tokens
    for kind in kinds or ():
        check_known("kind", kind, KINDS)
    return [Cell(name, kind, l0, seed, samples) for seed, l0, kind in product(range(seeds), L0S[name], kinds or KINDS)]


def measure(
    name: str, planned: Sequence[Cell], *, libraries: Sequence[str] = LIBRARIES, done: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:  # fmt: skip
    """Train and score every cell with every library that is installed, with a random control per cell.

    `done`: earlier results, whose rows are not measured again. `keep` is called with the results after each row. `seconds`
    are those of training, samples included, and `stream_share` is the share of that time that our samples took.
    """
    result = done or about("cuda" if torch.cuda.is_available() else "cpu") | {
        "preset": name,
        "rows": [],
        "left_out": {},
    }
    for library in libraries:
        if library == "sae_lens" and find_spec(library) is None:
            result["left_out"][library] = "sae_lens is not installed; pip install 'temposae[peers]'"
    libraries = [library for library in libraries if library not in result["left_out"]]
    rows = {(*_label(row), row["library"]) for row in result["rows"]}
    missing = [(cell, library) for cell in planned for library in libraries if (*cell.label, library) not in rows]
    controls: dict[tuple[str, int, int], dict[str, float]] = {_label(row): row["random"] for row in result["rows"]}
    for n, (cell, library) in enumerate(missing, 1):
        kind, l0, seed = cell.label
        print(f"dictionary {n} of {len(missing)}: {kind}, L0 {l0}, seed {seed}, {library}", file=sys.stderr)
        if cell.label not in controls:
            group = [other for other, _ in missing if other.label[1:] == cell.label[1:] and other.label not in controls]
            controls |= _controls(list(dict.fromkeys(group)))
        began = time.perf_counter()
        encoder, more = (_ours if library == "temposae" else _sae_lens)(cell)
        seconds = time.perf_counter() - began
        scores = _scores(cell, {"sae": encoder})["sae"]
        result["rows"].append(
            {"kind": kind, "library": library, "seed": seed, "target_l0": l0, "l0": scores["l0"]}
            | {key: scores[key] for key in (*SCORES, "dead")}
            | {"seconds": round(seconds, 2), **more, "random": controls[cell.label]}
        )
        keep(result)
    return result


def _label(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["kind"], row["target_l0"], row["seed"]


def _controls(group: list[Cell]) -> dict[tuple[str, int, int], dict[str, float]]:
    """F1 and MCC of the random controls of cells of one seed, trained together on one stream."""
    stream, runs = group[0].open(), {}
    for cell in group:
        sae, config = cell.configs()
        runs[cell.kind] = RunConfig(
            stream=stream.config, sae=sae.model_copy(update={"decoder": "random"}), train=config
        )
    trained = train_together(stream, runs)
    scores = _scores(group[0], {kind: unit_decoder(run.sae) for kind, run in trained.items()})
    return {cell.label: {key: scores[cell.kind][key] for key in ("f1", "mcc")} for cell in group}


def _scores(cell: Cell, dictionaries: dict[str, Encoder]) -> dict[str, dict[str, Any]]:
    return recovery(WorldSource(cell.world, seed=cell.seed), dictionaries)


def _ours(cell: Cell) -> tuple[Encoder, dict[str, Any]]:
    stream = cell.open()
    run = train(stream, *cell.configs())
    seconds = stream.watch.total
    return unit_decoder(run.sae), {"stream_share": round(seconds[stream.source.label] / sum(seconds.values()), 4)}


def _sae_lens(cell: Cell) -> tuple[Encoder, dict[str, Any]]:
    """Train with SAELens' SAETrainer on the samples that ours see. ReLU and JumpReLU follow the target L0."""
    library, stream = load("sae_lens"), cell.open()
    steps = -(-cell.tokens // cell.batch)
    name, settings = {
        "topk": ("TopK", {"k": cell.l0}),
        "batchtopk": ("BatchTopK", {"k": float(cell.l0)}),
        "matryoshka": ("MatryoshkaBatchTopK", {
            "k": float(cell.l0), "use_matryoshka_aux_loss": True,
            "matryoshka_widths": [cell.d_sae // share for share in PREFIXES[:-1]],
        }),
        "relu": ("Standard", {"l1_coefficient": 2.0, "l1_warm_up_steps": 0}),
        "jumprelu": ("JumpReLU", {
            "normalize_activations": "expected_average_only_in", "jumprelu_bandwidth": 1.0,
            "jumprelu_init_threshold": 1.0, "decoder_init_norm": 0.5,
        }),
    }[cell.kind]  # fmt: skip
    device = stream.source.device.type
    torch.manual_seed(cell.seed)
    config = getattr(library, f"{name}TrainingSAEConfig")(
        d_in=cell.world.width, d_sae=cell.d_sae, device=device, **settings
    )
    sae = getattr(library, f"{name}TrainingSAE")(config)
    rate = PEER_RATES[cell.preset]
    trainer_config = load("sae_lens.config").SAETrainerConfig(
        total_training_samples=steps * cell.batch, train_batch_size_samples=cell.batch, device=device, lr=rate,
        lr_end=rate, lr_decay_steps=0, n_batches_for_norm_estimate=10,
        dead_feature_window=min(1000, max(10, steps // 10)), autocast=device == "cuda",
    )  # fmt: skip
    trainer = library.SAETrainer(trainer_config, sae, data_provider=iter(()))
    trainer.data_provider = _batches(stream, trainer, cell)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        trainer.fit()
    return sae_lens_dictionary(sae.eval()), {"lr": rate}


def _batches(stream: ActivationStream, trainer: Any, cell: Cell) -> Iterator[Tensor]:
    """Batches for SAELens' trainer. Before each, the sparsity coefficient moves towards the target L0, by 2% of the
    logarithm of their ratio in the last step."""
    active = trainer.act_freq_scores.sum()
    while True:
        before, active = active, trainer.act_freq_scores.sum()
        l0 = float(active - before) / cell.batch
        for name in trainer.coefficient_schedulers.keys() & {"l0", "l1"}:
            if l0 > 0:
                trainer.coefficient_schedulers[name].final_value *= (l0 / cell.l0) ** 0.02
        yield stream.next(cell.batch).flat().x.float().clone()


def read(file: Path | None, name: str) -> dict[str, Any] | None:
    """Read a results file of this suite, if there is one. Raises UserError for other files and other presets."""
    parts = lambda result: [(_label(row), row["library"], row["random"]) for row in result["rows"]]
    result = read_unfinished(file, "synth bench", parts)
    if result is not None and result.get("preset") != name:
        raise UserError(f"json: {file} is not allowed; its preset is {result.get('preset')}, not {name}")
    return result


def table(result: dict[str, Any]) -> str:
    """The results as Markdown: means over seeds, and the published table."""
    scores = ("F1", "MCC", "uniqueness", "R2")
    lines: list[tuple[str, ...]] = [
        ("kind", "L0", "library", "seeds", "L0 is", *scores, "dead", "seconds", "random F1", "random MCC")
    ]
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["kind"], row["target_l0"], row["library"]), []).append(row)
    for (kind, l0, library), rows in groups.items():
        mean = {key: fmean(row[key] for row in rows) for key in ("l0", *SCORES, "dead", "seconds")}
        figures = [f"{mean[key]:.4f}" for key in SCORES[: len(scores)]]
        random = [f"{fmean(row['random'][key] for row in rows):.4f}" for key in ("f1", "mcc")]
        counts = f"{mean['dead']:.0f}", f"{mean['seconds']:.1f}"
        lines.append((kind, str(l0), library, str(len(rows)), f"{mean['l0']:.1f}", *figures, *counts, *random))
    published = [(kind, str(l0), *(f"{value:.4f}" for value in values)) for (kind, l0), values in PUBLISHED.items()]
    return "\n".join([
        f"preset {result['preset']}, {heading(result)}", "", *markdown(lines),
        *(f"\n{library} was left out: {reason}" for library, reason in result["left_out"].items()),
        "", "Published (arXiv 2602.14687; the world of preset synthsaebench, F = 4096, 200M samples):", "",
        *markdown([("kind", "L0", *scores), *published]), "",
    ])  # fmt: skip
