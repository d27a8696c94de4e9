"""The same latents at two layers, against plain formulas."""

import pytest
import torch
from temposae.engine.errors import UserError
from temposae.engine.parts import BatchView
from temposae.variants.cross_layer import to_units_of

from ..stepping import advance
from .conftest import D, R, T

N = R * T


@pytest.fixture
def two_layers(made, rows, learner):
    """two_layers(activation, **settings): a dictionary with a mask that was trained a little, and a batch as it sees it."""

    def make(activation="relu", **settings):
        sae = made("cross_layer", sae={"activation": activation, "mask": {"kind": "random"}}, **settings)
        one = learner(sae, steps=20)
        for step in range(5):
            advance(one, rows(step))
        sae.zero_grad()
        batch = rows(9)
        seen = BatchView(
            sae, batch.x, batch.pos.long(), T, training=True, target=batch.x, second=3 * batch.acts["second"] + 1
        )
        return sae, seen

    return make


def test_the_second_layer_is_brought_to_the_units_of_the_first(rows):
    x, second = rows().x.double(), 5 * rows(1).x.double() + 2
    found = to_units_of(x, second)
    torch.testing.assert_close(found.mean(0), x.mean(0))
    torch.testing.assert_close((found - x.mean(0)).square().sum(), (x - x.mean(0)).square().sum())
    torch.testing.assert_close(to_units_of(x, 7 * x - 3), x)


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk"])
def test_latents_of_further_activations_are_those_that_training_sees(activation, two_layers):
    sae, seen = two_layers(activation)
    sae.objective(seen.x, seen.pos, T, batch_context=(None, None, seen.second))
    assert torch.equal(sae.latents_of(seen.x, seen.pos), sae._last.f)
    sae.scale_(4.0)  # x of another unit is brought to that of training
    torch.testing.assert_close(sae.latents_of(seen.x, seen.pos), sae._last.f)


def both(sae, seen):
    """f and residual at both layers, worked out from the encoder."""
    found = []
    for x in (seen.x, to_units_of(seen.x, seen.second)):
        f = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * sae.mask.fixed[seen.pos]
        found.append((f, x - (f @ sae.W_dec + sae.b_dec)))
    return found


def test_latents_are_held_to_be_the_same(two_layers):
    sae, seen = two_layers(consistency=0.5, alignment=0.0)
    (f, _), (f2, _) = both(sae, seen)
    seen.f = f
    expected = 0.5 * D * (f - f2).square().sum() / (f.square().sum() + f2.square().sum())
    found = sae.parts[0].penalty(seen)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert sae.parts[0].report()["consistency"] == pytest.approx(float(expected.detach()) / 0.5 / D, rel=1e-4)


def test_gradients_of_the_decoder_are_held_to_agree(two_layers):
    sae, seen = two_layers(consistency=0.0, alignment=0.5)
    pairs = both(sae, seen)
    seen.f = pairs[0][0]
    gradients = [torch.autograd.grad(r.square().sum(), sae.W_dec, retain_graph=True)[0] for _, r in pairs]
    cosine = float(torch.cosine_similarity(*(g.flatten() for g in gradients), dim=0))
    assert abs(cosine) < 0.99
    assert float(sae.parts[0].penalty(seen).detach()) == pytest.approx(0.5 * D * (1 - cosine), rel=1e-4)
    assert sae.parts[0].report()["cosine"] == pytest.approx(cosine, abs=1e-5)


def test_layers_that_are_the_same_but_for_scale_cost_nothing(two_layers):
    sae, seen = two_layers()
    seen.second = 3 * seen.x - 1
    seen.f = sae.latents_of(seen.x, seen.pos)
    assert abs(float(sae.parts[0].penalty(seen).detach())) < 1e-5


def test_a_sample_of_tokens_follows_from_seed_and_step(two_layers):
    sae, seen = two_layers(tokens=7)
    seen.f = sae.latents_of(seen.x, seen.pos)
    found = []
    for step in (3, 3, 4):
        seen.step, seen.drawn = step, 0
        found.append(float(sae.parts[0].penalty(seen).detach()))
    assert found[0] == found[1] != found[2]


def end_of(made, rows, learner, **settings):
    one = learner(made("cross_layer", **settings), steps=60, lr=3e-2)
    for step in range(60):
        advance(one, rows(step))
    one.report()
    return one.sae.parts[0].report()


def test_consistency_makes_codes_of_two_layers_alike(made, rows, learner):
    apart = [end_of(made, rows, learner, consistency=w, alignment=0.0)["consistency"] for w in (0.0, 10.0)]
    assert apart[1] < 0.8 * apart[0]


def test_alignment_makes_gradients_of_two_layers_alike(made, rows, learner):
    cosines = [end_of(made, rows, learner, consistency=0.0, alignment=w)["cosine"] for w in (0.0, 1.0)]
    assert cosines[1] > cosines[0] + 0.1


def test_it_is_refused_beside_parts_whose_input_is_a_row(made):
    with pytest.raises(
        UserError, match="sae.parts: cross_layer is not allowed with self_attention, which needs whole rows"
    ):
        made(parts=[{"kind": "cross_layer"}, {"kind": "self_attention"}])
    with pytest.raises(UserError, match="sae.parts.cross_layer.consistency: -1 is not allowed"):
        made("cross_layer", consistency=-1)
