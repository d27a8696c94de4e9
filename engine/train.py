"""Training: a stream in, dictionaries and their run folders out."""

import itertools
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .ambient import own_modes
from .center import center
from .composed import dictionary
from .config import RunConfig, SAEConfig, StreamConfig, SweepConfig, TrainConfig
from .errors import Stopped, UserError
from .files import remove_folder
from .folder import (
    CONFIG,
    HELD_OUT,
    begin,
    check_free,
    difference,
    read_metrics,
    read_settings,
    report,
    rewind,
    with_absolute_paths,
)  # fmt: skip
from .interchange.plain import bias_where
from .lock import owned
from .loggers import Logger, open_loggers
from .names import check_links, expand_path
from .optim import Cohort, Learner, together
from .parts import reads
from .progress import percent, progress_bar
from .sae import SparseAutoencoder
from .sample import RunSample
from .signals import SIGNALS, stop_advice
from .stream import ActivationStream, Batch, Own
from .stream.norms import check_scale, check_variance
from .stream.own import held_out_scores

CHECKPOINT_SECONDS = 600  # between checkpoints, where the settings don't say how many steps


@dataclass
class Run:
    """What `train` gives back. `metrics`: one dict per report, as in metrics.jsonl. `random`: the control, if trained.
    `failed`: why it was stopped before its end, if it was. `held_out`: of arrays, the scores of both on
    the rows kept apart. `massive`: the massive activations that were left out (`stream.norms.NormFilter.report`).

        run = ts.train(stream, sae_config, out="runs/mine")
        run.sae, run.random, run.metrics[-1]["fvu"]
    """

    sae: SparseAutoencoder
    random: SparseAutoencoder | None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None
    held_out: dict[str, dict[str, Any]] | None = None
    massive: dict[str, Any] | None = None

    def __repr__(self) -> str:
        """Sizes and the last report's figures, in a line."""
        said = [repr(self.sae)]
        if self.metrics:
            last = self.metrics[-1]
            said.append(f"{last['tokens']:,} tokens in {last['step']:,} steps")
            figures = [f"FVU {last['fvu']:.4f}", f"L0 {last['l0']:.1f}", f"{percent(last['dead_fraction'])} dead"]
            said.append(", ".join(figures))
            if "random" in last:
                said.append(f"random control: FVU {last['random']['fvu']:.4f}")
        if self.failed is not None:
            said.append(f"failed: {self.failed}")
        return f"Run({'; '.join(said)})"


@own_modes()
def train(
    stream: ActivationStream | Any,
    sae: SAEConfig,
    config: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
) -> Run:
    """Train a dictionary on `config.tokens` activations of `stream`, and beside it, on the same batches, its `random`
    control (a frozen random decoder with a trained encoder; `config.control=False` leaves it out).

        run = train(ActivationStream(StreamConfig(model="testbed")), SAEConfig(d_in=128, d_sae=1024))

    In place of a stream may be activations from anywhere: a tensor, an array or a memory map [M, D] or [R, T, D], a dict of
    `x`, `pos` and the like, or an iterable of chunks (`Own` says more).

    With `out`, a run folder is written: config.yaml (resolved), metrics.jsonl (a line every `log_every_steps`), and
    checkpoints/ (the last two). With `resume`, the run in `out` goes on from its last checkpoint and ends with the weights
    that it would have had without the stop. The same seed gives the same metrics, fields that tell times apart. On SIGINT
    and SIGTERM a run with a folder writes a checkpoint and raises Stopped.

    What surrounds the call changes nothing: it has its own gradient mode, default dtype and device, no autocast, and uses no
    global random state. The code of an iterable of chunks runs in these modes, too.

    Raises UserError for a width that is not the stream's, for an `out` that can't be written or holds a run already,
    for activations that are not finite, and for a loss that isn't.
    """
    config = config or TrainConfig()
    if not isinstance(stream, ActivationStream):
        own = stream if isinstance(stream, Own) else Own(stream, seed=config.seed)
        most = max(config.tokens, 2 * config.batch)
        stream = ActivationStream(StreamConfig(), tokens=most, batch=config.batch, seed=config.seed, own=own)
    run = RunConfig(stream=stream.config, sae=sae, train=config)
    trained = train_together(stream, {"": run}, out=out, resume=resume)[""]
    if stream.own is not None:
        parts = {"sae": trained.sae} | ({"random": trained.random} if trained.random is not None else {})
        scores = {part: held_out_scores(one, stream.own_held_out()) for part, one in parts.items()}
        trained.held_out = {part: found for part, found in scores.items() if found is not None} or None
    return trained


