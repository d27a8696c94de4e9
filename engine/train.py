"""Train dictionaries on a stream, into run folders."""

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..kernels.torch_modes import default_modes
from .cohort import Cohort, group_into_cohorts
from .config import RunConfig, SAEConfig, StreamConfig, SweepConfig, TrainConfig
from .errors import Stopped, UserError
from .metrics import held_out_scores
from .process.progress import percent, progress_bar
from .process.signals import collect_signals, stop_advice
from .run_sample import RunSample, needs_sample
from .sae import SparseAutoencoder
from .storage import checkpoint, run_folder
from .storage.files import remove_folder
from .storage.lock import owned
from .storage.loggers import Logger, open_loggers
from .storage.path_names import check_links, expand_path
from .stream import ActivationStream, ArraySource, Batch
from .training.checks import check_runs
from .training.trained_dictionary import TrainedDictionary

CHECKPOINT_SECONDS = 600  # between checkpoints, if `train.checkpoint_every_steps` is not set


@dataclass
class Run:
    """A trained dictionary, returned by `train`. `metrics`: one dict per report, as in metrics.jsonl. `random`: the control,
    if trained. `failed`: why it was stopped before its end, if it was. `held_out`: scores of all on held-out rows, if it
    was trained on arrays. `massive`: the massive activations that were left out (`NormFilter.report`). `controls`: all
    controls by name, `random` among them.

        run = ts.train(stream, sae_config, out="runs/mine")
        run.sae, run.random, run.metrics[-1]["fvu"]
    """

    sae: SparseAutoencoder
    random: SparseAutoencoder | None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None
    held_out: dict[str, dict[str, Any]] | None = None
    massive: dict[str, Any] | None = None
    controls: dict[str, SparseAutoencoder] = field(default_factory=dict)

    @property
    def dictionaries(self) -> dict[str, SparseAutoencoder]:
        """The dictionary, `sae`, and its controls by name."""
        random = {} if self.random is None else {"random": self.random}
        return {"sae": self.sae, **random, **self.controls}

    def __repr__(self) -> str:
        """Sizes and the last report's figures, in a line."""
        fields = [repr(self.sae)]
        if self.metrics:
            last_report = self.metrics[-1]
            fields.append(f"{last_report['tokens']:,} tokens in {last_report['step']:,} steps")
            dead = percent(last_report["dead_fraction"])
            fields.append(f"FVU {last_report['fvu']:.4f}, L0 {last_report['l0']:.1f}, {dead} dead")
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
    """Train a dictionary on `config.tokens` activations of `stream`, and its `random` control on the same batches: a frozen
    random decoder with a trained encoder. `config.control=False` leaves the control out, `config.controls` adds others.

        run = train(ActivationStream(StreamConfig(model="testbed")), SAEConfig(d_in=128, d_sae=1024))

    `stream` may also be activations: a tensor, an array or a memory map [M, D] or [R, T, D], a dict of `x`, `pos` and other
    fields, or an iterable of chunks; see `ArraySource`.

    With `out`, a run folder is written: config.yaml (resolved), metrics.jsonl (a line every `log_every_steps`), and
    checkpoints/ (the last two). With `resume`, the run in `out` continues from its last checkpoint and ends with the weights
    that it would have had without the stop. The same seed gives the same metrics, except for times. On SIGINT and SIGTERM, a
    run with a folder writes a checkpoint and raises Stopped.

    The result doesn't depend on the caller's state: training has its own gradient mode, default dtype and device, no
    autocast, and uses no global random state. The code of an iterable of chunks also runs in these modes.

    Raises UserError if a width is not the stream's, if `out` can't be written or holds a run already, and if activations or
    the loss are not finite.
    """
    config = config or TrainConfig()
    if not isinstance(stream, ActivationStream):
        source = stream if isinstance(stream, ArraySource) else ArraySource(stream, seed=config.seed)
        token_count = max(config.tokens, 2 * config.batch)
        stream = ActivationStream(StreamConfig(), tokens=token_count, batch=config.batch, seed=config.seed, own=source)
    run = RunConfig(stream=stream.config, sae=sae, train=config)
    trained = train_together(stream, {"": run}, out=out, resume=resume)[""]
    if stream.own is not None:
        held_out = stream.held_out_activations
        scores = {role: held_out_scores(sae, held_out()) for role, sae in trained.dictionaries.items()}
        trained.held_out = {role: score for role, score in scores.items() if score} or None
    return trained


