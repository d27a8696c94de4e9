"""Agreement of dictionaries whose common latents are known, and of dictionaries that were trained."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.train import train
from temposae.evals import agreement as module
from temposae.evals.agreement import Activity, agreement, matched
from temposae.evals.api import evaluate
from temposae.evals.evaluation import Evaluation, Reference
from temposae.evals.positions import positions
from temposae.kernels.code import SparseCode

from ..commandline import run

N, F = 600, 40


def code(dense: np.ndarray) -> SparseCode:
    token, latent = np.nonzero(dense)
    offsets = torch.from_numpy(np.searchsorted(token, np.arange(len(dense) + 1)))
    values = torch.from_numpy(dense[token, latent].astype(np.float32))
    return SparseCode(values, torch.from_numpy(latent.astype(np.int32)), dense.shape[1], offsets)


def activations(seed: int, density: float = 0.1) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (draw.random((N, F)) < density) * draw.uniform(0.5, 2, (N, F)).astype(np.float32)


def test_the_same_latents_in_another_order_and_scale_agree_fully():
    dense, draw = activations(0), np.random.default_rng(1)
    other = dense[:, draw.permutation(F)] * draw.uniform(0.5, 2)
    found = agreement(code(other), code(dense))
    assert found == {"value": pytest.approx(1, abs=1e-6), "per_latent": pytest.approx(1, abs=1e-6), "matched": 1}
    assert agreement(code(dense), code(dense), np.arange(N))["value"] == pytest.approx(1, abs=1e-6)


def test_latents_whose_tokens_are_permuted_agree_with_nothing():
    dense, draw = activations(0), np.random.default_rng(1)
    assigned = np.stack([column[draw.permutation(N)] for column in dense.T], 1)  # each latent to other tokens
    for found in (agreement(code(assigned), code(dense)), agreement(code(dense), code(dense), draw.permutation(N))):
        assert 0 < found["value"] < 0.12  # about 2 / sqrt(N), the largest of F correlations by chance
        assert found["matched"] == 0


def test_each_side_counts_by_its_mass_and_a_latent_without_a_partner_as_0():
    dense = np.zeros((8, 3))
    dense[0, 0], dense[1, 1], dense[2:4, 2] = 3, 1, (2, 4)
    other = np.zeros((8, 2))
    other[0, 1], other[5, 0] = 5, 15
    # the first latent of 3 of 10 has a partner, of 5 of 20 of the other's mass
    found = agreement(code(other), code(dense))
    assert found["value"] == pytest.approx((3 / 10 + 5 / 20) / 2)
    assert found["per_latent"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert agreement(code(dense), code(other)) == pytest.approx(found)
    nothing = dict.fromkeys(("value", "per_latent", "matched"))
    assert agreement(code(other * 0), code(dense)) == agreement(code(dense), code(other * 0)) == nothing


@pytest.mark.parametrize("cells", [2**22, 100, 1])
def test_the_assignment_is_the_best_one_whatever_fits_memory(cells, monkeypatch):
    monkeypatch.setattr(module, "CELLS", cells)
    monkeypatch.setattr(module, "CANDIDATES", 2 * F)
    dense = activations(0, 0.3)
    other = np.concatenate([dense[:, ::2] + 0.3 * activations(1, 0.3)[:, ::2], activations(2, 0.3)], 1)
    r = np.corrcoef(dense.T, other.T)[:F, F:].clip(0)
    row, column = linear_sum_assignment(-r)
    a, b, found = matched(Activity.of(code(dense)), Activity.of(code(other)))
    assert len(set(a)) == len(a)
    assert len(set(b)) == len(b)
    assert found == pytest.approx(r[a, b], abs=1e-6)
    assert found.sum() == pytest.approx(r[row, column].sum(), abs=1e-6)


def test_decoder_rows_play_no_part(stream_of):
    sae, other, unlike = (SparseAutoencoder(SAEConfig(d_in=128, d_sae=96, k=6), seed=seed) for seed in (1, 1, 2))
    with torch.no_grad():
        other.W_dec.copy_(sae.W_dec.flip(0))
        unlike.W_dec.copy_(sae.W_dec)
    found = [
        positions(Evaluation(stream_of(), dictionary, None), Reference(sae), rows=12, bins=4, shuffles=1)["agreement"]
        for dictionary in (other, unlike)
    ]
    assert found[0]["value"] == pytest.approx(1, abs=1e-6)
    assert found[0]["same_recipe"] is None
    assert found[1]["value"] < 0.7


def test_two_seeds_of_a_recipe_agree_and_shuffled_ones_do_not(stream_of):
    config = TrainConfig(tokens=40_000, lr=3e-3, control=True, held_out_rows=0)
    recipe = SAEConfig(d_in=128, d_sae=128, k=8)
    one, two, three = (train(stream_of(), recipe, config.model_copy(update={"seed": seed})) for seed in (0, 1, 2))
    evaluation = Evaluation(stream_of(), one.sae, one.random)
    found = positions(evaluation, Reference(two.sae, three.sae), rows=48, bins=4, shuffles=1)["agreement"]
    json.dumps(found, allow_nan=False)
    assert found["value"] > found["shuffled"]["value"] + 0.4
    assert found["same_recipe"]["value"] > found["shuffled"]["value"] + 0.4
    assert abs(found["value"] - found["same_recipe"]["value"]) < 0.15
    assert found["shuffled"]["value"] < 0.1
    assert set(found["controls"]) == {"random", "lm_neurons"}
    assert found["controls"]["random"]["value"] < found["value"]
    again = positions(evaluation, Reference(two.sae, three.sae), rows=48, bins=4, shuffles=1)["agreement"]
    assert again == found


def test_a_second_seed_needs_a_reference(stream_of):
    sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=96, k=6))
    with pytest.raises(UserError, match="same_recipe: needs a reference"):
        evaluate(sae, "positions", stream=stream_of(), same_recipe=sae)


@pytest.mark.parametrize("field", ["reference", "same_recipe"])
def test_a_folder_that_is_not_there_is_named_by_its_option(field, tmp_path):
    status, _, err = run(
        "eval", "positions", "--sae", tmp_path / "a", f"--{field.replace('_', '-')}", tmp_path / "none"
    )
    assert status == 2
    assert err.startswith(f"error: {field}: {tmp_path / 'none'} does not exist")
