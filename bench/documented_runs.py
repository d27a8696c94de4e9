"""Time the documented runs: a step of each against a plain TopK step of the same size, and training all on one stream
against training them one by one."""

import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

from ..campaign.documented import BASELINES, RUNS, settings
from ..engine.cohort import Cohort
from ..engine.composed import dictionary
from ..engine.config import RunConfig, SAEConfig, TrainConfig
from ..engine.learner import Learner
from ..engine.process.cpu_memory import tune_host
from ..engine.process.progress import progress_bar
from ..engine.stream import ActivationStream, Batch
from ..engine.sweep import resolve
from ..engine.train import train_together
from ..kernels.torch_modes import default_modes
from .data import seed_of
from .results import FOLDER, about, markdown
from .streams import GEMMA, folder_of, text_of
from .timing import quantiles, sample, synchronise

PLAIN = "topk"
TRAINED = tuple(name for name, run in (BASELINES | RUNS).items() if run.trained_as is None)


class Sizes(NamedTuple):
    """Of steps: rows in a batch, tokens in a row, width D, numbers of latents F, K of topk, and rounds. Of the campaign:
    language model and layer (None: the middle one), tokens, latents, and tokens in a batch."""

    rows: int
    context: int
    D: int
    F: tuple[int, ...]
    K: int
    rounds: int
    model: str
    layer: int | None
    tokens: int
    campaign_F: int
    campaign_batch: int


PRESETS = {
    "tiny": Sizes(2, 32, 32, (64,), 4, 2, "testbed", None, 1024, 64, 256),
    "cpu": Sizes(8, 128, 768, (2304,), 32, 5, "testbed", None, 16384, 1024, 1024),
    "testbed": Sizes(8, 128, 128, (2304,), 32, 5, "testbed", None, 2048, 64, 512),
    "gpu": Sizes(64, 128, 2304, (2304, 16384, 65536), 64, 20, GEMMA, 12, 200_000, 2304, 8192),
}


@default_modes()
def measure(sizes: Sizes, runs: Sequence[str] = TRAINED, *, device: str) -> dict[str, Any]:
    """Time a step of each run at each F, and a campaign.

    `steps` holds by F and run the time `ms` of a step (with 20th and 80th percentile), `cpu_ms`, the median processor time
    of all threads, and `times_topk`, the median over rounds of its time divided by the plain TopK step's in the same round.
    A step is `Cohort.step` with Adam, as in `temposae run`, on synthetic rows. `campaign` holds the seconds for training
    all runs on one stream of the language model, those for training each on its own stream, and their `ratio`, all without
    controls.
    """
    tune_host()
    names = [PLAIN, *(run for run in runs if run != PLAIN)]
    total = len(sizes.F) * (sizes.rounds + 2) * len(names) + len(names) + 1
    steps: dict[str, dict[str, Any]] = {}
    batches = [_batch(sizes, seed, device) for seed in range(4)]
    with progress_bar("runs", total=total, unit="turns") as bar:
        for F in sizes.F:
            cohorts = {name: _cohort(name, sizes, F, device) for name in names}
            times: dict[str, list[float]] = {name: [] for name in names}
            busy: dict[str, list[float]] = {name: [] for name in names}
            for round_index in range(sizes.rounds + 2):
                for name, cohort in cohorts.items():
                    batch = batches[round_index % 4]
                    began = time.process_time()
                    ms = sample(lambda cohort=cohort, batch=batch: cohort.step(batch), device)
                    if round_index >= 2:  # the first steps compile and allocate
                        times[name].append(ms)
                        busy[name].append(1e3 * (time.process_time() - began))
                    bar.advance(1)
            for name, ms_by_round in times.items():
                ratio = median(ms / plain_ms for ms, plain_ms in zip(ms_by_round, times[PLAIN], strict=True))
                figures = quantiles(ms_by_round)._asdict() | {"cpu_ms": median(busy[name]), "times_topk": ratio}
                steps.setdefault(str(F), {})[name] = figures
        with folder_of(sizes.model, device) as model:
            campaign = _campaign(sizes, model, names, bar.advance)
    return about(device) | {"runs": {"sizes": sizes._asdict(), "steps": steps, "campaign": campaign}}


