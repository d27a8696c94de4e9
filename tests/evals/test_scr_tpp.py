"""TPP and SCR of dictionaries that hold a class, an attribute, or nothing, on documents made for it."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from temposae.engine.config import SAEConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.evals.class_sets import _pooled
from temposae.evals.evaluation import Evaluation, TextActivations
from temposae.evals.probes import balanced
from temposae.evals.scr_tpp import _halves, scr, tpp

from .planted import Planted

TOPICS, R, T = 8, 256, 6
D = 2 * TOPICS + 2  # two directions of each topic, which come together, and one of each tone


def documents(tone_scale: float = 1.0, mixed: bool = False, short: bool = False) -> TextActivations:
    """R documents, as many of each topic in each tone. A row's last two places are left out, with `short` four in those of
    the first topic. With `mixed`, the directions are turned against the coordinates."""
    topic, tone = np.arange(R) % TOPICS, np.arange(R) // TOPICS % 2
    row = np.zeros((R, D))
    row[np.arange(R), 2 * topic] = row[np.arange(R), 2 * topic + 1] = 4
    row[np.arange(R), 2 * TOPICS + tone] = 4 * tone_scale
    kept = torch.ones(R, T, dtype=torch.bool)
    kept[:, T - 2 :] = False
    if short:
        kept[topic == 0, T - 4 :] = False
    at_row, pos = kept.nonzero(as_tuple=True)
    x = torch.from_numpy(row).float()[at_row] * torch.tensor([0.5, 1.5, 1, 1])[pos, None]
    labels = {
        name: np.where(kept, value[:, None], -1).astype(np.int16)
        for name, value in {"topic": topic, "tone": tone}.items()
    }
    if mixed:
        x = x @ turn()
    return TextActivations(torch.zeros(R, T, dtype=torch.int64), kept, x, pos, at_row, labels)


def turn() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0))).Q


def dictionary(directions: torch.Tensor) -> SparseAutoencoder:
    """A latent along each of the directions [F, D], on wherever x is."""
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=len(directions), activation="relu", k=4))
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions.T)
    return sae


def test_latents_of_one_class_each_perturb_that_class_only():
    found = tpp(Planted(dictionary(torch.eye(D)), documents()), seeds=2)
    assert found["clean_accuracy"] == 1
    # without its two latents a class gets the answer of all the others, and half of the test documents are its own
    assert found["tpp"][2] == {"total_metric": 0.5, "intended_diff_only": 0.5, "unintended_diff_only": 0}
    # other topics' latents, which speak against the class, are never taken
    assert found["tpp"][10] == pytest.approx(found["tpp"][2])
    assert found["score"] == found["tpp"][10]["total_metric"]
    assert list(found["tpp"]) == [2, 5, 10]
    assert found["controls"]["mean"]["tpp"][2]["intended_diff_only"] == 0
    json.dumps(found, allow_nan=False)


def test_latents_that_mix_the_classes_perturb_less_than_those_of_one_class():
    found = tpp(Planted(dictionary(turn()), documents(mixed=True)), seeds=2)
    assert found["tpp"][2]["total_metric"] == 0.5
    neurons = found["controls"]["lm_neurons"]["tpp"][2]
    assert neurons["intended_diff_only"] < 0.25


def test_effects_given_to_other_latents_find_nothing():
    directions = torch.cat([torch.eye(D), -torch.eye(D).repeat(20, 1)])  # those of -x never fire
    found = tpp(Planted(dictionary(directions), documents()), seeds=2)
    assert found["tpp"][2]["total_metric"] == 0.5
    assert found["controls"]["shuffled"]["tpp"][2]["total_metric"] == 0
    assert found["reached_by"] == [
        name for name, other in found["controls"].items() if other["score"] >= found["score"]
    ]
    assert "shuffled" not in found["reached_by"]


def test_a_dictionary_without_active_latents_changes_nothing():
    sae = dictionary(torch.eye(D))
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    found = tpp(Planted(sae, documents()), seeds=2)
    assert [list(values.values()) for values in found["tpp"].values()] == [[0, 0, 0]] * 3
    assert set(found["reached_by"]) >= {"mean", "shuffled"}


def test_ablating_in_every_token_gives_the_same():
    """Against a plain computation of one class: encode every token, zero two latents, decode, keep the error, pool."""
    collected, sae = documents(mixed=True), dictionary(torch.randn(24, D, generator=torch.Generator().manual_seed(3)))
    evaluation = Planted(sae, collected)
    topic = collected.row_label("topic").numpy()
    losses = []
    for seed in range(2):
        draw = evaluation.generator(f"tpp {seed}")
        sides = [np.concatenate(parts) for parts in zip(*_halves(topic, range(TOPICS), draw), strict=True)]
        sides = [[side[balanced(topic[side] == c, draw, groups=topic[side])] for c in range(TOPICS)] for side in sides]
        x = collected.pooled().numpy().astype(float)
        for c in range(TOPICS):
            train, test = (side[c] for side in sides)
            probe = LogisticRegression(max_iter=1000).fit(x[train], topic[train] == c)
            f = sae.encode(collected.x).detach().double()
            pooled = torch.stack([f[collected.row == r].mean(0) for r in range(R)]).numpy()
            W_dec = sae.W_dec.detach().double()
            of_class = topic[train] == c
            difference = pooled[train][of_class].mean(0) - pooled[train][~of_class].mean(0)
            effect = difference.clip(0) * (W_dec.numpy() @ probe.coef_[0])
            chosen = np.argsort(-effect)[:2]
            assert effect[chosen].min() > 0
            error = collected.x.double() - f @ W_dec
            f[:, chosen] = 0
            ablated = f @ W_dec + error
            means = torch.stack([ablated[collected.row == r].mean(0) for r in range(R)]).numpy()
            y = topic[test] == c
            losses.append(probe.score(x[test], y) - probe.score(means[test], y))
    assert np.mean(losses) > 0
    found = tpp(evaluation, seeds=2)
    assert found["tpp"][2]["intended_diff_only"] == pytest.approx(np.mean(losses), abs=1e-9)


def test_without_latents_of_the_spurious_attribute_the_probe_is_as_good_as_a_clean_one():
    found = scr(Planted(dictionary(torch.eye(D)), documents(tone_scale=4)), seeds=2)
    pair = found["sets"]["sailing/cooking"]
    assert (pair["clean_class"], pair["clean_attribute"], pair["base_class"], pair["base_attribute"]) == (1, 1, 0.5, 1)
    # dir1 takes the latents of the tone away; what the probe knows of the topic is enough then
    assert found["scr_dir1"] == {2: 1, 5: 1, 10: 1}
    assert found["scr_dir2"] == {2: None, 5: None, 10: None}
    assert found["scr_metric"] == found["scr_dir1"]
    assert (found["score"], found["spread"]) == (1, {2: 0, 5: 0, 10: 0})
    assert found["controls"]["mean"]["scr_metric"] == {2: 0, 5: 0, 10: 0}
    json.dumps(found, allow_nan=False)


def test_the_attribute_is_not_removed_by_other_latents():
    directions = torch.cat([torch.eye(D), -torch.eye(D).repeat(20, 1)])  # those of -x never fire
    found = scr(Planted(dictionary(directions), documents(tone_scale=4)), seeds=2)
    assert found["scr_metric"][2] == 1
    assert found["controls"]["shuffled"]["scr_metric"][2] == 0


def test_the_other_direction_is_taken_where_the_topic_hides_the_tone():
    found = scr(Planted(dictionary(torch.eye(D)), documents(tone_scale=0.25)), seeds=2)
    assert found["sets"]["music/gardening"]["base_attribute"] == 0.5
    # two topics have two latents each: with two of them gone the other topic still hides the tone
    assert found["scr_dir2"][5] == found["scr_dir2"][10] == 1
    assert found["scr_dir1"] == {2: None, 5: None, 10: None}
    assert found["scr_metric"] == found["scr_dir2"]


def test_a_dictionary_without_the_attribute_removes_nothing():
    directions = torch.eye(D)[: 2 * TOPICS]
    found = scr(Planted(dictionary(directions), documents(tone_scale=4)), seeds=2)
    assert found["scr_metric"] == {2: 0, 5: 0, 10: 0}


def test_ablation_takes_what_latents_write_at_padding_too():
    """With SAEBench's protocol: against zeroing the latent at every position, and a mean over the kept ones."""
    collected = documents(short=True)
    sae = dictionary(torch.cat([torch.eye(D), -torch.ones(1, D)]))
    with torch.no_grad():
        sae.b_enc[-1] = 1.0  # the last latent fires on zeros, and nowhere else
    x = torch.zeros(R, T + 3, D)  # rows are padded further than the longest text
    x[collected.row, collected.pos] = collected.x
    kept = collected.kept.sum(1, keepdim=True)
    latents, own = _pooled(collected, sae, True, T + 3), _pooled(collected, sae, False)
    chosen = np.array([0, D])
    np.testing.assert_allclose(latents.ablated(chosen), (sae.encode(x).sum(1) / kept)[:, chosen].detach(), atol=1e-6)
    assert latents.f[:, [-1]].max() == own.ablated(chosen)[:, 1].max() == 0
    np.testing.assert_array_equal(latents.f.toarray(), own.f.toarray())


def test_the_same_figures_again_and_whatever_the_other_dictionaries_are():
    collected = documents(mixed=True)
    sae = dictionary(torch.randn(24, D, generator=torch.Generator().manual_seed(3)))
    for measure, keys in ((tpp, ("tpp", "spread")), (scr, ("scr_metric", "scr_dir1", "scr_dir2", "sets"))):
        alone, beside = measure(Planted(sae, collected)), measure(Planted(sae, collected, dictionary(turn())))
        assert {key: alone[key] for key in keys} == {key: beside[key] for key in keys}
        assert alone["controls"]["shuffled"] == beside["controls"]["shuffled"]
        assert set(beside["controls"]) == {"random", "lm_neurons", "mean", "shuffled"}


def test_mistakes_are_refused(stream_of):
    sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=8, k=2))
    evaluation = Evaluation(stream_of(), sae, None)
    with pytest.raises(UserError, match="seeds: 1 is not allowed"):
        tpp(evaluation, seeds=1)
    with pytest.raises(UserError, match="rows: 12 is not allowed"):
        tpp(evaluation, rows=12)
    with pytest.raises(UserError, match="rows: 12 is not allowed"):
        scr(evaluation, rows=12)
