"""Evaluate a checkpoint where it stands: its own stream, its own control, results and figures into its run folder."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine.config import EvalConfig, TrainConfig
from ..engine.errors import UserError
from ..engine.sae import SparseAutoencoder
from ..engine.storage import checkpoint as checkpoint_files
from ..engine.storage.checkpoint import Checkpoint
from ..engine.storage.files import write_text
from ..engine.storage.run_folder import read_metrics
from ..engine.stream import ActivationStream
from ..engine.stream.arrays import held_out_scores
from ..engine.train import Run, train
from ..kernels.torch_modes import default_modes
from . import result_files
from .evaluation import Evaluation, fitted
from .report import write_report
from .row_budget import Sizes, row_counts
from .run_figures import draw_pareto
from .saebench import file_name, output
from .suite import input_digests, load_eval, missing_inputs

VERSION = 9  # of the evals: results of another one are not taken for today's
SCORES = ("explained_variance", "ce_recovered", "ce_recovered_over_mean", "l0", "dead_fraction")
L0_AGREES = 0.05  # by how much L0 on held-out text may differ from that at the end of training, without a warning
ERRORS = ("explained_variance_error", "ce_recovered_error")


@default_modes()
def evaluate_runs(folder: Path, runs: dict[str, Run], stream: ActivationStream) -> dict[str, Any]:
    """Core scores of the dictionaries trained in `folder`, by name; of a single one, named "", just its scores.

    Several are compared in figures/pareto.png. One that failed in training is there with the reason, and nothing else. Where
    `eval.after_training` is false, and where measuring fails, the figures are those of training's last report:
    `measured_on` says so, and `not_measured` why. A dictionary that is measured already isn't again.
    """
    results: dict[str, dict[str, Any]] = {}
    texts: tuple[tuple[str, ...], Evaluation] | None = None
    for name, run in runs.items():
        if run.failed is not None:
            results[name] = {"failed": run.failed}
            continue
        last = checkpoint_files.find(folder / name)
        assert last.run is not None
        settings = {
            "hook": last.run.stream.hook,
            "activation": last.run.sae.activation,
            "d_sae": last.run.sae.d_sae,
            "tokens": run.metrics[-1]["tokens"],
        }
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
            result = evaluate(last, stream, folder / name, like=texts[1], report=True)["core"]
        except Exception as error:  # training is done, and its run whole, whatever goes wrong here
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
    """Scores of training's last report. CE needs a pass through the model, and is None."""

    def scores(line: dict[str, Any]) -> dict[str, Any]:
        measured = {"explained_variance": 1 - line["fvu"], **line}
        return {key: measured.get(key) for key in SCORES} | {"measured_on": "training"}

    last = run.metrics[-1]
    return scores(last) | {"controls": {"random": scores(last["random"])} if "random" in last else {}}


def _without_model(run: Run, stream: ActivationStream) -> dict[str, Any]:
    """Scores on the activations held out, else those of training's last report; CE needs a model and is None."""

    def held_out(sae: SparseAutoencoder) -> dict[str, Any] | None:
        measured = held_out_scores(sae, stream.held_out_activations())
        if measured is None:
            return None
        warnings = {"warnings": measured["warnings"]} if "warnings" in measured else {}
        return {key: measured.get(key) for key in SCORES} | {"measured_on": "held-out rows"} | warnings

    scores = _of_training(run)
    if (sae_scores := held_out(run.sae)) is not None:
        scores |= sae_scores
        if run.random is not None and (control := held_out(run.random)) is not None:
            scores["controls"]["random"] = control
    mean = dict.fromkeys(SCORES) | {"explained_variance": 0.0, "l0": 0.0, "dead_fraction": 1.0}
    return scores | {"controls": {**scores["controls"], "mean": mean}}


