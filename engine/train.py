"""Training: a stream in, a run folder out."""

import json
import math
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from . import checkpoint
from .config import RunConfig, SAEConfig, TrainConfig, read_yaml
from .errors import UserError
from .optim import Learner
from .progress import progress_bar
from .sae import SparseAutoencoder
from .stream import ActivationStream

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
KEEP = 2  # checkpoints that stay on disk


@dataclass
class Run:
    """What `train` gives back. `metrics`: one dict per report, as in metrics.jsonl. `random`: the control, if trained."""

    sae: SparseAutoencoder
    random: SparseAutoencoder | None
    metrics: list[dict[str, Any]] = field(default_factory=list)


def train(
    stream: ActivationStream,
    sae: SAEConfig,
    config: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
) -> Run:
    """Train a dictionary on `config.tokens` activations of `stream`, and beside it, on the same batches, its `random`
    control (a frozen random decoder with a trained encoder; `config.control=False` leaves it out).

        run = train(ActivationStream(StreamConfig(model="testbed")), SAEConfig(d_in=128, d_sae=1024))

    With `out`, a run folder is written: config.yaml (resolved), metrics.jsonl (a line every `log_every_steps`), and
    checkpoints/ (the last two). With `resume`, the run in `out` goes on from its last checkpoint and ends with the weights
    that it would have had without the stop. The same seed gives the same metrics, fields named `seconds` apart.

    Raises UserError for a width that is not the stream's, for an `out` that can't be written or holds a run already,
    and for activations that are not finite.
    """
    config = config or TrainConfig()
    if sae.d_in != stream.d_in:
        raise UserError(
            f"sae.d_in: {sae.d_in} is not allowed; {stream.model.hook} of {stream.model.name} has width {stream.d_in}"
        )
    if 2 * config.batch > stream.buffer_tokens:
        raise UserError(
            f"train.batch: {config.batch} is not allowed; it must be at most half of "
            f"stream.buffer_tokens ({stream.buffer_tokens})"
        )
    sae.mask.check_context(stream.positions)
    run = RunConfig(stream=stream.config, sae=sae, train=config)
    folder = Path(out).expanduser() if out is not None else None
    last = _open_folder(folder, run, resume) if folder is not None else None
    learners = _learners(stream, run, last)
    if folder is not None:
        _begin(folder, run)
    main = learners["sae"]
    metrics = _rewind_metrics(folder, main.steps_done) if folder is not None and resume else []

    began = time.monotonic()
    with progress_bar("training", total=config.tokens, unit="tokens", done=main.steps_done * config.batch) as bar:
        for step in range(main.steps_done, config.steps):
            batch = stream.next(config.batch)
            for learner in learners.values():
                learner.step(batch)
            done = step + 1
            bar.advance(config.batch)
            if done % config.report_steps == 0 or done == config.steps:
                line = _report(learners, config) | {"seconds": round(time.monotonic() - began, 2)}
                metrics.append(line)
                if folder is not None:
                    _append(folder / METRICS, line)
                shown = {"loss": f"{line['loss']:.3g}", "L0": f"{line['l0']:.1f}", "EV": f"{1 - line['fvu']:.3f}"}
                bar.advance(0, **shown, dead=f"{line['dead_fraction']:.1%}")
            if folder is not None and (done % config.checkpoint_every_steps == 0 or done == config.steps):
                _checkpoint(folder, run, learners, stream, done)
    for learner in learners.values():
        learner.sae.scale_(1 / learner.scale)
    return Run(main.sae, learners["random"].sae if "random" in learners else None, metrics)


def _learners(stream: ActivationStream, run: RunConfig, last: checkpoint.Checkpoint | None) -> dict[str, Learner]:
    """The dictionary and its control, new or as `last` left them (the stream's place in the text with them)."""
    configs = {"sae": run.sae}
    if run.train.control and run.sae.decoder == "learned":
        configs["random"] = run.sae.model_copy(update={"decoder": "random"})
    state = last.tensors("state") if last is not None else {}
    if last is not None:
        stream.load_state(_under("stream.", state))
    mean, mean_norm = stream.moments()
    learners = {}
    for name, config in configs.items():
        sae = SparseAutoencoder(config, seed=run.train.seed).to(stream.model.device)
        learners[name] = Learner(sae, run.train, mean, mean_norm, stream.positions)
        if last is not None:
            learners[name].load_state(_under(f"{name}.", state), last.tensors(name))
    return learners


