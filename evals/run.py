"""Evaluate a checkpoint where it stands: its own stream, its own control, results and figures into its run folder."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine import checkpoint
from ..engine.checkpoint import Checkpoint
from ..engine.errors import UserError
from ..engine.files import UNFINISHED
from ..engine.sae import SparseAutoencoder
from ..engine.stream import ActivationStream
from ..engine.stream.own import held_out_scores
from ..engine.train import Run, train
from .collect import Evaluation
from .core import check_fits
from .figures import draw_pareto
from .report import write_report
from .saebench import file_name, output
from .suite import given_to, load_eval

VERSION = 5  # of the evals: results of another one are not taken for today's
SCORES = ("explained_variance", "ce_recovered", "ce_recovered_over_mean", "l0", "dead_fraction")


def evaluate_runs(folder: Path, runs: dict[str, Run], stream: ActivationStream) -> dict[str, Any]:
    """Core scores of the dictionaries trained in `folder`, by name; of a single one, named "", just its scores.

    Several are compared in figures/pareto.png. One that failed is there with the reason, and nothing else.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        if run.failed is not None:
            found[name] = {"failed": run.failed}
            continue
        last = checkpoint.find(folder / name)
        assert last.run is not None
        settings = {
            "hook": last.run.stream.hook,
            "activation": last.run.sae.activation,
            "d_sae": last.run.sae.d_sae,
            "tokens": run.metrics[-1]["tokens"],
        }
        if stream.own is not None:
            found[name] = _without_model(run, stream) | settings
            continue
        stream.model.use(hooks=last.run.stream.hooks)
        result = evaluate(last, stream, folder / name)["core"]
        controls = {control: {key: r[key] for key in SCORES} for control, r in result["controls"].items()}
        found[name] = {key: result[key] for key in SCORES} | {"controls": controls} | settings
    if "" in found:
        return found[""]
    draw_pareto(folder / "figures", {name: scores for name, scores in found.items() if "failed" not in scores})
    return {"dictionaries": found}


def _without_model(run: Run, stream: ActivationStream) -> dict[str, Any]:
    """Scores on the activations held out, else those of training's last report; CE needs a model and is None."""

    def scores(sae: SparseAutoencoder, line: dict[str, Any]) -> dict[str, Any]:
        held_out = held_out_scores(sae, stream.own_held_out())
        measured = held_out or {"explained_variance": 1 - line["fvu"], **line}
        found = {key: measured.get(key) for key in SCORES}
        return found | {"measured_on": "held-out rows" if held_out else "training"}

    last = run.metrics[-1]
    found = scores(run.sae, last)
    controls = {} if run.random is None else {"random": scores(run.random, last["random"])}
    mean = dict.fromkeys(SCORES) | {"explained_variance": 0.0, "l0": 0.0, "dead_fraction": 1.0}
    return found | {"controls": {**controls, "mean": mean}}


def evaluate(
    found: Checkpoint,
    stream: ActivationStream,
    run: Path | None,
    names: Sequence[str] = ("core",),
    *,
    seed: int = 0,
    sets: Sequence[str] = (),
    files: Mapping[str, Sequence[str]] | None = None,
    fresh: bool = False,
    like: Evaluation | None = None,
    reference: Checkpoint | None = None,
) -> dict[str, dict[str, Any]]:
    """The evals of these `names` of a checkpoint, by name, each with its controls and the `seconds` that it took.

    With `run`, each is kept there as evals/NAME.json (and in SAEBench's format in evals/saebench/), where a later call finds
    it unless it asks for `fresh` ones or is of another dictionary, seed, version, or of other sets or files `given` to this
    eval; and report.md, report.html and figures/ show all that is kept there of this dictionary. The random control is the
    one trained beside the dictionary; where there is none, it is trained now on as many tokens. Of several evals, one that
    can't be had of this model or text has `skipped` in its place: why. Of a single one, that is a UserError.

    `like`: an evaluation whose texts (and share of them) serve for this dictionary, too; then there is no report.
    `reference`: the dictionary that `positions` compares with.
    """
    common = {"dictionary": found.manifest["files"]["sae.safetensors"]["sha256"], "seed": seed, "version": VERSION}
    if like is not None and like.share > 1:
        common["share"] = like.share
    if reference is not None:
        common["reference"] = reference.manifest["files"]["sae.safetensors"]["sha256"]
    keys = {name: common | {"given": given_to(name, sets, files or {})} for name in names}
    results = {} if run is None or fresh else {name: kept for name in names if (kept := _kept(run, name, keys[name]))}
    if missing := [name for name in names if name not in results]:
        sae = found.dictionary()
        check_fits("sae", sae, stream)
        random = None if sae.cfg.decoder == "random" else _control(found, sae, stream)
        compared = None if reference is None else reference.dictionary()
        if like is None:
            evaluation = Evaluation(stream, sae, random, seed, sets, files, reference=compared)
        else:
            evaluation = like.of(sae, random, compared)
        for name in missing:
            began = time.monotonic()
            try:
                result = load_eval(name)(evaluation)
            except UserError as error:
                if len(names) == 1:
                    raise
                result = {"skipped": str(error)}
            result |= {"seconds": round(time.monotonic() - began, 2), "of": keys[name]}
            results[name] = json.loads(json.dumps(result, allow_nan=False))  # as it is read again
            if run is not None:
                _write(run / "evals" / f"{name}.json", results[name])
                if (theirs := output(name, results[name], sae, stream.config, sae_id=run.name, seed=seed)) is not None:
                    _write(run / "evals" / "saebench" / name / file_name("temposae", run.name), theirs)
    if run is not None and like is None:
        write_report(run, found, VERSION)
    return {name: results[name] for name in names}


def _kept(run: Path, name: str, key: dict[str, Any]) -> dict[str, Any] | None:
    try:
        found = json.loads((run / "evals" / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("of") == key and "skipped" not in found else None


def _write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{UNFINISHED}{path.name}")
    fresh.write_text(json.dumps(found, indent=1) + "\n")
    fresh.replace(path)


def _control(found: Checkpoint, sae: SparseAutoencoder, stream: ActivationStream) -> SparseAutoencoder:
    if "random" in found.dictionaries:
        return found.dictionary("random")
    config = found.run.train if found.run is not None else None
    return train(stream, sae.cfg.model_copy(update={"decoder": "random"}), config).sae
