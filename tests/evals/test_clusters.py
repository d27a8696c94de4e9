"""Clusters by position of latents whose places are known."""

import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import silhouette_score
from temposae.engine.config import SAEConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.evals import clusters as clusters_module
from temposae.evals.clusters import BINS, _distances, _silhouette, clusters, tree
from temposae.evals.evaluation import Evaluation, TextActivations

R, T = 64, 32
EARLY, LATE, SELDOM = 5, 7, 2
D = EARLY + LATE + SELDOM


def documents(ragged: bool = True) -> TextActivations:
    """Coordinates are on now and then: the first at the first quarter of the positions, the next at the last, and the rest
    in one row only. Rows have 4 places padding each, and where `ragged` half of them 8 more."""
    draw = np.random.default_rng(0)
    on = draw.random((R, T, D)) * (draw.random((R, T, D)) < 0.8)
    on[:, T // 4 :, :EARLY] = 0
    on[:, : T // 2, EARLY : EARLY + LATE] = 0
    on[1:, :, EARLY + LATE :] = 0
    kept = torch.ones(R, T, dtype=torch.bool)
    kept[:, T - 4 :] = False
    if ragged:
        kept[::2, T - 12 :] = False
    row, pos = kept.nonzero(as_tuple=True)
    x = torch.from_numpy(on).float()[row, pos]
    return TextActivations(torch.zeros(R, T, dtype=torch.int64), kept, x, pos, row)


def dictionary(order: torch.Tensor | None = None) -> SparseAutoencoder:
    """A latent of each coordinate, in this order."""
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=D, activation="relu", k=4))
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(D) if order is None else torch.eye(D)[order])
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


class Planted(Evaluation):
    is_testbed = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __init__(self, collected: TextActivations, random: SparseAutoencoder | None = None):
        super().__init__(cast(Any, SimpleNamespace(model=SimpleNamespace(device="cpu"))), dictionary(), random)
        self.collected = collected

    def labelled(self, rows: int) -> TextActivations:
        return self.collected


