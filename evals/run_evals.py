"""Run evals on checkpoints and keep results, figures and a report in their run folders."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..engine.config import EvalConfig, TrainConfig
from ..engine.config.controls import CONTROLS
from ..engine.errors import UserError
from ..engine.metrics import held_out_scores
from ..engine.sae import SparseAutoencoder
from ..engine.storage import checkpoint as checkpoint_files
from ..engine.storage.checkpoint import Checkpoint
from ..engine.storage.files import write_text
from ..engine.storage.run_folder import read_metrics
from ..engine.stream import ActivationStream, WorldSource
from ..engine.train import Run
from ..engine.unit_decoder import unit_decoder
from ..kernels.torch_modes import default_modes
from . import result_files
from .evaluation import BY_PROTOCOL, OWN, Evaluation, Reference, check_protocol, fitted
from .held_out import SavedEffects
from .judge import Answers, Judge
from .kept_sets import KeptSets
from .recovery import recovery
from .report import write_report
from .row_budget import Sizes, row_counts
from .run_figures import draw_pareto
from .saebench import file_name, output
from .suite import input_digests, load_eval, missing_inputs
from .trained_controls import TrainedControls, without_control

VERSION = 14  # of the evals; results of another version are not used
SCORES = ("explained_variance", "ce_recovered", "ce_recovered_over_mean", "l0", "dead_fraction")
L0_AGREES = 0.05  # relative difference of L0 on held-out text and at the end of training, up to which no warning is due
ERRORS = ("explained_variance_error", "ce_recovered_error")


@default_modes()
def evaluate_runs(folder: Path, runs: dict[str, Run], stream: ActivationStream) -> dict[str, Any]:
    """Core scores of the dictionaries trained in `folder`, by name; of a single one, named "", only its scores.

    Several are compared in figures/pareto.png. A run that failed in training has the reason as `failed`, and nothing else.
    If `eval.after_training` is false or measuring fails, the figures are those of training's last report, `measured_on` says
    so, and `not_measured` has the reason. Stored results are used again.
    """
    results: dict[str, dict[str, Any]] = {}
    texts: tuple[tuple[str, ...], Evaluation] | None = None
    for name, run in runs.items():
        if run.failed is not None:
            results[name] = {"failed": run.failed}
            continue
        last = checkpoint_files.find(folder / name)
        assert last.run is not None
        sae, tokens = last.run.sae, run.metrics[-1]["tokens"]
        settings = {"hook": last.run.stream.hook, "activation": sae.activation, "d_sae": sae.d_sae, "tokens": tokens}
        if (reason := without_control(last)) is not None:
            settings["no_random_control"] = reason
        if not last.run.eval.after_training:
            results[name] = _of_training(run) | settings | {"not_measured": "eval.after_training is false (--no-eval)"}
            continue
        if stream.own is not None:
            results[name] = _without_model(run, stream) | settings
            continue
        try:
            stream.model.use(hooks=last.run.stream.hooks)
            if texts is None or texts[0] != stream.model.hooks:
                texts = stream.model.hooks, Evaluation(stream, last.dictionary(), None)
            result = evaluate(last, stream, folder / name, like=texts[1])["core"]
            write_report(folder / name, last, VERSION)
        except Exception as error:  # training is done and saved, so no error in measuring may end the command
            results[name] = _of_training(run) | settings | {"not_measured": _one_line(error)}
            continue
        keys = (*SCORES, *ERRORS, "rows", "ce_rows")
        controls = {control: {key: r[key] for key in keys if key in r} for control, r in result["controls"].items()}
        warnings = {"warnings": result["warnings"]} if "warnings" in result else {}
        results[name] = {key: result[key] for key in keys} | {"controls": controls} | settings | warnings
    if "" in results:
        return results[""]
    drawn = {name: scores for name, scores in results.items() if scores.get("explained_variance") is not None}
    if drawn:
        draw_pareto(folder / "figures", drawn)
    return {"dictionaries": results}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _of_training(run: Run) -> dict[str, Any]:
    """Scores of training's last report; CE is None, because it needs a pass through the model."""

    def scores(line: dict[str, Any]) -> dict[str, Any]:
        measured = {"explained_variance": 1 - line["fvu"], **line}
        return {key: measured.get(key) for key in SCORES} | {"measured_on": "training"}

    last = run.metrics[-1]
    return scores(last) | {"controls": {control: scores(last[control]) for control in CONTROLS if control in last}}