@default_modes()
def evaluate(
    checkpoint: Checkpoint,
    stream: ActivationStream,
    run: Path | None,
    names: Sequence[str] = ("core",),
    *,
    seed: int = 0,
    sets: Sequence[str] = (),
    files: Mapping[str, Sequence[str]] | None = None,
    fresh: bool = False,
    rows: int | None = None,
    control: bool = False,
    like: Evaluation | None = None,
    report: bool | None = None,
    reference: Checkpoint | None = None,
) -> dict[str, dict[str, Any]]:
    """The evals of these `names` of a checkpoint, by name, each with its controls and the `seconds` that it took.

    With `run`, each is kept there as evals/NAME.json (and in SAEBench's format in evals/saebench/), where a later call finds
    it unless it asks for `fresh` ones or is of another dictionary, seed, version, number of rows, or of other sets or files
    `given` to this eval; and report.md, report.html and figures/ show all that is kept there of this dictionary.

    What can't be measured on this model and text is said before anything else is done, with the option that would supply
    what is missing (`suite.missing_inputs`). Of several evals, such a one, and one that turns out not to be possible, has
    `skipped` in its place: why. Of a single one, that is a UserError.

    The random control is the one trained beside the dictionary. Where there is none, as with `train.control: false`, results
    have none, unless `control` asks for one to be trained now on as many tokens. `rows`: of text, in place of
    `checkpoint.run.eval.rows` or, where that isn't given, of as many as fit the run and the model (`row_budget.row_counts`).

    `like`: an evaluation whose texts (and share of them) serve for this dictionary, too; then there is no `report` unless
    asked for. `reference`: the dictionary that `positions` compares with.
    """
    sae, files = checkpoint.dictionary(), files or {}
    fitted("sae", sae, stream)
    for name in names:
        load_eval(name)
    trained_now = control and "random" not in checkpoint.dictionaries and sae.cfg.decoder == "learned"
    common: dict[str, Any] = {"dictionary": _digest(checkpoint), "seed": seed, "version": VERSION}
    if like is not None and like.share > 1:
        common["share"] = like.share
    if reference is not None:
        common["reference"] = _digest(reference)
    if trained_now:
        common["control"] = "trained for evaluation"
    sizes = _sizes(checkpoint, stream, sae, rows, "random" in checkpoint.dictionaries or trained_now, like)
    keys = {name: common | {"given": input_digests(name, sets, files), "rows": sizes.of(name)} for name in names}
    known = {} if run is None or fresh else {name: _stored_result(run, name, keys[name]) for name in names}
    results = {name: result for name, result in known.items() if result is not None}
    lacking = {name: missing_inputs(name, stream, sae.cfg, sets, files) for name in names if name not in results}
    if len(names) == 1 and (why := lacking.get(names[0], {}).get("")):
        raise UserError(f"{names[0]}: {why}")
    if like is None:
        _announce(lacking)
    todo = [name for name, reasons in lacking.items() if "" not in reasons]
    if lacking:
        random = checkpoint.dictionary("random") if "random" in checkpoint.dictionaries else None
        if trained_now and todo:
            random = _train_control(checkpoint, sae, stream)
        compared = None if reference is None else reference.dictionary()
        if like is None:
            evaluation = Evaluation(stream, sae, random, seed, sets, files, reference=compared, sizes=sizes)
        else:
            evaluation = like.of(sae, random, compared, sizes)
        for name, reasons in lacking.items():
            if len(todo) > 1 and like is None and name in todo:
                has_limit = sizes.other_rows is not None and name != "core"
                limit = f", on at most {sizes.other_rows} rows of text" if has_limit else ""
                print(f"measuring {name}, {todo.index(name) + 1} of {len(todo)}{limit}", file=sys.stderr, flush=True)
            began = time.monotonic()
            result: dict[str, Any]
            result = {"skipped": reasons[""]} if "" in reasons else _measured(name, evaluation, alone=len(names) == 1)
            if "skipped" not in result and not trained_now and (reason := without_control(checkpoint)) is not None:
                result["no_random_control"] = reason
            if name == "core" and run is not None and (warning := l0_warning(run, checkpoint.step, result["l0"])):
                result["warnings"] = [*result.get("warnings", []), warning]
            result |= {"seconds": round(time.monotonic() - began, 2), "of": keys[name]}
            results[name] = json.loads(json.dumps(result, allow_nan=False))  # as it is read again
            if run is not None:
                _keep(run, name, results[name], checkpoint, sae, stream)
    if run is not None and (like is None if report is None else report):
        write_report(run, checkpoint, VERSION)
    return {name: results[name] for name in names}


