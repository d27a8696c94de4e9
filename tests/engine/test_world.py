"""Synthetic worlds: structure, firing over positions, samples by seed and chunk, and streams of them."""

import math

import pytest
import torch
from temposae.engine.config import MaskConfig, SAEConfig, StreamConfig, TrainConfig, WorldConfig
from temposae.engine.errors import UserError
from temposae.engine.stream import ActivationStream, WorldSource
from temposae.engine.synthetic.presets import PRESETS
from temposae.engine.synthetic.sampling import generator_for, sample
from temposae.engine.synthetic.world import KINDS, World
from temposae.engine.train import train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..stepping import stopped_after

SMALL = {
    "features": 120,
    "width": 24,
    "roots": 6,
    "branching": 3,
    "depth": 2,
    "orthogonal_steps": 5,
    "firing_min": 0.05,
}
TIME = {"positions": 32, "lasting": 0.2, "positional": 0.2, "order": 0.4, "context": 0.2, "roots": 0}


def coefficients(config: WorldConfig, tokens: int, seed: int = 0) -> tuple[World, torch.Tensor]:
    """A world and coefficients [rows, T, features] of at least `tokens` tokens."""
    source = WorldSource(config, seed=seed, device="cpu")
    dense = torch.cat([code.to_dense() for _, code in source.labelled(tokens)])
    return source.world, dense.unflatten(0, (-1, config.positions))


@pytest.fixture(scope="module")
def tree() -> tuple[World, torch.Tensor]:
    world, dense = coefficients(WorldConfig(**SMALL), 40_000)
    return world, dense[:, 0]


@pytest.fixture(scope="module")
def rows() -> tuple[World, torch.Tensor]:
    return coefficients(WorldConfig(**SMALL | TIME), 100_000)


def test_directions_have_unit_norm_and_little_overlap():
    start, end = (World(WorldConfig(**SMALL | {"orthogonal_steps": steps})).directions for steps in (0, 200))
    for directions in (start, end):
        torch.testing.assert_close(directions.norm(dim=1), torch.ones(120))

    def overlap(directions):
        return float((directions @ directions.T).square().sum())

    assert overlap(end) < 0.5 * (overlap(start) + 120**2 / 24)  # the least for 120 unit vectors in 24 dimensions


def test_activations_are_sums_of_directions(tree):
    world, _ = tree
    batch, code = next(WorldSource(world.config, device="cpu").labelled(1))
    torch.testing.assert_close(batch.x, code.to_dense() @ world.directions + world.bias)
    assert code.values.min() > 0
    assert torch.equal(code.l0(), (code.to_dense() > 0).sum(1))  # no feature twice


def test_children_fire_only_with_their_parents_and_alone(tree):
    world, dense = tree
    on = dense > 0
    assert (world.parents, world.tree_end, len(world.base)) == (24, 78, 6 + 120 - 78)
    fired_together = 0
    for parent in range(world.parents):
        children = on[:, 6 + 3 * parent : 9 + 3 * parent]
        assert not (children.any(1) & ~on[:, parent]).any()
        assert children.sum(1).max() <= 1
        fired_together += int(children.any(1).sum())
    assert fired_together > 1000
    shared = coefficients(WorldConfig(**SMALL | {"exclusive": 0.0}), 20_000)[1][:, 0] > 0
    assert max(int(shared[:, 6 + 3 * p : 9 + 3 * p].sum(1).max()) for p in range(24)) > 1


def test_children_scale_with_their_parents():
    settings = SMALL | {"spread_mean": 0.5, "spread_std": 0.0, "magnitude_first": 4.0, "magnitude_last": 2.0}

    def correlation(scale_by_parent: bool) -> float:
        _, dense = coefficients(WorldConfig(**settings | {"scale_by_parent": scale_by_parent}), 20_000)
        root, child = dense[:, 0, 0], dense[:, 0, 6]
        return float(torch.corrcoef(torch.stack([root, child])[:, child > 0])[0, 1])

    assert correlation(True) > 0.4
    assert abs(correlation(False)) < 0.15


def test_features_fire_at_their_rates(tree):
    world, dense = tree
    rate = (dense > 0).double().mean(0)
    expected = world.rate.double().clone()
    expected[6 : world.tree_end] = 0
    # a coefficient below zero counts as not fired
    above_zero = 0.5 * (1 + torch.erf(world.mean / world.spread / math.sqrt(2))).double()
    expected = (expected * above_zero)[world.base]
    error = (expected * (1 - expected) / len(dense)).sqrt()
    assert ((rate[world.base] - expected).abs() < 5 * error).all()
    assert (expected[:6] > 0.1).all()