def _without_model(run: Run, stream: ActivationStream) -> dict[str, Any]:
    """Scores on held-out activations, or those of training's last report; CE is None, because it needs a model."""

    def held_out(sae: SparseAutoencoder) -> dict[str, Any] | None:
        measured = held_out_scores(sae, stream.held_out_activations())
        if measured is None:
            return None
        warnings = {"warnings": measured["warnings"]} if "warnings" in measured else {}
        return {key: measured.get(key) for key in SCORES} | {"measured_on": "held-out rows"} | warnings

    scores: dict[str, Any] = _of_training(run)
    if (sae_scores := held_out(run.sae)) is not None:
        scores |= sae_scores
        measured = {name: held_out(sae) for name, sae in run.dictionaries.items() if name != "sae"}
        scores["controls"] |= {name: control for name, control in measured.items() if control is not None}
    if isinstance(stream.own, WorldSource):
        try:
            recovered = recovery(stream.own, {name: unit_decoder(sae) for name, sae in run.dictionaries.items()})
        except UserError as error:
            scores["warnings"] = [*scores.get("warnings", []), str(error)]
        else:
            scores["recovery"] = recovered.pop("sae")
            for name, control in recovered.items():
                scores["controls"][name]["recovery"] = control
    mean = dict.fromkeys(SCORES) | {"explained_variance": 0.0, "l0": 0.0, "dead_fraction": 1.0}
    return scores | {"controls": {**scores["controls"], "mean": mean}}


@dataclass(frozen=True)
class EvalOptions:
    """Keyword options of `evaluate`."""

    seed: int = 0  # of all random draws
    sets: Sequence[str] = ()  # labelled texts for sparse probing, TPP and SCR
    files: Mapping[str, Sequence[str]] | None = None  # by the names of `suite.FILES`
    fresh: bool = False  # measure again what the run has results of
    rows: int | None = None  # of text; default: the run's `eval.rows`, or what fits run and model (`row_budget`)
    controls: Sequence[str] = ()  # to train if the checkpoint lacks them, on as many tokens; names: `config.controls`
    protocol: str = OWN  # of the evals in `BY_PROTOCOL`, one of `evaluation.PROTOCOLS`
    judge: Judge | None = None  # for autointerp

    def __post_init__(self) -> None:
        check_protocol(self.protocol)


