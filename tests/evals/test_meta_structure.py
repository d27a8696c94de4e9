"""Dictionaries whose decoder rows share directions by construction, and some whose rows share nothing."""

import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from temposae.engine.config import SAEConfig
from temposae.engine.sae import SparseAutoencoder
from temposae.evals import meta_structure as module
from temposae.evals.evaluation import Evaluation, TextActivations
from temposae.evals.meta_structure import FEWEST, RATIO, SPLIT, K, meta_structure

D, SHARED, F = 32, 16, 1050


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 60)
    monkeypatch.setattr(module, "BATCH", 512)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def unrelated(seed: int, count: int = F) -> torch.Tensor:
    return unit(torch.randn(count, D, generator=torch.Generator().manual_seed(seed)))


def sums_of_two(count: int = F) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [count, D], each a sum of 2 of SHARED orthogonal directions with weights from 0.5 to 1, and which ones."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(D, SHARED, generator=generator)).Q.T
    pairs = torch.stack([torch.randperm(SHARED, generator=generator)[:2] for _ in range(count)])
    weights = 0.5 + 0.5 * torch.rand(count, 2, generator=generator)
    return unit((weights[..., None] * directions[pairs]).sum(1)), pairs


def dictionary(rows: torch.Tensor, dead: int = 0) -> SparseAutoencoder:
    """A latent for each decoder row, of which the first `dead` never fire."""
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=len(rows), activation="relu", k=4))
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_enc[:dead] = -100
    return sae


class Planted(Evaluation):
    """Every decoder row is an activation, so that all latents fire whose bias allows it."""

    is_testbed = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __init__(self, sae: SparseAutoencoder, random: SparseAutoencoder | None = None, seed: int = 0):
        super().__init__(cast(Any, SimpleNamespace(model=SimpleNamespace(device="cpu"))), sae, random, seed)

    def labelled(self, rows: int) -> TextActivations:
        x = torch.cat([sae.W_dec for sae in (self.sae, *self.controls.values())])
        kept = torch.ones(1, len(x), dtype=torch.bool)
        return TextActivations.of(torch.zeros(1, len(x), dtype=torch.int64), kept, x)


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", 60)
        patch.setattr(module, "BATCH", 512)
        return meta_structure(Planted(dictionary(sums_of_two()[0]), dictionary(unrelated(2))))


def test_sums_of_two_shared_directions_score_far_above_rows_that_share_nothing(planted):
    controls = {name: control["meta_explained_variance"] for name, control in planted["controls"].items()}
    assert planted["meta_explained_variance"] > 0.8
    assert list(controls) == ["random", "shuffled"]
    assert all(0.2 < score < planted["meta_explained_variance"] - 0.3 for score in controls.values())
    assert planted["train_explained_variance"] == pytest.approx(planted["meta_explained_variance"], abs=0.05)
    json.dumps(planted, allow_nan=False)


