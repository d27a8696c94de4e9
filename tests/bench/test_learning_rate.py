"""The default learning rate: its values, what the bench says of it, and that no grid has a much better one."""

import json
import math
from pathlib import Path

import pytest
import torch
from temposae.bench import learning_rate as bench
from temposae.bench.learning_rate import Cell, excess
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.learner import Learner
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.training.schedules import default_lr

from ..commandline import run


def rate(d_in: int, d_sae: int, batch: int, steps: int, **train) -> float:
    return default_lr(SAEConfig(d_in=d_in, d_sae=d_sae), TrainConfig(tokens=batch * steps, batch=batch, **train))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((64, 1024, 1024, 1000), 0.65 / 8 / 10),
        ((256, 1024, 1024, 1000), 0.65 / 16 / 10),
        ((64, 1024, 1024, 8000), 0.65 / 8 / 20),
        ((64, 65536, 1024, 1000), 0.65 / 8 / 10 / 2),
        ((64, 1024, 64, 1000), 0.65 / 8 / 10 * (1 / 16) ** (1 / 6)),
        ((576, 4608, 512, 580), 2.2517e-3),
        ((16, 64, 64, 8), 0.016),
    ],
)
def test_it_follows_width_latents_batch_and_steps(sizes: tuple[int, int, int, int], expected: float) -> None:
    assert rate(*sizes) == pytest.approx(expected, rel=1e-4)


def test_the_last_incomplete_batch_is_a_step() -> None:
    config = SAEConfig(d_in=64, d_sae=64)
    assert default_lr(config, TrainConfig(tokens=8001, batch=8)) == default_lr(
        config, TrainConfig(tokens=8008, batch=8)
    )


def test_a_trained_dictionary_keeps_its_directions() -> None:
    """A short run's rate would destroy them; that of a long run is below the power law anyway."""
    assert rate(128, 512, 256, 100, init="runs/other") == pytest.approx(2e-4 * 32**0.5)
    assert rate(2304, 16384, 2048, 244_000, init="runs/other") == rate(2304, 16384, 2048, 244_000)


def test_training_takes_it_where_none_is_given() -> None:
    config, x = SAEConfig(d_in=16, d_sae=64, k=4), torch.randn(8, 16)
    for lr, expected in ((None, rate(16, 64, 32, 1000)), (3e-4, 3e-4)):
        training = TrainConfig(tokens=32_000, batch=32, lr=lr)
        assert Learner(SparseAutoencoder(config), training, x.mean(0), 4.0, 1).lr == expected


@pytest.mark.parametrize("best", [-4, -1, 0, 3])
def test_a_grid_has_two_rates_on_either_side_of_the_best(best: int) -> None:
    found = bench.grid(lambda lr: {"fvu": abs(math.log2(lr / 1e-3) - best)}, 1e-3)
    powers = [math.log2(lr / 1e-3) for lr in found]
    assert powers == sorted(powers)
    assert {best + step for step in range(-2, 3)} <= set(powers)


def test_a_rate_that_diverges_is_not_the_best() -> None:
    found = bench.grid(lambda lr: {"fvu": math.nan if lr > 1e-3 else 1 / lr}, 1e-3)
    assert max(found) == 4e-3


def test_what_is_measured_is_kept_and_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "lr.json"
    command = ("bench", "lr", "--preset", "tiny", "--json", file)
    code, out, err = run(*command)
    assert code == 0, err
    found = json.loads(file.read_text())
    assert [one["activation"] for one in found["cells"]] == ["topk", "batchtopk"]
    for one in found["cells"]:
        assert len(one["grid"]) >= 5
        assert one["default"]["l0"] == pytest.approx(4, abs=0.01)
    code, again, err = run(*command)
    assert (code, again, "cell 1" in err) == (0, out, False)
    code, out, err = run(*command, "--cell", "relu,32,4,64,8")
    assert code == 0, err
    assert "cell 1 of 1" in err
    assert "relu" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--preset", "huge"), ("preset: 'huge'", "tiny")),
        (("--source", "synthetic"), ("source: 'synthetic'", "MODEL:LAYER")),
        (("--source", "mine=none.npy"), ("source: 'mine=none.npy'",)),
        (("--cell", "topk,512,16"), ("cell: topk,512,16", "STEPS")),
        (("--cell", "topk,8,16,64,8"), ("k: 16",)),
        (("--cell", "sparse,32,4,64,8"), ("activation: ", "sparse")),
    ],
)
def test_what_it_refuses(options: tuple[str, ...], words: tuple[str, ...]) -> None:
    code, _, err = run("bench", "lr", "--preset", "tiny", *options)
    assert code == 2
    for word in words:
        assert word in err


def test_another_file_is_not_gone_on_in(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text("{}")
    code, _, err = run("bench", "lr", "--preset", "tiny", "--json", file)
    assert code == 2
    assert "must hold results of `temposae bench lr`" in err
    assert file.read_text() == "{}"


def test_batchtopk_is_scored_at_its_k() -> None:
    sae = SparseAutoencoder(SAEConfig(d_in=16, d_sae=64, k=4, activation="batchtopk"))
    sae.threshold.fill_(100.0)
    assert bench.evaluate(sae, torch.randn(256, 16))["l0"] == pytest.approx(4, abs=0.01)


def test_unknown_sources_are_named() -> None:
    with pytest.raises(UserError, match="synthetic:WIDTH"):
        bench.activations("testbed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell",
    [Cell("topk", 512, 16, 256, 100), Cell("topk", 512, 16, 1024, 300), Cell("batchtopk", 2048, 16, 256, 300)],
    ids=str,
)
def test_no_rate_of_the_grid_is_much_better_on_the_embedded_model(cell: Cell) -> None:
    """Three seeds, because those of one differ by up to 4%. At 2e-4 sqrt(2^14 / F) FVU is more than twice the best."""
    (one,) = bench.measure({"testbed:1": [cell]}, seeds=3)["cells"]
    assert excess(one) < 0.03