@default_modes()
def evaluate(
    checkpoint: Checkpoint,
    stream: ActivationStream,
    run: Path | None,
    names: Sequence[str] = ("core",),
    *,
    like: Evaluation | None = None,
    reference: Checkpoint | None = None,
    same_recipe: Checkpoint | None = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Run the evals `names` on a checkpoint; returns their results by name, with controls and the `seconds` they took.

    With `run`, writes each result to the run's evals/NAME.json and evals/saebench/, and a report of all results. A stored
    result is used again if its dictionary, seed, version, rows, sets and files are the same and `fresh` is not set.

    Reports inputs that are missing (`suite.missing_inputs`) before measuring anything. An eval that can't be measured has
    the reason as `skipped`. If it is the only one, raises UserError instead.

    `like`: an evaluation whose texts and `share` are used for this dictionary too; no report is written. `reference`: the
    dictionary that `positions` compares with, and `same_recipe` another seed of the reference's recipe.
    `options`: see `EvalOptions`.
    """
    chosen, sae = EvalOptions(**options), checkpoint.dictionary()
    fitted("sae", sae, stream)
    for name in names:
        load_eval(name)
    sets, files = chosen.sets, chosen.files or {}
    controls = TrainedControls(checkpoint, sae, chosen.controls)
    sizes = _sizes(checkpoint, stream, sae, chosen.rows, len(controls), like)
    if same_recipe is not None and reference is None:
        raise UserError("same_recipe: needs a reference, the dictionary that it is another seed of")
    origin = _origin(checkpoint, chosen.seed, like) | controls.origin
    others = {"reference": reference, "same_recipe": same_recipe}
    keys = {name: origin | _inputs(name, chosen, sizes, others) for name in names}
    results: dict[str, dict[str, Any]] = {}
    if run is not None and not chosen.fresh:
        results = {name: result for name in names if (result := _stored_result(run, name, keys[name])) is not None}
    request = stream, sae.cfg, sets, files, chosen.judge
    lacking = {name: missing_inputs(name, *request) for name in names if name not in results}
    if len(names) == 1 and (why := lacking.get(names[0], {}).get("")):
        raise UserError(f"{names[0]}: {why}")
    if like is None:
        announce(lacking)
    if lacking:
        trained = controls.get(stream, train=not all("" in reasons for reasons in lacking.values()))
        compared = reference and Reference(reference.dictionary(), same_recipe and same_recipe.dictionary())
        if like is None:
            evaluation = Evaluation(stream, sae, trained, chosen.seed, sets, files, reference=compared, sizes=sizes)
        else:
            evaluation = like.of(sae, trained, compared, sizes)
        evaluation.protocol = chosen.protocol
        evaluation.answers = _answers(run, chosen)
        evaluation.kept_sets = None if run is None else KeptSets(run / "evals/sae_probes", origin, fresh=chosen.fresh)
        results |= _measure(checkpoint, run, evaluation, lacking, keys, alone=len(names) == 1, quiet=like is not None)
    if run is not None and like is None:
        write_report(run, checkpoint, VERSION)
    return {name: results[name] for name in names}


def _inputs(
    name: str, chosen: EvalOptions, sizes: Sizes, others: Mapping[str, Checkpoint | None]
) -> dict[str, Any]:  # fmt: skip
    """What the result of one eval depends on. `others`: dictionaries to compare with, by option."""
    inputs: dict[str, Any] = {"given": input_digests(name, chosen.sets, chosen.files or {}), "rows": sizes.of(name)}
    if name == "positions":
        inputs |= {option: _digest(given) for option, given in others.items() if given is not None}
    if name in BY_PROTOCOL and chosen.protocol != OWN:
        inputs["protocol"] = chosen.protocol
    if name == "autointerp" and chosen.judge is not None:
        inputs |= {"judge": chosen.judge.identity, "latents": chosen.judge.latents}
    return inputs


def _origin(checkpoint: Checkpoint, seed: int, like: Evaluation | None) -> dict[str, Any]:
    """What a result depends on, apart from its own inputs."""
    origin: dict[str, Any] = {"dictionary": _digest(checkpoint), "seed": seed, "version": VERSION}
    if like is not None and like.share > 1:
        origin["share"] = like.share
    return origin


def _answers(run: Path | None, options: EvalOptions) -> Answers | None:
    if options.judge is None:
        return None
    return Answers(options.judge, None if run is None else run / "evals" / "judge.jsonl", fresh=options.fresh)


def _measure(
    checkpoint: Checkpoint,
    run: Path | None,
    evaluation: Evaluation,
    lacking: Mapping[str, Mapping[str, str]],
    keys: Mapping[str, dict[str, Any]],
    *,
    alone: bool,
    quiet: bool,
) -> dict[str, dict[str, Any]]:
    """Measure the evals in `lacking` that have their inputs; write each result to `run` as soon as it is there."""
    results: dict[str, dict[str, Any]] = {}
    todo = [name for name, reasons in lacking.items() if "" not in reasons]
    for name, reasons in lacking.items():
        if len(todo) > 1 and name in todo and not quiet:
            most = None if name == "core" else evaluation.sizes.other_rows
            limit = "" if most is None else f", on at most {most} rows of text"
            print(f"measuring {name}, {todo.index(name) + 1} of {len(todo)}{limit}", file=sys.stderr, flush=True)
        if name == "core" and run is not None:
            evaluation.saved = SavedEffects(run / "evals" / "core.part", keys[name])
        began = time.monotonic()
        result: dict[str, Any] = {"skipped": reasons[""]} if "" in reasons else _measured(name, evaluation, alone=alone)
        if "skipped" not in result:
            reason = without_control(checkpoint)
            if evaluation.random is None and reason is not None:
                result["no_random_control"] = reason
            if name == "core" and run is not None and (warning := l0_warning(run, checkpoint.step, result["l0"])):
                result["warnings"] = [*result.get("warnings", []), warning]
        result |= {"seconds": round(time.monotonic() - began, 2), "of": keys[name]}
        results[name] = json.loads(json.dumps(result, allow_nan=False))  # as it will be read again
        if run is not None:
            _write_result(run, name, results[name], checkpoint, evaluation)
    return results


def _digest(checkpoint: Checkpoint) -> str:
    return checkpoint.manifest["files"]["sae.safetensors"]["sha256"]


def announce(lacking: Mapping[str, Mapping[str, str]]) -> None:
    """Print which evals and parts of evals won't be measured, and why."""
    for name, reasons in lacking.items():
        for part, why in reasons.items():
            title = f"{name}, {part}" if part else name
            print(f"will not be measured: {title}: {why}", file=sys.stderr, flush=True)


def _measured(name: str, evaluation: Evaluation, *, alone: bool) -> dict[str, Any]:
    """The result of an eval, or the reason why it is skipped; raises the UserError if the eval is the only one."""
    try:
        with _one_blas_thread():
            return load_eval(name)(evaluation)
    except UserError as error:
        if alone:
            raise
        print(f"not measured: {name}: {error}", file=sys.stderr, flush=True)
        return {"skipped": str(error)}


def _one_blas_thread() -> AbstractContextManager[Any]:
    """Probes solve many small problems. With several threads they mostly wait for each other, on a busy machine for minutes.
    torch's threads are others."""
    if find_spec("threadpoolctl") is None:  # it comes with scikit-learn
        return nullcontext()
    return import_module("threadpoolctl").threadpool_limits(1, user_api="blas")


def _write_result(run: Path, name: str, result: dict[str, Any], checkpoint: Checkpoint, evaluation: Evaluation) -> None:
    """Write a result to its run, and in SAEBench's format if that has this eval."""
    result_files.write(run, name, result)
    stream = evaluation.stream
    exported = output(
        name, result, evaluation.sae, stream.config, sae_id=run.name, training_tokens=checkpoint.tokens,
        seed=result["of"]["seed"], llm_dtype=str(stream.model.dtype).removeprefix("torch."),
    )  # fmt: skip
    path = run / "evals" / "saebench" / name / file_name("temposae", run.name)
    path.unlink(missing_ok=True)  # an earlier result may have been exportable
    if exported is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(exported, indent=1) + "\n")


