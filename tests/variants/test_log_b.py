"""What log B's runs are about, beyond their parts."""

import pytest
import torch
from temposae.campaign.documented import settings
from temposae.engine.composed import dictionary
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.learner import Learner

from ..stepping import advance
from .conftest import D, F, R, T


def in_training(run: str, **train) -> Learner:
    given = settings(run)
    sae = given["sae"] | {"d_in": D, "d_sae": F, "mask": {"positions": T} | given["sae"]["mask"]}
    config = TrainConfig(**given["train"] | {"tokens": 10 * R * T, "batch": R * T, "warmup": 0.0} | train)
    return Learner(dictionary(SAEConfig(**sae)), config, torch.zeros(D), D**0.5, T)


def gradient_norm(one: Learner) -> float:
    """Of the gradient that the first step took, from Adam's first moment, a tenth of it."""
    return float(torch.cat([held["exp_avg"].flatten() for held in one.adam.state.values()]).norm() / 0.1)


def test_b4_takes_gradients_of_norm_1_at_most_and_steps_of_a_tenth(rows):
    slow, free = in_training("B4"), in_training("B3")
    for one in (slow, free):
        advance(one, rows())
    assert gradient_norm(free) > 1.5
    assert gradient_norm(slow) == pytest.approx(1.0, rel=1e-4)
    assert slow.report()["gradient_norm"] == pytest.approx(gradient_norm(free), rel=1e-4)
    assert slow.lr == pytest.approx(free.lr / 10)


def test_b4_leaves_small_gradients_alone(rows):
    small, same = in_training("B4", clip_norm=1000.0), in_training("B3")
    for one in (small, same):
        advance(one, rows())
    assert gradient_norm(small) == pytest.approx(gradient_norm(same), rel=1e-6)


def test_b5_clips_too_at_the_usual_rate():
    train = settings("B5")["train"]
    assert (train["clip_norm"], train["lr"]) == (1.0, 3e-4)
