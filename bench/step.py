"""Time and memory of one training step of each library, on the same tokens in the same run, and whether it learns."""

import gc
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ..engine.errors import UserError, check_known
from ..engine.process.cpu_memory import tune_host
from ..engine.process.progress import ProgressBar, progress_bar
from ..kernels.torch_modes import default_modes
from .data import DTYPES, Shape, Tokens, check_settings, tokens
from .floors import rates_of, step_floors, step_work
from .providers import PROVIDERS
from .timing import free_bytes, inner_calls, memory, quantiles, sample, synchronise
from .training_job import ACTIVATIONS, ProviderRun, ProviderUnavailable, TrainingJob, fixes_l0

SAMPLE_MS = 30.0  # least duration of a sample on a GPU
WARM = 2  # steps that compile and allocate


class Contender(NamedTuple):
    """A provider, and whether it runs with its own defaults."""

    provider: str
    own: bool

    def __str__(self) -> str:
        return f"{self.provider}, own defaults" if self.own else self.provider


def contenders(providers: Iterable[str], own: bool) -> list[Contender]:
    """All providers with the headline's settings and then, with `own`, with their own. Raises UserError for unknown ones."""
    names = list(dict.fromkeys(providers))
    for name in names:
        check_known("provider", name, PROVIDERS)
    entrants = [Contender(name, False) for name in names]
    return entrants + [Contender(name, True) for name in names if own and PROVIDERS[name].own]


@dataclass
class RaceEntry:
    """A contender in a race, with its samples (ms), peak memory (bytes) and number of steps done."""

    contender: Contender
    trainee: ProviderRun
    peak: int
    fvu_start: float
    times: list[float] = field(default_factory=list)
    done: int = 0

    def step(self) -> None:
        self.trainee.step(self.done)
        self.done += 1