def _report(learners: dict[str, Learner], config: TrainConfig) -> dict[str, Any]:
    steps = learners["sae"].steps_done
    found: dict[str, Any] = {"step": steps, "tokens": steps * config.batch} | learners["sae"].report()
    for name, learner in learners.items():
        if name != "sae":
            found[name] = learner.report()
    bad = [key for key in ("loss", "gradient_norm") if not math.isfinite(found.get(key, 0))]
    if bad:
        raise UserError(
            f"train.lr: {learners['sae'].lr:g} made {bad[0]} {found[bad[0]]} by step {steps}; "
            "try a smaller one (the last checkpoint is untouched)"
        )
    return found


def _checkpoint(
    folder: Path, run: RunConfig, learners: dict[str, Learner], stream: ActivationStream, step: int
) -> None:
    """Write a checkpoint, in the units of the activations, and drop all but the last `KEEP`."""
    state = {f"stream.{key}": value for key, value in stream.state().items()}
    for name, learner in learners.items():
        state |= {f"{name}.{key}": value for key, value in learner.state().items()}
        learner.sae.scale_(1 / learner.scale)
    target = folder / "checkpoints" / f"step_{step:08d}"
    try:
        checkpoint.write(target, step, {name: learner.sae for name, learner in learners.items()}, run, state)
    finally:
        for learner in learners.values():
            learner.sae.scale_(learner.scale)
    for old in checkpoint.all_in(folder)[:-KEEP]:
        shutil.rmtree(old)


def _open_folder(folder: Path, run: RunConfig, resume: bool) -> checkpoint.Checkpoint | None:
    """See that a new run may go there, or go back into one; gives the checkpoint to go on from."""
    place = folder / CONFIG
    if resume and place.is_file():
        if read_run(folder) != run:
            raise UserError(f"resume: the settings differ from {place}; resume with the ones that the run began with")
        return checkpoint.find(folder) if checkpoint.all_in(folder) else None
    check_free(folder)
    return None


def _begin(folder: Path, run: RunConfig) -> None:
    """Make the run folder, with its settings in it; a resumed run has them."""
    if (folder / CONFIG).exists():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(yaml.safe_dump(run.model_dump(), sort_keys=False))
    except OSError as error:
        raise UserError(f"out: {folder} can't be written ({error.strerror})") from None


def check_free(folder: Path) -> None:
    """Refuse a run folder that holds something already, or that can't be made. Leaves nothing behind."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"out: {folder} exists and is not empty; give a new folder, or --resume to go on with that run"
            )
        above = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        Path(tempfile.mkdtemp(prefix=".temposae-", dir=above)).rmdir()
    except OSError as error:
        raise UserError(
            f"out: {folder} can't be written ({error.strerror}); give a folder that you may write to"
        ) from None


def read_run(folder: Path) -> RunConfig:
    """The settings of the run in `folder`."""
    return RunConfig(**read_yaml(folder / CONFIG))


def read_metrics(folder: Path, until: int | None = None) -> list[dict[str, Any]]:
    """The reports in a run's metrics.jsonl up to step `until`; a line cut short by a kill ends them."""
    path = folder / METRICS
    kept = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if until is not None and line["step"] > until:
            break
        kept.append(line)
    return kept


def _rewind_metrics(folder: Path, step: int) -> list[dict[str, Any]]:
    """Take what was reported after `step` out of metrics.jsonl; give the rest."""
    kept = read_metrics(folder, step)
    fresh = (folder / METRICS).with_suffix(".tmp")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
    fresh.replace(folder / METRICS)
    return kept


def _append(path: Path, line: dict[str, Any]) -> None:
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(f"out: {path} can't be written ({error.strerror}); the checkpoints are untouched") from None


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
