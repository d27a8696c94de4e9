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

from ..kernels.torch_modes import default_modes
from .cohort import Cohort, group_into_cohorts
from .composed import dictionary
from .config import RunConfig, SAEConfig, StreamConfig, SweepConfig, TrainConfig
from .errors import Stopped, UserError
from .interchange.intermediate import bias_where
from .learner import Learner
from .process.progress import percent, progress_bar
from .process.signals import SIGNALS, stop_advice
from .registry import reads
from .run_sample import RunSample, needs_sample
from .sae import SparseAutoencoder
from .storage import checkpoint
from .storage.files import remove_folder
from .storage.lock import owned
from .storage.loggers import Logger, open_loggers
from .storage.path_names import check_links, expand_path
from .storage.run_folder import (
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
from .stream import ActivationStream, ArraySource, Batch
from .stream.arrays import held_out_scores
from .stream.center import center
from .stream.norm_filter import check_scale, check_variance

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
        fields = [repr(self.sae)]
        if self.metrics:
            last_report = self.metrics[-1]
            fields.append(f"{last_report['tokens']:,} tokens in {last_report['step']:,} steps")
            figures = [
                f"FVU {last_report['fvu']:.4f}",
                f"L0 {last_report['l0']:.1f}",
                f"{percent(last_report['dead_fraction'])} dead",
            ]
            fields.append(", ".join(figures))
            if "random" in last_report:
                fields.append(f"random control: FVU {last_report['random']['fvu']:.4f}")
        if self.failed is not None:
            fields.append(f"failed: {self.failed}")
        return f"Run({'; '.join(fields)})"


@default_modes()
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
    `x`, `pos` and the like, or an iterable of chunks (`ArraySource` says more).

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
        source = stream if isinstance(stream, ArraySource) else ArraySource(stream, seed=config.seed)
        token_count = max(config.tokens, 2 * config.batch)
        stream = ActivationStream(StreamConfig(), tokens=token_count, batch=config.batch, seed=config.seed, own=source)
    run = RunConfig(stream=stream.config, sae=sae, train=config)
    trained = train_together(stream, {"": run}, out=out, resume=resume)[""]
    if stream.own is not None:
        saes = {"sae": trained.sae} | ({"random": trained.random} if trained.random is not None else {})
        scores = {
            role: held_out_scores(trained_sae, stream.held_out_activations()) for role, trained_sae in saes.items()
        }
        trained.held_out = {role: score for role, score in scores.items() if score is not None} or None
    return trained


@default_modes()
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


class _TrainedDictionary:
    """One of the dictionaries in training, with its control."""

    def __init__(
        self, name: str, run: RunConfig, stream: ActivationStream, folder: Path | None,
        held_out_batches: dict[int, list[Batch]], run_sample: RunSample,
    ):  # fmt: skip
        """`held_out_batches`: held-out rows, by how many; all dictionaries share them and `run_sample`."""
        self.sample = run_sample
        self.name, self.run, self.folder, self.is_writer = name, run, folder, stream.ranks.is_first
        self.hooks, self.reads = run.stream.read_hooks, reads(run.sae)
        configs = {"sae": run.sae}
        if run.train.control and run.sae.decoder == "learned":
            configs["random"] = run.sae.model_copy(update={"decoder": "random"})
        stream_sample = stream.sample().at(*run.stream.hooks)
        x, target = stream_sample.x, stream_sample.target
        for hook, acts in zip(run.stream.hooks, (x, target), strict=False):
            check_scale(acts, hook)
            check_variance(acts, hook)
        mean, mean_norm = center(target, "mean"), float(torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).mean())
        bias = center(target, run.train.bias)
        self.learners: dict[str, Learner] = {}
        for role, config in configs.items():
            sae = dictionary(config, seed=run.train.seed)
            is_trained = run.train.init is not None and role == "sae"
            if is_trained:
                _initialise_from(sae, expand_path(str(run.train.init), "train.init"))
            self.learners[role] = Learner(
                sae,
                run.train,
                mean,
                mean_norm,
                stream.positions,
                bias,
                hook=run.stream.hooks[0],
                trained=is_trained,
                ranks=stream.ranks,
            )
        self.metrics: list[dict[str, Any]] = []
        self.failed: str | None = None
        self.saved_step = 0
        self.failed_step: int | None = None
        self.held_out_batches: list[Batch] = []
        if run.train.held_out_rows:
            if run.train.held_out_rows not in held_out_batches:
                held_out_batches[run.train.held_out_rows] = stream.held_out_batches(run.train.held_out_rows)
            self.held_out_batches = [batch.at(*run.stream.hooks) for batch in held_out_batches[run.train.held_out_rows]]

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

    def report(self, **extra_figures: Any) -> dict[str, Any]:
        """A line of metrics since the last one, kept and written. Sets `failed` where a loss isn't finite."""
        line: dict[str, Any] = {"step": self.main.steps_done, "tokens": self.main.tokens_done} | self.main.report()
        line |= {role: learner.report() for role, learner in self.learners.items() if role != "sae"} | extra_figures
        for figures in (line, line.get("random", {})):
            for key in ("loss", "gradient_norm"):
                if self.failed is None and not math.isfinite(figures.get(key, 0)):
                    self.failed = line["failed"] = (
                        f"train.lr: {self.main.lr:g} made {key} {figures[key]} by step {line['step']}; "
                        "try a smaller one (the last checkpoint is untouched)"
                    )
        if self.failed is not None and self.failed_step is None:
            self.failed_step = self.main.steps_done
        self.metrics.append(line)
        if self.folder is not None and self.is_writer:
            report(self.folder, line)
        self.measure_held_out()
        return line

    def measure_held_out(self) -> None:
        """Measure on the rows held out, and write it down."""
        if self.held_out_batches and self.failed is None and self.folder is not None and self.is_writer:
            self.main.fit_threshold(self.sample)
            counts = {"step": self.main.steps_done, "tokens": self.main.tokens_done}
            report(self.folder, counts | self.main.held_out(self.held_out_batches), HELD_OUT)

    def save(self, folder: Path, tensor_files: dict[str, dict[str, Tensor]], massive: dict[str, Any] | None) -> None:
        """Write a checkpoint, in the units of the activations, with `tensor_files` beside it."""
        self.fit_thresholds()
        state = {
            f"{role}.{key}": value for role, learner in self.learners.items() for key, value in learner.state().items()
        }
        dictionaries = {role: (learner.cfg, learner.weights()) for role, learner in self.learners.items()}
        self.saved_step = self.main.steps_done
        if self.is_writer:
            path = checkpoint.place(folder, self.saved_step)
            files = {"state": state, **tensor_files}
            checkpoint.write(path, self.saved_step, dictionaries, self.run, files, massive=massive)
            checkpoint.keep_last(folder)

    def load(self, last_checkpoint: checkpoint.Checkpoint) -> None:
        state = last_checkpoint.tensors("state")
        for role, learner in self.learners.items():
            learner.load_state(_select_prefix(f"{role}.", state), last_checkpoint.tensors(role))
        self.saved_step = last_checkpoint.step

    def fit_thresholds(self) -> None:
        """Fit the thresholds of what is about to be saved or given back."""
        for learner in self.learners.values():
            learner.fit_threshold(self.sample)

    def end(self) -> Run:
        self.fit_thresholds()
        saes = {role: learner.end() for role, learner in self.learners.items()}
        return Run(saes["sae"], saes.get("random"), self.metrics, self.failed)


