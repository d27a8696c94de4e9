"""What is followed from step to step, against the same worked out token by token."""

import math

import pytest
import torch
from temposae.campaign.documented import settings
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.train import train

from ..stepping import advance

T = 12


def by_position(sae, batch) -> torch.Tensor:
    """Mean squared error of a token at each position, one after the other."""
    f = sae.encode(batch.x, batch.pos)
    error = (batch.x - sae.decode(f)).square().sum(1)
    return torch.stack([error[batch.pos == p].mean() for p in range(T)])


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_mean_max_and_min_over_positions_of_every_step(activation, made, rows, objective):
    sae = made("position_tracker", sae={"activation": activation})
    expected = []
    for seed in (0, 1):
        batch = rows(seed)
        if seed:  # nothing at position 5
            batch = batch[batch.pos != 5]
        loss = by_position(sae, batch)
        loss = loss[~loss.isnan()]
        expected.append((loss.mean(), loss.max(), loss.min()))
        objective(sae, batch)
        sae.after()
    found = sae.part_reports()["position_tracker"]
    for name, values in zip(("loss_mean", "loss_max", "loss_min"), zip(*expected, strict=True), strict=True):
        assert found[name] == pytest.approx([float(value) for value in values], rel=1e-4), name
    assert found["weights"] == [1.0] * T
    assert "mask" not in found
    again = sae.part_reports()["position_tracker"]
    assert again["loss_mean"] == again["loss_max"] == again["loss_min"] == []


@pytest.mark.parametrize("kind", ["soft", "gaussian", "windows"])
def test_mask_weights_and_their_sharpness(kind, made, rows, objective):
    sae = made("position_tracker", sae={"mask": {"kind": kind}})
    objective(sae, rows())
    sae.after()
    found = sae.part_reports()["position_tracker"]
    if kind == "soft":
        m = torch.sigmoid(sae.mask.logits.detach())
    elif kind == "gaussian":
        places = torch.arange(T, dtype=torch.float64)[:, None]
        m = torch.exp(-(places - sae.mask.centre.double()).square() / (2 * (T / 8) ** 2))
    else:
        m = sae.mask.fixed.double()
    assert found["mask"] == pytest.approx(m.mean(1).tolist(), rel=1e-4)
    assert found["mask_sharpness"] == pytest.approx(float((2 * m - 1).abs().mean()), rel=1e-4)


def test_a_mask_grows_sharper_as_its_temperature_falls(made, rows, learner):
    mask = {"kind": "soft", "start": "normal", "temperature": 5.0, "temperature_end": 0.1}
    one, found = learner(made("position_tracker", sae={"mask": mask})), []
    for step in range(20):
        advance(one, rows(step))
        if step in (9, 19):
            found.append(one.report()["parts"]["position_tracker"])
    assert [len(line["loss_mean"]) for line in found] == [10, 10]
    assert found[0]["mask_sharpness"] < 0.5 < 0.85 < found[1]["mask_sharpness"]


def test_lines_of_steps_before_a_checkpoint_are_in_the_report_after_it(made, rows, learner):
    given = {"parts": [{"kind": "position_tracker"}, {"kind": "adaptive_weights"}]}
    whole = learner(made(**given))
    for step in range(5):
        advance(whole, rows(step))
    state, weights = ({name: value.clone() for name, value in one.items()} for one in (whole.state(), whole.weights()))
    other = learner(made(**given, seed=3))
    other.load_state(state, weights)
    reports = []
    for one in (whole, other):
        advance(one, rows(5))
        reports.append(one.report()["parts"])
    assert reports[0] == reports[1]
    assert len(reports[0]["position_tracker"]["loss_mean"]) == 6


def test_what_is_not_finite_is_reported_as_nothing(made, rows, objective):
    sae, batch = made("position_tracker"), rows()
    batch.x[batch.pos == 3] = math.inf
    objective(sae, batch)
    sae.after()
    found = sae.part_reports()["position_tracker"]
    assert found["loss_mean"] == found["loss_max"] == [None]


def test_metrics_of_c6_hold_what_its_analyses_read(stream_of):
    given = settings("C6")
    stream = stream_of()
    config = TrainConfig(
        **given["train"] | {"tokens": 4096, "batch": 512, "log_every_steps": 4, "control": False, "lr": 1e-3}
    )
    run = train(stream, SAEConfig(**given["sae"] | {"d_in": 128, "d_sae": 64}), config)
    for line in run.metrics:
        tracked, positions = line["parts"]["position_tracker"], line["positions"]
        assert len(tracked["loss_mean"]) == 4
        assert len(tracked["weights"]) == len(tracked["mask"]) == stream.positions
        assert len(positions["squared_error"]) == len(positions["l0"]) == stream.positions
        assert 0 < tracked["mask_sharpness"] < 1
    assert run.metrics[0]["parts"]["position_tracker"]["weights"] != [1.0] * stream.positions
