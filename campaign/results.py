"""What campaign.json holds: of every run its settings, its scores over the seeds beside its random control's, and whether
it beats that in what was measured."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.errors import UserError
from ..engine.folder import HELD_OUT, METRICS, read_metrics, read_settings
from ..engine.sealed import read_json
from ..evals import results as kept
from ..evals.page import NOTHING, number
from ..variants import LOGS, documented
from ..variants.analyses import analysis, sentence
from .config import CampaignConfig, Entry

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


def gather(config: CampaignConfig, planned: Sequence[Entry], out: Path, failed: Mapping[str, str]) -> dict[str, Any]:
    """The results of a campaign in `out`, of which `failed` says what went wrong, by the name of a dictionary."""
    labels = dict.fromkeys((one.run, one.condition, one.label) for one in planned)
    trained = {
        label: _of_run(run, condition, [one for one in planned if one.label == label], out, failed)
        for run, condition, label in labels
    }
    found: dict[str, Any] = {"runs": {}, "baselines": {}}
    for run, _, label in labels:
        if run in config.baselines:
            found["baselines"][label] = trained[label]
    for run in config.runs:
        parent = documented(run).trained_as
        for other, condition, label in labels:
            if other == (parent or run):
                name = f"{run}-{condition}" if condition else run
                found["runs"][name] = trained[label] | _identity(run, condition)
                if parent is not None:
                    found["runs"][name]["analysis"] = _analysed(run, trained[label], out)
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
        **found,
    }


def _identity(run: str, condition: str) -> dict[str, Any]:
    log = next((name for name, runs in LOGS.items() if run in runs), None)
    one = documented(run)
    return {"run": run, "title": one.title, "log": log, "condition": condition, "trained_as": one.trained_as}


def _of_run(run: str, condition: str, planned: Sequence[Entry], out: Path, failed: Mapping[str, str]) -> dict[str, Any]:
    settings = read_settings(out / "runs").by_name()[planned[0].name]
    common = _identity(run, condition) | {
        "folders": [f"runs/{one.name}" for one in planned],
        "failed": {one.name: failed[one.name] for one in planned if one.name in failed} or None,
        "activation": settings.sae.activation,
        "d_sae": settings.sae.d_sae,
        "k": settings.sae.k,
        "l1_coefficient": settings.sae.l1_coefficient,
        "lr": settings.train.lr,
        "clip_norm": settings.train.clip_norm,
        "target_l0": settings.train.target_l0,
        "mask": settings.sae.mask.kind,
        "parts": [one["kind"] for one in settings.sae.parts],
    }
    whole = [_of_seed(out / "runs" / one.name) for one in planned if one.name not in failed]
    if not whole:
        return common | dict.fromkeys(("steps", "fvu_first", "fvu_last", *SCORES)) | {
            "scores": {}, "beats_random": None, "why_not": "no seed came through: " + next(iter(failed.values()), "")
        }  # fmt: skip
    scores = {
        name: _over([one["sae"].get(name) for one in whole], [one["random"].get(name) for one in whole])
        for name in dict.fromkeys(key for one in whole for key in one["sae"])
    }
    found = {
        name: scores[name]["mean"] if name in scores else None for name in ("fvu_first", "fvu_last", "loss", *SCORES)
    }
    judged = against_random(scores)
    why_not = "; ".join(judged.unknown if judged.beats is None else judged.below) or None
    return common | {
        "steps": min(one["steps"] for one in whole), "tokens": min(one["tokens"] for one in whole), **found,
        "beats_random": judged.beats, "why_not": why_not, "scores": scores,
    }  # fmt: skip


def _of_seed(folder: Path) -> dict[str, Any]:
    """Scores of one dictionary, and of its random control, by name."""
    metrics, apart = read_metrics(folder), read_metrics(folder, name=HELD_OUT) if (folder / HELD_OUT).is_file() else []
    if not metrics:
        raise UserError(f"campaign: {folder / METRICS} holds no report; the run must be trained again")
    last = metrics[-1]
    found: dict[str, dict[str, float | None]] = {"sae": {"loss": last["loss"]}, "random": {}}
    if "random" in last:
        found["random"]["loss"] = last["random"]["loss"]
    if apart:
        found["sae"] |= {"fvu_first": apart[0]["fvu"], "fvu_last": apart[-1]["fvu"]}
    results = {name: kept.read(folder, name) or {} for name in kept.names(folder)}
    probing = results.get("sparse_probing", {})
    for name, score in SCORES.items():
        result = results.get(score.eval)
        if result and "skipped" not in result:
            found["sae"][name] = at(result, score.path)
            found["random"][name] = _control(result, score.path)
    if probing and "skipped" not in probing:
        ks = ("top_1", "top_2", "top_5")
        found["sae"]["probing_error"] = at(probing, "top_1_error")
        for part, scores in (("sae", probing), ("random", probing.get("controls", {}).get("random", {}))):
            known = [scores[k] for k in ks if scores.get(k) is not None]
            found[part]["probing"] = sum(known) / len(known) if len(known) == len(ks) else None
    return {**found, "steps": last["step"], "tokens": last["tokens"]}


def at(result: Mapping[str, Any], path: str) -> float | None:
    """What lies at a path of names, a number, or None."""
    value: Any = result
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _control(result: Mapping[str, Any], path: str) -> float | None:
    """The random control's figure: under `controls` of the part that has the score."""
    *parts, last = path.split(".")
    for depth in range(len(parts), -1, -1):
        inner: Any = result
        for name in parts[:depth]:
            inner = inner.get(name) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and isinstance(inner.get("controls"), Mapping):
            return at(inner["controls"].get("random", {}), ".".join([*parts[depth:], last]))
    return None


