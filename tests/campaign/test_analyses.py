"""Analyses of log C: each must find the pattern that was put into what it reads."""

import json
from typing import Any

import numpy as np
import pytest
from temposae.campaign.analyses import LABELS, analysis, distance_to_last, early_to_late, rank_correlation
from temposae.campaign.documented import RUNS, settings
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.storage.run_folder import read_metrics
from temposae.engine.train import train

T, S, BINS = 10, 6, 16
ONES = np.ones((S, T))


def planted(loss: np.ndarray = ONES, weights: np.ndarray = ONES, l0: np.ndarray = ONES) -> list[dict[str, Any]]:
    """Reports at steps 5, 10, ... of these [S, T], as they come back from a file."""
    lines = [
        {
            "step": 5 * (i + 1),
            "positions": {"squared_error": loss[i].tolist(), "l0": l0[i].tolist()},
            "parts": {
                "position_tracker": {
                    "loss_mean": [9.0, i + 0.5], "loss_max": [9.0, i + 1.0], "loss_min": [9.0, i + 0.25],
                    "weights": weights[i].tolist(), "mask_sharpness": i / 10,
                }
            },
        }
        for i in range(S)
    ]  # fmt: skip
    return json.loads(json.dumps(lines).replace("NaN", "null"))


def clustered(profiles: np.ndarray, sizes: tuple[int, ...] = (3, 1)) -> dict[str, Any]:
    return {
        "count": len(sizes), "latents": sum(sizes), "within": 0.1, "between": 0.6, "stability": {"adjusted_rand": 0.9},
        "clusters": [{"size": size, "specialization": [0, 0, 0.1 + 0.2 * i, 1, 1]} for i, size in enumerate(sizes)],
        "sample": {"profiles": profiles.tolist()}, "controls": {"shuffled": {"stability": None}},
    }  # fmt: skip


def at_bins(*places: int) -> np.ndarray:
    """A latent in each of these bins."""
    return np.eye(BINS)[list(places)]


def test_c3_finds_the_hardest_position_and_what_every_step_told():
    draw = np.random.default_rng(0)
    loss = draw.uniform(1, 2, (S, T))
    loss[:, 7], loss[:, 2], loss[:, 4] = 9.0, 0.5, np.nan
    loss[:-1, 3] = 50.0  # not at the end
    found = analysis("C3", planted(loss))
    assert (found["most_at"], found["least_at"]) == (7, 2)
    assert (found["mean"], found["most"], found["least"]) == (S - 0.5, S, S - 0.75)
    assert found["ratio"] == pytest.approx(S / (S - 0.75))


def test_c4_finds_where_the_error_fell_and_that_the_mask_sharpened():
    loss = np.tile(np.linspace(8, 4, S)[:, None], (1, T))
    loss[:, 6], loss[:, 1], loss[:, 0] = 8.0, np.linspace(8, 1, S), np.nan
    found = analysis("C4", planted(loss))
    assert (found["most_at"], found["most"]) == (6, 1.0)
    assert (found["least_at"], found["least"]) == (1, 0.125)
    assert found["first"] == 8.0
    assert found["last"] == pytest.approx((7 * 4 + 8 + 1) / 9)
    assert (found["sharpness_first"], found["sharpness_last"]) == (0.0, 0.5)


def test_c7_finds_when_weights_settled():
    weights = np.ones((S, T))
    weights[:3, 1] = 2.0  # away at steps 5, 10 and 15
    weights[:, 2] = [1.0, 1.2, 1.0, 1.0, 1.2, 1.0]  # away at the last report but one
    weights[:, 3] = [1.04, 0.96, 1.0, 1.04, 1.0, 1.0]  # always close
    weights[:2, 4:] = 0.5
    weights[:, 9] = 1.5
    weights[:, 0] = 0.25
    found = analysis("C7", planted(weights=weights))
    assert found["all_settled_at"] == 30
    assert found["half_settled_at"] == 15  # 5, 20, 30, 5, and 15 five times, and 5
    assert (found["most_at"], found["most"]) == (9, 1.5)
    assert (found["least_at"], found["least"]) == (0, 0.25)


