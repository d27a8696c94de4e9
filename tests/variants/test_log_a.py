"""Runs of log A: what holds for a run and not for one of its parts."""

import pytest
import torch
from temposae.campaign.documented import documented, settings
from temposae.engine.config import MaskConfig, SAEConfig
from temposae.engine.masks import PositionMask
from temposae.engine.registry import find

from ..stepping import advance

F, T = 24, 12
GROUPS = {"mask": {"kind": "ranges", "ranges": T}, "k": 4}
EMBEDDED = [{"kind": "position_embedding"}, {"kind": "linear_weights"}]


def mask_of(d_sae: int, ranges: int, positions: int) -> torch.Tensor:
    config = MaskConfig(kind="ranges", ranges=ranges, positions=positions)
    return PositionMask(config, d_sae, torch.Generator()).fixed


def test_a5_has_a_group_of_latents_for_each_position():
    given = settings("A5")["sae"]
    config = SAEConfig(**given, d_in=64)
    assert config.mask.positions == config.mask.ranges == settings("A5")["stream"]["context"] == 128
    mask = mask_of(config.d_sae, 128, 128)
    assert (mask.sum(1) == 2304 // 128).all()
    assert (mask.sum(0) == 1).all()


@pytest.mark.parametrize("d_sae", [24, 30, 35])
def test_latents_that_are_left_over_are_shared_out(d_sae):
    mask = mask_of(d_sae, T, T)
    assert (mask.sum(0) == 1).all()
    assert set(mask.sum(1).tolist()) <= {d_sae // T, d_sae // T + 1}


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu"])
def test_a_group_that_is_smaller_than_k_caps_it(activation, made, rows, learner):
    sae = made(parts=EMBEDDED, sae={**GROUPS, "activation": activation, "aux_k": 8})
    one = learner(sae, steps=40, dead_after_tokens=72)
    lines = []
    for step in range(40):
        advance(one, rows(step))
        if step % 20 == 19:
            lines.append(one.report())
    assert lines[1]["fvu"] < lines[0]["fvu"]
    assert 0 < lines[1]["l0"] <= F // T
    batch, sae = rows(99), one.end()
    f = sae.encode(batch.x, batch.pos)
    assert (f[~sae.mask.fixed[batch.pos.long()]] == 0).all()
    assert (f > 0).sum(1).max() == F // T
    torch.testing.assert_close(sae.decode(sae.encode_sparse(batch.x, batch.pos)), sae.decode(f))


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_rows_of_a_group_learn_from_its_position_alone(activation, made, rows, objective):
    sae = made(parts=EMBEDDED, sae={**GROUPS, "activation": activation})
    batch = rows()
    objective(sae, batch[batch.pos == 7]).loss.backward()
    group = torch.arange(F) // 2 == 7
    for gradient in (sae.W_enc.grad.T, sae.W_dec.grad, sae.b_enc.grad[:, None]):
        assert (gradient[~group] == 0).all()
        assert (gradient[group] != 0).any()


def test_the_runs_are_what_the_logs_say():
    """L1, parts and rows of each; the other settings are those of all logs."""
    kinds = {
        "A4": ["specialised_weights"],
        "A5": ["position_embedding", "linear_weights"],
        "A6": ["position_embedding", "attention_router"],
        "A7": ["position_embedding", "attention_router", "global_position", "linear_weights"],
        "A8": ["position_embedding", "position_contrast"],
        "A9": ["multi_scale", "scale_targets"],
        "A10": ["residual_position"],
    }
    for run, expected in kinds.items():
        given = settings(run)
        assert [one["kind"] for one in given["sae"]["parts"]] == expected
        assert given["sae"]["l1_coefficient"] == (0.1 if run in ("A4", "A5") else 0.04)
        needs_rows = any("rows" in find(kind).reads for kind in expected)
        assert (given["stream"].get("mode") == "sequences") == needs_rows == (run == "A9")
    assert documented("A4").sae["mask"] == documented("A2").sae["mask"]
    of_a7 = {one["kind"]: one for one in SAEConfig(**settings("A7")["sae"], d_in=64).parts}
    of_a6 = {one["kind"]: one for one in SAEConfig(**settings("A6")["sae"], d_in=64).parts}
    assert of_a7["attention_router"]["prior"] > of_a6["attention_router"]["prior"]


def test_a7_begins_with_global_latents_and_ends_with_both(made, rows, learner):
    sae = made(parts=settings("A7")["sae"]["parts"])
    one = learner(sae, steps=20)
    batch = rows(99)
    for step in range(20):
        advance(one, rows(step))
        found = sae.encode(batch.x * one.scale, batch.pos)
        assert (found[:, : F // 2] > 0).any()
        assert (found[:, F // 2 :] > 0).any() == (step > 4)  # 4 / 19 < 1 / 4 < 5 / 19