@own_modes()
def train_together(
    stream: ActivationStream, dictionaries: dict[str, RunConfig], *, out: str | Path | None = None, resume: bool = False
) -> dict[str, Run]:
    """Train several dictionaries, each with a control as `train` does, on the same batches of one stream.

    They may be of any shape and at any of the stream's hooks (`stream.hook` of each says which), with learning rates,
    schedules, seeds and numbers of tokens of their own; `train.batch` and `train.checkpoint_every_steps` are common to all.
    Those of one configuration step together. Each has a run folder `out`/NAME, and `out` keeps the place in the stream. One
    whose loss is no longer finite, or whose step can't be done, is stopped and named in its `Run.failed`; others go on.

        sizes = {f"F{F}": RunConfig(sae=SAEConfig(d_in=stream.d_in, d_sae=F)) for F in (512, 1024)}
        runs = train_together(stream, sizes, out="runs/sizes")
        runs["F512"].sae
    """
    folder = expand_path(out, "out") if out is not None else None
    with owned(folder) if folder is not None and stream.ranks.is_first else nullcontext():
        return _Training(stream, dictionaries, folder, resume).run()


class _Trainee:
    """One of the dictionaries in training, with its control."""

    def __init__(
        self, name: str, run: RunConfig, stream: ActivationStream, folder: Path | None, apart: dict[int, list[Batch]],
        drawn: RunSample,
    ):  # fmt: skip
        """`apart`: held-out rows, by how many; all dictionaries share them, and the sample of the run, `drawn`."""
        self.sample = drawn
        self.name, self.run, self.folder, self.writes = name, run, folder, stream.ranks.is_first
        self.hooks, self.reads = run.stream.read_hooks, reads(run.sae)
        configs = {"sae": run.sae}
        if run.train.control and run.sae.decoder == "learned":
            configs["random"] = run.sae.model_copy(update={"decoder": "random"})
        sample = stream.sample().at(*run.stream.hooks)
        x, target = sample.x, sample.target
        for hook, acts in zip(run.stream.hooks, (x, target), strict=False):
            check_scale(acts, hook)
            check_variance(acts, hook)
        mean, mean_norm = center(target, "mean"), float(torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).mean())
        start = center(target, run.train.bias)
        self.learners: dict[str, Learner] = {}
        for part, config in configs.items():
            sae = dictionary(config, seed=run.train.seed)
            trained = run.train.init is not None and part == "sae"
            if trained:
                _take_over(sae, expand_path(str(run.train.init), "train.init"))
            self.learners[part] = Learner(
                sae,
                run.train,
                mean,
                mean_norm,
                stream.positions,
                start,
                hook=run.stream.hooks[0],
                trained=trained,
                ranks=stream.ranks,
            )
        self.metrics: list[dict[str, Any]] = []
        self.failed: str | None = None
        self.saved_step = 0
        self.failed_step: int | None = None
        self.apart: list[Batch] = []
        if run.train.held_out_rows:
            if run.train.held_out_rows not in apart:
                apart[run.train.held_out_rows] = stream.held_out_batches(run.train.held_out_rows)
            self.apart = [batch.at(*run.stream.hooks) for batch in apart[run.train.held_out_rows]]

    @property
    def main(self) -> Learner:
        return self.learners["sae"]

    @property
    def has_ended(self) -> bool:
        return self.failed is not None or self.main.steps_done >= self.run.train.steps

    @property
    def is_due(self) -> bool:
        """Whether a report is to be made after the step just done."""
        return self.main.steps_done % self.run.train.report_steps == 0 or self.has_ended

    def report(self, **more: Any) -> dict[str, Any]:
        """A line of metrics since the last one, kept and written. Sets `failed` where a loss isn't finite."""
        line: dict[str, Any] = {"step": self.main.steps_done, "tokens": self.main.tokens_done} | self.main.report()
        line |= {part: learner.report() for part, learner in self.learners.items() if part != "sae"} | more
        for found in (line, line.get("random", {})):
            for key in ("loss", "gradient_norm"):
                if self.failed is None and not math.isfinite(found.get(key, 0)):
                    self.failed = line["failed"] = (
                        f"train.lr: {self.main.lr:g} made {key} {found[key]} by step {line['step']}; "
                        "try a smaller one (the last checkpoint is untouched)"
                    )
        if self.failed is not None and self.failed_step is None:
            self.failed_step = self.main.steps_done
        self.metrics.append(line)
        if self.folder is not None and self.writes:
            report(self.folder, line)
        self.look()
        return line

    def look(self) -> None:
        """Measure on the rows held out, and write it down."""
        if self.apart and self.failed is None and self.folder is not None and self.writes:
            self.main.fit_threshold(self.sample)
            places = {"step": self.main.steps_done, "tokens": self.main.tokens_done}
            report(self.folder, places | self.main.held_out(self.apart), HELD_OUT)

    def save(self, folder: Path, others: dict[str, dict[str, Tensor]], massive: dict[str, Any] | None) -> None:
        """Write a checkpoint, in the units of the activations, with `others` in files of their own."""
        self.fit()
        state = {f"{part}.{key}": value for part, one in self.learners.items() for key, value in one.state().items()}
        dictionaries = {part: (learner.cfg, learner.weights()) for part, learner in self.learners.items()}
        self.saved_step = self.main.steps_done
        if self.writes:
            there = checkpoint.place(folder, self.saved_step)
            files = {"state": state, **others}
            checkpoint.write(there, self.saved_step, dictionaries, self.run, files, massive=massive)
            checkpoint.keep_last(folder)

    def load(self, last: checkpoint.Checkpoint) -> None:
        state = last.tensors("state")
        for part, learner in self.learners.items():
            learner.load_state(_under(f"{part}.", state), last.tensors(part))
        self.saved_step = last.step

    def fit(self) -> None:
        """Fit the thresholds of what is about to be saved or given back."""
        for learner in self.learners.values():
            learner.fit_threshold(self.sample)

    def end(self) -> Run:
        self.fit()
        ended = {part: learner.end() for part, learner in self.learners.items()}
        return Run(ended["sae"], ended.get("random"), self.metrics, self.failed)