def test_sizes_and_sparsity_are_the_documented_ones(planted):
    held = F // 10
    sizes = {"latents": F, "held_out": held, "meta_latents": (F - held) // RATIO}
    for scores in (planted, *planted["controls"].values()):
        assert {key: scores[key] for key in sizes} == sizes
        assert scores["l0"] <= K + 0.1
    assert all(control["l0"] == pytest.approx(K, abs=0.1) for control in planted["controls"].values())
    assert planted["dead"] == 0
    assert planted["protocol"] == {"k": K, "ratio": RATIO, "steps": 60, "batch": 512}


def test_the_listed_members_share_a_direction(planted):
    _, pairs = sums_of_two()
    assert len(planted["largest"]) == module.SHOWN
    counts = [meta["count"] for meta in planted["largest"]]
    assert counts == sorted(counts, reverse=True)
    for meta in planted["largest"]:
        assert len(meta["members"]) == len(meta["cosines"]) == module.MEMBERS
        common = torch.bincount(pairs[meta["members"]].flatten(), minlength=SHARED).max()
        assert int(common) >= module.MEMBERS - 1
        assert min(meta["cosines"]) > 0.5


def test_held_out_rows_are_not_trained_on(monkeypatch):
    """Rows of one direction each: the held-out ones are badly explained, the others well."""
    found = meta_structure(Planted(dictionary(unrelated(3))))
    assert found["meta_explained_variance"] < found["train_explained_variance"] - 0.01
    monkeypatch.setattr(module, "SPLIT", F + 1)
    whole = meta_structure(Planted(dictionary(unrelated(3))))
    assert whole["held_out"] == 0
    assert whole["meta_explained_variance"] == whole["train_explained_variance"]


def test_a_small_dictionary_is_scored_on_its_training_rows():
    count = 60
    found = meta_structure(Planted(dictionary(sums_of_two(count)[0])))
    assert count < SPLIT
    assert (found["held_out"], found["meta_latents"], found["latents"]) == (0, module.LEAST, count)
    assert found["meta_explained_variance"] > found["controls"]["shuffled"]["meta_explained_variance"] + 0.1


def test_dead_latents_are_left_out_and_counted():
    """Unrelated rows of latents that never fire change nothing, and the members are numbers of the whole dictionary."""
    rows, dead = sums_of_two(200)[0], 100
    alone = meta_structure(Planted(dictionary(rows)))
    beside = meta_structure(Planted(dictionary(torch.cat([unrelated(4, dead), rows]), dead)))
    assert (beside["dead"], beside["latents"]) == (dead, 200)
    for meta in alone["largest"]:
        meta["members"] = [latent + dead for latent in meta["members"]]
    changed = ("dead", "rows")
    assert {k: v for k, v in beside.items() if k not in changed} == {k: v for k, v in alone.items() if k not in changed}


def test_a_random_control_gives_as_many_rows_as_the_dictionary_has_live_latents():
    dead, rows = 100, sums_of_two(200)[0]
    found = meta_structure(Planted(dictionary(rows, dead), dictionary(unrelated(2, 200), 150)))
    assert found["controls"]["random"]["latents"] == found["latents"] == 100


def test_rerunning_gives_the_same_bits_and_another_seed_another_dictionary(planted):
    again = meta_structure(Planted(dictionary(sums_of_two()[0]), dictionary(unrelated(2))))
    assert again == planted
    torch.rand(3)
    rows = dictionary(sums_of_two(100)[0])
    first, other = meta_structure(Planted(rows)), meta_structure(Planted(rows, seed=1))
    assert first["meta_explained_variance"] != other["meta_explained_variance"]


def test_rows_at_their_initial_directions_are_no_structure(monkeypatch):
    """A meta-dictionary that started from the dictionary's own seed would start at its first decoder rows."""
    first_rows = []

    class Started(SparseAutoencoder):
        def __init__(self, config: SAEConfig, *, seed: int = 0):
            super().__init__(config, seed=seed)
            first_rows.append(self.W_dec.detach().clone())

    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=200, activation="relu", k=4), seed=0)
    monkeypatch.setattr(module, "SparseAutoencoder", Started)
    monkeypatch.setattr(module, "STEPS", 1)
    meta_structure(Planted(sae, seed=0))
    (of_sae, _) = first_rows
    assert float((of_sae @ sae.W_dec.detach().T).max()) < 0.9


def test_too_few_live_latents_have_no_score_but_a_warning():
    found = meta_structure(Planted(dictionary(sums_of_two(40)[0], dead=40 - FEWEST + 1)))
    assert found["meta_explained_variance"] is None
    assert found["largest"] == []
    assert found["dead"] == 40 - FEWEST + 1
    assert found["warnings"][0] == "sae: 31 latents fire; at least 32 are needed for a meta-dictionary"
    json.dumps(found, allow_nan=False)


def test_shuffled_rows_have_the_same_coordinates_in_another_order():
    rows = sums_of_two(50)[0]
    shuffled = module._shuffled(rows, np.random.default_rng(0))
    assert shuffled.norm(dim=1) == pytest.approx(np.ones(50), abs=1e-6)
    assert float((shuffled - rows).abs().max()) > 0.1
    ratio = shuffled[:, :1] / shuffled[:, 1:2]
    assert not torch.allclose(ratio, rows[:, :1] / rows[:, 1:2])
