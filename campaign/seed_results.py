"""What a campaign's folder holds, as its figures need it: of every run the numbers of all its seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.storage.run_folder import CONFIG, METRICS, read_metrics, read_sealed_yaml
from ..evals import result_files
from .documented import documented
from .results import logs_of, read_results, value_at

#: by the first name of a path in metrics.jsonl: why it may not be there
WHY_NOT = {
    "positions": "its metrics don't tell losses by position (train.log_positions was off)",
    "parts": "it was trained without the part position_tracker",
}


class NotMeasured(Exception):
    """What a figure, or a panel of one, would show was not measured; the text says why."""


@dataclass(frozen=True)
class SeedValues:
    """A figure of each seed, those without one left out: with the mean, and the least and largest as spread."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "SeedValues":
        return cls(tuple(value for value in values if value is not None))

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def reach(self) -> tuple[float, float]:
        """How far down from the mean, and up, the seeds lie."""
        return self.mean - min(self.values), max(self.values) - self.mean

    def __bool__(self) -> bool:
        return bool(self.values)


@dataclass(frozen=True)
class Curve:
    """Values [seeds, S, ...] at the same steps [S] of every seed; NaN where there is none."""

    steps: np.ndarray
    of_seeds: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return self._over("mean")

    @property
    def low(self) -> np.ndarray:
        return self._over("min")

    @property
    def high(self) -> np.ndarray:
        return self._over("max")

    def __getitem__(self, step_index: int) -> "Curve":
        """At one of the steps, as if positions were steps: [seeds, T]."""
        values = self.of_seeds[:, step_index]
        return Curve(np.arange(values.shape[1]), values)

    def _over(self, reduction: str) -> np.ndarray:
        known = np.ma.masked_invalid(self.of_seeds)
        return np.ma.filled(getattr(known, reduction)(axis=0), np.nan)  # nanmean would warn where no seed has a value


class CampaignResults:
    """A campaign's saved numbers. `logs` and `baselines` hold of every run, by its name, the part of campaign.json in the
    first condition that the run has; `campaign` is all of it."""

    def __init__(self, out: Path):
        self.out = out
        self.campaign: dict[str, Any] = read_results(out)
        self.logs = {log: _first(runs) for log, runs in logs_of(self.campaign).items()}
        self.baselines = _first(self.campaign["baselines"])

    def trained(self, log: str) -> dict[str, dict[str, Any]]:
        """The runs of a log that have weights of their own; in an analysis' place the run that it looks at."""
        run_by_name: dict[str, dict[str, Any]] = {}
        for run in self.logs[log].values():
            name = run["trained_as"]
            if name is None:
                run_by_name[run["run"]] = run
            elif name not in self.logs[log]:
                run_by_name[name] = run | {"run": name, "title": documented(name).title}
        return dict(sorted(run_by_name.items(), key=lambda item: (len(item[0]), item[0])))

    def weights_of(self, name: str) -> dict[str, Any]:
        """The run whose weights are those of this one. Raises Lacking where the campaign has none."""
        run = self.trained(name[0]).get(name) if name[0] in self.logs else None
        if run is None:
            raise NotMeasured(f"it shows {name}, which this campaign has not trained")
        return run

    def folders(self, run: Mapping[str, Any]) -> list[Path]:
        """Of every seed that came through."""
        folders = [self.out / folder for folder in run["folders"]]
        return [folder for folder in folders if folder.name not in (run["failed"] or {})]

    def settings(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Those of its first seed, by section, as config.yaml has them."""
        return read_sealed_yaml(self.out / run["folders"][0] / CONFIG)

    def curve(self, run: Mapping[str, Any], *path: str, file: str = METRICS) -> Curve:
        """What every report of a run says at a path of names."""
        seeds: list[dict[int, Any]] = []
        for folder in self.folders(run):
            lines = {line["step"]: value_at(line, path) for line in read_metrics(folder, name=file)}
            seeds.append({step: value for step, value in lines.items() if value is not None})
        if not seeds:
            raise NotMeasured(f"{run['run']} failed with every seed")
        steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
        if not steps:
            raise NotMeasured(f"{run['run']}: {WHY_NOT.get(path[0], f'{file} has no {path[0]}')}")
        return Curve(np.array(steps), np.array([[seed[step] for step in steps] for seed in seeds], dtype=float))

    def steps(self, run: Mapping[str, Any]) -> SeedValues:
        """How many every seed has come to, also of those that failed."""
        metrics = [read_metrics(self.out / folder) for folder in run["folders"]]
        return SeedValues(tuple(float(lines[-1]["step"]) for lines in metrics if lines))

    def results(self, run: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
        """What an eval found, of every seed."""
        measured = [result_files.read(folder, name) for folder in self.folders(run)]
        complete = [result for result in measured if result is not None and "skipped" not in result]
        if not complete:
            raise NotMeasured(f"{name} was not measured of {run['run']}")
        return complete

    def per_position(self, run: Mapping[str, Any], name: str) -> Curve:
        """What core found at each position."""
        results = self.results(run, "core")
        values = np.array([result["per_position"][name] for result in results], dtype=float)
        return Curve(np.array(results[0]["per_position"]["position"]), values)


def score(run: Mapping[str, Any], name: str) -> tuple[SeedValues, SeedValues]:
    """A score of a run's seeds, and of their random controls."""
    figures = run["scores"].get(name)
    if figures is None:
        return SeedValues(()), SeedValues(())
    return SeedValues.of(figures["values"]), SeedValues.of((figures["random"] or {"values": ()})["values"])


def final_fvu(run: Mapping[str, Any]) -> SeedValues:
    """FVU on held-out text at the end: as core has it, or as training had it last."""
    explained, _ = score(run, "explained_variance")
    return SeedValues(tuple(1 - value for value in explained.values)) if explained else score(run, "fvu_last")[0]


def _first(runs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The first condition of each: a run without a mask has none of strictness, so conditions differ from run to run."""
    first_runs: dict[str, dict[str, Any]] = {}
    for run in runs.values():
        first_runs.setdefault(run["run"], run)
    return first_runs
