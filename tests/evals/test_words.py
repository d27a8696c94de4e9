"""Words of a vocabulary, and pairs of texts with two words exchanged."""

import numpy as np
import pytest
import torch
from temposae.engine.config import SAEConfig, StreamConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import ActivationStream
from temposae.engine.stream.token_rows import TextRows
from temposae.evals import positions, word_order
from temposae.evals.evaluation import Evaluation, squared_distance
from temposae.evals.word_order import order_probing
from temposae.evals.words import AFTER, CONTEXT, spelled, swapped_pairs
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

D, SIZE = 128, CONTEXT + 2 + AFTER


def evaluation_of(documents: list[str], testbed, context: int = 64) -> Evaluation:
    """The embedded model on a text without labels."""
    text = TextRows(documents, testbed.tokenizer, context)
    stream = ActivationStream(StreamConfig(context=context, buffer_tokens=64), model=testbed, rows=text)
    return Evaluation(stream, SparseAutoencoder(SAEConfig(d_in=D, d_sae=64, k=4)), None)


@pytest.fixture
def documents(texts) -> list[str]:
    return texts * 8


@pytest.mark.parametrize("decoder", ["sentencepiece", "byte-level"])
def test_a_token_is_spelled_with_its_space(decoder):
    mark = {"sentencepiece": "\u2581", "byte-level": "\u0120"}[decoder]
    vocabulary = [f"{mark}the", f"{mark}dog", "s", ",", "dog"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=","))
    inner.decoder = (  # pyright: ignore[reportAttributeAccessIssue]
        decoders.Metaspace(prepend_scheme="always") if decoder == "sentencepiece" else decoders.ByteLevel()
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert (tokenizer.decode([1]) == "dog") == (decoder == "sentencepiece")  # why tokens are not decoded alone
    assert spelled(tokenizer, range(5)) == [" the", " dog", "s", ",", "dog"]
    assert spelled(tokenizer, [3]) == [","]


def test_two_words_are_exchanged_and_nothing_else(documents, testbed):
    evaluation = evaluation_of(documents, testbed)
    pairs = swapped_pairs(evaluation, 64, 1000)
    words, rows = testbed.tokenizer.decode, list(evaluation.stream.held_out(64))
    held_out = " ".join(words(row) for batch in rows for row in batch.tokens.tolist())
    assert len(pairs) > 100
    for context, text, swapped in pairs:
        assert (len(context), len(text)) == (CONTEXT, 2 + AFTER)  # a token of this model is a word
        assert swapped == [text[1], text[0], *text[2:]]
        assert all(word.isalpha() and word.islower() for word in words(text[:2]).split())
        assert words(context + text) in held_out
    assert swapped_pairs(evaluation, 64, 1000) == pairs
    assert swapped_pairs(evaluation, 64, 40) == pairs[:40]


def test_pairs_have_no_more_tokens_than_the_rows(documents, testbed):
    evaluation = evaluation_of(
        [" ".join(text.replace(".", "").replace(",", "").split()) for text in documents], testbed
    )
    tokens = sum(len(context) + len(text) for context, text, _ in swapped_pairs(evaluation, 32, 10**6))
    held_out = next(iter(evaluation._shared.values())).kept.numel()
    assert held_out - 2 * SIZE < 2 * tokens <= held_out


def test_held_out_rows_fit_the_memory_they_may_take(documents, testbed, monkeypatch):
    """With longer rows or wider activations, fewer rows are kept."""
    assert len(positions.held_out(evaluation_of(documents, testbed), 32)) == 32
    monkeypatch.setattr(positions, "HELD", 8 * 4 * 64 * D)
    assert len(positions.held_out(evaluation_of(documents, testbed), 32)) == 8
    monkeypatch.setattr(positions, "HELD", 1)
    assert len(positions.held_out(evaluation_of(documents, testbed), 32)) == 1


def test_squared_distances_are_those_of_all_tokens_at_once(monkeypatch):
    x, y = torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("temposae.evals.evaluation.CHUNK", 4)
    torch.testing.assert_close(squared_distance(x, y), (x - y).double().square().sum(1))
    torch.testing.assert_close(squared_distance(x, y[0]), (x - y[0]).double().square().sum(1))


def test_words_left_out_are_in_no_pair(documents, testbed):
    """A massive activation in the middle of a row cuts the windows."""
    evaluation = evaluation_of(documents, testbed)
    before = swapped_pairs(evaluation, 64, 1000)
    collected = next(iter(evaluation._shared.values()))
    collected.kept[:, CONTEXT] = False
    after = swapped_pairs(evaluation, 64, 1000)
    held_out = collected.tokens.masked_fill(~collected.kept, -1).tolist()
    runs = {tuple(row[i : i + SIZE]) for row in held_out for i in range(len(row))}
    assert all(tuple(context + text) in runs for context, text, _ in after)
    assert not all(tuple(context + text) in runs for context, text, _ in before)


def test_a_bag_of_words_is_at_chance(documents, testbed):
    found = order_probing(evaluation_of(documents, testbed))
    assert list(found["tasks"]) == ["swapped words"]
    assert found["bow"] == 0.5  # exactly
    assert set(found["controls"]) == {"shuffled", "lm_neurons"}
    assert set(found["intervals"]) == {"mean_pooled", "last_token"}


def test_both_texts_of_a_pair_are_on_one_side(documents, testbed):
    pairs = swapped_pairs(evaluation_of(documents, testbed), 64, 1000)
    task = word_order.Task.of_pairs(pairs, np.random.default_rng(0))
    assert (task.train[: len(pairs)] == task.train[len(pairs) :]).all()
    assert torch.tensor(task.train).float().mean() == pytest.approx(0.5, abs=0.1)


def test_a_text_without_words_to_exchange_says_what_to_give(testbed):
    evaluation = evaluation_of(["the dog hid . " * 2] * 400, testbed)
    with pytest.raises(UserError, match=r"has \d places in \d+ held-out rows to exchange two words, and 32 are needed"):
        swapped_pairs(evaluation, 64, 1000)
