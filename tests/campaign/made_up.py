"""A campaign's folder with numbers that were made up, in the form in which a campaign leaves them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

BASELINES = {"relu": "ReLU + L1 (run 0 of every log)", "topk": "TopK", "batchtopk": "BatchTopK"}
ANALYSES = {"C3": "C2", "C4": "C2", "C7": "C6", "C8": "C6", "C9": "C6"}
ADAPTIVE = ("C5", "C6")
T, F, STEPS, EVERY, BINS = 12, 40, 100, 10, 16
NAMES = ("explained_variance", "l0", "dead_fraction", "unlearning", "fvu_last", "loss")


def campaign(
    out: Path, runs: dict[str, str], *, seeds: int = 1, conditions: tuple[str, ...] = ("",), positions: int = T,
    evals: tuple[str, ...] = ("core", "unlearning", "clusters"), failed: tuple[str, ...] = (), tracked: bool = True,
) -> Path:  # fmt: skip
    """Write runs of these names and titles, and the baselines, to `out`; folders that are named in `failed` have failed."""
    found: dict[str, Any] = {"runs": {}, "baselines": {}}
    for name, title in {**BASELINES, **runs}.items():
        for condition in conditions:
            trained = ANALYSES.get(name, name)
            label, own = (f"{one}-{condition}" if condition else one for one in (name, trained))
            folders = [f"runs/{own}-s{seed}" if seeds > 1 else f"runs/{own}" for seed in range(seeds)]
            bad = {folder[5:]: "nan in the loss" for folder in folders if folder[5:] in failed}
            values = [
                _folder(out / folder, trained, seed, positions, evals, tracked) for seed, folder in enumerate(folders)
            ]
            good = [value for value, folder in zip(values, folders, strict=True) if folder[5:] not in bad]
            scores = {
                key: _summary([one[key] for one in good]) | {"random": _summary([one[f"random {key}"] for one in good])}
                for key in (NAMES if good else ())
                if (key != "unlearning" or key in evals)
                and (key not in ("l0", "explained_variance") or "core" in evals)
            }
            found["baselines" if name in BASELINES else "runs"][label] = {
                "run": name, "title": title, "log": None if name in BASELINES else name[0], "condition": condition,
                "trained_as": ANALYSES.get(name), "folders": folders, "failed": bad or None,
                "activation": name if name in ("topk", "batchtopk") else "relu", "d_sae": F, "k": 4,
                "l1_coefficient": 0.2 if name == "A3" else 0.04, "lr": 3e-5 if name == "B4" else 3e-4, "target_l0": 4.0,
                "scores": scores,
            }  # fmt: skip
    found |= {"format": "temposae-campaign/2", "seeds": seeds, "conditions": list(conditions), "evals": list(evals)}
    (out / "campaign.json").write_text(json.dumps(found))
    (out / "campaign.yaml").write_text(yaml.safe_dump({"runs": [], "seeds": seeds}))
    return out


def numbers(run: str, seed: int) -> dict[str, float]:
    """The scores that a run is given."""
    draw = np.random.default_rng([*map(ord, run)])
    level, apart = draw.uniform(0.02, 0.15), np.random.default_rng([*map(ord, run), seed]).uniform(-1, 1)
    fvu = level * (1 + 0.15 * apart)
    return {
        "explained_variance": 1 - fvu, "random explained_variance": 0.35 + level + 0.05 * apart,
        "l0": 4 + 0.4 * apart, "random l0": 4.2, "dead_fraction": 0.25 * level * (2 + apart), "random dead_fraction": 0.0,
        "unlearning": 2 * level + 0.02 * apart, "random unlearning": 0.03 + 0.01 * apart,
        "fvu_last": fvu, "random fvu_last": 0.5, "loss": 20 + 9 * apart, "random loss": 50.0,
    }  # fmt: skip


def by_position(run: str, seed: int, positions: int, step: int) -> np.ndarray:
    """The squared error at each position; the first has no tokens."""
    rough = np.random.default_rng([seed, step, *map(ord, run)]).uniform(0.9, 1.1, positions)
    found = (6 + 30 / (1 + np.arange(positions))) * (0.3 + np.exp(-step / 40)) * rough
    found[0] = np.nan
    return found


def weights(run: str, seed: int, positions: int, step: int) -> np.ndarray:
    if run not in ADAPTIVE:
        return np.ones(positions)
    end = 0.3 + 3 / (1 + np.arange(positions)) + 0.05 * seed
    end /= end.mean()
    return 1 + (end - 1) * (1 - np.exp(-step / 25))


def curve(run: str, seed: int) -> list[tuple[int, float]]:
    last = numbers(run, seed)["fvu_last"]
    return [(step, float(last + (0.9 - last) * np.exp(-step / 12))) for step in range(0, STEPS + 1, EVERY)]


def _folder(
    folder: Path, run: str, seed: int, positions: int, evals: tuple[str, ...], tracked: bool
) -> dict[str, float]:
    found = numbers(run, seed)
    if folder.exists():
        return found
    (folder / "evals").mkdir(parents=True)
    part: dict[str, Any] = {"kind": "range_adapters", "pace": 0.3, "l1_from": 0.5} if run == "B10" else {"kind": "none"}
    train = {"tokens": STEPS * 8, "batch": 8}
    (folder / "config.yaml").write_text(yaml.safe_dump({"sae": {"parts": [part]}, "train": train}))
    lines = []
    for step in range(EVERY, STEPS + 1, EVERY):
        line: dict[str, Any] = {"step": step, "tokens": 8 * step, "loss": found["loss"], "fvu": found["fvu_last"] * 1.1}
        line |= {"l0": found["l0"], "dead_fraction": found["dead_fraction"]}
        if run not in ("topk", "batchtopk"):
            line["sparsity"] = 1 + step / 10
        if tracked and run[0] == "C":
            error = [None if np.isnan(v) else v for v in by_position(run, seed, positions, step)]
            l0 = [None, *(4 + np.sin(np.arange(1, positions) / 3) + step / 100 + seed / 10)]
            line["positions"] = {"squared_error": error, "l0": l0}
            mask = 0.5 + 0.4 * np.sin(np.arange(positions) / 2) * step / STEPS
            line["parts"] = {
                "position_tracker": {
                    "mask": mask.tolist(),
                    "mask_sharpness": step / STEPS,
                    "weights": weights(run, seed, positions, step).tolist(),
                    "loss_mean": [9.0] * EVERY,
                    "loss_max": [20.0] * EVERY,
                    "loss_min": [2.0] * EVERY,
                }
            }
        lines.append(line)
    _write(folder / "metrics.jsonl", lines)
    _write(
        folder / "held_out.jsonl",
        [{"step": step, "tokens": 8 * step, "fvu": fvu, "l0": 4.0} for step, fvu in curve(run, seed)],
    )
    if "core" in evals:
        error = by_position(run, seed, positions, STEPS) / 300
        at = {"position": list(range(positions)), "explained_variance": [None, *(1 - error[1:])]}
        (folder / "evals" / "core.json").write_text(json.dumps({"per_position": at}))
    if "clusters" in evals and run == "C6":
        (folder / "evals" / "clusters.json").write_text(json.dumps(clusters(seed)))
    return found


def clusters(seed: int = 0, latents: int = 90) -> dict[str, Any]:
    """What the eval says of latents around three places."""
    draw = np.random.default_rng(seed)
    member = np.sort(draw.integers(0, 3, latents))
    middle, width = np.array([2, 8, 13])[member], 1.5 + draw.random(latents) * 3
    profiles = np.exp(-np.square((np.arange(BINS) - middle[:, None]) / width[:, None]))
    profiles = (profiles + 0.02) * draw.uniform(0.7, 1.3, profiles.shape)
    profiles /= profiles.sum(1, keepdims=True)
    shuffled = draw.permutation(latents)
    return {
        "count": 3, "latents": latents, "bins": BINS,
        "correlation": [[0.9, -0.3, -0.4], [-0.3, 0.8, 0.1], [-0.4, 0.1, None]],
        "clusters": [
            {
                "size": int((member == c).sum()),
                "profile": profiles[member == c].mean(0).tolist(),
                "specialization": [0.1 * c + at for at in (0.1, 0.2, 0.3, 0.45, 0.6)],
            }
            for c in range(3)
        ],
        "sample": {"profiles": profiles[shuffled].tolist(), "cluster": member[shuffled].tolist()},
    }  # fmt: skip


def _summary(values: list[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "spread": None, "values": values}


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