class _Training:
    """Dictionaries by name on one stream. A single one has the name "", and the whole folder for itself."""

    def __init__(self, stream: ActivationStream, dictionaries: dict[str, RunConfig], folder: Path | None, resume: bool):
        streams = {name: stream.config_for(run.stream) for name, run in dictionaries.items()}
        dictionaries = {
            name: with_absolute_paths(run.model_copy(update={"stream": streams[name]}))
            for name, run in dictionaries.items()
        }
        self.stream, self.runs, self.ranks = stream, dictionaries, stream.ranks
        self.folder = folder
        self.config = next(iter(dictionaries.values())).train
        check(stream, dictionaries)
        settings = dictionaries[""] if list(dictionaries) == [""] else SweepConfig(dictionaries=dictionaries)
        last_checkpoint = self._open_folder(settings, resume)
        stream_state = last_checkpoint.tensors("stream") if last_checkpoint is not None else {}
        if last_checkpoint is not None:
            stream.load_state(stream_state)
        self.trainees: list[_TrainedDictionary] = []
        with self._folder_with_settings(settings):
            held_out_batches: dict[int, list[Batch]] = {}
            sampled = [run.stream.hooks[0] for run in dictionaries.values() if needs_sample(run.sae)]
            self.sample = RunSample(max(run.train.steps for run in dictionaries.values()), sampled)
            self.sample.load_state(stream_state, stream.source.device)
            for name, run in dictionaries.items():
                folder = self.folder / name if self.folder is not None else None
                trainee = _TrainedDictionary(name, run, stream, folder, held_out_batches, self.sample)
                if last_checkpoint is not None:
                    self._restore(trainee, last_checkpoint)
                elif resume and name:
                    self._discard(trainee, 0)
                self.trainees.append(trainee)
            self.loggers: list[Logger] = []
            if self.ranks.is_first:
                self.loggers = open_loggers(self.config.log, self.folder, settings.model_dump(mode="json"))
        self._begin(resume)
        self.step = self.saved_step = last_checkpoint.step if last_checkpoint is not None else 0
        self.epoch = stream.counts.get("epoch", 0)
        self._active_cohorts: tuple[list[str], list[tuple[tuple[str, ...], Cohort]]] = ([], [])
        self.start_time = self.saved_time = time.monotonic()

    def _open_folder(self, settings: RunConfig | SweepConfig, resume: bool) -> checkpoint.Checkpoint | None:
        """See that a new run may go there, or go back into one; gives the checkpoint to go on from."""
        if self.folder is None:
            return None
        config_path = self.folder / CONFIG
        if not resume or not config_path.is_file():
            check_free(self.folder)
            return None
        check_links(self.folder)
        if changed := difference(read_settings(self.folder).by_name(), settings.by_name()):
            raise UserError(
                f"resume: {changed[0]} is {changed[2]}, and {changed[1]} in {config_path}; resume with the run's settings"
            )
        last_checkpoint = checkpoint.find(self.folder) if checkpoint.all_in(self.folder) else None
        if last_checkpoint is not None and last_checkpoint.run is not None:
            _check_settings(config_path, last_checkpoint, settings.by_name()[""])
        return last_checkpoint

    @contextmanager
    def _folder_with_settings(self, settings: RunConfig | SweepConfig) -> Iterator[None]:
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

    def _restore(self, trainee: _TrainedDictionary, last_checkpoint: checkpoint.Checkpoint) -> None:
        """Take a dictionary to where it was at `last_checkpoint`; what it wrote after that is made again."""
        if trainee.folder == self.folder:
            trainee.load(last_checkpoint)
            return
        assert trainee.folder is not None
        status = (last_checkpoint.manifest["status"] or {}).get(trainee.name)
        if not isinstance(status, dict) or not isinstance(status.get("step"), int):
            raise UserError(
                f"checkpoint: {last_checkpoint.folder / checkpoint.MANIFEST} is damaged: no status of {trainee.name}"
            )
        trainee.failed, trainee.failed_step = status.get("failed"), status.get("failed_step")
        checkpoint_folder = checkpoint.place(trainee.folder, status["step"])
        self._discard(trainee, status["step"])
        if status["step"]:
            dictionary_checkpoint = checkpoint.find(checkpoint_folder)
            _check_settings(
                self.folder / CONFIG if self.folder is not None else checkpoint_folder,
                dictionary_checkpoint,
                trainee.run,
            )
            trainee.load(dictionary_checkpoint)

    def _discard(self, trainee: _TrainedDictionary, step: int) -> None:
        """Remove what one of several dictionaries saved after `step`, before a kill kept the checkpoint of all from being
        written; it is made again."""
        if trainee.folder is None or not self.ranks.is_first:
            return
        for checkpoint_folder in checkpoint.all_in(trainee.folder):
            if checkpoint_folder > checkpoint.place(trainee.folder, step):
                remove_folder(checkpoint_folder)

    def _begin(self, resume: bool) -> None:
        if self.folder is None:
            return
        if self.ranks.is_first:
            checkpoint.keep_last(self.folder)  # a kill may have come between writing one and this
        for trainee in self.trainees:
            assert trainee.folder is not None
            if self.ranks.is_first:
                begin(trainee.folder, trainee.run)
                checkpoint.keep_last(trainee.folder)
            if resume:
                until = trainee.main.steps_done if trainee.failed_step is None else trainee.failed_step
                trainee.metrics = read_metrics(trainee.folder, until)
                if self.ranks.is_first:
                    rewind(trainee.folder, trainee.metrics)
                    if (trainee.folder / HELD_OUT).is_file():
                        rewind(trainee.folder, read_metrics(trainee.folder, until, HELD_OUT), HELD_OUT)
            if trainee.main.steps_done == 0:
                trainee.measure_held_out()

    def run(self) -> dict[str, Run]:
        with ExitStack() as closing:
            for logger in self.loggers:
                closing.callback(logger.close)
            self._train()
        if all(trainee.failed for trainee in self.trainees):
            raise UserError(self.trainees[0].failed)
        runs = {trainee.name: trainee.end() for trainee in self.trainees}
        for run in runs.values():
            run.massive = self.stream.norms.report()
        return runs

    def _train(self) -> None:
        total_tokens = max(run.train.steps for run in self.runs.values()) * self.config.batch
        tokens_done = self.step * self.config.batch
        patient = self.ranks.size > 1  # torchrun passes on what the terminal has sent already
        with (
            progress_bar("training", total_tokens, "tokens", tokens_done) as self._bar,
            _stop_signals(self.folder, patient) as signals,
        ):
            while active := [trainee for trainee in self.trainees if not trainee.has_ended]:
                batch = self.stream.next(self.config.batch).flat()
                if len(batch):
                    if any("attribute" in trainee.reads for trainee in active):
                        batch = replace(batch, attribute=self.stream.attribute(batch))
                    with self.stream.watch("sae"):
                        for hooks, cohort in self._cohorts(active):
                            self._step(cohort, batch.at(*hooks), active)
                    self.sample.add(self.step, batch)
                    self.step += 1
                    self._bar.advance(len(batch))
                    self._report([trainee for trainee in active if trainee.is_due])
                else:
                    self._end_early(active)
                signal_number = self.ranks.largest(signals[0] if signals else 0)
                self._save(len(batch) == 0 or bool(signal_number) or any(trainee.has_ended for trainee in active))
                if signal_number:
                    raise Stopped(signal_number, f"stopped at step {self.step}; --resume goes on from there")
                if not len(batch):
                    break

    def _step(self, cohort: Cohort, batch: Batch, active: list[_TrainedDictionary]) -> None:
        """A step, in which one of several dictionaries may fail, and is left out from then on."""
        try:
            cohort.step(batch)
        except (RuntimeError, ValueError) as error:
            failed_trainees = [
                trainee
                for trainee in active
                if any(learner in cohort.learners for learner in trainee.learners.values())
            ]
            if len(failed_trainees) == len(self.trainees):
                raise
            for trainee in failed_trainees:
                message = f"step {trainee.main.steps_done}: {type(error).__name__}: {str(error).splitlines()[0]}"
                trainee.failed = trainee.failed or message

    def _cohorts(self, active: list[_TrainedDictionary]) -> list[tuple[tuple[str, ...], Cohort]]:
        """What takes steps, with the hooks that it looks at; made anew when one of the dictionaries has ended."""
        names = [trainee.name for trainee in active]
        if names != self._active_cohorts[0]:
            self._settle()
            cohorts: list[tuple[tuple[str, ...], Cohort]] = []
            for hooks in dict.fromkeys(trainee.hooks for trainee in active):
                learners = [
                    learner for trainee in active if trainee.hooks == hooks for learner in trainee.learners.values()
                ]
                cohorts += [(hooks, cohort) for cohort in group_into_cohorts(learners)]
            self._active_cohorts = names, cohorts
        return self._active_cohorts[1]

    def _settle(self) -> None:
        """Finish the steps of all cohorts, before dictionaries are read."""
        for _, cohort in self._active_cohorts[1]:
            cohort.settle()

    def _report(self, due: list[_TrainedDictionary]) -> None:
        if not due:
            return
        self._settle()
        times: dict[str, Any] = {
            "seconds": round(time.monotonic() - self.start_time, 2),
            "time": self.stream.watch.shares(),
        }
        if self.stream.buffer_error is not None:
            times["buffer_error"] = self.stream.buffer_error
        lines = [trainee.report(**times) for trainee in due]
        for logger, (trainee, line) in itertools.product(self.loggers, zip(due, lines, strict=True)):
            logger.log(f"{trainee.name}/" if trainee.name else "", line)
        for trainee in due:
            if trainee.failed and trainee.name:
                self._bar.note(f"{trainee.name} is stopped: {trainee.failed}")
        best = min(lines, key=lambda line: line["fvu"] if math.isfinite(line["fvu"]) else math.inf)
        figures = {"loss": f"{best['loss']:.3g}", "L0": f"{best['l0']:.1f}", "EV": f"{1 - best['fvu']:.3f}"}
        figures |= {"dead": percent(best["dead_fraction"])}
        figures |= {self.stream.source.label: "0%"} | {
            section: f"{share:.0%}" for section, share in times["time"].items()
        }
        if len(self.trainees) > 1:
            figures = {"in training": str(sum(not trainee.has_ended for trainee in self.trainees)), **figures}
        self._bar.advance(0, **figures)
        epoch = self.stream.counts.get("epoch", 0)
        if epoch > self.epoch:
            self._bar.note(f"data: {self.stream.source.name} has ended and begins again (so often now: {epoch})")
            self.epoch = epoch

    def _end_early(self, active: list[_TrainedDictionary]) -> None:
        """The text has ended before the run."""
        tokens_done = active[0].main.tokens_done
        self._bar.note(f"data: {self.stream.source.name} ended after {tokens_done:,} of {self.config.tokens:,} tokens")
        self._report([trainee for trainee in active if trainee.main.has_news])

    def _save(self, must_save: bool) -> None:
        """Write a checkpoint of all, if it `must_save` or where it is time. It counts once the stream's is there, which
        comes last."""
        if self.folder is None or self.saved_step == self.step:
            return
        interval = self.config.checkpoint_every_steps
        is_time = self.step % interval == 0 if interval else time.monotonic() - self.saved_time > CHECKPOINT_SECONDS
        if not (must_save or self.ranks.largest(int(is_time))):
            return
        self._settle()
        unsaved = [
            trainee
            for trainee in self.trainees
            if trainee.failed is None and trainee.saved_step < trainee.main.steps_done
        ]
        self._report([trainee for trainee in unsaved if not trainee.main.is_finite()])  # which stops them
        stream_files = {"stream": self.stream.state() | self.sample.state()}
        for trainee in unsaved:
            if trainee.failed is None and trainee.folder is not None:
                trainee.save(
                    trainee.folder, stream_files if trainee.folder == self.folder else {}, self.stream.norms.report()
                )
        if "" not in self.runs and self.ranks.is_first:
            status = {
                trainee.name: {"step": trainee.saved_step, "failed": trainee.failed, "failed_step": trainee.failed_step}
                for trainee in self.trainees
            }
            checkpoint.write(checkpoint.place(self.folder, self.step), self.step, {}, None, stream_files, status)
            checkpoint.keep_last(self.folder)
        self.saved_step, self.saved_time = self.step, time.monotonic()


