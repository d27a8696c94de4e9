"""What campaign.json holds: of every run its settings, its scores over the seeds beside its random control's, and whether
it beats that in what was measured."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.errors import UserError
from ..engine.storage.run_folder import HELD_OUT, METRICS, read_metrics, read_settings
from ..engine.storage.sealed import read_json
from ..evals import result_files
from ..evals.markdown_page import NOTHING, number
from .analyses import analysis, sentence
from .config import CampaignConfig, CampaignRun
from .documented import LOGS, documented

FORMAT = "temposae-campaign/1"
RESULTS = "campaign.json"


@dataclass(frozen=True)
class Score:
    """A figure of a dictionary: the eval that measures it and where in its result; `better` is 1 where more is better, -1
    where less is, 0 where neither."""

    label: str
    eval: str
    path: str
    better: int = 1


#: by the names that campaign.json has for them, in the order of tables
SCORES = {
    "explained_variance": Score("EV", "core", "explained_variance"),
    "ce_recovered": Score("CE recovered", "core", "ce_recovered"),
    "l0": Score("L0", "core", "l0", 0),
    "dead_fraction": Score("dead", "core", "dead_fraction", -1),
    "probing_1": Score("probing, top 1", "sparse_probing", "top_1"),
    "probing_5": Score("probing, top 5", "sparse_probing", "top_5"),
    "order_pooled": Score("order, pooled", "positions", "order_probing.mean_pooled"),
    "order_last": Score("order, last token", "positions", "order_probing.last_token"),
    "unlearning": Score("unlearning", "unlearning", "score"),
    "scr": Score("SCR", "scr", "score"),
    "tpp": Score("TPP", "tpp", "score"),
    "specialization": Score("specialization", "positions", "specialization", 0),
    "retention": Score("retention", "positions", "retention.value"),
    "fidelity": Score("fidelity", "positions", "fidelity.profile"),
}
#: what a run is compared with its random control in
JUDGED = {"explained_variance": "explained variance", "probing": "sparse probing"}


def gather(
    config: CampaignConfig, planned: Sequence[CampaignRun], out: Path, failed: Mapping[str, str]
) -> dict[str, Any]:
    """The results of a campaign in `out`, of which `failed` says what went wrong, by the name of a dictionary."""
    labels = dict.fromkeys((campaign_run.run, campaign_run.condition, campaign_run.label) for campaign_run in planned)
    trained = {
        label: _run_results(
            run, condition, [campaign_run for campaign_run in planned if campaign_run.label == label], out, failed
        )
        for run, condition, label in labels
    }
    results: dict[str, Any] = {"runs": {}, "baselines": {}}
    for run, _, label in labels:
        if run in config.baselines:
            results["baselines"][label] = trained[label]
    for run in config.runs:
        parent = documented(run).trained_as
        for other, condition, label in labels:
            if other == (parent or run):
                name = f"{run}-{condition}" if condition else run
                results["runs"][name] = trained[label] | _identity(run, condition)
                if parent is not None:
                    results["runs"][name]["analysis"] = _analysed(run, trained[label], out)
    first = read_settings(out / "runs").by_name()
    stream = next(iter(first.values())).stream
    return {
        "format": FORMAT,
        "model": stream.model,
        "hook": stream.hook,
        "seeds": config.seeds,
        "conditions": list(dict.fromkeys(condition for _, condition, _ in labels)),
        "evals": list(config.evals),
        "share": config.share,
        **results,
    }


def _identity(run: str, condition: str) -> dict[str, Any]:
    log = next((name for name, runs in LOGS.items() if run in runs), None)
    definition = documented(run)
    return {
        "run": run,
        "title": definition.title,
        "log": log,
        "condition": condition,
        "trained_as": definition.trained_as,
    }


def _run_results(
    run: str, condition: str, planned: Sequence[CampaignRun], out: Path, failed: Mapping[str, str]
) -> dict[str, Any]:
    settings = read_settings(out / "runs").by_name()[planned[0].name]
    common = _identity(run, condition) | {
        "folders": [f"runs/{campaign_run.name}" for campaign_run in planned],
        "failed": {
            campaign_run.name: failed[campaign_run.name] for campaign_run in planned if campaign_run.name in failed
        }
        or None,
        "activation": settings.sae.activation,
        "d_sae": settings.sae.d_sae,
        "k": settings.sae.k,
        "l1_coefficient": settings.sae.l1_coefficient,
        "lr": settings.train.lr,
        "clip_norm": settings.train.clip_norm,
        "target_l0": settings.train.target_l0,
        "mask": settings.sae.mask.kind,
        "parts": [section["kind"] for section in settings.sae.parts],
    }
    seed_results = [
        _seed_results(out / "runs" / campaign_run.name) for campaign_run in planned if campaign_run.name not in failed
    ]
    if not seed_results:
        return common | dict.fromkeys(("steps", "fvu_first", "fvu_last", *SCORES)) | {
            "scores": {}, "beats_random": None, "why_not": "no seed came through: " + next(iter(failed.values()), "")
        }  # fmt: skip
    scores = {
        name: _over(
            [seed_result["sae"].get(name) for seed_result in seed_results],
            [seed_result["random"].get(name) for seed_result in seed_results],
        )
        for name in dict.fromkeys(key for seed_result in seed_results for key in seed_result["sae"])
    }
    means = {
        name: scores[name]["mean"] if name in scores else None for name in ("fvu_first", "fvu_last", "loss", *SCORES)
    }
    comparison = against_random(scores)
    why_not = "; ".join(comparison.unknown if comparison.beats is None else comparison.below) or None
    return common | {
        "steps": min(seed_result["steps"] for seed_result in seed_results),
        "tokens": min(seed_result["tokens"] for seed_result in seed_results), **means,
        "beats_random": comparison.beats, "why_not": why_not, "scores": scores,
    }  # fmt: skip


def _seed_results(folder: Path) -> dict[str, Any]:
    """Scores of one dictionary, and of its random control, by name."""
    metrics, held_out = (
        read_metrics(folder),
        read_metrics(folder, name=HELD_OUT) if (folder / HELD_OUT).is_file() else [],
    )
    if not metrics:
        raise UserError(f"campaign: {folder / METRICS} holds no report; the run must be trained again")
    last = metrics[-1]
    by_dictionary: dict[str, dict[str, float | None]] = {"sae": {"loss": last["loss"]}, "random": {}}
    if "random" in last:
        by_dictionary["random"]["loss"] = last["random"]["loss"]
    if held_out:
        by_dictionary["sae"] |= {"fvu_first": held_out[0]["fvu"], "fvu_last": held_out[-1]["fvu"]}
    results = {name: result_files.read(folder, name) or {} for name in result_files.names(folder)}
    probing = results.get("sparse_probing", {})
    for name, score in SCORES.items():
        result = results.get(score.eval)
        if result and "skipped" not in result:
            by_dictionary["sae"][name] = value_at(result, score.path)
            by_dictionary["random"][name] = _control(result, score.path)
    if probing and "skipped" not in probing:
        ks = ("top_1", "top_2", "top_5")
        by_dictionary["sae"]["probing_error"] = value_at(probing, "top_1_error")
        for dictionary, scores in (("sae", probing), ("random", probing.get("controls", {}).get("random", {}))):
            known = [scores[k] for k in ks if scores.get(k) is not None]
            by_dictionary[dictionary]["probing"] = sum(known) / len(known) if len(known) == len(ks) else None
    return {**by_dictionary, "steps": last["step"], "tokens": last["tokens"]}


def value_at(result: Mapping[str, Any], path: str) -> float | None:
    """What lies at a path of names, a number, or None."""
    value: Any = result
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _control(result: Mapping[str, Any], path: str) -> float | None:
    """The random control's figure: under `controls` of the part that has the score."""
    *names, last = path.split(".")
    for depth in range(len(names), -1, -1):
        inner: Any = result
        for name in names[:depth]:
            inner = inner.get(name) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and isinstance(inner.get("controls"), Mapping):
            return value_at(inner["controls"].get("random", {}), ".".join([*names[depth:], last]))
    return None


