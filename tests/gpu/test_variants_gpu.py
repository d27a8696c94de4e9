"""Documented runs on a GPU: the same steps as on the CPU, where the random numbers are the same; and no NaN in bfloat16."""

import pytest
import torch
from temposae.campaign.documented import BASELINES, RUNS, settings
from temposae.engine.composed import dictionary
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.learner import Learner
from temposae.engine.registry import reads
from temposae.engine.stream import Batch

from ..stepping import advance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
TRAINED = [name for name, run in (BASELINES | RUNS).items() if run.trained_as is None]
DRAWN_THERE = ("D3",)  # draws its dropout on the device
D, F, T, R = 64, 256, 128, 4


def batch(seed: int, second: bool, device: str) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    pos, row = torch.arange(T).repeat(R), torch.arange(R).repeat_interleave(T)
    x = torch.randn(R * T, D, generator=draw)
    acts = {"x": x} | ({"second": 0.8 * x + 0.6 * torch.randn(R * T, D, generator=draw)} if second else {})
    made = Batch(acts, pos.int(), pos.int(), row, row, attribute=(torch.rand(R, generator=draw) < 0.5).long()[row])
    return made.each(lambda value: value.to(device))


def trained(run: str, activation: str, device: str, steps: int, dtype: str) -> Learner:
    sections = settings(run, activation)
    sae = dictionary(SAEConfig(**sections["sae"] | {"d_in": D, "d_sae": F, "k": 8, "aux_k": 8})).to(device)
    config = TrainConfig(**sections["train"] | {"tokens": steps * R * T, "batch": R * T, "lr": 1e-3, "dtype": dtype})
    one = Learner(sae, config, torch.zeros(D, device=device), D**0.5, T)
    for step in range(steps):
        advance(one, batch(step, "second" in reads(sae.cfg), device))
    return one


@pytest.mark.parametrize("activation", ["relu", "topk"])
@pytest.mark.parametrize("run", [run for run in TRAINED if run not in DRAWN_THERE and run not in BASELINES])
def test_steps_are_those_of_the_cpu(run, activation, assert_close):
    on_gpu, on_cpu = (trained(run, activation, device, 4, "float32") for device in ("cuda", "cpu"))
    report, expected = on_gpu.report(), on_cpu.report()
    assert report["loss"] == pytest.approx(expected["loss"], rel=2e-3)
    assert report["fvu"] == pytest.approx(expected["fvu"], rel=2e-3)
    assert report["l0"] == pytest.approx(expected["l0"], rel=2e-2)
    for name in ("W_dec", "b_enc"):  # Adam makes a whole step of the least gradient: mean distances, not every number
        a, b = (getattr(one.sae, name).detach().cpu() for one in (on_gpu, on_cpu))
        assert float((a - b).norm() / (b.norm() + 1e-9)) < 2e-2, name


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
@pytest.mark.parametrize("run", TRAINED)
def test_bfloat16_trains(run, activation):
    one = trained(run, activation, "cuda", 12, "bfloat16")
    assert one.is_finite()
    found = one.report()
    assert found["l0"] > 0
    sae = one.end()
    given = batch(99, False, "cuda")
    assert sae.encode(given.x, given.pos).isfinite().all()
