"""One of a run's dictionaries, with its controls: what it reports and saves."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..composed import dictionary
from ..config import RunConfig
from ..config.controls import control_names, control_of, is_learned
from ..errors import UserError
from ..interchange.intermediate import bias_where
from ..learner import Learner
from ..registry import reads
from ..run_sample import RunSample
from ..sae import SparseAutoencoder
from ..storage import checkpoint
from ..storage.path_names import expand_path
from ..storage.run_folder import HELD_OUT, report
from ..stream import ActivationStream, Batch
from ..stream.center import center
from ..stream.norm_filter import check_scale, check_variance


class TrainedDictionary:
    """A dictionary in training and its controls, with the folder that they are saved to."""

    def __init__(
        self, name: str, run: RunConfig, stream: ActivationStream, folder: Path | None,
        held_out_batches: dict[int, list[Batch]], run_sample: RunSample,
    ):  # fmt: skip
        """All dictionaries of a stream share `run_sample` and `held_out_batches`, held-out rows by their number."""
        self.sample = run_sample
        self.name, self.run, self.folder, self.is_writer = name, run, folder, stream.ranks.is_first
        self.hooks, self.reads = run.stream.read_hooks, reads(run.sae)
        configs = {"sae": run.sae}
        if is_learned(run.sae):
            configs |= {control: control_of(run.sae, control) for control in control_names(run.train)}
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
                sae, run.train, mean, mean_norm, stream.positions, bias,
                hook=run.stream.hooks[0], trained=is_trained, ranks=stream.ranks,
            )  # fmt: skip
        self.metrics: list[dict[str, Any]] = []
        self.failed: str | None = None  # why it was stopped before its end
        self.failed_step: int | None = None
        self.saved_step = 0
        self.held_out_batches: list[Batch] = []
        if row_count := run.train.held_out_rows:
            if row_count not in held_out_batches:
                held_out_batches[row_count] = stream.held_out_batches(row_count)
            self.held_out_batches = [batch.at(*run.stream.hooks) for batch in held_out_batches[row_count]]

    @property
    def main(self) -> Learner:
        return self.learners["sae"]

    @property
    def has_ended(self) -> bool:
        return self.failed is not None or self.main.steps_done >= self.run.train.steps

    @property
    def is_due(self) -> bool:
        """Whether the step just done is one that is reported."""
        return self.main.steps_done % self.run.train.report_steps == 0 or self.has_ended

    def report(self, **extra_figures: Any) -> dict[str, Any]:
        """Add a line of metrics since the last one, and write it. Sets `failed` if a loss is not finite."""
        line: dict[str, Any] = {"step": self.main.steps_done, "tokens": self.main.tokens_done} | self.main.report()
        line |= {role: learner.report() for role, learner in self.learners.items() if role != "sae"} | extra_figures
        for figures in (line, *(line[role] for role in self.learners if role != "sae")):
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
        """Measure the dictionary on held-out rows, and write the figures."""
        if self.held_out_batches and self.failed is None and self.folder is not None and self.is_writer:
            self.main.fit_threshold(self.sample)
            counts = {"step": self.main.steps_done, "tokens": self.main.tokens_done}
            report(self.folder, counts | self.main.held_out(self.held_out_batches), HELD_OUT)

    def save(self, folder: Path, tensor_files: dict[str, dict[str, Tensor]], massive: dict[str, Any] | None) -> None:
        """Write a checkpoint, in the units of the activations, with further `tensor_files`."""
        self.fit_thresholds()
        states = {role: learner.state() for role, learner in self.learners.items()}
        state = {f"{role}.{key}": value for role, tensors in states.items() for key, value in tensors.items()}
        dictionaries = {role: (learner.cfg, learner.weights()) for role, learner in self.learners.items()}
        self.saved_step = self.main.steps_done
        if self.is_writer:
            path, files = checkpoint.place(folder, self.saved_step), {"state": state, **tensor_files}
            checkpoint.write(path, self.saved_step, dictionaries, self.run, files, massive=massive)
            checkpoint.keep_last(folder)

    def load(self, last_checkpoint: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint."""
        state = last_checkpoint.tensors("state")
        for role, learner in self.learners.items():
            prefix = f"{role}."
            tensors = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            learner.load_state(tensors, last_checkpoint.tensors(role))
        self.saved_step = last_checkpoint.step

    def fit_thresholds(self) -> None:
        """Fit inference thresholds, before dictionaries are saved or returned."""
        for learner in self.learners.values():
            learner.fit_threshold(self.sample)

    def end(self) -> dict[str, SparseAutoencoder]:
        """The trained dictionary and its controls by role, in units of x. No step may follow."""
        self.fit_thresholds()
        return {role: learner.end() for role, learner in self.learners.items()}


def _initialise_from(sae: SparseAutoencoder, path: Path) -> None:
    """Start a new dictionary from the weights of the one at `path`."""
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
        with torch.no_grad():  # a dictionary of another library
            sae.b_enc.copy_(bias_where(subtracts, sae.b_enc, sae.b_dec, sae.W_enc))
    norm = sae.W_dec.detach().norm(dim=1)
    if (norm - 1).abs().max() > 1e-3 and (norm > 0).all():
        with torch.no_grad():  # of another library; training keeps rows at norm 1, so the norms move into the latents
            sae.W_dec.div_(norm[:, None])
            for tensor in (sae.W_enc, sae.b_enc, *([sae.threshold] if sae.cfg.activation == "jumprelu" else [])):
                tensor.mul_(norm)