class _Training:
    """Dictionaries by name on one stream. A single one has the name "", and the whole folder for itself."""

    def __init__(self, stream: ActivationStream, dictionaries: dict[str, RunConfig], folder: Path | None, resume: bool):
        own = {name: stream.config_at(run.stream) for name, run in dictionaries.items()}
        dictionaries = {
            name: with_absolute_paths(run.model_copy(update={"stream": own[name]}))
            for name, run in dictionaries.items()
        }
        self.stream, self.runs, self.ranks = stream, dictionaries, stream.ranks
        self.folder = folder
        self.config = next(iter(dictionaries.values())).train
        check(stream, dictionaries)
        settings = dictionaries[""] if list(dictionaries) == [""] else SweepConfig(dictionaries=dictionaries)
        last = self._open(settings, resume)
        place = last.tensors("stream") if last is not None else {}
        if last is not None:
            stream.load_state(place)
        self.trainees: list[_Trainee] = []
        with self._claimed(settings):
            apart: dict[int, list[Batch]] = {}
            self.sample = RunSample(max(run.train.steps for run in dictionaries.values()))
            self.sample.load_state(place, stream.source.device)
            for name, run in dictionaries.items():
                folder = self.folder / name if self.folder is not None else None
                trainee = _Trainee(name, run, stream, folder, apart, self.sample)
                if last is not None:
                    self._go_on(trainee, last)
                elif resume and name:
                    self._discard(trainee, 0)
                self.trainees.append(trainee)
            self.loggers: list[Logger] = []
            if self.ranks.is_first:
                self.loggers = open_loggers(self.config.log, self.folder, settings.model_dump(mode="json"))
        self._begin(resume)
        self.step = self.saved_step = last.step if last is not None else 0
        self.epoch = stream.counts.get("epoch", 0)
        self._together: tuple[list[str], list[tuple[tuple[str, ...], Cohort | Learner]]] = ([], [])
        self.began = self.saved = time.monotonic()

    def _open(self, settings: RunConfig | SweepConfig, resume: bool) -> checkpoint.Checkpoint | None:
        """See that a new run may go there, or go back into one; gives the checkpoint to go on from."""
        if self.folder is None:
            return None
        place = self.folder / CONFIG
        if not resume or not place.is_file():
            check_free(self.folder)
            return None
        check_links(self.folder)
        if what := difference(read_settings(self.folder).by_name(), settings.by_name()):
            raise UserError(f"resume: {what[0]} is {what[2]}, and {what[1]} in {place}; resume with the run's settings")
        last = checkpoint.find(self.folder) if checkpoint.all_in(self.folder) else None
        if last is not None and last.run is not None:
            _check_settings(place, last, settings.by_name()[""])
        return last

    @contextmanager
    def _claimed(self, settings: RunConfig | SweepConfig) -> Iterator[None]:
        """Have the folder with its settings there while the buffer fills, so that a run which is stopped meanwhile can be
        resumed; one that is refused leaves nothing behind."""
        self.ranks.wait()  # until all have looked at the folder
        if self.folder is None or not self.ranks.is_first:
            yield
            return
        had_settings = (self.folder / CONFIG).is_file()
        begin(self.folder, settings)
        try:
            with stop_advice("stopped before the first step; --resume starts from there"):
                yield
        except Exception:
            if not had_settings:
                (self.folder / CONFIG).unlink(missing_ok=True)
            raise

    def _go_on(self, trainee: _Trainee, last: checkpoint.Checkpoint) -> None:
        """Take a dictionary to where it was at `last`; what it wrote after that is made again."""
        if trainee.folder == self.folder:
            trainee.load(last)
            return
        assert trainee.folder is not None
        status = (last.manifest["status"] or {}).get(trainee.name)
        if not isinstance(status, dict) or not isinstance(status.get("step"), int):
            raise UserError(f"checkpoint: {last.folder / checkpoint.MANIFEST} is damaged: no status of {trainee.name}")
        trainee.failed, trainee.failed_step = status.get("failed"), status.get("failed_step")
        place = checkpoint.place(trainee.folder, status["step"])
        self._discard(trainee, status["step"])
        if status["step"]:
            own = checkpoint.find(place)
            _check_settings(self.folder / CONFIG if self.folder is not None else place, own, trainee.run)
            trainee.load(own)

    def _discard(self, trainee: _Trainee, step: int) -> None:
        """Remove what one of several dictionaries saved after `step`, before a kill kept the checkpoint of all from being
        written; it is made again."""
        if trainee.folder is None or not self.ranks.is_first:
            return
        for later in checkpoint.all_in(trainee.folder):
            if later > checkpoint.place(trainee.folder, step):
                remove_folder(later)

    def _begin(self, resume: bool) -> None:
        if self.folder is None:
            return
        if self.ranks.is_first:
            checkpoint.keep_last(self.folder)  # a kill may have come between writing one and this
        for one in self.trainees:
            assert one.folder is not None
            if self.ranks.is_first:
                begin(one.folder, one.run)
                checkpoint.keep_last(one.folder)
            if resume:
                until = one.main.steps_done if one.failed_step is None else one.failed_step
                one.metrics = read_metrics(one.folder, until)
                if self.ranks.is_first:
                    rewind(one.folder, one.metrics)
                    if (one.folder / HELD_OUT).is_file():
                        rewind(one.folder, read_metrics(one.folder, until, HELD_OUT), HELD_OUT)
            if one.main.steps_done == 0:
                one.look()

    def run(self) -> dict[str, Run]:
        with ExitStack() as closing:
            for logger in self.loggers:
                closing.callback(logger.close)
            self._train()
        if all(one.failed for one in self.trainees):
            raise UserError(self.trainees[0].failed)
        found = {one.name: one.end() for one in self.trainees}
        for run in found.values():
            run.massive = self.stream.norms.report()
        return found

    def _train(self) -> None:
        total = max(run.train.steps for run in self.runs.values()) * self.config.batch
        done = self.step * self.config.batch
        patient = self.ranks.size > 1  # torchrun passes on what the terminal has sent already
        with progress_bar("training", total, "tokens", done) as self._bar, _stop_signals(self.folder, patient) as got:
            while active := [one for one in self.trainees if not one.has_ended]:
                batch = self.stream.next(self.config.batch).flat()
                if len(batch):
                    if any("attribute" in one.reads for one in active):
                        batch = replace(batch, attribute=self.stream.attribute(batch))
                    with self.stream.watch("sae"):
                        for hooks, cohort in self._cohorts(active):
                            self._step(cohort, batch.at(*hooks), active)
                    if any(one.run.sae.activation == "batchtopk" for one in active):
                        self.sample.add(self.step, batch)
                    self.step += 1
                    self._bar.advance(len(batch))
                    self._report([one for one in active if one.is_due])
                else:
                    self._end_early(active)
                stop = self.ranks.largest(got[0] if got else 0)
                self._save(len(batch) == 0 or bool(stop) or any(one.has_ended for one in active))
                if stop:
                    raise Stopped(stop, f"stopped at step {self.step}; --resume goes on from there")
                if not len(batch):
                    break

    def _step(self, cohort: Cohort | Learner, batch: Batch, active: list[_Trainee]) -> None:
        """A step, in which one of several dictionaries may fail, and is left out from then on."""
        try:
            cohort.step(batch)
        except (RuntimeError, ValueError) as error:
            learners = cohort.learners if isinstance(cohort, Cohort) else [cohort]
            failed = [one for one in active if any(learner in learners for learner in one.learners.values())]
            if len(failed) == len(self.trainees):
                raise
            for one in failed:
                said = f"step {one.main.steps_done}: {type(error).__name__}: {str(error).splitlines()[0]}"
                one.failed = one.failed or said

    def _cohorts(self, active: list[_Trainee]) -> list[tuple[tuple[str, ...], Cohort | Learner]]:
        """What takes steps, with the hooks that it looks at; made anew when one of the dictionaries has ended."""
        names = [one.name for one in active]
        if names != self._together[0]:
            found: list[tuple[tuple[str, ...], Cohort | Learner]] = []
            for hooks in dict.fromkeys(one.hooks for one in active):
                learners = [learner for one in active if one.hooks == hooks for learner in one.learners.values()]
                found += [(hooks, cohort) for cohort in together(learners)]
            self._together = names, found
        return self._together[1]

    def _report(self, due: list[_Trainee]) -> None:
        if not due:
            return
        times: dict[str, Any] = {"seconds": round(time.monotonic() - self.began, 2), "time": self.stream.watch.shares()}
        if self.stream.buffer_error is not None:
            times["buffer_error"] = self.stream.buffer_error
        lines = [one.report(**times) for one in due]
        for logger, (one, line) in itertools.product(self.loggers, zip(due, lines, strict=True)):
            logger.log(f"{one.name}/" if one.name else "", line)
        for one in due:
            if one.failed and one.name:
                self._bar.note(f"{one.name} is stopped: {one.failed}")
        best = min(lines, key=lambda line: line["fvu"] if math.isfinite(line["fvu"]) else math.inf)
        shown = {"loss": f"{best['loss']:.3g}", "L0": f"{best['l0']:.1f}", "EV": f"{1 - best['fvu']:.3f}"}
        shown |= {"dead": percent(best["dead_fraction"])}
        shown |= {self.stream.source.label: "0%"} | {
            section: f"{share:.0%}" for section, share in times["time"].items()
        }
        if len(self.trainees) > 1:
            shown = {"in training": str(sum(not one.has_ended for one in self.trainees)), **shown}
        self._bar.advance(0, **shown)
        epoch = self.stream.counts.get("epoch", 0)
        if epoch > self.epoch:
            self._bar.note(f"data: {self.stream.source.name} has ended and begins again (so often now: {epoch})")
            self.epoch = epoch

    def _end_early(self, active: list[_Trainee]) -> None:
        """The text has ended before the run."""
        done = active[0].main.tokens_done
        self._bar.note(f"data: {self.stream.source.name} ended after {done:,} of {self.config.tokens:,} tokens")
        self._report([one for one in active if one.main.has_news])

    def _save(self, now: bool) -> None:
        """Write a checkpoint of all, `now` or where it is time. It counts once the stream's is there, which comes last."""
        if self.folder is None or self.saved_step == self.step:
            return
        every = self.config.checkpoint_every_steps
        is_time = self.step % every == 0 if every else time.monotonic() - self.saved > CHECKPOINT_SECONDS
        if not (now or self.ranks.largest(int(is_time))):
            return
        news = [one for one in self.trainees if one.failed is None and one.saved_step < one.main.steps_done]
        self._report([one for one in news if not one.main.is_finite()])  # which stops them
        stream = {"stream": self.stream.state() | self.sample.state()}
        for one in news:
            if one.failed is None and one.folder is not None:
                one.save(one.folder, stream if one.folder == self.folder else {}, self.stream.norms.report())
        if "" not in self.runs and self.ranks.is_first:
            status = {
                one.name: {"step": one.saved_step, "failed": one.failed, "failed_step": one.failed_step}
                for one in self.trainees
            }
            checkpoint.write(checkpoint.place(self.folder, self.step), self.step, {}, None, stream, status)
            checkpoint.keep_last(self.folder)
        self.saved_step, self.saved = self.step, time.monotonic()