def test_two_groups_of_latents_are_found():
    found = clusters(Planted(documents()))
    assert (found["count"], found["latents"]) == (2, EARLY + LATE)
    assert [c["size"] for c in found["clusters"]] == [EARLY, LATE]
    early, late = (np.array(c["profile"]) for c in found["clusters"])
    assert early[: BINS // 4].sum() == pytest.approx(1)
    assert late[BINS // 2 :].sum() == pytest.approx(1)
    assert found["between"] == pytest.approx(1)  # never in the same bin
    assert found["within"] < 0.2
    assert found["stability"] == {"adjusted_rand": 1, "spread": 0, "halves": 3}
    assert found["silhouette"][2] == max(found["silhouette"].values())
    json.dumps(found, allow_nan=False)


def test_a_profile_does_not_depend_on_how_many_tokens_a_bin_has():
    """Half of the rows end early, and yet latents of the second half of positions are as active in each of its bins."""
    late = clusters(Planted(documents()))["clusters"][1]["profile"]
    assert late[BINS // 2 : BINS - 2] == pytest.approx([1 / 6] * 6, abs=0.02)
    assert late[BINS - 2 :] == [0, 0]  # padding


def test_likeness_and_specialization_of_clusters_are_those_of_their_profiles():
    found = clusters(Planted(documents(), dictionary()))
    assert (found["latents"], [of["size"] for of in found["clusters"]]) == (EARLY + LATE, [EARLY, LATE])
    profiles, cluster = (np.array(found["sample"][key]) for key in ("profiles", "cluster"))
    r = np.corrcoef(profiles)
    for i, of in enumerate(found["clusters"]):
        for j in range(2):
            pairs = (cluster == i)[:, None] & (cluster == j) & ~np.eye(len(r), dtype=bool)
            assert found["correlation"][i][j] == pytest.approx(r[pairs].mean(), abs=2e-3)  # profiles have four digits
        p = profiles[cluster == i]
        special = 1 + np.where(p > 0, p * np.log(np.maximum(p, 1e-9)), 0).sum(1) / np.log(BINS)
        assert of["specialization"] == pytest.approx(np.percentile(special, (5, 25, 50, 75, 95)), abs=2e-3)
        np.testing.assert_allclose(p.mean(0), of["profile"], atol=1e-4)
    assert not any("sample" in control for control in found["controls"].values())


def test_a_sample_is_of_latents_evenly_and_a_cluster_of_one_has_no_likeness_with_itself(monkeypatch):
    whole = clusters(Planted(documents()), count=11)
    assert sorted(of["size"] for of in whole["clusters"]) == [1] * 10 + [2]
    profiles, cluster = (np.array(whole["sample"][key]) for key in ("profiles", "cluster"))
    for i, of in enumerate(whole["clusters"]):
        np.testing.assert_allclose(profiles[cluster == i].mean(0), of["profile"], atol=1e-4)
        assert (whole["correlation"][i][i] is None) == (of["size"] == 1)
    monkeypatch.setattr("temposae.evals.clusters.SHOWN", 4)
    some = clusters(Planted(documents()), count=11)["sample"]
    assert some["profiles"] == [whole["sample"]["profiles"][at] for at in (0, 3, 7, 11)]
    assert some["cluster"] == [whole["sample"]["cluster"][at] for at in (0, 3, 7, 11)]


def test_a_sample_of_many_latents_is_clustered(monkeypatch):
    """No tree has more than `MOST` latents, neither that of the whole text nor those of its halves."""
    whole, sizes, draw_tree = clusters(Planted(documents(), dictionary())), [], clusters_module.linkage
    assert (whole["latents"], whole["frequent"]) == (EARLY + LATE, EARLY + LATE)

    def linkage(distances, method):
        sizes.append(int(1 + np.sqrt(1 + 8 * len(distances))) // 2)
        return draw_tree(distances, method)

    monkeypatch.setattr(clusters_module, "linkage", linkage)
    monkeypatch.setattr(clusters_module, "MOST", 8)
    found = clusters(Planted(documents(), dictionary()))
    assert (found["latents"], found["frequent"], max(sizes)) == (8, EARLY + LATE, 8)
    assert len(sizes) == 4 * (1 + 2 * 3)  # the dictionary and three controls; three pairs of halves
    assert (found["count"], sum(of["size"] for of in found["clusters"])) == (2, 8)
    assert found["stability"]["adjusted_rand"] == 1
    assert clusters(Planted(documents(), dictionary())) == found


def test_the_tree_merges_the_nearest_first():
    profiles = np.zeros((3, BINS))
    profiles[0, 0], profiles[1, :2], profiles[2, [1, 9]] = 1, 0.5, 0.5
    near, far = (jensenshannon(profiles[1], profiles[at], base=2) for at in (0, 2))
    assert near < far < 1  # 1: that of the first and the last, which have no bin in common
    assert tree(profiles).tolist() == [[0, 1, pytest.approx(near), 2], [2, 3, pytest.approx((far + 1) / 2), 3]]


def test_groups_are_gone_where_positions_are_shuffled():
    found = clusters(Planted(documents(ragged=False), dictionary()))
    shuffled = found["controls"]["shuffled"]
    assert shuffled["between"] < 0.3
    assert shuffled["stability"]["adjusted_rand"] < 0.5
    own = {key: found[key] for key in ("count", "latents", "clusters", "between", "stability")}
    assert {key: found["controls"]["random"][key] for key in own} == own  # it was given the same dictionary
    # the model's own neurons are what the dictionary reads, each token's four largest
    assert found["controls"]["lm_neurons"]["between"] > 0.9


def test_distance_and_silhouette_are_those_of_their_formulas():
    draw = np.random.default_rng(5)
    profiles, labels = draw.dirichlet(np.ones(BINS), 12), np.array([1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 4])
    found = _distances(profiles)
    assert found[0] == pytest.approx(jensenshannon(profiles[0], profiles[1], base=2))
    square = np.zeros((12, 12))
    square[np.triu_indices(12, 1)] = found
    square += square.T
    assert _silhouette(square, labels) == pytest.approx(silhouette_score(square, labels, metric="precomputed"))
    assert _silhouette(square, np.ones(12)) == 0


def test_profiles_that_differ_in_rounding_have_no_distance():
    profiles = np.random.default_rng(0).dirichlet(np.ones(BINS), 300)
    again = profiles * 3 / (profiles * 3).sum(1, keepdims=True)
    square = np.zeros((600, 600))
    square[np.triu_indices(600, 1)] = _distances(np.concatenate([profiles, again]))
    assert 0 <= np.diagonal(square, 300).max() < 1e-7
    assert square[0, 1] > 0.1


def test_as_many_clusters_as_asked_for_and_the_same_again():
    evaluation = Planted(documents())
    found = clusters(evaluation, count=4)
    assert (found["count"], len(found["clusters"]), list(found["silhouette"])) == (4, 4, [4])
    assert clusters(Planted(documents()), count=4) == found
    with pytest.raises(UserError, match="count: 1 is not allowed"):
        clusters(evaluation, count=1)


def test_a_dictionary_that_never_fires_has_no_clusters():
    evaluation = Planted(documents())
    with torch.no_grad():
        evaluation.sae.b_enc.fill_(-1e6)
    found = clusters(evaluation)
    assert (found["latents"], found["count"], found["clusters"], found["stability"]) == (0, None, None, None)


def test_another_text_is_read_where_there_are_no_labels(stream_of, texts):
    stream = stream_of()
    sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=32, k=4))
    evaluation = Evaluation(stream, sae, None)
    evaluation.__class__ = type("DictionarySpec", (Evaluation,), {"is_testbed": False})
    stream.held_out = lambda count: iter(list(type(stream).held_out(stream, 32)))  # pyright: ignore[reportAttributeAccessIssue]
    found = clusters(evaluation)
    assert found["rows"] == 32
    assert found["latents"] > 2