def _analysed(run: str, parent: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """What an analysis finds in the seeds of its run that came through, by figure; or why it finds nothing."""
    folders = [out / folder for folder in parent["folders"] if Path(folder).name not in (parent["failed"] or {})]
    try:
        found = [analysis(run, read_metrics(folder), kept.read(folder, "clusters")) for folder in folders]
    except UserError as reason:
        return {"why_not": str(reason)}
    if not found:
        return {"why_not": f"{parent['run']} failed with every seed"}
    return {name: _summary([one[name] for one in found]) for name in found[0]}


def found_by(run: Mapping[str, Any]) -> str:
    """What an analysis finds, as a sentence: means over seeds with their spread; of positions and steps all that occur."""
    figures: dict[str, Any] = run["analysis"]
    if "why_not" in figures:
        return f"nothing: {figures['why_not']}"

    def text(name: str, of: Mapping[str, Any]) -> str:
        known = [value for value in of["values"] if value is not None]
        if not known:
            return NOTHING
        if name.endswith("_at"):
            return " or ".join(f"{value:g}" for value in dict.fromkeys(known))
        return number(of["mean"], 3) + ("" if of["spread"] is None else f" ± {number(of['spread'], 3)}")

    return sentence(run["run"], {name: text(name, of) for name, of in figures.items()})


def _over(own: Sequence[float | None], random: Sequence[float | None]) -> dict[str, Any]:
    return {**_summary(own), "random": _summary(random)}


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
    found = AgainstRandom([], [], [])
    for name, label in JUDGED.items():
        own, other = (part["mean"] if part else None for part in (scores.get(name), scores.get(name, {}).get("random")))
        if own is None or other is None:
            found.unknown.append(f"{label}{'' if own is None else ' of its random control'} was not measured")
        elif own > other:
            found.above.append(label)
        else:
            error = (scores.get("probing_error") or {}).get("mean") if name == "probing" else None
            near = error is not None and other - own <= error
            close = f", no further apart than the standard error of so few texts ({error:.4f})" if near else ""
            found.below.append(f"{label} is {own:.4f}, the random control's {other:.4f}{close}")
    return found


def read_results(out: Path) -> dict[str, Any]:
    """What campaign.json of a folder holds. Raises UserError if there is none."""
    place = out / RESULTS
    if not place.is_file():
        raise UserError(f"{out} holds no {RESULTS}; the campaign isn't done: go on with --resume --out {out}")
    mend = f"remove it, and temposae campaign --resume --out {out} makes it again"
    return read_json(place, "campaign", mend, keys=dict.fromkeys(("runs", "baselines"), dict))


def logs_of(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The runs of campaign.json by log, each by its name, of logs that have some."""
    by_log = {log: {name: run for name, run in found["runs"].items() if run["log"] == log} for log in LOGS}
    return {log: runs for log, runs in by_log.items() if runs}
