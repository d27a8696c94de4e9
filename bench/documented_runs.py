"""What the documented runs cost: a training step of each beside that of a plain TopK dictionary of the same size, and many
on one stream beside the same ones trained one by one."""

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
from .results import FOLDER, about, markdown
from .streams import GEMMA, folder_of, text_of
from .timing import quantiles, sample, synchronise

PLAIN = "topk"
TRAINED = tuple(name for name, run in (BASELINES | RUNS).items() if run.trained_as is None)


class Sizes(NamedTuple):
    """Rows of `context` tokens in a batch, width D, numbers of latents, K of topk; how often each step takes its turn; and
    of the campaign the language model and layer (None: the middle one), tokens, latents and tokens in a batch."""

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
    """By F and run `ms` of a step (20th, 50th and 80th percentile), `cpu_ms`, the median processor time of all threads, and
    `times_topk`, the median over rounds of its time over that of the plain TopK step in the same round; and of the
    `campaign` seconds together, one by one, and their `ratio`.

    A step is `Cohort.step` with Adam, as `temposae run` takes it, on the same batches of made-up rows. In the campaign all
    are trained on one stream of the language model, without controls; one by one, each on a stream of its own.
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
                    began = time.process_time()
                    ms = sample(
                        lambda cohort=cohort, round_index=round_index: cohort.step(batches[round_index % 4]), device
                    )
                    if round_index >= 2:  # the first steps compile and allocate
                        times[name].append(ms)
                        busy[name].append(1e3 * (time.process_time() - began))
                    bar.advance(1)
            steps[str(F)] = {
                name: quantiles(samples_ms)._asdict()
                | {"cpu_ms": median(busy[name])}
                | {"times_topk": median(a / b for a, b in zip(samples_ms, times[PLAIN], strict=True))}
                for name, samples_ms in times.items()
            }
        with folder_of(sizes.model, device) as model:
            campaign = _campaign(sizes, model, names, bar.advance)
    return about(device) | {"runs": {"sizes": sizes._asdict(), "steps": steps, "campaign": campaign}}


def expected_seconds(name: str, d_sae: int, tokens: int, plain: str = "relu") -> tuple[float, str]:
    """Estimate how long one core trains a documented run on the embedded model, with the plain dictionary of its activation
    and a random control of each; and say what the estimate comes from.

    It is the processor time of their steps, as measured with F = 2304, in proportion to F and tokens. The language model's
    own time is not in it. The measurement is the newest `bench/results/documented/testbed-*.json`.
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
    draw = torch.Generator().manual_seed(seed)
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
    """The measurement as Markdown: a row per run, its step as a multiple of the plain TopK step's."""
    runs = result["runs"]
    sizes, steps, campaign = runs["sizes"], runs["steps"], runs["campaign"]
    head = ("run", *(cell for F in steps for cell in (f"ms, F = {F}", "x TopK")))
    lines = [head]
    for name in next(iter(steps.values())):
        cells = (
            f"{measured[name]['ms']:.1f}" if i == 0 else f"{measured[name]['times_topk']:.2f}"
            for measured in steps.values()
            for i in (0, 1)
        )
        lines.append((name, *cells))
    return "\n".join(
        [
            f"{result['device']}; torch {result['versions'].get('torch')}, {result['threads']} threads; "
            f"commit {result['commit']}",
            "",
            f"A training step, N = {sizes['rows'] * sizes['context']}, D = {sizes['D']}, K = {sizes['K']} of topk:",
            "",
            *markdown(lines),
            "",
            f"{campaign['runs']} dictionaries of F = {campaign['F']} on {campaign['tokens']:,} tokens of "
            f"{campaign['model']}: {campaign['together_s']:.1f} s together, {campaign['one_by_one_s']:.1f} s one by one, "
            f"ratio {campaign['ratio']:.2f}",
            "",
        ]
    )