def _check_settings(config_path: Path, last_checkpoint: checkpoint.Checkpoint, run: RunConfig) -> None:
    """Refuse to go on from a checkpoint of other settings."""
    if last_checkpoint.run is not None and (changed := difference({"": last_checkpoint.run}, {"": run})):
        raise UserError(
            f"resume: {changed[0]} is {changed[2]} in {config_path}, and {changed[1]} in "
            f"{last_checkpoint.folder / checkpoint.MANIFEST}; undo the change"
        )


def _initialise_from(sae: SparseAutoencoder, path: Path) -> None:
    """Let a new dictionary begin as the one at `path`."""
    try:
        source_sae = checkpoint.load(path)
    except UserError as error:
        raise UserError(f"train.init: {str(error).removeprefix('sae: ')}") from None
    fields = {"d_in", "d_sae", "d_out", "activation", "mask", "parts"}
    settings, source_settings = (autoencoder.cfg.model_dump(include=fields) for autoencoder in (sae, source_sae))
    for name, value in settings.items():
        if source_settings[name] != value:
            raise UserError(
                f"train.init: {path} is not allowed; its {name} is {source_settings[name]}, and sae.{name} {value}"
            )
    sae.load_state_dict(source_sae.state_dict())
    if (subtracts := sae.cfg.apply_b_dec_to_input) != source_sae.cfg.apply_b_dec_to_input:
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
    first_config = next(iter(dictionaries.values())).train
    for name, run in dictionaries.items():
        prefix = f"{name}: " if name else ""
        widths = stream.source.widths
        for key in ("hook", "target", "second"):
            if (hook := getattr(run.stream, key)) not in (None, *widths):
                raise UserError(f"{prefix}stream.{key}: {hook} is not allowed; the stream has {', '.join(widths)}")
        sae_widths = {"d_in": run.sae.d_in} | ({} if run.sae.d_out is None else {"d_out": run.sae.d_out})
        if len(sae_widths) != len(run.stream.hooks):
            raise UserError(
                f"{prefix}sae.d_out: {run.sae.d_out} is not allowed; "
                "a transcoder has both sae.d_out and stream.target, others neither"
            )
        for (field_name, width), hook in zip(sae_widths.items(), run.stream.hooks, strict=True):
            if width != widths[hook]:
                raise UserError(
                    f"{prefix}sae.{field_name}: {width} is not allowed; {hook} of {stream.name} has width {widths[hook]}"
                )
        if 2 * run.train.batch > stream.buffer_tokens:
            raise UserError(
                f"{prefix}train.batch: {run.train.batch} is not allowed; it must be at most half of "
                f"stream.buffer_tokens ({stream.buffer_tokens})"
            )
        for shared_field in ("batch", "checkpoint_every_steps", "log"):
            if getattr(run.train, shared_field) != getattr(first_config, shared_field):
                raise UserError(
                    f"{prefix}train.{shared_field}: {getattr(run.train, shared_field)} is not allowed; it is "
                    f"{getattr(first_config, shared_field)} for all dictionaries of a stream"
                )
        stream.check_mask(run.sae.mask)
        _check_parts(prefix, run, stream, widths)
        if (size := stream.ranks.size) > 1:
            if run.sae.d_sae % size:
                raise UserError(f"{prefix}sae.d_sae: {run.sae.d_sae} is not allowed; {size} processes must divide it")
            if run.train.accumulate > 1 or run.train.resample_every_steps is not None:
                field_name = "accumulate" if run.train.accumulate > 1 else "resample_every_steps"
                raise UserError(
                    f"{prefix}train.{field_name}: {getattr(run.train, field_name)} is not allowed; "
                    f"there are {size} processes"
                )


