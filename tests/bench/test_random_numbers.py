"""Data and initial weights of the benchmarks share no random numbers."""

from importlib.util import find_spec

import pytest
import torch
from temposae.bench import documented_runs
from temposae.bench.data import Shape, Tokens, seed_of, tokens
from temposae.bench.ops import Inputs
from temposae.bench.providers import PROVIDERS, make_learner
from temposae.bench.torch_baseline import plain_torch
from temposae.bench.training_job import TrainingJob
from torch import Tensor
from torch.nn.functional import normalize

SHAPE = Shape(N=256, D=64, F=512, K=4)


def job(seed: int = 0) -> TrainingJob:
    return TrainingJob(SHAPE, "cpu", "fp32", 3e-3, tokens(SHAPE, "cpu", torch.float32, count=1, seed=seed))


def strongest(data: Tokens, rows: Tensor) -> float:
    """Mean over tokens of the largest cosine with a row of W [F, D]; about 0.6 if rows are the hidden directions."""
    x = data.wide[0] - data.mean
    return float((normalize(x, dim=1) @ normalize(rows.detach(), dim=1).T).amax(1).mean())


WEIGHTS = {
    "temposae": lambda given: make_learner(given).sae.W_dec,
    "torch": lambda given: plain_torch(given).reconstruct.W_dec,
    "ops": lambda given: Inputs(SHAPE, torch.float32, "cpu").sae.W_dec,
}


@pytest.mark.parametrize("provider", WEIGHTS)
def test_weights_look_like_no_hidden_direction(provider: str) -> None:
    given = job()
    independent = torch.randn(SHAPE.F, SHAPE.D, generator=torch.Generator().manual_seed(987654321))
    expected = strongest(given.tokens, independent)
    assert strongest(given.tokens, WEIGHTS[provider](given)) == pytest.approx(expected, rel=0.1)
    directions = torch.randn(2 * SHAPE.D, SHAPE.D, generator=torch.Generator().manual_seed(seed_of("tokens")))
    assert strongest(given.tokens, directions) > 1.3 * expected  # the measure sees it


@pytest.mark.parametrize("provider", WEIGHTS)
def test_other_data_leaves_the_weights(provider: str) -> None:
    first, second = job(0), job(1)
    assert not torch.equal(first.tokens.wide[0], second.tokens.wide[0])
    assert torch.equal(WEIGHTS[provider](first), WEIGHTS[provider](second))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package"),
    [("eai-sparsify", "sparsify"), ("SAELens", "sae_lens"), ("dictionary_learning", "dictionary_learning")],
)
def test_other_libraries_draw_weights_from_their_own_seed(name: str, package: str, monkeypatch) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    given, seeds, seed_all = job(), [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), seed_all(seed))[1])
    PROVIDERS[name].build(given)
    assert set(seeds) == {seed_of("weights")}


def test_documented_runs_start_from_no_token() -> None:
    sizes = documented_runs.PRESETS["tiny"]
    x = documented_runs._batch(sizes, 0, "cpu").x
    rows = documented_runs._cohort("topk", sizes, sizes.F[0], "cpu").learners[0].sae.W_dec.detach()
    assert (normalize(x, dim=1) @ rows.T).max() < 0.9


def test_seeds_have_names() -> None:
    seeds = {seed_of(name, seed) for name in ("tokens", "weights") for seed in range(100)}
    assert len(seeds) == 200
    assert all(100 <= seed < 2**32 for seed in seeds)  # no seed that somebody gives by hand