def _check_settings(config: Path, last: checkpoint.Checkpoint, run: RunConfig) -> None:
    """Refuse to go on from a checkpoint of other settings."""
    if last.run is not None and (what := difference({"": last.run}, {"": run})):
        raise UserError(
            f"resume: {what[0]} is {what[2]} in {config}, and {what[1]} in {last.folder / checkpoint.MANIFEST}; "
            "undo the change"
        )


def _take_over(sae: SparseAutoencoder, path: Path) -> None:
    """Let a new dictionary begin as the one at `path`."""
    try:
        found = checkpoint.load(path)
    except UserError as error:
        raise UserError(f"train.init: {str(error).removeprefix('sae: ')}") from None
    fields = {"d_in", "d_sae", "d_out", "activation", "mask", "parts"}
    own, theirs = (one.cfg.model_dump(include=fields) for one in (sae, found))
    for name, value in own.items():
        if theirs[name] != value:
            raise UserError(f"train.init: {path} is not allowed; its {name} is {theirs[name]}, and sae.{name} {value}")
    sae.load_state_dict(found.state_dict())
    if (subtracts := sae.cfg.apply_b_dec_to_input) != found.cfg.apply_b_dec_to_input:
        with torch.no_grad():  # another library's
            sae.b_enc.copy_(bias_where(subtracts, sae.b_enc, sae.b_dec, sae.W_enc))
    norm = sae.W_dec.detach().norm(dim=1)
    if (norm - 1).abs().max() > 1e-3 and (norm > 0).all():
        with torch.no_grad():  # another library's: training keeps rows at norm 1, so the latents take theirs over
            sae.W_dec.div_(norm[:, None])
            for tensor in (sae.W_enc, sae.b_enc, *([sae.threshold] if sae.cfg.activation == "jumprelu" else [])):
                tensor.mul_(norm)