@default_modes()
def train_together(
    stream: ActivationStream, dictionaries: dict[str, RunConfig], *, out: str | Path | None = None, resume: bool = False
) -> dict[str, Run]:
    """Train several dictionaries, each with its controls as `train` does, on the same batches of one stream.

    Each has its own shape, hook of the stream (`stream.hook`), learning rate, schedules, seed and number of tokens.
    `train.batch`, `train.checkpoint_every_steps` and `train.log` are common to all. Dictionaries of one configuration take
    their steps together. Each has a run folder `out`/NAME, and `out` keeps the position in the stream. If a loss is no
    longer finite or a step fails, that dictionary is stopped, its `Run.failed` says why, and the others continue.

        sizes = {f"F{F}": RunConfig(sae=SAEConfig(d_in=stream.d_in, d_sae=F)) for F in (512, 1024)}
        runs = train_together(stream, sizes, out="runs/sizes")
        runs["F512"].sae
    """
    folder = expand_path(out, "out") if out is not None else None
    with owned(folder) if folder is not None and stream.ranks.is_first else nullcontext():
        return _Training(stream, dictionaries, folder, resume).run()


class _Training:
    """Dictionaries by name on one stream. A single one has the name "" and the whole folder."""

    def __init__(self, stream: ActivationStream, dictionaries: dict[str, RunConfig], folder: Path | None, resume: bool):
        dictionaries = {
            name: run_folder.with_absolute_paths(run.model_copy(update={"stream": stream.config_for(run.stream)}))
            for name, run in dictionaries.items()
        }
        self.stream, self.runs, self.ranks = stream, dictionaries, stream.ranks
        self.folder = folder
        self.config = next(iter(dictionaries.values())).train
        check_runs(stream, dictionaries)
        settings = dictionaries[""] if list(dictionaries) == [""] else SweepConfig(dictionaries=dictionaries)
        last_checkpoint = self._open_folder(settings, resume)
        stream_state = last_checkpoint.tensors("stream") if last_checkpoint is not None else {}
        if last_checkpoint is not None:
            stream.load_state(stream_state)
        self.trainees: list[TrainedDictionary] = []
        with self._folder_with_settings(settings):
            held_out_batches: dict[int, list[Batch]] = {}
            sampled = [run.stream.hooks[0] for run in dictionaries.values() if needs_sample(run.sae)]
            self.sample = RunSample(max(run.train.steps for run in dictionaries.values()), sampled)
            self.sample.load_state(stream_state, stream.source.device)
            for name, run in dictionaries.items():
                folder = self.folder / name if self.folder is not None else None
                trainee = TrainedDictionary(name, run, stream, folder, held_out_batches, self.sample)
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
        """Check that a new run may be written, or open the one to resume. Returns the checkpoint to continue from."""
        if self.folder is None:
            return None
        config_path = self.folder / run_folder.CONFIG
        if not resume or not config_path.is_file():
            run_folder.check_free(self.folder)
            return None
        check_links(self.folder)
        if changed := run_folder.difference(run_folder.read_settings(self.folder).by_name(), settings.by_name()):
            raise UserError(
                f"resume: {changed[0]} is {changed[2]}, and {changed[1]} in {config_path}; resume with the run's settings"
            )
        last_checkpoint = checkpoint.find(self.folder) if checkpoint.all_in(self.folder) else None
        if last_checkpoint is not None and last_checkpoint.run is not None:
            _check_settings(config_path, last_checkpoint, settings.by_name()[""])
        return last_checkpoint

    @contextmanager
    def _folder_with_settings(self, settings: RunConfig | SweepConfig) -> Iterator[None]:
        """Write the settings before the buffer fills, so that a stopped run can be resumed; a refused one has none."""
        self.ranks.wait()  # until all processes have looked at the folder
        if self.folder is None or not self.ranks.is_first:
            yield
            return
        had_settings = (self.folder / run_folder.CONFIG).is_file()
        run_folder.begin(self.folder, settings)
        try:
            with stop_advice("stopped before the first step; --resume starts from there"):
                yield
        except Exception:
            if not had_settings:
                (self.folder / run_folder.CONFIG).unlink(missing_ok=True)
            raise

    def _restore(self, trainee: TrainedDictionary, last_checkpoint: checkpoint.Checkpoint) -> None:
        """Take a dictionary back to `last_checkpoint`. What it wrote later is written again."""
        if trainee.folder == self.folder:
            trainee.load(last_checkpoint)
            return
        assert trainee.folder is not None
        assert self.folder is not None
        status = (last_checkpoint.manifest["status"] or {}).get(trainee.name)
        if not isinstance(status, dict) or not isinstance(status.get("step"), int):
            raise UserError(
                f"checkpoint: {last_checkpoint.folder / checkpoint.MANIFEST} is damaged: no status of {trainee.name}"
            )
        trainee.failed, trainee.failed_step = status.get("failed"), status.get("failed_step")
        self._discard(trainee, status["step"])
        if status["step"]:
            dictionary_checkpoint = checkpoint.find(checkpoint.place(trainee.folder, status["step"]))
            _check_settings(self.folder / run_folder.CONFIG, dictionary_checkpoint, trainee.run)
            trainee.load(dictionary_checkpoint)

    def _discard(self, trainee: TrainedDictionary, step: int) -> None:
        """Remove what one of several dictionaries saved after `step`, if a kill came before the common checkpoint."""
        if trainee.folder is None or not self.ranks.is_first:
            return
        for checkpoint_folder in checkpoint.all_in(trainee.folder):
            if checkpoint_folder > checkpoint.place(trainee.folder, step):
                remove_folder(checkpoint_folder)

    def _begin(self, resume: bool) -> None:
        if self.folder is None:
            return
        if self.ranks.is_first:
            checkpoint.keep_last(self.folder)  # a kill may have come after the last was written
        for trainee in self.trainees:
            assert trainee.folder is not None
            if self.ranks.is_first:
                run_folder.begin(trainee.folder, trainee.run)
                checkpoint.keep_last(trainee.folder)
            if resume:
                until = trainee.main.steps_done if trainee.failed_step is None else trainee.failed_step
                trainee.metrics = run_folder.read_metrics(trainee.folder, until)
                if self.ranks.is_first:
                    run_folder.rewind(trainee.folder, trainee.metrics)
                    if (trainee.folder / run_folder.HELD_OUT).is_file():
                        scores = run_folder.read_metrics(trainee.folder, until, run_folder.HELD_OUT)
                        run_folder.rewind(trainee.folder, scores, run_folder.HELD_OUT)
            if trainee.main.steps_done == 0:
                trainee.measure_held_out()

    def run(self) -> dict[str, Run]:
        with ExitStack() as closing:
            for logger in self.loggers:
                closing.callback(logger.close)
            self._train()
        if all(trainee.failed for trainee in self.trainees):
            raise UserError(self.trainees[0].failed)
        ends = [(trainee, trainee.end()) for trainee in self.trainees]
        return {
            trainee.name: Run(
                saes["sae"],
                saes.get("random"),
                trainee.metrics,
                trainee.failed,
                massive=self.stream.norms.report(),
                controls={role: sae for role, sae in saes.items() if role != "sae"},
            )
            for trainee, saes in ends
        }

    def _train(self) -> None:
        total_tokens = max(run.train.steps for run in self.runs.values()) * self.config.batch
        tokens_done = self.step * self.config.batch
        patient = self.ranks.size > 1  # torchrun repeats the signal that the terminal has sent
        with (
            progress_bar("training", total_tokens, "tokens", tokens_done) as self._bar,
            nullcontext([]) if self.folder is None else collect_signals(patient=patient) as signals,
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
                    tokens_done = active[0].main.tokens_done
                    name = self.stream.source.name
                    self._bar.note(f"data: {name} ended after {tokens_done:,} of {self.config.tokens:,} tokens")
                    self._report([trainee for trainee in active if trainee.main.has_news])
                signal_number = self.ranks.largest(signals[0] if signals else 0)
                self._save(len(batch) == 0 or bool(signal_number) or any(trainee.has_ended for trainee in active))
                if signal_number:
                    raise Stopped(signal_number, f"stopped at step {self.step}; --resume goes on from there")
                if not len(batch):
                    break

    def _step(self, cohort: Cohort, batch: Batch, active: list[TrainedDictionary]) -> None:
        """Take a step. If it fails, its dictionaries are stopped, unless they are all that there are."""
        try:
            cohort.step(batch)
        except (RuntimeError, ValueError) as error:
            failed_trainees = [trainee for trainee in active if {*trainee.learners.values()} & {*cohort.learners}]
            if len(failed_trainees) == len(self.trainees):
                raise
            for trainee in failed_trainees:
                message = f"step {trainee.main.steps_done}: {type(error).__name__}: {str(error).splitlines()[0]}"
                trainee.failed = trainee.failed or message

    def _cohorts(self, active: list[TrainedDictionary]) -> list[tuple[tuple[str, ...], Cohort]]:
        """The active dictionaries' cohorts and the hooks that each reads. Grouped anew after a dictionary has ended."""
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

    def _report(self, due: list[TrainedDictionary]) -> None:
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
        figures |= {self.stream.source.label: "0%"} | {name: f"{share:.0%}" for name, share in times["time"].items()}
        if len(self.trainees) > 1:
            figures = {"in training": str(sum(not trainee.has_ended for trainee in self.trainees)), **figures}
        self._bar.advance(0, **figures)
        epoch = self.stream.counts.get("epoch", 0)
        if epoch > self.epoch:
            self._bar.note(f"data: end of {self.stream.source.name} reached, repeating it (repetition {epoch})")
            self.epoch = epoch

    def _save(self, must_save: bool) -> None:
        """Write a checkpoint if it `must_save` or is time. The stream's part is written last and makes it valid."""
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
    if last_checkpoint.run is not None and (changed := run_folder.difference({"": last_checkpoint.run}, {"": run})):
        raise UserError(
            f"resume: {changed[0]} is {changed[2]} in {config_path}, and {changed[1]} in "
            f"{last_checkpoint.folder / checkpoint.MANIFEST}; undo the change"
        )