def _analysed(run: str, parent: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """What an analysis finds in the seeds of its run that came through, by figure; or why it finds nothing."""
    folders = [out / folder for folder in parent["folders"] if Path(folder).name not in (parent["failed"] or {})]
    try:
        figures_by_seed = [
            analysis(run, read_metrics(folder), result_files.read(folder, "clusters")) for folder in folders
        ]
    except UserError as reason:
        return {"why_not": str(reason)}
    if not figures_by_seed:
        return {"why_not": f"{parent['run']} failed with every seed"}
    return {name: _summary([figures[name] for figures in figures_by_seed]) for name in figures_by_seed[0]}


def analysis_sentence(run: Mapping[str, Any]) -> str:
    """What an analysis finds, as a sentence: means over seeds with their spread; of positions and steps all that occur."""
    figures: dict[str, Any] = run["analysis"]
    if "why_not" in figures:
        return f"nothing: {figures['why_not']}"

    def text(name: str, figure: Mapping[str, Any]) -> str:
        known = [value for value in figure["values"] if value is not None]
        if not known:
            return NOTHING
        if name.endswith("_at"):
            return " or ".join(f"{value:g}" for value in dict.fromkeys(known))
        return number(figure["mean"], 3) + ("" if figure["spread"] is None else f" ± {number(figure['spread'], 3)}")

    return sentence(run["run"], {name: text(name, figure) for name, figure in figures.items()})


def _over(trained: Sequence[float | None], random: Sequence[float | None]) -> dict[str, Any]:
    return {**_summary(trained), "random": _summary(random)}


def _summary(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and spread (standard deviation, of two seeds or more) of what is there."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "spread": statistics.stdev(known) if len(known) > 1 else None,
        "values": list(values),
    }


class AgainstRandom(NamedTuple):
    """A run beside its random control: the scores in which it is above, a sentence for each in which it is not, and one for
    each that is not known of both."""

    above: list[str]
    below: list[str]
    unknown: list[str]

    @property
    def beats(self) -> bool | None:
        """Whether it is above in all that was measured; None where nothing was."""
        return not self.below if self.above or self.below else None


def against_random(scores: Mapping[str, Any]) -> AgainstRandom:
    """Compare a run's scores in campaign.json with its random control's, in means over seeds: explained variance and sparse
    probing (mean of top 1, 2 and 5), those of them that were measured."""
    comparison = AgainstRandom([], [], [])
    for name, label in JUDGED.items():
        trained_mean, random_mean = (
            summary["mean"] if summary else None for summary in (scores.get(name), scores.get(name, {}).get("random"))
        )
        if trained_mean is None or random_mean is None:
            comparison.unknown.append(
                f"{label}{'' if trained_mean is None else ' of its random control'} was not measured"
            )
        elif trained_mean > random_mean:
            comparison.above.append(label)
        else:
            error = (scores.get("probing_error") or {}).get("mean") if name == "probing" else None
            near = error is not None and random_mean - trained_mean <= error
            close = f", no further apart than the standard error of so few texts ({error:.4f})" if near else ""
            comparison.below.append(f"{label} is {trained_mean:.4f}, the random control's {random_mean:.4f}{close}")
    return comparison


def read_results(out: Path) -> dict[str, Any]:
    """What campaign.json of a folder holds. Raises UserError if there is none."""
    path = out / RESULTS
    if not path.is_file():
        raise UserError(f"{out} holds no {RESULTS}; the campaign isn't done: go on with --resume --out {out}")
    mend = f"remove it, and temposae campaign --resume --out {out} makes it again"
    return read_json(path, "campaign", mend, keys=dict.fromkeys(("runs", "baselines"), dict))


def logs_of(campaign: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The runs of campaign.json by log, each by its name, of logs that have some."""
    by_log = {log: {name: run for name, run in campaign["runs"].items() if run["log"] == log} for log in LOGS}
    return {log: runs for log, runs in by_log.items() if runs}
