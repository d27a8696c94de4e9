"""Documented runs: they train, and their masks act."""

import pytest
import torch
from temposae.engine.config import TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.train import train
from temposae.variants import RUNS, dictionary

SETTINGS = TrainConfig(tokens=10_000, batch=256, log_every_steps=10, lr=3e-3, control=False)


@pytest.mark.parametrize("run", RUNS)
def test_it_trains_and_its_mask_acts(run, stream_of):
    config = dictionary(run, d_in=128, d_sae=128)
    found = train(stream_of(), config, SETTINGS)
    assert found.metrics[-1]["fvu"] < found.metrics[0]["fvu"]
    assert found.metrics[-1]["l0"] > 0
    batch = stream_of(seed=3).next(1500)
    f = found.sae.encode(batch.x.float(), batch.pos)
    without = found.sae.encode(batch.x.float(), batch.pos.flip(0))
    assert torch.equal(f, without) == (config.mask.kind == "none")


def test_a3_is_sparser_than_a2(stream_of):
    l1 = {run: train(stream_of(), dictionary(run, 128, 128), SETTINGS).metrics[-1]["l1"] for run in ("A2", "A3")}
    assert l1["A3"] < l1["A2"]


def test_unknown_runs_are_named():
    with pytest.raises(UserError, match="run: 'A11' is not allowed; did you mean A1"):
        dictionary("A11", 128)