@pytest.mark.parametrize(("power", "expected"), [(2.0, 1.0), (-1.0, -1.0), (0.0, None)])
def test_c7_finds_whether_weights_go_with_difficulty(power, expected):
    draw = np.random.default_rng(1)
    loss = draw.uniform(1, 2, (S, T))
    weights = loss**power
    loss[:, 3] = np.nan
    found = analysis("C7", planted(loss, weights))["correlation"]
    assert found == (None if expected is None else pytest.approx(expected))


def test_c8_finds_where_latents_are_active():
    draw = np.random.default_rng(2)
    l0 = draw.uniform(5, 6, (S, T)) + np.arange(T)
    l0[0] = 7.0
    found = analysis("C8", planted(l0=l0), clustered(at_bins(0, 1, 8, 15)))
    assert (found["least_at"], found["most_at"]) == (0, T - 1)
    assert found["most"] == pytest.approx(l0[-1, -1])
    assert found["deviation"] == pytest.approx(l0[-1].std() / l0[-1].mean())
    assert found["deviation_first"] == 0
    assert (found["early"], found["late"]) == (0.5, 0.25)


def test_c9_tells_how_many_clusters_there_are_and_whether_they_are_found_again():
    found = analysis("C9", planted(), clustered(at_bins(0, 1, 2, 9)))
    assert (found["count"], found["latents"], found["largest"]) == (2, 4, 0.75)
    assert (found["stability"], found["shuffled"]) == (0.9, None)
    assert found["specialization"] == pytest.approx(0.3)


def test_rank_correlation_with_ties_and_gaps():
    a, b = np.array([1.0, 2.0, 2.0, 3.0, 9.0, np.nan]), np.array([2.0, 1.0, 4.0, 4.0, 4.0, 7.0])
    assert rank_correlation(a, b) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4, 5], [2, 1, 4, 4, 4])[0, 1])
    assert rank_correlation(a[:2], b[:2]) is None


def test_how_far_weights_are_from_the_last():
    weights = np.array([[[1.0, 4.0], [2.0, 3.0], [2.0, 2.0]]])
    assert distance_to_last(weights).tolist() == [[1.5, 0.5, 0.0]]


def test_latents_in_the_order_of_their_place():
    assert early_to_late(at_bins(8, 1, 5)).argmax(1).tolist() == [1, 5, 8]


def test_what_was_not_measured_is_named():
    lines = planted()
    with pytest.raises(UserError, match=r"train with train\.log_positions"):
        analysis("C8", [], clustered(at_bins(0)))
    without = [{key: value for key, value in line.items() if key != "parts"} for line in lines]
    for run in ("C3", "C4", "C7"):
        with pytest.raises(UserError, match="no position_tracker"):
            analysis(run, without)
    with pytest.raises(UserError, match="clusters: not among the evals"):
        analysis("C9", lines)
    few = {"clusters": None, "latents": 3}
    with pytest.raises(UserError, match="only 3 latents fire often enough"):
        analysis("C9", lines, few)
    for clusters in (None, few):
        found = analysis("C8", lines, clusters)
        assert (found["most"], found["early"], found["late"]) == (1.0, None, None)


def test_every_analysis_finds_something_in_a_real_run_with_words_for_it(stream_of, tmp_path):
    given = settings("C7")
    config = TrainConfig(
        **given["train"] | {"tokens": 4096, "batch": 512, "log_every_steps": 2, "control": False, "lr": 1e-3}
    )
    train(stream_of(), SAEConfig(**given["sae"] | {"d_in": 128, "d_sae": 64}), config, out=tmp_path / "run")
    metrics = read_metrics(tmp_path / "run")
    for run in (name for name, one in RUNS.items() if one.trained_as):
        found = analysis(run, metrics, clustered(at_bins(0, 3)))
        assert LABELS[run].keys() == found.keys(), run
        assert len(set(LABELS[run].values())) == len(found), run
        assert found.get("correlation", 1.0) > 0