def _check_parts(prefix: str, run: RunConfig, stream: ActivationStream, widths: dict[str, int]) -> None:
    """Refuse parts that the stream or the way of training has nothing for."""
    needs, kinds = reads(run.sae), ", ".join(part_settings["kind"] for part_settings in run.sae.parts)
    if (part_kind := needs.get("rows")) and stream.config.mode != "sequences":
        raise UserError(
            f"{prefix}stream.mode: {stream.config.mode} is not allowed with {part_kind}, which looks along rows of text; "
            "it must be sequences"
        )
    second = run.stream.second
    if (part_kind := needs.get("second")) and second is None:
        raise UserError(
            f"{prefix}stream.second: needed by {part_kind}; give another hook, as in blocks.0.hook_resid_post"
        )
    if second is not None and "second" not in needs:
        raise UserError(f"{prefix}stream.second: {second} is not allowed; no part of the dictionary looks at it")
    if second is not None and widths[second] != run.sae.d_in:
        raise UserError(
            f"{prefix}stream.second: {second} is not allowed; its width is {widths[second]}, and that of "
            f"{run.stream.hook} {run.sae.d_in}"
        )
    if run.train.held_out_rows and (stream.own is not None or stream.ranks.size > 1):
        reason = "several processes" if stream.own is None else "activations without a model"
        raise UserError(f"{prefix}train.held_out_rows: {run.train.held_out_rows} is not allowed with {reason}")
    if kinds and stream.own is not None and not stream.own.has_positions:
        raise UserError(f"{prefix}sae.parts: {kinds} is not allowed; {stream.own.name} has no positions")
    if kinds and run.train.accumulate > 1:
        raise UserError(f"{prefix}train.accumulate: {run.train.accumulate} is not allowed with sae.parts ({kinds})")
    if kinds and stream.ranks.size > 1:
        raise UserError(f"{prefix}sae.parts: {kinds} is not allowed; there are {stream.ranks.size} processes")


@contextmanager
def _stop_signals(folder: Path | None, patient: bool) -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM is put into, where there is a folder to save to; a second one stops at once, unless
    we are `patient`."""
    signals: list[int] = []
    if folder is None or threading.current_thread() is not threading.main_thread():
        yield signals
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    previous_handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def note(number: int, frame: object) -> None:
        signals.append(number)
        for stop_signal, handler in () if patient else previous_handlers.items():
            signal.signal(stop_signal, handler)

    for number in previous_handlers:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _select_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