def check(stream: ActivationStream, dictionaries: dict[str, RunConfig]) -> None:
    """Refuse what does not go together, before any work."""
    first = next(iter(dictionaries.values())).train
    for name, run in dictionaries.items():
        inside = f"{name}: " if name else ""
        widths = stream.source.widths
        for key in ("hook", "target", "second"):
            if (hook := getattr(run.stream, key)) not in (None, *widths):
                raise UserError(f"{inside}stream.{key}: {hook} is not allowed; the stream has {', '.join(widths)}")
        own = {"d_in": run.sae.d_in} | ({} if run.sae.d_out is None else {"d_out": run.sae.d_out})
        if len(own) != len(run.stream.hooks):
            raise UserError(
                f"{inside}sae.d_out: {run.sae.d_out} is not allowed; "
                "a transcoder has both sae.d_out and stream.target, others neither"
            )
        for (name_of, width), hook in zip(own.items(), run.stream.hooks, strict=True):
            if width != widths[hook]:
                raise UserError(
                    f"{inside}sae.{name_of}: {width} is not allowed; {hook} of {stream.name} has width {widths[hook]}"
                )
        if 2 * run.train.batch > stream.buffer_tokens:
            raise UserError(
                f"{inside}train.batch: {run.train.batch} is not allowed; it must be at most half of "
                f"stream.buffer_tokens ({stream.buffer_tokens})"
            )
        for common in ("batch", "checkpoint_every_steps", "log"):
            if getattr(run.train, common) != getattr(first, common):
                raise UserError(
                    f"{inside}train.{common}: {getattr(run.train, common)} is not allowed; it is "
                    f"{getattr(first, common)} for all dictionaries of a stream"
                )
        stream.check_mask(run.sae.mask)
        _check_parts(inside, run, stream, widths)
        if (size := stream.ranks.size) > 1:
            if run.sae.d_sae % size:
                raise UserError(f"{inside}sae.d_sae: {run.sae.d_sae} is not allowed; {size} processes must divide it")
            if run.train.accumulate > 1 or run.train.resample_every_steps is not None:
                name_of = "accumulate" if run.train.accumulate > 1 else "resample_every_steps"
                raise UserError(
                    f"{inside}train.{name_of}: {getattr(run.train, name_of)} is not allowed; there are {size} processes"
                )