def expected_seconds(name: str, d_sae: int, tokens: int, plain: str = "relu") -> tuple[float, str]:
    """Estimate the seconds that one core needs to train a documented run, its plain dictionary and a random control of each
    on the embedded model. Also returns the machine that the estimate is for.

    The estimate is the processor time of the steps in the newest `bench/results/documented/testbed-*.json`, scaled by F and
    tokens. It leaves out the language model.
    """
    result = json.loads(max(FOLDER.glob("documented/testbed-*.json")).read_text())
    ((measured_F, steps),) = result["runs"]["steps"].items()
    trained = (BASELINES | RUNS)[name].trained_as or name
    run_names = [trained] if trained in BASELINES else [trained, plain]
    sizes = result["runs"]["sizes"]
    ms = sum(2 * steps[run_name]["cpu_ms"] for run_name in run_names)
    seconds = ms / 1e3 * tokens / (sizes["rows"] * sizes["context"]) * d_sae / int(measured_F)
    return seconds, f"one core of an {result['device']}, torch {result['versions']['torch']}"


def _cohort(name: str, sizes: Sizes, F: int, device: str) -> Cohort:
    sections = settings(name, context=sizes.context)
    sae = {**sections["sae"], "d_in": sizes.D, "d_sae": F, "k": min(sizes.K, F)}
    sae["mask"] = {"positions": sizes.context, **sae.get("mask", {})}
    training = TrainConfig(**{**sections["train"], "tokens": 10**9, "batch": sizes.rows * sizes.context})
    autoencoder = dictionary(SAEConfig(**sae)).to(device)
    zeros = torch.zeros(sizes.D, device=device)
    return Cohort([Learner(autoencoder, training, zeros, sizes.D**0.5, sizes.context)])


def _batch(sizes: Sizes, seed: int, device: str) -> Batch:
    draw = torch.Generator().manual_seed(seed_of("tokens", seed))
    pos = torch.arange(sizes.context).repeat(sizes.rows)
    row = torch.arange(sizes.rows).repeat_interleave(sizes.context)
    x = torch.randn(len(pos), sizes.D, generator=draw)
    second = 0.8 * x + 0.6 * torch.randn(len(pos), sizes.D, generator=draw)
    attribute = (torch.rand(sizes.rows, generator=draw) < 0.5).long()[row]
    batch = Batch({"x": x, "second": second}, pos.int(), pos.int(), row, row, attribute=attribute)
    return batch.each(lambda value: value.to(device))


def _campaign(sizes: Sizes, model: str, names: Sequence[str], advance: Callable[[int], None]) -> dict[str, Any]:
    sections = {}
    for name in names:
        run_sections = settings(name)
        sections[name] = {
            "stream": {**run_sections["stream"], "mode": "sequences", "model": model, "layer": sizes.layer},
            "sae": {**run_sections["sae"], "d_sae": sizes.campaign_F},
            "train": {**run_sections["train"], "tokens": sizes.tokens, "batch": sizes.campaign_batch, "control": False},
        }
    lm, runs = resolve(sections)
    assert lm is not None
    hooks = list(dict.fromkeys(hook for run in runs.values() for hook in run.stream.read_hooks))
    device = str(lm.device)

    def training_seconds(group: dict[str, RunConfig]) -> float:
        lm.use(hooks=hooks)
        synchronise(device)
        began = time.perf_counter()
        config = next(iter(group.values())).stream
        rows = text_of(config.context, lm)
        train_together(ActivationStream(config, tokens=sizes.tokens, model=lm, rows=rows, hooks=hooks), group)
        synchronise(device)
        advance(1)
        return time.perf_counter() - began

    joint_seconds = training_seconds(runs)
    single_seconds = {name: training_seconds({name: run}) for name, run in runs.items()}
    return {
        "runs": len(runs), "model": sizes.model, "tokens": sizes.tokens, "F": sizes.campaign_F,
        "together_s": joint_seconds, "one_by_one_s": sum(single_seconds.values()),
        "ratio": sum(single_seconds.values()) / joint_seconds,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The measurement as Markdown, one line per run."""
    runs = result["runs"]
    sizes, steps, campaign = runs["sizes"], runs["steps"], runs["campaign"]
    lines = [("run", *(cell for F in steps for cell in (f"ms, F = {F}", "x TopK")))]
    for name in next(iter(steps.values())):
        figures = [by_name[name] for by_name in steps.values()]
        lines.append((name, *(cell for f in figures for cell in (f"{f['ms']:.1f}", f"{f['times_topk']:.2f}"))))
    return (
        f"{result['device']}; torch {result['versions'].get('torch')}, {result['threads']} threads; "
        f"commit {result['commit']}\n\n"
        f"A training step, N = {sizes['rows'] * sizes['context']}, D = {sizes['D']}, K = {sizes['K']} of topk:\n\n"
        + "\n".join(markdown(lines))
        + f"\n\n{campaign['runs']} dictionaries of F = {campaign['F']} on {campaign['tokens']:,} tokens of "
        f"{campaign['model']}: {campaign['together_s']:.1f} s together, {campaign['one_by_one_s']:.1f} s one by one, "
        f"ratio {campaign['ratio']:.2f}\n"
    )
