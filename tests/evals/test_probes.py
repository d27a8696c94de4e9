"""Probes and collected activations on cases whose answers are known."""

import numpy as np
import pytest
import torch
from temposae.engine.config import SAEConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.evals.evaluation import Evaluation, Mean, Neurons, joined
from temposae.evals.pooling import pooled_latents
from temposae.evals.probes import Split, accuracy, ailing, balanced, columns, halves, top_k
from temposae.kernels.code import SparseCode


def planted(n=400, seed=0):
    """Columns of noise, of which number 3 has the label in it and number 1 half of the time."""
    draw = np.random.default_rng(seed)
    y = draw.random(n) < 0.5
    X = draw.normal(size=(n, 6))
    X[:, 3] += 8 * y
    X[:, 1] += 2 * (y & (draw.random(n) < 0.5))
    return X, y


def test_the_column_that_is_the_label_is_found_and_scores_one():
    X, y = planted()
    draw = np.random.default_rng(1)
    split = halves(X, y, balanced(y, draw), draw)
    assert columns(split, 2).tolist() == [3, 1]
    found = top_k(split, (1, 2, 50))
    assert found[1] > 0.99
    assert found[50] == accuracy(split)
    # a single shuffle may be far from it: what little correlation is left by chance is along the one strong column
    assert 0.4 < np.mean([accuracy(split.shuffled(draw)) for _ in range(40)]) < 0.6
    assert accuracy(split, np.array([0])) < 0.6
    with pytest.raises(UserError, match="^k: 7 is not allowed; there are 6 latents$"):
        columns(split, 7)


def test_rows_are_balanced_and_negatives_come_evenly_from_the_other_groups():
    groups = np.repeat([0, 1, 2, 3], [30, 100, 20, 5])
    y = groups == 0
    rows = balanced(y, np.random.default_rng(0), groups=groups)
    counts = np.bincount(groups[rows], minlength=4)
    assert counts.tolist() == [30, 13, 12, 5] or counts.tolist() == [30, 12, 13, 5]
    assert len(set(rows)) == 60
    split = halves(np.arange(155)[:, None].astype(float), y, rows, np.random.default_rng(0))
    assert len(split.train_X) == len(split.test_X) == 30
    assert split.train_y.sum() == split.test_y.sum() == 15
    assert not set(split.train_X[:, 0]) & set(split.test_X[:, 0])
    with pytest.raises(UserError, match="^labels: 0 of 155 rows are in the class; a probe needs rows of both sides$"):
        balanced(groups == 9, np.random.default_rng(0))
    with pytest.raises(UserError, match="too few"):
        halves(np.zeros((2, 1)), np.array([True, False]), np.array([0, 1]), np.random.default_rng(0))


def test_latents_that_no_probe_can_use_are_named():
    assert ailing(np.zeros((4, 3))) == "no latent is active on any text"
    assert "the largest pooled activation is 1.0e-04, too small" in str(ailing(np.full((4, 3), 1e-4)))
    assert ailing(np.eye(3)) is None
    # and that is why: what is as small as that gives chance, though the label is in it
    X, y = planted()
    small = Split(3e-5 * X[:200, 3:4], y[:200], 3e-5 * X[200:, 3:4], y[200:])
    assert accuracy(small) < 0.7 < accuracy(Split(X[:200, 3:4], y[:200], X[200:, 3:4], y[200:]))


def test_collected_activations_are_the_model_s(stream_of):
    stream = stream_of(rows_per_forward=5)
    evaluation = Evaluation(stream, SparseAutoencoder(SAEConfig(d_in=128, d_sae=32, k=3), seed=1), None)
    found = evaluation.labelled(12)
    assert evaluation.labelled(12) is found
    assert len(found) == 12
    full = stream.model.activations(found.tokens)
    assert torch.allclose(full[found.kept], found.x, atol=1e-4)
    assert torch.equal(found.tokens[found.row, found.pos], found.tokens[found.kept])
    assert not found.kept[:, 0].any()  # <bos>
    words = [stream.text.language.document(1_000_000 + 10_000_000 + i) for i in range(12)]
    assert found.row_label("topic").tolist() == [document.topic for document in words]
    role = found.label("role")
    assert role[found.row == 3].tolist() == words[3].labels["role"][1:-1]

    code = found.code(evaluation.sae)
    assert torch.equal(code.to_dense(), evaluation.sae.encode(found.x, found.pos))
    f = evaluation.sae.encode(found.x, found.pos)
    pooled = torch.stack([f[found.row == row].mean(0) for row in range(12)])
    assert np.allclose(pooled_latents(found, evaluation.sae).toarray(), pooled, atol=1e-5)
    raw = torch.stack([found.x[found.row == row].mean(0) for row in range(12)])
    assert torch.allclose(found.pooled(), raw, atol=1e-4)
    autoencoders = evaluation.autoencoders(found)
    assert list(autoencoders) == ["sae", "lm_neurons", "mean"]


def test_controls_are_what_they_say():
    x = torch.tensor([[1.0, -5.0, 2.0], [0.0, 0.5, -0.1]])
    neurons = Neurons(3, 2)
    code = neurons.encode_sparse(x, torch.zeros(2))
    assert torch.equal(neurons.decode(code), torch.tensor([[0.0, -5.0, 2.0], [0.0, 0.5, -0.1]]))
    mean = Mean(x.mean(0))
    assert torch.equal(mean.decode(mean.encode_sparse(x, torch.zeros(2))), x.mean(0).expand(2, -1))


def test_codes_are_joined_in_order():
    fixed = SparseCode(torch.tensor([[1.0, 0.0], [-2.0, 3.0]]), torch.tensor([[4, 0], [1, 2]], dtype=torch.int32), 5)
    ragged = SparseCode(
        torch.tensor([7.0, 9.0]), torch.tensor([3, 3], dtype=torch.int32), 5, torch.tensor([0, 0, 1])
    )  # the second entry is unused
    found = joined([fixed, ragged])
    assert torch.equal(found.to_dense(), torch.cat([fixed.to_dense(), ragged.to_dense()]))
    assert found.offsets.tolist() == [0, 1, 3, 3, 4]