def _digest(checkpoint: Checkpoint) -> str:
    return checkpoint.manifest["files"]["sae.safetensors"]["sha256"]


def _announce(lacking: Mapping[str, Mapping[str, str]]) -> None:
    """Say what won't be measured of each eval, and why."""
    for name, reasons in lacking.items():
        for part, why in reasons.items():
            place = f"{name}, {part}" if part else name
            print(f"will not be measured: {place}: {why}", file=sys.stderr, flush=True)


def _measured(name: str, evaluation: Evaluation, *, alone: bool) -> dict[str, Any]:
    """The result of an eval, or why there is none. Raises UserError for that if the eval stands alone."""
    try:
        return load_eval(name)(evaluation)
    except UserError as error:
        if alone:
            raise
        print(f"not measured: {name}: {error}", file=sys.stderr, flush=True)
        return {"skipped": str(error)}


def _keep(
    run: Path,
    name: str,
    result: dict[str, Any],
    checkpoint: Checkpoint,
    sae: SparseAutoencoder,
    stream: ActivationStream,
) -> None:
    """Write a result into its run's folder, and in SAEBench's format where that has a place for it."""
    result_files.write(run, name, result)
    exported = output(
        name, result, sae, stream.config, sae_id=run.name, training_tokens=checkpoint.tokens,
        seed=result["of"]["seed"], llm_dtype=str(stream.model.dtype).removeprefix("torch."),
    )  # fmt: skip
    path = run / "evals" / "saebench" / name / file_name("temposae", run.name)
    path.unlink(missing_ok=True)  # of an earlier measurement
    if exported is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(exported, indent=1) + "\n")


def l0_warning(run: Path, step: int, l0: float) -> str | None:
    """What to say where a dictionary has another L0 on held-out text than it had at the end of training, by `step`: a
    threshold that doesn't fit, or text of another kind. None within 5%, or where training left no metrics."""
    trained = [line["l0"] for line in read_metrics(run, until=step) if "l0" in line][-1:]
    if not trained or not trained[0] or abs(l0 / trained[0] - 1) <= L0_AGREES:
        return None
    return (
        f"L0 is {l0:.1f} on held-out text and was {trained[0]:.1f} at the end of training ({l0 / trained[0] - 1:+.0%}); a "
        "longer run or more tokens to a batch bring the two together"
    )


def _sizes(
    checkpoint: Checkpoint, stream: ActivationStream, sae: SparseAutoencoder, rows: int | None, has_random: bool,
    like: Evaluation | None,
) -> Sizes:  # fmt: skip
    config = EvalConfig() if checkpoint.run is None else checkpoint.run.eval
    if rows is not None:
        config = config.model_copy(update={"rows": rows})
    tokens = (TrainConfig() if checkpoint.run is None else checkpoint.run.train).tokens
    latents = [sae.cfg.d_sae] * (1 + has_random)
    if sae.cfg.d_out is None and (like is None or like.neurons):
        latents.append(sae.cfg.d_in)
    return row_counts(stream, config, tokens, latents)


def without_control(checkpoint: Checkpoint) -> str | None:
    """Why a dictionary has no random control beside it; None where it has one, or is one."""
    if "random" in checkpoint.dictionaries or checkpoint.manifest["dictionaries"]["sae"]["decoder"] == "random":
        return None
    if checkpoint.run is not None and not checkpoint.run.train.control:
        return "train.control: false"
    return f"{checkpoint.folder.name} holds none"


def _stored_result(run: Path, name: str, key: dict[str, Any]) -> dict[str, Any] | None:
    try:
        result = result_files.read(run, name)
    except UserError as error:
        print(f"measured again: {error}", file=sys.stderr, flush=True)
        return None
    return result if result is not None and result.get("of") == key and "skipped" not in result else None


def _train_control(checkpoint: Checkpoint, sae: SparseAutoencoder, stream: ActivationStream) -> SparseAutoencoder:
    config = TrainConfig() if checkpoint.run is None else checkpoint.run.train
    print(f"control: a random one is trained first, on {config.tokens:,} tokens", file=sys.stderr, flush=True)
    config = config.model_copy(update={"control": False, "init": None, "held_out_rows": 0, "log": ()})
    return train(stream, sae.cfg.model_copy(update={"decoder": "random"}), config).sae
