"""Intervals of scores whose distribution is known."""

import json
import math

import numpy as np
import pytest
from temposae.engine.config import SAEConfig
from temposae.engine.sae import SparseAutoencoder
from temposae.evals.evaluation import Evaluation
from temposae.evals.intervals import DRAWS, POWER, Outcomes, interval, joined
from temposae.evals.suite import load_eval
from temposae.evals.word_order import order_probing


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_interval_is_that_of_the_binomial_and_covers_the_truth():
    covered, n, p = 0, 200, 0.8
    for seed in range(100):
        found = interval({"sae": Outcomes.of(draw(seed).random(n) < p)}, draw())
        assert found is not None
        assert found["items"] == n
        assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / n), rel=0.3)
        covered += found["low"] <= p <= found["high"]
    assert 88 <= covered <= 100
    assert found["above_random"] is None


def test_it_is_the_same_every_time():
    outcomes = {"sae": Outcomes.of(draw(1).random(50)), "random": Outcomes.of(draw(2).random(50))}
    assert interval(outcomes, draw()) == interval(outcomes, draw())
    assert interval(outcomes, draw()) != interval(outcomes, draw(1))


def test_the_difference_is_paired_by_item():
    """Items differ much, dictionaries by a constant: only pairs show it."""
    hard = draw(1).random(100)
    sae = Outcomes.of(hard + 0.02 + 0.001 * draw(2).normal(size=100), bounded=False)
    above = interval({"sae": sae, "random": Outcomes.of(hard, bounded=False)}, draw())["above_random"]
    assert above["difference"] == pytest.approx(0.02, abs=1e-3)
    assert 0.019 < above["low"] < above["difference"] < above["high"] < 0.021
    assert above["least"] == pytest.approx(POWER * 0.001 / 10, rel=0.2)
    other = Outcomes.of(draw(3).permutation(hard), bounded=False)
    unpaired = interval({"sae": sae, "random": other}, draw())["above_random"]
    assert unpaired["least"] > 50 * above["least"]
    assert unpaired["low"] < 0 < unpaired["high"]


def test_the_least_difference_is_found_in_four_of_five_tests():
    n, p, shown = 400, 0.7, 0
    least = POWER * math.sqrt(2 * p * (1 - p) / n)
    for seed in range(100):
        pair = draw(seed)
        sae, random = pair.random(n) < p + least / 2, pair.random(n) < p - least / 2
        above = interval({"sae": Outcomes.of(sae), "random": Outcomes.of(random)}, draw())["above_random"]
        assert above["least"] == pytest.approx(least, rel=0.15)
        shown += above["low"] > 0
    assert 68 <= shown <= 92


def test_items_with_one_outcome_have_the_rule_of_three():
    ones = Outcomes.of(np.ones(60))
    found = interval({"sae": ones, "random": ones}, draw())
    assert (found["low"], found["high"]) == (pytest.approx(0.95), 1)
    assert found["above_random"] == {
        "difference": 0, "low": pytest.approx(-0.05), "high": pytest.approx(0.05), "least": pytest.approx(0.05)
    }  # fmt: skip


def test_groups_weigh_the_same_whatever_their_sizes_and_missing_ones_are_left_out():
    small, large = Outcomes.of(np.ones(2)), Outcomes.of(np.zeros(98))
    both = joined([small, large])
    assert both.items == 100
    assert both.score == 0.5
    resampled = both.scores(np.eye(100)[[0, 5]] * 3)  # only the small group's items, only the large group's
    assert resampled.tolist() == [1, 0]
    weighted = Outcomes(both.gained, both.counted, np.array([3.0, 1.0]))
    assert weighted.score == 0.75


def test_a_ratio_of_sums_counts_every_item_by_its_size():
    sizes = draw(0).uniform(1, 9, (40, 1))
    found = Outcomes(sizes * 0.5, sizes, bounded=False)
    assert found.score == pytest.approx(0.5)
    edges = interval({"sae": found}, draw())
    assert edges["low"] == pytest.approx(0.5)
    assert edges["high"] == pytest.approx(0.5)
    assert interval({"sae": Outcomes.of(np.ones(1))}, draw()) is None


def test_many_items_are_resampled_in_parts(monkeypatch):
    outcomes = {"sae": Outcomes.of(draw(1).random(500))}
    whole = interval(outcomes, draw())
    monkeypatch.setattr("temposae.evals.intervals._AT_ONCE", 500 * 7)
    parts = interval(outcomes, draw())
    assert {key: parts[key] for key in ("low", "high")} == pytest.approx(
        {key: whole[key] for key in ("low", "high")}, rel=1e-12
    )
    assert DRAWS % 7


#: eval -> paths of the scores that have intervals
MEASURED = {
    "core": ("explained_variance", "ce_recovered", "kl_recovered"),
    "sparse_probing": ("top_1", "top_5"),
    "order_probing": ("mean_pooled", "last_token"),
    "ground_truth": ("recovered", "detected", "mean_f1", "mean_top_5"),
    "unlearning": ("score",),
    "scr": ("score",),
    "tpp": ("score",),
    "absorption": ("mean_absorption",),
    "mdl": ("bits_per_token", "fvu"),
}


@pytest.fixture
def evaluation(stream_of) -> Evaluation:
    sae, random = (SparseAutoencoder(SAEConfig(d_in=128, d_sae=160, k=8), seed=seed) for seed in (1, 2))
    return Evaluation(stream_of(), sae, random, share=4)


@pytest.mark.parametrize("name", MEASURED)
def test_the_outcomes_of_an_eval_are_those_of_its_scores(name, evaluation):
    """Resampling without a change gives the reported figure, and the difference is that of the reported figures."""
    measure = order_probing if name == "order_probing" else load_eval(name)
    result = measure(evaluation)
    for key in MEASURED[name]:
        found, value, control = result["intervals"][key], result[key], result["controls"]["random"][key]
        assert found["above_random"]["difference"] == pytest.approx(value - control, abs=1e-9), key
        assert found["low"] - 1e-9 <= value <= found["high"] + 1e-9, key
        edges = found["controls"]["random"]
        assert edges["low"] - 1e-9 <= control <= edges["high"] + 1e-9, key
        assert found["above_random"]["least"] > 0
        assert 10 < found["items"] < 2000
    if name != "unlearning":  # which takes longest
        assert json.dumps(measure(evaluation)["intervals"], allow_nan=False) == json.dumps(result["intervals"])
