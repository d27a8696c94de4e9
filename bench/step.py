"""One training step, ours and everybody else's, on the same tokens in the same run: time, memory, and whether it learns."""

import gc
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ..engine.errors import UserError
from ..engine.process.cpu_memory import tune_host
from ..engine.process.progress import ProgressBar, progress_bar
from ..kernels.torch_modes import default_modes
from .data import DTYPES, Shape, Tokens, tokens
from .floors import rates_of, step_floors, step_work
from .providers import PROVIDERS
from .timing import free_bytes, inner_calls, memory, quantiles, sample, synchronise
from .training_job import ACTIVATIONS, ProviderRun, ProviderUnavailable, TrainingJob, fixes_l0

SAMPLE_MS = 30.0  # a sample on a GPU lasts at least as long
WARM = 2  # steps: what is compiled or allocated once is done after two


class Contender(NamedTuple):
    """A provider, and whether it runs by its own defaults."""

    provider: str
    own: bool

    def __str__(self) -> str:
        return f"{self.provider}, own defaults" if self.own else self.provider


def contenders(providers: Iterable[str], own: bool) -> list[Contender]:
    """Everyone by the headline's settings, then, with `own`, by their own. Raises UserError for an unknown provider."""
    names = list(dict.fromkeys(providers))
    for name in names:
        if name not in PROVIDERS:
            raise UserError(f"provider: {name!r} is not allowed; there are {', '.join(PROVIDERS)}")
    entrants = [Contender(name, False) for name in names]
    return entrants + [Contender(name, True) for name in names if own and PROVIDERS[name].own]


@dataclass
class RaceEntry:
    """A contender in the race: what it is, took, and has learned."""

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
    """Time a training step of each contender at each shape, a race for each of `activations`; with `auxk`, every fourth
    latent is dead. A step is one of each of so many `dictionaries` on the same tokens, temposae's together and the others'
    one after another. Returns the cases and, by contender, why it was left out.

    Round robin: each round takes a sample of everyone in turn, so that a busy machine hurts all alike. Contenders that don't
    fit into memory beside each other race in several heats (`heat` in the case). A case holds, beside shape, settings, time
    quantiles and peak memory, `fvu_start` and `fvu_end`: the share of variance unexplained on tokens that nobody trains on,
    before the first and after the last step, and `loss_falls`: whether it has fallen. Where the activation does not fix it,
    `l0` is the number of active latents a token after the last step; the floor is that of so many. Of several dictionaries,
    all that tells what was learned is the first one's.

    Raises UserError for sizes and activations that are not allowed, and for AuxK where there is none. An exception of
    temposae's own step is not caught.
    """
    shapes = [shape.check() for shape in shapes]
    if dtype not in ("fp32", "bf16"):
        raise UserError(f"dtype: {dtype!r} is not allowed; it must be fp32 or bf16")
    if rounds < 1:
        raise UserError(f"rounds: {rounds} is not allowed; it must be at least 1")
    if dictionaries < 1:
        raise UserError(f"dictionaries: {dictionaries} is not allowed; it must be at least 1")
    activations = list(dict.fromkeys(activations))
    for activation in activations:
        if activation not in ACTIVATIONS:
            raise UserError(f"activation: {activation!r} is not allowed; there are {', '.join(ACTIVATIONS)}")
        if auxk and not fixes_l0(activation):
            raise UserError(f"auxk: not allowed with activation {activation}; only topk and batchtopk have AuxK")
    tune_host()
    rates_of(device, DTYPES[dtype].itemsize)  # measured while nothing else is there
    cases: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    races = len(shapes) * len(activations)
    with progress_bar("steps", total=races * len(entrants) * (rounds + 1), unit="samples") as bar:
        for shape in shapes:
            training_tokens = tokens(shape, device, DTYPES[dtype])
            for activation in activations:
                job = TrainingJob(
                    shape, device, dtype, lr, training_tokens,
                    clip=clip, activation=activation, auxk=auxk, dictionaries=dictionaries,
                )  # fmt: skip
                waiting, heat = list(entrants), 0
                while waiting:
                    entries, waiting = _line_up(job, waiting, left_out, bar)
                    for _ in range(rounds):
                        _round(entries, job, left_out, bar)
                    cases += [_case(entry, job, heat) for entry in entries]
                    heat += 1
                    del entries
                    _release(device)
    return cases, left_out


def _line_up(
    job: TrainingJob, waiting: list[Contender], left_out: dict[str, str], bar: ProgressBar
) -> tuple[list[RaceEntry], list[Contender]]:
    """Build as many contenders as memory holds; the others go on waiting. Who can't run at all is left out."""
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
            _check_room(job, entries, 16 * weights)  # they, gradients, moments
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
            _release(job.device)  # not earlier: the exception held on to the memory
            if memory_short and entries:
                return entries, waiting[index:]
            left_out[f"{contender} at {job}"] = reason
        elif entry is not None:
            entries.append(entry)
        bar.advance(1)
    return entries, []


def _check_room(job: TrainingJob, entries: list[RaceEntry], more_bytes: int) -> None:
    """Raises MemoryError unless the device has `more_bytes` bytes, and what the largest step so far took, to spare."""
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
    if provider == "temposae":  # which knows what to do with several
        return build(job)
    trainees = [build(job) for _ in range(job.dictionaries)]

    def step(i: int) -> None:
        for trainee in trainees:
            trainee.step(i)

    return replace(trainees[0], step=step)


def _round(entries: list[RaceEntry], job: TrainingJob, left_out: dict[str, str], bar: ProgressBar) -> None:
    """A sample of everyone in turn. Who fails leaves the race."""
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
    """sum |x - x_hat|^2 / sum |x - mean x|^2 on the tokens that nobody trains on."""
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
