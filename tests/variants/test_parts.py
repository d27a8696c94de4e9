"""What holds for every part: the contract of `engine.parts.Part`, over all kinds that are registered."""

import copy

import pytest
import torch
from temposae import variants as ours  # noqa: F401 (registers them)
from temposae.engine import registry
from temposae.engine.errors import UserError
from temposae.engine.storage.checkpoint import load, save

from ..stepping import advance

KINDS = sorted(registry._PARTS)
#: settings that a part needs in these small dictionaries, and those of the dictionary
NEEDED: dict[str, dict] = {
    "l1_before_mask": {"sae": {"mask": {"kind": "gaussian"}}},
    "range_encoders": {"sae": {"mask": {"kind": "ranges"}}},
    "specialised_weights": {"sae": {"mask": {"kind": "soft"}}},
}
ACTIVATIONS = ("relu", "topk", "batchtopk")


def settings_of(kind: str, activation: str = "relu") -> dict:
    given = copy.deepcopy(NEEDED.get(kind, {}))
    given["sae"] = {"activation": activation} | given.get("sae", {})
    return given


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_gives_codes_that_are_not_negative(kind, activation, made, rows, learner):
    one = learner(made(kind, **settings_of(kind, activation)), steps=30)
    lines = []
    for step in range(30):
        advance(one, rows(step))
        if step in (9, 29):
            lines.append(one.report())
    assert lines[1]["fvu"] < lines[0]["fvu"]
    assert lines[1]["l0"] > 0
    sae = one.end()
    batch = rows(99)
    f = sae.encode(batch.x, batch.pos)
    assert f.isfinite().all()
    assert (f >= 0).all()
    assert (f > 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_it_learns(kind, made, rows, learner):
    sae = made(kind, **settings_of(kind))
    before = {name: value.clone() for name, value in sae.named_parameters() if name.startswith("parts.")}
    one = learner(sae, steps=12)
    for step in range(12):
        advance(one, rows(step))
    for name, value in sae.named_parameters():
        if name in before:
            assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_units_of_the_activations_do_not_matter(kind, made, rows, learner, assert_close):
    """Trained on 4 x instead of x, the dictionary gives 4 times the activations and the same losses."""
    found = []
    for factor in (1.0, 4.0):
        sae = made(kind, **settings_of(kind))
        one = learner(sae)
        one.scale = 1 / factor
        for step in range(6):
            batch = rows(step)
            batch.acts = {name: factor * x for name, x in batch.acts.items()}
            advance(one, batch)
        batch = rows(99)
        sae = one.end()
        found.append((sae.encode(factor * batch.x, batch.pos) / factor, sae(factor * batch.x, batch.pos) / factor))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_dictionary_is_the_same(kind, made, rows, learner, tmp_path):
    one = learner(made(kind, **settings_of(kind)), steps=8)
    for step in range(5):
        advance(one, rows(step))
    sae = one.end()
    save(sae, tmp_path / "sae")
    again = load(tmp_path / "sae")
    batch = rows(99)
    assert torch.equal(sae.encode(batch.x, batch.pos), again.encode(batch.x, batch.pos))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit(kind, made, rows, learner):
    whole = learner(made(kind, **settings_of(kind)), steps=10)
    for step in range(6):
        advance(whole, rows(step))
    state, weights = whole.state(), whole.weights()
    state, weights = ({name: value.clone() for name, value in one.items()} for one in (state, weights))
    other = learner(made(kind, seed=5, **settings_of(kind)), steps=10)
    other.load_state(state, weights)
    for one in (whole, other):
        for step in range(6, 10):
            advance(one, rows(step))
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(value, other.sae.state_dict()[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_it_looks_along_rows_only_if_it_says_so(kind, made, rows):
    sae = made(kind, **settings_of(kind))
    batch, needs_rows = rows(3), "rows" in registry.find(kind).reads
    whole = sae.encode(batch.x, batch.pos)
    order = torch.randperm(len(batch.x), generator=torch.Generator().manual_seed(0))
    if needs_rows and sae.looks_along_rows:
        with pytest.raises(UserError, match="not in the order of their rows"):
            sae.encode(batch.x[order], batch.pos[order])
    elif not needs_rows:
        torch.testing.assert_close(sae.encode(batch.x[order], batch.pos[order]), whole[order])


def test_unknown_parts_are_named(made):
    with pytest.raises(UserError, match="sae.parts: 'position_embeding' is not known; did you mean position_embedding"):
        made("position_embeding")
    with pytest.raises(UserError, match="sae.parts.position_embedding.scale: -1 is not allowed"):
        made("position_embedding", scale=-1)
    with pytest.raises(UserError, match="position_embedding is not allowed twice"):
        made(parts=[{"kind": "position_embedding"}] * 2)
