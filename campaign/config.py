"""What a campaign is: which runs, with which seeds and in which conditions, and what is measured of them."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, field_validator

from ..engine.config import Config
from ..engine.errors import UserError, near, shown
from ..engine.parts import reads
from ..engine.sweep import expand
from ..evals.suite import EVALS
from ..variants import BASELINES, RUNS, documented, settings
from ..variants.documented import COMMON
from ..variants.strictness import STRICTNESS, strict

MEASURED = ("core", "sparse_probing", "positions", "unlearning", "scr", "tpp", "clusters")


class CampaignConfig(Config):
    """A campaign, as `campaign.yaml` holds it.

    `runs` of the logs (all unless given) and `baselines` are trained with `seeds` seeds each, 0, 1 and so on. `axes`: lists
    of settings, of which every combination is a condition that all are trained in: settings that may differ between the
    dictionaries of a stream (`engine.sweep`: activation, d_sae, k, l1_coefficient, target_l0), and `strictness` of masks
    (hard, soft, annealed), which leaves runs without a mask as they are. `stream`, `sae` and `train` are settings on top of
    the logs', for all; but the baselines relu, topk and batchtopk keep their activation, and runs with another learning rate
    or L1 coefficient than the logs' usual one keep the ratio (B4 a tenth of `train.lr`). `evals` are measured of each, on
    one in `share` of the usual rows; the commands' `--tokens` makes that up to one in 16 for runs below 65,536 tokens.
    """

    runs: tuple[str, ...] = tuple(RUNS)
    baselines: tuple[str, ...] = tuple(BASELINES)
    seeds: Annotated[int, Field(ge=1, le=1000)] = 1
    axes: dict[str, list[Any]] = {}
    stream: dict[str, Any] = {}
    sae: dict[str, Any] = {}
    train: dict[str, Any] = {}
    evals: tuple[str, ...] = MEASURED
    share: Annotated[int, Field(ge=1, le=1000)] = 1

    @field_validator("runs", "baselines", mode="before")
    @classmethod
    def _all(cls, given: Any, info: Any) -> Any:
        known = RUNS if info.field_name == "runs" else BASELINES
        if given == "all":
            return tuple(known)
        for run in given if isinstance(given, list | tuple) else ():
            if run not in known:
                raise UserError(f"{info.field_name}: {shown(run)} is not allowed; {near(str(run), known)}")
        return given

    @field_validator("evals")
    @classmethod
    def _known(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for name in given:
            if name not in EVALS:
                raise UserError(f"evals: {shown(name)} is not allowed; {near(name, EVALS)}")
        return given if "core" in given else ("core", *given)

    @field_validator("axes")
    @classmethod
    def _strictness(cls, given: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for how in given.get("strictness", ()):
            if how not in STRICTNESS:
                raise UserError(f"axes.strictness: {shown(how)} is not allowed; it must be {', '.join(STRICTNESS)}")
        return given


#: baselines that are an activation: no setting for all runs takes it from them
PLAIN = ("relu", "topk", "batchtopk")
#: what some runs have more or less of than the logs' common ground: so they have beside what is set for all
RELATIVE = (("train", "lr"), ("sae", "l1_coefficient"))
#: all runs at a size that two cores train and measure in minutes; with K in place of L1, so that L0 is the same for all
QUICK: dict[str, Any] = {
    "sae": {"d_sae": 512, "activation": "topk", "k": 16},
    "train": {"tokens": 100_000, "batch": 512, "lr": 4e-3, "held_out_rows": 16},
    "evals": ["core", "sparse_probing"],
    "share": 2,
}


def fitting_share(tokens: int) -> int:
    """`share` for runs of so few tokens that measuring them as usual would take longer than training: up to one in 16."""
    return min(16, max(1, 2**16 // max(1, tokens)))


@dataclass(frozen=True)
class Entry:
    """A dictionary of a campaign: `label` is the run's name with its condition's."""

    name: str
    run: str
    label: str
    condition: str
    seed: int
    sections: dict[str, Any]


def entries(config: CampaignConfig) -> list[Entry]:
    """Every dictionary that is to be trained, by run, condition and seed; analyses have none of their own, but their run
    has."""
    wanted = [*config.baselines, *dict.fromkeys(documented(run).trained_as or run for run in config.runs)]
    found: list[Entry] = []
    for run in wanted:
        base = settings(run, context=config.stream.get("context", 128))
        common = {name: {**base[name], **getattr(config, name)} for name in ("stream", "sae", "train")}
        for section, name in RELATIVE:
            with suppress(TypeError, ValueError):  # what is no number is refused later, by name
                if name in getattr(config, section):
                    common[section][name] = float(common[section][name]) * ratio(run, section, name)
        kept = base["sae"]["activation"] if run in PLAIN else None
        if kept is not None:
            common["sae"]["activation"] = kept
        for condition, sections in _conditions(config, common):
            if kept not in (None, sections["sae"]["activation"]):
                continue
            for seed in range(config.seeds):
                label = f"{run}-{condition}" if condition else run
                name = f"{label}-s{seed}" if config.seeds > 1 else label
                own = {**sections, "train": {**sections["train"], "seed": seed}}
                found.append(Entry(name, run, label, condition, seed, _fitting(own)))
    if any("rows" in reads(one.sections["sae"]) for one in found):
        found = [_in_sequences(one) for one in found]
    return found


def ratio(run: str, section: str, name: str) -> float:
    """A setting of a documented run over that of the logs' common ground."""
    return settings(run)[section][name] / COMMON[section][name]


def _conditions(config: CampaignConfig, common: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    axes = {key: values for key, values in config.axes.items() if key != "strictness"}
    found: list[tuple[str, dict[str, Any]]] = []
    for how in config.axes.get("strictness", [None]):
        mask = None if how is None else strict(common["sae"].get("mask", {}), how)
        sections = common if mask is None else {**common, "sae": {**common["sae"], "mask": mask}}
        if how is not None and mask is None and how != config.axes["strictness"][0]:
            continue  # without a mask there is one condition
        named = expand({**sections, "sweep": axes}) if axes else {"": sections}
        for label, each in named.items():
            condition = "_".join(part for part in (how if mask is not None else None, label) if part)
            found.append((condition, each))
    return found


def _fitting(sections: dict[str, Any]) -> dict[str, Any]:
    """Without what is only for other activations, where it was given for all runs."""
    train, activation = dict(sections["train"]), sections["sae"].get("activation")
    if activation not in ("relu", "jumprelu"):
        train.pop("target_l0", None)
    if activation not in ("topk", "batchtopk"):
        train.pop("k_start", None)
    return {**sections, "train": train}


def _in_sequences(entry: Entry) -> Entry:
    """Some runs look along rows, so all get whole rows: they are compared on the same batches."""
    given: Mapping[str, Any] = entry.sections["stream"]
    mode = given.get("mode", "sequences")
    if mode != "sequences":
        raise UserError(f"stream.mode: {mode} is not allowed; some of the runs look along rows, it must be sequences")
    return Entry(**{**vars(entry), "sections": {**entry.sections, "stream": {**given, "mode": "sequences"}}})