def _check_parts(inside: str, run: RunConfig, stream: ActivationStream, widths: dict[str, int]) -> None:
    """Refuse parts that the stream or the way of training has nothing for."""
    needs, kinds = reads(run.sae), ", ".join(one["kind"] for one in run.sae.parts)
    if (part := needs.get("rows")) and stream.config.mode != "sequences":
        raise UserError(
            f"{inside}stream.mode: {stream.config.mode} is not allowed with {part}, which looks along rows of text; "
            "it must be sequences"
        )
    second = run.stream.second
    if (part := needs.get("second")) and second is None:
        raise UserError(f"{inside}stream.second: needed by {part}; give another hook, as in blocks.0.hook_resid_post")
    if second is not None and "second" not in needs:
        raise UserError(f"{inside}stream.second: {second} is not allowed; no part of the dictionary looks at it")
    if second is not None and widths[second] != run.sae.d_in:
        raise UserError(
            f"{inside}stream.second: {second} is not allowed; its width is {widths[second]}, and that of "
            f"{run.stream.hook} {run.sae.d_in}"
        )
    if run.train.held_out_rows and (stream.own is not None or stream.ranks.size > 1):
        why = "several processes" if stream.own is None else "activations without a model"
        raise UserError(f"{inside}train.held_out_rows: {run.train.held_out_rows} is not allowed with {why}")
    if kinds and stream.own is not None and not stream.own.has_positions:
        raise UserError(f"{inside}sae.parts: {kinds} is not allowed; {stream.own.name} has no positions")
    if kinds and run.train.accumulate > 1:
        raise UserError(f"{inside}train.accumulate: {run.train.accumulate} is not allowed with sae.parts ({kinds})")
    if kinds and stream.ranks.size > 1:
        raise UserError(f"{inside}sae.parts: {kinds} is not allowed; there are {stream.ranks.size} processes")


@contextmanager
def _stop_signals(folder: Path | None, patient: bool) -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM is put into, where there is a folder to save to; a second one stops at once, unless
    we are `patient`."""
    got: list[int] = []
    if folder is None or threading.current_thread() is not threading.main_thread():
        yield got
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def note(number: int, frame: object) -> None:
        got.append(number)
        for one, handler in () if patient else before.items():
            signal.signal(one, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
