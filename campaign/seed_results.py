"""The saved numbers of a campaign's folder, per run and seed, as figures need them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.storage.run_folder import CONFIG, METRICS, read_metrics, read_sealed_yaml
from ..evals import result_files
from .documented import documented
from .results import logs_of, read_results, value_at

#: by the first name of a path in metrics.jsonl: why it may be missing
WHY_NOT = {
    "positions": "its metrics have no losses by position (train.log_positions was off)",
    "parts": "it was trained without the part position_tracker",
}


class NotMeasured(Exception):
    """The numbers of a figure or panel were not measured. The text is the reason."""


Seeds = tuple[float, ...]  # the values of the seeds that have one


@dataclass(frozen=True)
class Curve:
    """Values [seeds, S, ...] at steps [S] that all seeds have. NaN: no value."""

    steps: np.ndarray
    of_seeds: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return self.over("mean")

    def __getitem__(self, step_index: int) -> "Curve":
        """At one of the steps, with positions in place of steps: [seeds, T]."""
        values = self.of_seeds[:, step_index]
        return Curve(np.arange(values.shape[1]), values)

    def over(self, reduction: str) -> np.ndarray:
        """The "mean", "min" or "max" over seeds."""
        known = np.ma.masked_invalid(self.of_seeds)
        return np.ma.filled(getattr(known, reduction)(axis=0), np.nan)  # nanmean would warn where no seed has a value


class CampaignResults:
    """A campaign's saved numbers.

    `campaign` is campaign.json. `baselines`, and `logs` by log, are its entries by run, each in the first condition that the
    run has.
    """

    def __init__(self, out: Path):
        self.out = out
        self.campaign: dict[str, Any] = read_results(out)
        self.logs = {log: _first(runs) for log, runs in logs_of(self.campaign).items()}
        self.baselines = _first(self.campaign["baselines"])

    def trained(self, log: str) -> dict[str, dict[str, Any]]:
        """The runs of a log that have weights of their own. In place of an analysis, the run that it analyses."""
        run_by_name: dict[str, dict[str, Any]] = {}
        for run in self.logs[log].values():
            name = run["trained_as"]
            if name is None:
                run_by_name[run["run"]] = run
            elif name not in self.logs[log]:
                run_by_name[name] = run | {"run": name, "title": documented(name).title}
        return dict(sorted(run_by_name.items(), key=lambda item: (len(item[0]), item[0])))

    def runs_of(self, log: str) -> dict[str, dict[str, Any]]:
        """The baselines, then the runs of a log that have weights of their own."""
        return self.baselines | self.trained(log)

    def weights_of(self, name: str) -> dict[str, Any]:
        """The run with these weights. Raises NotMeasured if the campaign has none."""
        run = self.trained(name[0]).get(name) if name[0] in self.logs else None
        if run is None:
            raise NotMeasured(f"it shows {name}, which this campaign has not trained")
        return run

    def folders(self, run: Mapping[str, Any]) -> list[Path]:
        """The folders of the seeds that did not fail. Raises NotMeasured if one is missing."""
        return [self._folder(name) for name in run["folders"] if Path(name).name not in (run["failed"] or {})]

    def settings(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """The sections of config.yaml of the first seed."""
        return read_sealed_yaml(self._folder(run["folders"][0]) / CONFIG)

    def _folder(self, name: str) -> Path:
        if not (self.out / name).is_dir():
            raise NotMeasured(f"the campaign's folder has no {name}")
        return self.out / name

    def curve(self, run: Mapping[str, Any], *path: str, file: str = METRICS) -> Curve:
        """The value at a path of names in every report of a run."""
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

    def steps(self, run: Mapping[str, Any]) -> Seeds:
        """The last step of every seed, failed ones included."""
        metrics = [read_metrics(self.out / folder) for folder in run["folders"]]
        return tuple(float(lines[-1]["step"]) for lines in metrics if lines)

    def results(self, run: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
        """An eval's results of every seed."""
        measured = [result_files.read(folder, name) for folder in self.folders(run)]
        complete = [result for result in measured if result is not None and "skipped" not in result]
        if not complete:
            raise NotMeasured(f"{name} was not measured of {run['run']}")
        return complete

    def per_position(self, run: Mapping[str, Any], name: str) -> Curve:
        """A result of core at each position."""
        results = self.results(run, "core")
        values = np.array([result["per_position"][name] for result in results], dtype=float)
        return Curve(np.array(results[0]["per_position"]["position"]), values)


def score(run: Mapping[str, Any], name: str) -> tuple[Seeds, Seeds]:
    """A score of a run's seeds, and of their random controls."""
    values, random = (value_at(run["scores"], path) or () for path in ((name, "values"), (name, "random", "values")))
    return tuple(v for v in values if v is not None), tuple(v for v in random if v is not None)


def final_fvu(run: Mapping[str, Any]) -> Seeds:
    """Final FVU on held-out text: from core, else the last value in training."""
    explained, _ = score(run, "explained_variance")
    return tuple(1 - value for value in explained) or score(run, "fvu_last")[0]


def _first(runs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each run in its first condition. Runs without a mask have no condition of strictness, so this differs between runs."""
    first_runs: dict[str, dict[str, Any]] = {}
    for run in runs.values():
        first_runs.setdefault(run["run"], run)
    return first_runs