def l0_warning(run: Path, step: int, l0: float) -> str | None:
    """Warning if L0 on held-out text differs by more than 5% from L0 at the end of training (by `step`), because a threshold
    doesn't fit or the text is different. None otherwise, and without training metrics."""
    trained = [line["l0"] for line in read_metrics(run, until=step) if "l0" in line][-1:]
    if not trained or not trained[0] or abs(l0 / trained[0] - 1) <= L0_AGREES:
        return None
    return (
        f"L0 is {l0:.1f} on held-out text and was {trained[0]:.1f} at the end of training ({l0 / trained[0] - 1:+.0%}); a "
        "longer run or more tokens to a batch bring the two together"
    )


def _sizes(
    checkpoint: Checkpoint, stream: ActivationStream, sae: SparseAutoencoder, rows: int | None, controls: int,
    like: Evaluation | None,
) -> Sizes:  # fmt: skip
    config = EvalConfig() if checkpoint.run is None else checkpoint.run.eval
    if rows is not None:
        config = config.model_copy(update={"rows": rows})
    tokens = (TrainConfig() if checkpoint.run is None else checkpoint.run.train).tokens
    latents = [sae.cfg.d_sae] * (1 + controls)
    if sae.cfg.d_out is None and (like is None or like.neurons):
        latents.append(sae.cfg.d_in)
    return row_counts(stream, config, tokens, latents)


def _stored_result(run: Path, name: str, key: dict[str, Any]) -> dict[str, Any] | None:
    try:
        result = result_files.read(run, name)
    except UserError as error:
        print(f"measured again: {error}", file=sys.stderr, flush=True)
        return None
    return result if result is not None and result.get("of") == key and "skipped" not in result else None