@default_modes()
def measure(
    shapes: Iterable[Shape],
    entrants: list[Contender],
    *,
    device: str,
    dtype: str,
    rounds: int = 20,
    clip: float | None = None,
    lr: float = 3e-4,
    activations: Iterable[str] = ("topk",),
    auxk: bool = False,
    dictionaries: int = 1,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Time a training step of each contender at each shape, in one race per activation.

    Contenders take samples in turns, so that a busy machine slows all of them alike. Those that do not fit into memory
    together race in several heats. With `auxk`, every fourth latent is dead. With several `dictionaries`, a step is one step
    of each on the same tokens; temposae steps them together. Returns the cases and, by contender, why it was left out.

    A case holds shape, settings, time quantiles, peak memory and `heat`. `fvu_start` and `fvu_end` are the unexplained
    variance of held-out tokens before the first and after the last step, of the first dictionary, and `loss_falls` compares
    them. `l0` is the number of active latents per token after the last step, unless the activation fixes it.

    Raises UserError for sizes, dtypes and activations that are not allowed, and for AuxK with an activation that has none.
    Errors of temposae's own step are raised, except for missing memory.
    """
    shapes, activations = [shape.check() for shape in shapes], list(dict.fromkeys(activations))
    check_settings(dtype, rounds=rounds, dictionaries=dictionaries)
    for activation in activations:
        check_known("activation", activation, ACTIVATIONS)
        if auxk and not fixes_l0(activation):
            raise UserError(f"auxk: not allowed with activation {activation}; only topk and batchtopk have AuxK")
    tune_host()
    rates_of(device, DTYPES[dtype].itemsize)  # measured before anything else uses the device
    cases: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    races = len(shapes) * len(activations)
    with progress_bar("steps", total=races * len(entrants) * (rounds + 1), unit="samples") as bar:
        for shape in shapes:
            job = TrainingJob(shape, device, dtype, lr, tokens(shape, device, DTYPES[dtype]))
            job = job._replace(clip=clip, auxk=auxk, dictionaries=dictionaries)
            for activation in activations:
                cases += _race(job._replace(activation=activation), entrants, rounds, left_out, bar)
    return cases, left_out


def _race(
    job: TrainingJob, entrants: list[Contender], rounds: int, left_out: dict[str, str], bar: ProgressBar
) -> list[dict[str, Any]]:
    """The cases of all contenders at one shape and activation, in as many heats as memory needs."""
    cases: list[dict[str, Any]] = []
    waiting, heat = list(entrants), 0
    while waiting:
        entries, waiting = _line_up(job, waiting, left_out, bar)
        for _ in range(rounds):
            _round(entries, job, left_out, bar)
        cases += [_case(entry, job, heat) for entry in entries]
        heat += 1
        del entries
        _release(job.device)
    return cases


def _line_up(
    job: TrainingJob, waiting: list[Contender], left_out: dict[str, str], bar: ProgressBar
) -> tuple[list[RaceEntry], list[Contender]]:
    """Build as many contenders as fit into memory. Returns them and those that still wait."""
    entries: list[RaceEntry] = []
    for index, contender in enumerate(waiting):
        bar.advance(0, now=f"building {contender}")
        if job.activation not in PROVIDERS[contender.provider].activations:
            left_out[f"{contender.provider}, {job.activation}"] = f"it has no {job.activation}"
            bar.advance(1)
            continue
        entry, reason, memory_short = None, "", False
        try:
            weights = job.dictionaries * 2 * job.shape.D * job.shape.F
            _check_room(job, entries, 16 * weights)  # bytes of weights, gradients and moments
            entry = _enter(job, contender)
            _check_room(job, [*entries, entry] if entries else [], 0)
        except ProviderUnavailable as absent:
            left_out[str(contender)] = str(absent)
        except Exception as error:
            if contender.provider == "temposae" and not _out_of_memory(error):
                raise
            reason, memory_short = in_one_line(error), _out_of_memory(error)
        if reason:
            entry = None
            _release(job.device)  # only now, because the exception held the memory
            if memory_short and entries:
                return entries, waiting[index:]
            left_out[f"{contender} at {job}"] = reason
        elif entry is not None:
            entries.append(entry)
        bar.advance(1)
    return entries, []


def _check_room(job: TrainingJob, entries: list[RaceEntry], more_bytes: int) -> None:
    """Raise MemoryError unless `more_bytes` and the memory of the largest step so far are free."""
    needed, free = more_bytes + max((entry.peak for entry in entries), default=0), free_bytes(job.device)
    if needed > free:
        raise MemoryError(f"needs {needed / 2**30:,.1f} GiB, {free / 2**30:,.1f} GiB are free")


def _enter(job: TrainingJob, contender: Contender) -> RaceEntry:
    job = job._replace(own=contender.own)
    trainee, built = memory(lambda: _build(job, contender.provider), job.device)
    entry = RaceEntry(contender, trainee, 0, _fvu(trainee, job.tokens))

    def warm() -> None:
        for _ in range(WARM):
            entry.step()

    _, stepped = memory(warm, job.device)
    entry.peak = max(built.peak, built.held + stepped.peak)
    return entry


def _build(job: TrainingJob, provider: str) -> ProviderRun:
    build = PROVIDERS[provider].build
    if provider == "temposae":  # builds several dictionaries itself
        return build(job)
    trainees = [build(job) for _ in range(job.dictionaries)]

    def step(i: int) -> None:
        for trainee in trainees:
            trainee.step(i)

    return replace(trainees[0], step=step)


def _round(entries: list[RaceEntry], job: TrainingJob, left_out: dict[str, str], bar: ProgressBar) -> None:
    """Take a sample of each contender. One that fails leaves the race."""
    cuda = torch.device(job.device).type == "cuda"
    for entry in list(entries):
        try:
            inner = inner_calls(entry.step, job.device, SAMPLE_MS) if cuda else 1
            entry.times.append(sample(entry.step, job.device, inner))
        except Exception as error:
            if entry.contender.provider == "temposae" and not _out_of_memory(error):
                raise
            left_out[f"{entry.contender} at {job}"] = in_one_line(error)
            entries.remove(entry)
        bar.advance(1, now=str(entry.contender))


@torch.no_grad()
def _case(entry: RaceEntry, job: TrainingJob, heat: int) -> dict[str, Any]:
    fvu, trainee = _fvu(entry.trainee, job.tokens), entry.trainee
    itemsize = DTYPES[trainee.dtype].itemsize
    n, d, f, k = job.shape
    l0 = None if trainee.l0 is None else trainee.l0(job.tokens.held_out)
    rates, active = rates_of(job.device, itemsize), (k if l0 is None else l0) + trainee.aux_k
    work = step_work(n, d, f, active, rates, itemsize)
    work = work._replace(**{name: job.dictionaries * value for name, value in work._asdict().items()})
    return {
        "provider": entry.contender.provider,
        "settings": "own" if entry.contender.own else "headline",
        "op": "train_step",
        "direction": "full",
        "activation": job.activation,
        "dtype": trainee.dtype,
        "optimizer": trainee.optimizer,
        "clip": trainee.clip,
        "auxk": trainee.aux_k,
        "dictionaries": job.dictionaries,
        **job.shape._asdict(),
        **quantiles(entry.times)._asdict(),
        "peak_bytes": entry.peak,
        **work._asdict(),
        "floors": step_floors(n, d, f, active, rates, itemsize)._asdict(),
        "l0": l0,
        "steps": entry.done,
        "fvu_start": entry.fvu_start,
        "fvu_end": fvu,
        "loss_falls": fvu < entry.fvu_start,
        "heat": heat,
    }


@torch.no_grad()
def _fvu(trainee: ProviderRun, training_tokens: Tokens) -> float:
    """sum |x - x_hat|^2 / sum |x - mean x|^2 on held-out tokens."""
    x = training_tokens.held_out
    return float((x - trainee.reconstruct(x).float()).square().sum() / (x - x.mean(0)).square().sum())


def _release(device: str) -> None:
    gc.collect()
    if torch.device(device).type == "cuda":
        synchronise(device)
        torch.cuda.empty_cache()


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
