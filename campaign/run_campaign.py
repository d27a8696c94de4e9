"""Run a campaign: train every dictionary on one stream, measure each, and write the results."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engine.errors import UserError
from ..engine.storage import checkpoint
from ..engine.storage.checkpoint import Checkpoint
from ..engine.storage.files import absolute, os_errors_named
from ..engine.storage.lock import owned
from ..engine.storage.run_folder import begin, check_free, read_sealed_yaml
from ..engine.storage.sealed import write_json
from ..engine.stream import ActivationStream
from ..engine.stream.model_loading import BUILT_IN
from ..engine.sweep import resolve
from ..engine.train import Run, train_together
from ..engine.training.checks import check_runs
from ..evals.evaluation import Evaluation
from ..evals.run_evals import announce, evaluate
from ..evals.suite import missing_inputs
from ..kernels.torch_modes import default_modes
from .config import CampaignConfig, CampaignRun, entries
from .results import RESULTS, gather, read_results
from .significance import strictness

SETTINGS = "campaign.yaml"


@default_modes()
def campaign(config: CampaignConfig, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train and measure the runs of `config` in the folder `out`, draw figures and write a report.

    All dictionaries are trained on the batches of one stream, each with its random control. `out` gets runs/NAME, as `train`
    leaves it, campaign.yaml, campaign.json, figures/, report.md and report.html. Returns the contents of campaign.json. With
    `resume`, training continues from the last checkpoint, and finished evals are kept. A run that fails is named with the
    reason, and the others continue. Raises UserError for settings that are not allowed, before any work.
    """
    with owned(out):
        return _campaign(config, out, resume)


def _campaign(config: CampaignConfig, out: Path, resume: bool) -> dict[str, Any]:
    from .figures import draw
    from .report import write

    began = time.monotonic()
    config = _with_absolute_paths(config)
    planned = entries(config)
    _open(config, out, resume)
    # the time that a finished campaign took, read first: results of another version stop the command before any work
    before = read_results(out)["seconds"] if resume and (out / RESULTS).is_file() else {}
    model, runs = resolve({campaign_run.name: campaign_run.sections for campaign_run in planned})
    tokens = max(run.train.tokens for run in runs.values())
    hooks = (
        list(dict.fromkeys(hook for run in runs.values() for hook in run.stream.read_hooks)) if model is None else []
    )
    stream = ActivationStream(next(iter(runs.values())).stream, tokens=tokens, seed=0, model=model, hooks=hooks)
    check_runs(stream, runs)  # before the folder is made
    if stream.own is None and stream.config.cache is None:  # a cache's text is loaded when it is needed
        sae = next(iter(runs.values())).sae
        announce({name: missing_inputs(name, stream, sae, (), {}) for name in config.evals})
    begin(out, config, SETTINGS)
    trained = train_together(stream, runs, out=out / "runs", resume=resume)
    failed = {name: run.failed for name, run in trained.items() if run.failed is not None}
    seconds = {"training": round(time.monotonic() - began, 1)}
    if stream.own is None:
        failed |= _measure(config, planned, trained, stream, out / "runs")
    seconds["measuring"] = round(time.monotonic() - began - seconds["training"], 1)
    seconds = {stage: round(duration + before.get(stage, 0), 1) for stage, duration in seconds.items()}
    results = gather(config, planned, out, failed) | {"seconds": seconds}
    with os_errors_named(f"out: {out / RESULTS}"):
        write_json(out / RESULTS, json.loads(json.dumps(results, default=str)))
    draw(out)
    write(out)
    return results


def _open(config: CampaignConfig, out: Path, resume: bool) -> None:
    path = out / SETTINGS
    if not resume:
        check_free(out)
    elif not path.is_file():
        raise UserError(f"resume: {out} has no {SETTINGS}; it is not a campaign's folder")
    elif _with_absolute_paths(read_config(out)) != config:
        raise UserError(f"resume: the settings differ from {path}; resume with the same settings")


def read_config(out: Path) -> CampaignConfig:
    """Read the settings of the campaign in a folder. Raises UserError if there are none."""
    path = out / SETTINGS
    if not path.is_file():
        raise UserError(f"{out} has no {SETTINGS}; it is not a campaign's folder")
    try:
        return CampaignConfig(**read_sealed_yaml(path))
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None


def _with_absolute_paths(config: CampaignConfig) -> CampaignConfig:
    """The settings with absolute paths, which mean the same from any working directory."""

    def resolved(section: dict[str, Any], *names: str) -> dict[str, Any]:
        paths = {name: section[name] for name in names if isinstance(section.get(name), str)}
        return section | {name: absolute(path) for name, path in paths.items() if path not in BUILT_IN}

    stream = resolved(config.stream, "model", "data", "cache", "activations")
    return config.model_copy(update={"stream": stream, "train": resolved(config.train, "init")})


def _measure(
    config: CampaignConfig, planned: list[CampaignRun], trained: Mapping[str, Run], stream: ActivationStream, runs: Path
) -> dict[str, str]:
    """Write the results of every dictionary to its folder's evals/. Returns the reasons of those that failed, by name."""
    failed: dict[str, str] = {}
    whole = [campaign_run for campaign_run in planned if trained[campaign_run.name].failed is None]
    texts: dict[str, Evaluation] = {}
    for index, campaign_run in enumerate(whole):
        saved = checkpoint.find(runs / campaign_run.name)
        assert saved.run is not None
        hook = str(saved.run.stream.hook)
        stream.model.use(hooks=saved.run.stream.hooks)
        if hook not in texts:
            texts[hook] = Evaluation(stream, saved.dictionary(), None, share=config.share, neurons=False)
        print(f"measuring {campaign_run.name}, {index + 1} of {len(whole)}", file=sys.stderr, flush=True)
        try:
            reference, same_recipe = _references(campaign_run, planned, runs)
            evaluate(
                saved, stream, runs / campaign_run.name, config.evals,
                like=texts[hook], reference=reference, same_recipe=same_recipe,
            )  # fmt: skip
        except (UserError, RuntimeError, ValueError) as error:
            failed[campaign_run.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            print(f"{campaign_run.name} can't be measured: {failed[campaign_run.name]}", file=sys.stderr, flush=True)
    return failed


def _references(
    entry: CampaignRun, planned: list[CampaignRun], runs: Path
) -> tuple[Checkpoint | None, Checkpoint | None]:
    """The plain dictionary of an entry's activation, condition and seed, the reference for `agreement`, and that of the next
    seed, the same recipe; None for one that is missing. Strictness of masks does not count."""
    activation, condition = entry.sections["sae"]["activation"], strictness(entry.condition)[1]
    plain = [other for other in planned if (other.run, other.condition) == (activation, condition)]
    at = next((i for i, other in enumerate(plain) if other.seed == entry.seed), None)
    if at is None:
        return None, None
    following = [*plain[at + 1 :], *plain[:at]]
    candidates = (runs / other.name for other in (plain[at], *following[:1]))
    found = [checkpoint.find(folder) if checkpoint.all_in(folder) else None for folder in candidates]
    return found[0], None if found[0] is None or len(found) == 1 else found[1]
