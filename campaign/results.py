"""campaign.json: the settings of every run, its scores over seeds beside its random control's, and whether it beats that
control."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.errors import UserError
from ..engine.storage.run_folder import HELD_OUT, METRICS, read_metrics, read_settings
from ..engine.storage.sealed import read_json
from ..evals import result_files
from ..reporting.markdown import number
from .analyses import LABELS, analysis
from .config import CampaignConfig, CampaignRun
from .documented import LOGS, documented

FORMAT = "temposae-campaign/2"
RESULTS = "campaign.json"


@dataclass(frozen=True)
class Score:
    """A score of a dictionary: its name, the eval that measures it, its path in the eval's result, and its meaning.

    `better` is 1 if more is better, -1 if less is, and 0 if neither is.
    """

    name: str
    eval: str
    path: str
    meaning: str
    better: int = 1


#: by their names in campaign.json, in the order of tables
SCORES = {
    "explained_variance": Score("Explained variance", "core", "explained_variance", "1 - FVU on held-out text"),
    "ce_recovered": Score(
        "CE recovered", "core", "ce_recovered", "share recovered of the cross-entropy lost to zero ablation"
    ),
    "l0": Score("L0", "core", "l0", "latents active per token", 0),
    "dead_fraction": Score("Dead latents", "core", "dead_fraction", "share of latents that never fire, less is better", -1),
    "probing_1": Score("Sparse probing top 1", "sparse_probing", "top_1", "probe accuracy on the best latent, chance 0.5"),
    "probing_5": Score("Sparse probing top 5", "sparse_probing", "top_5", "probe accuracy on the 5 best, chance 0.5"),
    "order_pooled": Score(
        "Order probing mean-pooled", "positions", "order_probing.mean_pooled",
        "probe accuracy on word order, from the mean of latents over tokens",
    ),
    "order_last": Score(
        "Order probing last token", "positions", "order_probing.last_token",
        "probe accuracy on word order, from the last token's latents",
    ),
    "unlearning": Score(
        "Unlearning", "unlearning", "score", "share of a subject's answers changed while 99% of the others are kept"
    ),
    "scr": Score("SCR", "scr", "score", "share of a spurious correlation removed by ablating its latents"),
    "tpp": Score("TPP", "tpp", "score", "accuracy that a class loses with its latents, minus what other classes lose"),
    "specialization": Score(
        "Specialization", "positions", "specialization", "how far position determines whether a latent is active", 0
    ),
    "agreement": Score(
        "Agreement", "positions", "agreement.value",
        "correlation of latents with their matches in the plain baseline of the same seed, by mass (not compared: 1 for the "
        "baseline)", 0,
    ),
    "agreement_same_recipe": Score(
        "Agreement (same recipe)", "positions", "agreement.same_recipe.value",
        "the same between two seeds of the plain baseline: as much as can be expected", 0,
    ),
    "agreement_shuffled": Score(
        "Agreement (shuffled)", "positions", "agreement.shuffled.value",
        "the same with the run's activations permuted over tokens: what unrelated latents reach", 0,
    ),
    "fidelity": Score(
        "Fidelity", "positions", "fidelity.snr.worst", "SNR of the reconstruction (dB) in the worst bin of positions"
    ),
}  # fmt: skip
#: the scores in which a run is compared with its random control
JUDGED = {"explained_variance": "explained variance", "probing": "sparse probing"}


def gather(
    config: CampaignConfig, planned: Sequence[CampaignRun], out: Path, failed: Mapping[str, str]
) -> dict[str, Any]:
    """Collect the results of a campaign in `out`. `failed` has the reason of each dictionary that failed, by name."""
    seeds_by_label: dict[str, list[CampaignRun]] = {}
    for campaign_run in planned:
        seeds_by_label.setdefault(campaign_run.label, []).append(campaign_run)
    trained = {label: _run_results(seeds, out, failed) for label, seeds in seeds_by_label.items()}
    runs: dict[str, Any] = {}
    for run in config.runs:
        parent = documented(run).trained_as
        for results in trained.values():
            if results["run"] == (parent or run):
                condition = results["condition"]
                name = f"{run}-{condition}" if condition else run
                runs[name] = results | _identity(run, condition)
                if parent is not None:
                    runs[name]["analysis"] = _analysed(run, results, out)
    stream = next(iter(read_settings(out / "runs").by_name().values())).stream
    return {
        "format": FORMAT, "model": stream.model, "hook": stream.hook, "seeds": config.seeds,
        "conditions": list(dict.fromkeys(results["condition"] for results in trained.values())),
        "evals": list(config.evals), "share": config.share, "runs": runs,
        "baselines": {label: results for label, results in trained.items() if results["run"] in config.baselines},
    }  # fmt: skip


def _identity(run: str, condition: str) -> dict[str, Any]:
    log, definition = next((name for name, runs in LOGS.items() if run in runs), None), documented(run)
    return {
        "run": run, "title": definition.title, "log": log, "condition": condition, "trained_as": definition.trained_as
    }  # fmt: skip


def _run_results(planned: Sequence[CampaignRun], out: Path, failed: Mapping[str, str]) -> dict[str, Any]:
    """The entry of a run in campaign.json. `planned` has one item per seed."""
    names, first = [campaign_run.name for campaign_run in planned], planned[0]
    settings = read_settings(out / "runs").by_name()[first.name]
    common = _identity(first.run, first.condition) | {
        "folders": [f"runs/{name}" for name in names],
        "failed": {name: failed[name] for name in names if name in failed} or None,
        "activation": settings.sae.activation, "d_sae": settings.sae.d_sae, "k": settings.sae.k,
        "l1_coefficient": settings.sae.l1_coefficient, "lr": settings.train.lr, "clip_norm": settings.train.clip_norm,
        "target_l0": settings.train.target_l0, "mask": settings.sae.mask.kind,
        "parts": [section["kind"] for section in settings.sae.parts],
    }  # fmt: skip
    seeds = [_seed_results(out / "runs" / name) for name in names if name not in failed]
    if not seeds:
        return common | dict.fromkeys(("steps", "fvu_first", "fvu_last", *SCORES)) | {
            "scores": {}, "beats_random": None, "why_not": "every seed failed: " + next(iter(failed.values()), "")
        }  # fmt: skip
    scores = {
        name: _summary([seed["sae"].get(name) for seed in seeds])
        | {"random": _summary([seed["random"].get(name) for seed in seeds])}
        for name in dict.fromkeys(key for seed in seeds for key in seed["sae"])
    }
    summed = ("fvu_first", "fvu_last", "loss", *SCORES)
    comparison = against_random(scores)
    return common | {
        "steps": min(seed["steps"] for seed in seeds), "tokens": min(seed["tokens"] for seed in seeds),
        **{name: scores[name]["mean"] if name in scores else None for name in summed},
        "beats_random": comparison.beats,
        "why_not": "; ".join(comparison.unknown if comparison.beats is None else comparison.below) or None,
        "scores": scores,
    }  # fmt: skip


def _seed_results(folder: Path) -> dict[str, Any]:
    """The scores of one dictionary and of its random control, by name."""
    metrics = read_metrics(folder)
    held_out = read_metrics(folder, name=HELD_OUT) if (folder / HELD_OUT).is_file() else []
    if not metrics:
        raise UserError(f"campaign: {folder / METRICS} has no report; train the run again")
    last = metrics[-1]
    trained: dict[str, float | None] = {"loss": last["loss"]}
    random: dict[str, float | None] = {"loss": last["random"]["loss"]} if "random" in last else {}
    if held_out:
        trained |= {"fvu_first": held_out[0]["fvu"], "fvu_last": held_out[-1]["fvu"]}
    results = {name: result_files.read(folder, name) or {} for name in result_files.names(folder)}
    probing = results.get("sparse_probing", {})
    for name, score in SCORES.items():
        result = results.get(score.eval)
        if result and "skipped" not in result:
            trained[name], random[name] = _number_at(result, score.path), _control(result, score.path)
    if probing and "skipped" not in probing:
        # of the embedded language's sets, only topics separate a trained dictionary from a random one (docs/evals.md)
        probing = probing.get("sets", {}).get("topic", probing)
        trained["probing_error"] = _number_at(probing, "top_1_error")
        for scores, result in ((trained, probing), (random, probing.get("controls", {}).get("random", {}))):
            accuracies = [result[k] for k in ("top_1", "top_2", "top_5") if result.get(k) is not None]
            scores["probing"] = sum(accuracies) / 3 if len(accuracies) == 3 else None
    return {"sae": trained, "random": random, "steps": last["step"], "tokens": last["tokens"]}


def value_at(value: Any, path: Sequence[str]) -> Any:
    """The value at a path of names in nested mappings, or None."""
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _number_at(result: Mapping[str, Any], path: str) -> float | None:
    value = value_at(result, path.split("."))
    return float(value) if isinstance(value, int | float) else None


def _control(result: Mapping[str, Any], path: str) -> float | None:
    """The random control's value of a score, from the innermost `controls` around the score."""
    *names, last = path.split(".")
    for depth in range(len(names), -1, -1):
        controls = value_at(result, [*names[:depth], "controls"])
        if isinstance(controls, Mapping):
            return _number_at(controls.get("random", {}), ".".join([*names[depth:], last]))
    return None


