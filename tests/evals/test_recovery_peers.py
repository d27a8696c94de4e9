"""SAELens' synthetic module as the oracle: the same world and samples, and the same scores of a dictionary."""

from typing import Any

import pytest
import torch
from temposae.bench.libraries import sae_lens_dictionary
from temposae.engine.config import WorldConfig
from temposae.engine.stream import WorldSource
from temposae.engine.synthetic.world import World
from temposae.evals.recovery import recovery

from ..peers import library

pytestmark = pytest.mark.slow
CONFIG = WorldConfig(features=300, width=40, roots=12, branching=3, depth=2, orthogonal_steps=60, firing_min=0.02)
TOKENS = 65_536


@pytest.fixture(scope="module")
def theirs() -> Any:
    """SAELens' model of the same world."""
    synthetic, c = library("sae_lens", "synthetic"), CONFIG
    return synthetic.SyntheticModel(
        synthetic.SyntheticModelConfig(
            num_features=c.features, hidden_dim=c.width, seed=c.seed, bias=c.bias,
            firing_probability=synthetic.ZipfianFiringProbabilityConfig(
                exponent=c.firing_exponent, max_prob=c.firing_max, min_prob=c.firing_min
            ),
            hierarchy=synthetic.HierarchyConfig(
                total_root_nodes=c.roots, branching_factor=c.branching, max_depth=c.depth,
                mutually_exclusive_portion=c.exclusive, compensate_probabilities=c.compensate,
                scale_children_by_parent=c.scale_by_parent,
            ),
            orthogonalization=synthetic.OrthogonalizationConfig(num_steps=c.orthogonal_steps, lr=3e-4),
            correlation=synthetic.LowRankCorrelationConfig(
                rank=c.correlation_rank, correlation_scale=c.correlation_scale
            ),
            mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(start=c.magnitude_first, end=c.magnitude_last),
            std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(mean=c.spread_mean, std=c.spread_std),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def world() -> World:
    return World(CONFIG)


def test_the_world_has_the_same_tensors(theirs, world):
    generator = theirs.activation_generator
    torch.testing.assert_close(world.directions, theirs.feature_dict.feature_vectors.data, atol=1e-4, rtol=0)
    torch.testing.assert_close(world.bias, theirs.feature_dict.bias.data, atol=1e-6, rtol=0)
    torch.testing.assert_close(world.rate, generator.firing_probabilities, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(world.mean, generator.mean_firing_magnitudes)
    torch.testing.assert_close(world.spread, generator.std_firing_magnitudes)
    torch.testing.assert_close(world.factor, theirs.correlation_matrix.correlation_factor)
    torch.testing.assert_close(world.own.square(), theirs.correlation_matrix.correlation_diag, atol=1e-6, rtol=0)


def test_a_share_of_exclusive_parents_are_the_same():
    hierarchy = library("sae_lens", "synthetic.hierarchy")
    settings = dict(total_root_nodes=12, branching_factor=3, max_depth=2, mutually_exclusive_portion=0.5)
    roots = hierarchy.generate_hierarchy(100, hierarchy.HierarchyConfig(**settings), seed=42 + 3).roots
    nodes, theirs = list(roots), {}
    for node in nodes:
        theirs[node.feature_index] = node.mutually_exclusive_children
        nodes.extend(node.children)
    world = World(CONFIG.model_copy(update={"exclusive": 0.5, "features": 100, "orthogonal_steps": 0}))
    assert world.exclusive.tolist() == [theirs[i] for i in range(world.parents)]


def test_samples_have_the_same_statistics(theirs):
    torch.manual_seed(0)
    source = WorldSource(CONFIG, device="cpu")
    ours = torch.cat([code.to_dense() for _, code in source.labelled(TOKENS)])
    peer = torch.cat([theirs.activation_generator.sample(4096) for _ in range(len(ours) // 4096)])

    def close(first: torch.Tensor, second: torch.Tensor, deviation: torch.Tensor) -> None:
        """Means over samples [n, ...] agree within five standard errors."""
        error = deviation * (2 / len(ours)) ** 0.5
        difference = (first.double().mean(0) - second.double().mean(0)).abs()
        assert (difference <= 5 * error + 1e-9).all(), float((difference / error).max())

    on, peer_on = (ours > 0).double(), (peer > 0).double()
    close(on, peer_on, peer_on.std(0))  # firing rates
    close(on.sum(1), peer_on.sum(1), peer_on.sum(1).std())  # L0
    close(ours, peer, peer.std(0))  # coefficients
    close(ours.square(), peer.square(), peer.square().std(0))
    frequent = world_pairs(peer_on)
    pairs, peer_pairs = ((x[:, frequent, None] * x[:, None, frequent]).flatten(1) for x in (on, peer_on))
    close(pairs, peer_pairs, peer_pairs.std(0))  # correlations and hierarchy
    child, parent = ours[:, 12], ours[:, 0]
    peer_child, peer_parent = peer[:, 12], peer[:, 0]
    close(child * parent, peer_child * peer_parent, (peer_child * peer_parent).std())


def world_pairs(on: torch.Tensor) -> torch.Tensor:
    """The 40 features that fire most often."""
    return on.mean(0).topk(40).indices


@pytest.mark.parametrize("kind", ["TopK", "BatchTopK", "Standard", "JumpReLU"])
def test_scores_are_equal_on_the_same_samples(kind, world):
    saes, synthetic = library("sae_lens", "saes"), library("sae_lens", "synthetic")
    settings = {"k": 6} if "TopK" in kind else {}
    torch.manual_seed(1)
    sae = getattr(saes, f"{kind}TrainingSAE")(getattr(saes, f"{kind}TrainingSAEConfig")(d_in=40, d_sae=96, **settings))
    with torch.no_grad():  # part of the true directions, with noise, so that scores are not trivial
        sae.W_dec.copy_(world.directions[:96] + 0.05 * torch.randn(96, 40))
        sae.W_dec[50:60] = sae.W_dec[40:50] + 0.1 * torch.randn(10, 40)
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc[:] = -2.0
        sae.b_enc[:3] = -100.0  # dead
        sae.b_dec.copy_(world.bias)
    source = WorldSource(CONFIG, device="cpu")
    ours = recovery(source, {"sae": sae_lens_dictionary(sae)}, tokens=16_384)["sae"]

    class Replay:
        """Our samples, in the form of SAELens' generator."""

        def __init__(self):
            self.codes = (code.to_dense() for _, code in source.labelled(16_384))

        def sample(self, n: int) -> torch.Tensor:
            dense = next(self.codes)
            assert len(dense) == n
            return dense

    features = synthetic.FeatureDictionary(300, 40, bias=True, initializer=None)
    features.feature_vectors.data, features.bias.data = world.directions, world.bias
    theirs = synthetic.eval_sae_on_synthetic_data(sae, features, Replay(), num_samples=16_384, batch_size=1024)
    expected = {
        "f1": theirs.classification.f1_score, "precision": theirs.classification.precision,
        "recall": theirs.classification.recall, "mcc": theirs.mcc, "uniqueness": theirs.uniqueness,
        "r2": theirs.explained_variance, "l0": theirs.sae_l0, "true_l0": theirs.true_l0, "dead": theirs.dead_latents,
        "shrinkage": theirs.shrinkage,
    }  # fmt: skip
    assert {key: ours[key] for key in expected} == pytest.approx(expected, abs=1e-4)
    assert theirs.dead_latents >= 3
    assert 0.1 < theirs.classification.f1_score < 0.95
