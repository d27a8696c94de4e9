"""Analyses of runs C3 to C8: each must find the pattern that was put into the metrics."""

import json

import numpy as np
import pytest
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.folder import read_metrics
from temposae.engine.train import train
from temposae.variants import settings
from temposae.variants.analyses import position_losses, sparsity_by_position, spearman, weight_evolution

T, S = 10, 6


def planted(loss: np.ndarray, weights: np.ndarray, l0: np.ndarray | None = None) -> list[dict]:
    """Reports at steps 5, 10, ... of these [S, T], as they come back from a file."""
    l0 = np.ones_like(loss) if l0 is None else l0
    lines = [
        {
            "step": 5 * (i + 1),
            "positions": {"squared_error": loss[i].tolist(), "l0": l0[i].tolist()},
            "parts": {
                "position_tracker": {
                    "loss_mean": [i + 0.5] * 5, "loss_max": [i + 1.0] * 5, "loss_min": [0.0] * 5,
                    "weights": weights[i].tolist(),
                }
            },
        }
        for i in range(S)
    ]  # fmt: skip
    return json.loads(json.dumps(lines).replace("NaN", "null"))


def test_the_hardest_positions_are_found():
    draw = np.random.default_rng(0)
    loss = draw.uniform(1, 2, (S, T))
    loss[:, 7], loss[:, 2], loss[:, 4] = 9.0, 5.0, np.nan
    found = position_losses(planted(loss, np.ones((S, T))))
    assert found.hardest[:2].tolist() == [7, 2]
    assert 4 not in found.hardest
    assert len(found.hardest) == T - 1
    np.testing.assert_array_equal(found.loss, loss)
    np.testing.assert_array_equal(found.final, loss[-1])
    assert found.steps.tolist() == [5, 10, 15, 20, 25, 30]
    assert found.of_step.shape == (5 * S, 3)
    assert found.of_step[7].tolist() == [1.5, 2.0, 0.0]


def test_when_each_position_converged():
    weights = np.ones((S, T))
    weights[:3, 1] = 2.0  # away at steps 5, 10 and 15
    weights[:, 2] = [1.0, 1.2, 1.0, 1.0, 1.2, 1.0]  # away at the last report but one
    weights[:, 3] = [1.04, 0.96, 1.0, 1.04, 1.0, 1.0]  # always close
    weights[0, 5] = 0.5
    found = weight_evolution(planted(np.ones((S, T)), weights))
    assert found.converged.tolist() == [5, 20, 30, 5, 5, 10, 5, 5, 5, 5]
    np.testing.assert_array_equal(found.weights, weights)


@pytest.mark.parametrize(("power", "expected"), [(2.0, 1.0), (-1.0, -1.0), (0.0, None)])
def test_weights_are_compared_with_losses(power, expected):
    draw = np.random.default_rng(1)
    loss = draw.uniform(1, 2, (S, T))
    weights = loss**power
    loss[:, 3] = np.nan
    found = weight_evolution(planted(loss, weights)).correlation
    assert found == (None if expected is None else pytest.approx(expected))


def test_rank_correlation_with_ties():
    a, b = np.array([1.0, 2.0, 2.0, 3.0, 9.0]), np.array([2.0, 1.0, 4.0, 4.0, 4.0])
    assert spearman(a, b) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4, 5], [2, 1, 4, 4, 4])[0, 1])


def test_latents_that_are_particular_about_position_are_found_in_order():
    draw = np.random.default_rng(2)
    activity = draw.uniform(0.9, 1.1, (20, T))
    for latent, place in ((4, 8), (11, 1), (17, 5)):
        activity[latent] = 0.0
        activity[latent, place] = 0.3
    activity[0] = 0.0  # never active
    l0 = draw.uniform(5, 6, (S, T)) + np.arange(T)
    found = sparsity_by_position(planted(np.ones((S, T)), np.ones((S, T)), l0), activity, most=3)
    assert found.latents.tolist() == [11, 17, 4]
    assert found.share.argmax(1).tolist() == [1, 5, 8]
    np.testing.assert_allclose(found.share.sum(1), 1)
    np.testing.assert_array_equal(found.final, l0[-1])
    everything = sparsity_by_position(planted(np.ones((S, T)), np.ones((S, T)), l0), activity)
    assert 0 not in everything.latents
    assert len(everything.latents) == 19


def test_metrics_that_lack_something_are_refused():
    lines = planted(np.ones((S, T)), np.ones((S, T)))
    with pytest.raises(UserError, match=r"activity: shape \[3, 4\] is not allowed; it must be \[F, 10\]"):
        sparsity_by_position(lines, np.ones((3, 4)))
    with pytest.raises(UserError, match=r"train with train\.log_positions"):
        sparsity_by_position([])
    without = [{key: value for key, value in line.items() if key != "parts"} for line in lines]
    for analysis in (position_losses, weight_evolution):
        with pytest.raises(UserError, match="no position_tracker"):
            analysis(without)


def test_a_real_run_has_all_of_it(stream_of, tmp_path):
    given = settings("C7")
    config = TrainConfig(
        **given["train"] | {"tokens": 4096, "batch": 512, "log_every_steps": 2, "control": False, "lr": 1e-3}
    )
    train(stream_of(), SAEConfig(**given["sae"] | {"d_in": 128, "d_sae": 64}), config, out=tmp_path / "run")
    metrics = read_metrics(tmp_path / "run")
    losses, weights, sparsity = position_losses(metrics), weight_evolution(metrics), sparsity_by_position(metrics)
    assert losses.loss.shape == weights.weights.shape == sparsity.l0.shape
    assert len(losses.loss) == 4
    assert losses.of_step.shape == (8, 3)
    assert weights.correlation is not None
    assert weights.correlation > 0