def _analysed(run: str, parent: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The results of an analysis by name, over the seeds that did not fail, or the reason why there are none."""
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


def analysis_figures(run: Mapping[str, Any]) -> dict[str, str]:
    """The results of an analysis as text, by label: mean ± standard deviation, or every position or step that a seed has.

    An analysis without results has the reason as "not measured".
    """
    if "why_not" in run["analysis"]:
        return {"not measured": run["analysis"]["why_not"]}

    def text(name: str, figure: Mapping[str, Any]) -> str:
        known = [value for value in figure["values"] if value is not None]
        if known and name.endswith("_at"):
            return " or ".join(f"{value:g}" for value in dict.fromkeys(known))
        return number(figure["mean"], 3) + ("" if figure["spread"] is None else f" ± {number(figure['spread'], 3)}")

    return {label: text(name, run["analysis"][name]) for name, label in LABELS[run["run"]].items()}


def _summary(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, spread (standard deviation, of two values or more) and values, None left out."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "spread": statistics.stdev(known) if len(known) > 1 else None,
        "values": list(values),
    }


class AgainstRandom(NamedTuple):
    """A run beside its random control: the scores in which it is above, and a sentence for each in which it is not and for
    each that was not measured of both."""

    above: list[str]
    below: list[str]
    unknown: list[str]

    @property
    def beats(self) -> bool | None:
        """Whether the run is above in every measured score; None if there is none."""
        return not self.below if self.above or self.below else None


def against_random(scores: Mapping[str, Any]) -> AgainstRandom:
    """Compare a run's scores in campaign.json with its random control's, by the means over seeds of explained variance and
    of sparse probing (mean of top 1, 2 and 5; on the embedded language, of topics)."""
    comparison = AgainstRandom([], [], [])
    for name, label in JUDGED.items():
        value, control = (value_at(scores, path) for path in ((name, "mean"), (name, "random", "mean")))
        if value is None or control is None:
            comparison.unknown.append(f"{label}{'' if value is None else ' of its random control'} was not measured")
        elif value > control:
            comparison.above.append(label)
        else:
            error = value_at(scores, ("probing_error", "mean")) if name == "probing" else None
            is_close = error is not None and control - value <= error
            close = f", within the standard error of so few texts ({error:.4f})" if is_close else ""
            comparison.below.append(f"{label} is {value:.4f}, the random control's {control:.4f}{close}")
    return comparison


def read_results(out: Path) -> dict[str, Any]:
    """Read campaign.json of a folder. Raises UserError if it is missing or damaged, or of another version."""
    path = out / RESULTS
    if not path.is_file():
        raise UserError(f"{out} has no {RESULTS}; the campaign is not finished, continue it with --resume --out {out}")
    remedy = f"remove it, and temposae campaign --resume --out {out} makes it again"
    return read_json(path, "campaign", remedy, form=FORMAT, keys=dict.fromkeys(("runs", "baselines"), dict))


def logs_of(campaign: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The runs of campaign.json by log and name."""
    by_log = {log: {name: run for name, run in campaign["runs"].items() if run["log"] == log} for log in LOGS}
    return {log: runs for log, runs in by_log.items() if runs}