def test_correlations_are_those_of_the_factor():
    settings = {"features": 12, "width": 12, "roots": 0, "correlation_rank": 2, "correlation_scale": 0.6}
    config = WorldConfig(**settings, firing_min=0.499, firing_max=0.5, spread_mean=0, spread_std=0)
    world, dense = coefficients(config, 60_000)
    measured = torch.corrcoef((dense[:, 0] > 0).double().T)
    gaussian = world.factor @ world.factor.T
    expected = 2 / math.pi * torch.asin(gaussian.clamp(-1, 1)).double()  # of signs of two Gaussian variables
    off = ~torch.eye(12, dtype=torch.bool)
    assert ((measured - expected)[off].abs() < 0.025).all()
    assert expected[off].abs().max() > 0.3


def test_samples_depend_on_seed_and_chunk_alone():
    config = WorldConfig(**SMALL | {"positions": 8})
    first, again, other = (WorldSource(config, seed=seed, device="cpu") for seed in (0, 0, 1))
    batches = [first.next() for _ in range(3)]
    assert all(torch.equal(batch.x, again.next().x) for batch in batches)
    assert not torch.equal(batches[0].x, other.next().x)
    resumed = WorldSource(config, seed=0, device="cpu")
    resumed.load_state({key: value.clone() for key, value in first.state().items()})
    assert torch.equal(resumed.next().x, first.next().x)
    assert torch.equal(torch.cat([batch.row for batch in batches]), torch.arange(3 * 1024) // 8)
    held_out = next(first.held_out())
    assert not torch.equal(held_out.x, batches[0].x)
    assert not torch.equal(World(WorldConfig(**SMALL | {"seed": 1})).directions, first.world.directions)


def test_nothing_of_size_tokens_times_features_is_made():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            self.numel = max(self.numel, *sizes, 0)
            return out

    world = World(WorldConfig(features=5440, width=8, roots=64, orthogonal_steps=0))
    with Largest() as largest:
        code = sample(world, 512, generator_for(world, 0))
        world.activations(code)
    assert code.n_tokens * world.config.features / 8 > largest.numel > 0


def test_kinds_have_their_shares(rows):
    world, _ = rows
    counts = torch.bincount(world.kind, minlength=len(KINDS)).tolist()
    assert dict(zip(KINDS, counts, strict=True)) == {
        "plain": 24, "lasting": 24, "positional": 24, "order": 24, "context": 24,
    }  # fmt: skip
    plain = World(WorldConfig(**SMALL | {"positions": 32}))
    assert (plain.kind == 0).all()


def test_lasting_features_last_for_their_durations(rows):
    world, dense = rows
    spread_alone = world.mean[world.base[world.time.lasting]] / world.spread[world.base[world.time.lasting]]
    certain = spread_alone > 5  # whose coefficients are hardly ever cut at zero
    on = (dense > 0)[..., world.base[world.time.lasting]][..., certain]
    stays = (on[:, :-1] & on[:, 1:]).sum((0, 1)).double()
    leaves = (on[:, :-1] & ~on[:, 1:]).sum((0, 1)).double()
    measured, true = (stays + leaves) / leaves, world.time.duration[certain].double()
    assert ((measured / true).log().abs() < 6 / leaves.sqrt()).all()
    assert true.max() > 3 * true.min()
    rate = world.rate[world.base[world.time.lasting]][certain].double()
    for position in (0, 15, 31):  # stationary
        error = (rate * (1 - rate) / len(on)).sqrt()
        assert ((on[:, position].double().mean(0) - rate).abs() < 5 * error).all()


def test_positional_features_fire_in_their_intervals(rows):
    world, dense = rows
    on = (dense > 0)[..., world.base[world.time.positional]].double().mean(0)  # [T, features]
    inside = (torch.arange(32) // 8)[:, None] == world.time.interval
    assert (on[~inside] == 0).all()
    assert (on[inside] > 0).all()


def test_order_features_fire_at_the_second_event(rows):
    world, dense = rows
    on = dense > 0
    event = on[..., world.base[world.time.events]]
    fires = on[..., world.base[world.time.ordered]]
    certain = (world.mean / world.spread)[world.base] > 6
    checked = 0
    for pair in range(len(world.time.events)):
        first, second = event[..., pair], event[..., pair ^ 1]
        columns = torch.stack([world.time.events[pair], world.time.events[pair ^ 1], world.time.ordered[pair]])
        if not certain[columns].all():
            continue
        recent = torch.zeros_like(first)
        for step in range(1, world.config.reach + 1):
            recent[:, step:] |= first[:, :-step]
        assert torch.equal(fires[..., pair], second & recent)
        checked += 1
    assert checked >= 4


def test_the_context_changes_slowly(rows):
    world, dense = rows
    on = (dense > 0).double()

    def agreement(columns, lag):
        centred = on[..., world.base[columns]] - on[..., world.base[columns]].mean((0, 1))
        signed = (centred * (world.time.sign if columns is world.time.context else 1)).sum(-1)
        return float((signed[:, :-lag] * signed[:, lag:]).mean() / signed.square().mean())

    assert agreement(world.time.context, 1) > agreement(world.time.context, 16) > 0.1
    plain = torch.isin(torch.arange(len(world.base)), world.time.events).nonzero().flatten()
    assert abs(agreement(plain, 1)) < 0.05


def test_a_stream_of_a_world_resumes_and_mixes():
    config = StreamConfig(world=WorldConfig(**SMALL), buffer_tokens=4096)
    stream = ActivationStream(config, tokens=20_000, batch=256)
    for _ in range(20):
        stream.next(256)
    resumed = ActivationStream(config, tokens=20_000, batch=256)
    resumed.load_state({key: value.clone() for key, value in stream.state().items()})
    for _ in range(10):
        batch, again = stream.next(256), resumed.next(256)
        assert torch.equal(batch.x, again.x)
        assert torch.equal(batch.row, again.row)
    assert stream.config.max_norm is None
    assert stream.counts["tokens"] > 5000


def test_a_stopped_run_resumes_exactly(tmp_path):
    config = StreamConfig(world=WorldConfig(**SMALL | TIME), buffer_tokens=2048)
    sae = SAEConfig(d_in=24, d_sae=64, k=4)
    settings = TrainConfig(tokens=8192, batch=256, log_every_steps=8, checkpoint_every_steps=8)

    def stream() -> ActivationStream:
        return ActivationStream(config, tokens=8192, batch=256)

    expected = train(stream(), sae, settings)
    with stopped_after(20):
        train(stream(), sae, settings, out=tmp_path / "half")
    resumed = train(stream(), sae, settings, out=tmp_path / "half", resume=True)
    for key, value in expected.sae.state_dict().items():
        assert torch.equal(value, resumed.sae.state_dict()[key]), key


def test_rows_of_a_world_are_served_whole_to_parts_along_rows():
    config = StreamConfig(world=WorldConfig(**SMALL | TIME), mode="sequences", buffer_dtype="float32")
    batch = ActivationStream(config, tokens=20_000, batch=256).next(256)
    assert batch.x.shape == (8, 32, 24)
    assert torch.equal(batch.pos, torch.arange(32, dtype=torch.int32).expand(8, 32))
    run = train(
        ActivationStream(config.model_copy(update={"mode": "tokens"}), tokens=4096, batch=256),
        SAEConfig(d_in=24, d_sae=64, k=4, mask=MaskConfig(kind="ranges", positions=32)),
        TrainConfig(tokens=4096, batch=256, log_every_steps=8),
    )
    assert run.held_out is not None
    assert run.held_out["sae"]["tokens"] == 16384


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    settings = PRESETS[name]
    StreamConfig(**settings["stream"])
    SAEConfig(d_in=8, **settings["sae"])
    TrainConfig(**settings["train"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lasting": 1.5, "positions": 8}, ("world.lasting: 1.5", "0 to 1")),
        ({"context": -0.1, "positions": 8}, ("world.context: -0.1", "0 to 1")),
        ({"roots": 200}, ("world.roots: 200", "at most features (120)")),
        ({"positional": 0.5}, ("world.positional: 0.5", "positions 1")),
        ({"lasting": 0.6, "order": 0.6, "positions": 8}, ("world.order: 0.6", "at most 1")),
        ({"positional": 0.6, "positions": 2}, ("world.intervals: 4", "at most positions (2)")),
        ({"firing_min": 0.5, "firing_max": 0.4}, ("world.firing_min: 0.5", "at most firing_max (0.4)")),
        ({"duration_min": 20.0}, ("world.duration_min: 20.0", "at most duration_max (16.0)")),
        ({"features": 1}, ("world.features: 1", "from 2")),
        ({"feature": 1}, ("world.feature: no such setting", "features")),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(UserError) as refused:
        WorldConfig(**SMALL | settings)
    assert [word for word in words if word not in str(refused.value)] == []


def test_settings_that_do_not_go_with_a_world_are_refused(tmp_path):
    world = WorldConfig(**SMALL)
    for settings, words in (
        ({"model": "smollm2"}, "stream.model: smollm2"),
        ({"mode": "sequences"}, "stream.mode: sequences"),
        ({"data": "text.txt"}, "stream.data: text.txt"),
    ):
        with pytest.raises(UserError, match=words):
            ActivationStream(StreamConfig(world=world, **settings))
    with pytest.raises(UserError, match="activations: x.npy is not allowed with a world"):
        StreamConfig(world=world, activations="x.npy")
    masked = SAEConfig(d_in=24, d_sae=64, k=4, mask=MaskConfig(kind="ranges", positions=2, ranges=2))
    stream = ActivationStream(StreamConfig(world=world), tokens=1000)
    with pytest.raises(UserError, match="has no positions"):
        train(stream, masked, TrainConfig(tokens=1000, batch=100))
