"""A campaign's settings: its runs, seeds, conditions and evals, and the dictionaries that follow from them."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field, field_validator

from ..engine.config import Config
from ..engine.errors import UserError, check_known
from ..engine.registry import reads
from ..engine.sweep import expand
from ..evals.suite import EVALS
from .documented import BASELINES, RUNS, documented, settings
from .documented.documented_run import COMMON
from .documented.strictness import STRICTNESS, strict

MEASURED = ("core", "sparse_probing", "positions", "unlearning", "scr", "tpp", "clusters")


class CampaignConfig(Config):
    """Settings of a campaign, as in `campaign.yaml`: documented runs and baselines, each in every condition with every seed.

    All are trained on the batches [N, D] of one stream and measured in the same way. Raises UserError for a wrong value.

        CampaignConfig(runs=("A1", "A2"), seeds=3, axes={"activation": ["relu", "topk"]})
    """

    runs: tuple[str, ...] = Field(
        default=tuple(RUNS), description="Documented runs to train, by name, or all (docs/variants.md)."
    )
    baselines: tuple[str, ...] = Field(
        default=tuple(BASELINES), description="Plain dictionaries to train beside the runs, by name, or all."
    )
    seeds: int = Field(default=1, ge=1, le=1000, description="Number of seeds per run: 0, 1 and so on.")
    axes: dict[str, list[Any]] = Field(
        default={},
        description="Lists of settings. All runs are trained in every combination, called a condition. Allowed are "
        "settings that may differ between dictionaries of one stream (activation, d_sae, k, l1_coefficient, "
        "target_l0, mask.*) and the strictness of masks (hard, soft, annealed).",
    )
    stream: dict[str, Any] = Field(
        default={}, description="Settings of the stream. They replace those of the documented runs."
    )
    sae: dict[str, Any] = Field(
        default={},
        description="Settings of all dictionaries. They replace those of the documented runs. The baselines relu, topk "
        "and batchtopk keep their activation, and each run its ratio to the logs' L1 coefficient.",
    )
    train: dict[str, Any] = Field(
        default={},
        description="Settings of training. They replace those of the documented runs. B4 keeps a tenth of the learning "
        "rate.",
    )
    evals: tuple[str, ...] = Field(default=MEASURED, description="Evals of each dictionary. core is always included.")
    share: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Evals use one in this many of the usual rows. The option --tokens raises it, up to 16, for runs "
        "below 65,536 tokens.",
    )

    @field_validator("runs", "baselines", mode="before")
    @classmethod
    def _all(cls, runs: Any, info: Any) -> Any:
        known = RUNS if info.field_name == "runs" else BASELINES
        if runs == "all":
            return tuple(known)
        for name in runs if isinstance(runs, list | tuple) else ():
            check_known(info.field_name, name, known)
        return runs

    @field_validator("evals")
    @classmethod
    def _known(cls, evals: tuple[str, ...]) -> tuple[str, ...]:
        for name in evals:
            check_known("evals", name, EVALS)
        return evals if "core" in evals else ("core", *evals)

    @field_validator("axes")
    @classmethod
    def _strictness(cls, axes: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for strictness in axes.get("strictness", ()):
            check_known("axes.strictness", strictness, STRICTNESS)
        return axes


#: baselines that keep their activation whatever is set for all runs
PLAIN = ("relu", "topk", "batchtopk")
#: settings in which some runs keep their ratio to the logs' common value when it is set for all
RELATIVE = (("train", "lr"), ("sae", "l1_coefficient"))
#: all runs, small enough to train and measure on two cores in minutes; TopK gives all the same L0
QUICK: dict[str, Any] = {
    "sae": {"d_sae": 512, "activation": "topk", "k": 16},
    "train": {"tokens": 100_000, "batch": 512, "lr": 4e-3, "held_out_rows": 16},
    "evals": ["core", "sparse_probing"],
    "share": 2,
}


def fitting_share(tokens: int) -> int:
    """The `share` for short runs, where usual evals would take longer than training: up to one in 16."""
    return min(16, max(1, 2**16 // max(1, tokens)))


@dataclass(frozen=True)
class CampaignRun:
    """A dictionary of a campaign. `label` is its run and condition, `name` the label and the seed."""

    name: str
    run: str
    label: str
    condition: str
    seed: int
    sections: dict[str, Any]


def entries(config: CampaignConfig) -> list[CampaignRun]:
    """List every dictionary to train, by run, condition and seed. For an analysis, it is that of the run it analyses."""
    run_names = [*config.baselines, *dict.fromkeys(documented(run).trained_as or run for run in config.runs)]
    campaign_runs: list[CampaignRun] = []
    for run in run_names:
        base = settings(run, context=config.stream.get("context", 128))
        common = {name: {**base[name], **getattr(config, name)} for name in ("stream", "sae", "train")}
        for section, name in RELATIVE:
            with suppress(TypeError, ValueError):  # a later check names a value that is not a number
                if name in getattr(config, section):
                    common[section][name] = float(common[section][name]) * ratio(run, section, name)
        fixed_activation = base["sae"]["activation"] if run in PLAIN else None
        if fixed_activation is not None:
            common["sae"]["activation"] = fixed_activation
        for condition, sections in _conditions(config, common):
            if fixed_activation not in (None, sections["sae"]["activation"]):
                continue
            for seed in range(config.seeds):
                label = f"{run}-{condition}" if condition else run
                name = f"{label}-s{seed}" if config.seeds > 1 else label
                seeded_sections = {**sections, "train": {**sections["train"], "seed": seed}}
                campaign_runs.append(CampaignRun(name, run, label, condition, seed, _fitting(seeded_sections)))
    if any("rows" in reads(campaign_run.sections["sae"]) for campaign_run in campaign_runs):
        campaign_runs = [_in_sequences(campaign_run) for campaign_run in campaign_runs]
    return campaign_runs


def ratio(run: str, section: str, name: str) -> float:
    """A documented run's setting over the logs' common value."""
    return settings(run)[section][name] / COMMON[section][name]


def _conditions(config: CampaignConfig, common: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    axes = {key: values for key, values in config.axes.items() if key != "strictness"}
    conditions: list[tuple[str, dict[str, Any]]] = []
    for strictness in config.axes.get("strictness", [None]):
        mask = None if strictness is None else strict(common["sae"].get("mask", {}), strictness)
        sections = common if mask is None else {**common, "sae": {**common["sae"], "mask": mask}}
        if strictness is not None and mask is None and strictness != config.axes["strictness"][0]:
            continue  # without a mask there is one condition
        named = expand({**sections, "sweep": axes}) if axes else {"": sections}
        for label, condition_sections in named.items():
            condition = "_".join(word for word in (strictness if mask is not None else None, label) if word)
            conditions.append((condition, condition_sections))
    return conditions


def _fitting(sections: dict[str, Any]) -> dict[str, Any]:
    """Remove settings for all runs that apply to other activations only."""
    train, activation = dict(sections["train"]), sections["sae"].get("activation")
    if activation not in ("relu", "jumprelu"):
        train.pop("target_l0", None)
    if activation not in ("topk", "batchtopk"):
        train.pop("k_start", None)
    return {**sections, "train": train}


def _in_sequences(entry: CampaignRun) -> CampaignRun:
    """Give a run whole rows, which some runs need, so that all are compared on the same batches."""
    stream: Mapping[str, Any] = entry.sections["stream"]
    mode = stream.get("mode", "sequences")
    if mode != "sequences":
        raise UserError(f"stream.mode: {mode} is not allowed; some of the runs need whole rows, it must be sequences")
    return replace(entry, sections={**entry.sections, "stream": {**stream, "mode": "sequences"}})
