"""What the documented runs cost: a training step of each beside that of a plain TopK dictionary of the same size, and many
on one stream beside the same ones trained one by one."""

import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

from ..engine.ambient import own_modes
from ..engine.composed import dictionary
from ..engine.config import RunConfig, SAEConfig, TrainConfig
from ..engine.host import tune_host
from ..engine.optim import Learner
from ..engine.progress import progress_bar
from ..engine.stream import ActivationStream, Batch
from ..engine.sweep import resolve
from ..engine.train import train_together
from ..variants import BASELINES, RUNS, settings
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


@own_modes()
def measure(given: Sizes, runs: Sequence[str] = TRAINED, *, device: str) -> dict[str, Any]:
    """By F and run `ms` of a step (20th, 50th and 80th percentile), `cpu_ms`, the median processor time of all threads, and
    `times_topk`, the median over rounds of its time over that of the plain TopK step in the same round; and of the
    `campaign` seconds together, one by one, and their `ratio`.

    A step is `Learner.step` with Adam, as `temposae run` takes it, on the same batches of made-up rows. In the campaign all
    are trained on one stream of the language model, without controls; one by one, each on a stream of its own.
    """
    tune_host()
    names = [PLAIN, *(run for run in runs if run != PLAIN)]
    total = len(given.F) * (given.rounds + 2) * len(names) + len(names) + 1
    steps: dict[str, dict[str, Any]] = {}
    batches = [_batch(given, seed, device) for seed in range(4)]
    with progress_bar("runs", total=total, unit="turns") as bar:
        for F in given.F:
            learners = {name: _learner(name, given, F, device) for name in names}
            times: dict[str, list[float]] = {name: [] for name in names}
            busy: dict[str, list[float]] = {name: [] for name in names}
            for nth in range(given.rounds + 2):
                for name, learner in learners.items():
                    began = time.process_time()
                    ms = sample(lambda one=learner, nth=nth: one.step(batches[nth % 4]), device)
                    if nth >= 2:  # the first steps compile and allocate
                        times[name].append(ms)
                        busy[name].append(1e3 * (time.process_time() - began))
                    bar.advance(1)
            steps[str(F)] = {
                name: quantiles(of)._asdict()
                | {"cpu_ms": median(busy[name])}
                | {"times_topk": median(a / b for a, b in zip(of, times[PLAIN], strict=True))}
                for name, of in times.items()
            }
        with folder_of(given.model, device) as model:
            campaign = _campaign(given, model, names, bar.advance)
    return about(device) | {"runs": {"sizes": given._asdict(), "steps": steps, "campaign": campaign}}


def expected_seconds(name: str, d_sae: int, tokens: int, plain: str = "relu") -> tuple[float, str]:
    """Estimate how long one core trains a documented run on the embedded model, with the plain dictionary of its activation
    and a random control of each; and say what the estimate comes from.

    It is the processor time of their steps, as measured with F = 2304, in proportion to F and tokens. The language model's
    own time is not in it. The measurement is the newest `bench/results/documented/testbed-*.json`.
    """
    found = json.loads(max(FOLDER.glob("documented/testbed-*.json")).read_text())
    ((measured_at, steps),) = found["runs"]["steps"].items()
    trained = (BASELINES | RUNS)[name].trained_as or name
    every = [trained] if trained in BASELINES else [trained, plain]
    sizes = found["runs"]["sizes"]
    ms = sum(2 * steps[each]["cpu_ms"] for each in every)
    seconds = ms / 1e3 * tokens / (sizes["rows"] * sizes["context"]) * d_sae / int(measured_at)
    return seconds, f"one core of an {found['device']}, torch {found['versions']['torch']}"


def _learner(name: str, given: Sizes, F: int, device: str) -> Learner:
    sections = settings(name, context=given.context)
    sae = {**sections["sae"], "d_in": given.D, "d_sae": F, "k": min(given.K, F)}
    sae["mask"] = {"positions": given.context, **sae.get("mask", {})}
    training = TrainConfig(**{**sections["train"], "tokens": 10**9, "batch": given.rows * given.context})
    made = dictionary(SAEConfig(**sae)).to(device)
    zeros = torch.zeros(given.D, device=device)
    return Learner(made, training, zeros, given.D**0.5, given.context)


def _batch(given: Sizes, seed: int, device: str) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    pos = torch.arange(given.context).repeat(given.rows)
    row = torch.arange(given.rows).repeat_interleave(given.context)
    x = torch.randn(len(pos), given.D, generator=draw)
    second = 0.8 * x + 0.6 * torch.randn(len(pos), given.D, generator=draw)
    attribute = (torch.rand(given.rows, generator=draw) < 0.5).long()[row]
    made = Batch({"x": x, "second": second}, pos.int(), pos.int(), row, row, attribute=attribute)
    return made.each(lambda value: value.to(device))


def _campaign(given: Sizes, model: str, names: Sequence[str], advance: Callable[[int], None]) -> dict[str, Any]:
    sections = {}
    for name in names:
        own = settings(name)
        sections[name] = {
            "stream": {**own["stream"], "mode": "sequences", "model": model, "layer": given.layer},
            "sae": {**own["sae"], "d_sae": given.campaign_F},
            "train": {**own["train"], "tokens": given.tokens, "batch": given.campaign_batch, "control": False},
        }
    lm, runs = resolve(sections)
    assert lm is not None
    hooks = list(dict.fromkeys(hook for run in runs.values() for hook in run.stream.read_hooks))
    device = str(lm.device)

    def trained(some: dict[str, RunConfig]) -> float:
        lm.use(hooks=hooks)
        synchronise(device)
        began = time.perf_counter()
        config = next(iter(some.values())).stream
        rows = text_of(config.context, lm)
        train_together(ActivationStream(config, tokens=given.tokens, model=lm, rows=rows, hooks=hooks), some)
        synchronise(device)
        advance(1)
        return time.perf_counter() - began

    together = trained(runs)
    alone = {name: trained({name: run}) for name, run in runs.items()}
    return {
        "runs": len(runs), "model": given.model, "tokens": given.tokens, "F": given.campaign_F,
        "together_s": together, "one_by_one_s": sum(alone.values()), "ratio": sum(alone.values()) / together,
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The measurement as Markdown: a row per run, its step as a multiple of the plain TopK step's."""
    runs = found["runs"]
    sizes, steps, campaign = runs["sizes"], runs["steps"], runs["campaign"]
    head = ("run", *(cell for F in steps for cell in (f"ms, F = {F}", "x TopK")))
    rows = [head]
    for name in next(iter(steps.values())):
        cells = (
            f"{at[name]['ms']:.1f}" if i == 0 else f"{at[name]['times_topk']:.2f}"
            for at in steps.values()
            for i in (0, 1)
        )
        rows.append((name, *cells))
    return "\n".join(
        [
            f"{found['device']}; torch {found['versions'].get('torch')}, {found['threads']} threads; "
            f"commit {found['commit']}",
            "",
            f"A training step, N = {sizes['rows'] * sizes['context']}, D = {sizes['D']}, K = {sizes['K']} of topk:",
            "",
            *markdown(rows),
            "",
            f"{campaign['runs']} dictionaries of F = {campaign['F']} on {campaign['tokens']:,} tokens of "
            f"{campaign['model']}: {campaign['together_s']:.1f} s together, {campaign['one_by_one_s']:.1f} s one by one, "
            f"ratio {campaign['ratio']:.2f}",
            "",
        ]
    )
