"""Order probing where it is known what can be told, and files of further tasks."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from temposae.engine.config import SAEConfig, StreamConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.stream import ActivationStream, LanguageModel
from temposae.engine.stream.token_rows import TextRows
from temposae.engine.testbed import lexicon
from temposae.engine.testbed.language import Language
from temposae.evals import word_order
from temposae.evals.evaluation import Evaluation
from temposae.evals.word_order import Task, order_probing, read_blimp, read_senteval

D = 128


def tasks(evaluation: Evaluation, pairs: int) -> dict[str, Task]:
    language = Language()
    makers = {"agent": word_order._agents, "agreement": word_order._agreements}
    return {
        name: Task.of_pairs(make(language, pairs), evaluation.generator(f"order {name}"))
        for name, make in makers.items()
    }


@pytest.fixture
def evaluation(stream_of) -> Evaluation:
    return Evaluation(stream_of(), SparseAutoencoder(SAEConfig(d_in=D, d_sae=64, k=4)), None)


def test_both_texts_of_a_pair_have_the_same_words_and_are_on_one_side(evaluation):
    words = Language().vocabulary
    plurals = {noun + "s" for nouns in Language().nouns for noun in nouns.items}
    for name, task in tasks(evaluation, 150).items():
        n = len(task.y) // 2
        assert task.y.tolist() == [True] * n + [False] * n
        sides: dict[tuple, set] = {}
        for at in range(n):
            one, two = task.texts[at], task.texts[n + at]
            assert sorted(one) == sorted(two)
            assert one != two
            assert task.context[at] == task.context[n + at]
            sides.setdefault(tuple(sorted(one)), set()).update(task.train[[at, n + at]].tolist())
            subjects = [words[text[1]] for text in (one, two)]
            if name == "agent":
                assert [subject in lexicon.HUMANS for subject in subjects] == [True, False]
            else:
                assert [subject in plurals for subject in subjects] == [True, False]
        assert {len(side) for side in sides.values()} == {1}
        assert task.train.mean() == pytest.approx(0.5, abs=0.1)


def test_a_latent_that_is_the_label_is_found_at_the_last_token(evaluation):
    """A dictionary with one latent along what tells the agent at the last token, and others that mean nothing."""
    task = tasks(evaluation, 60)["agent"]
    _, last = word_order._readings(evaluation, task)
    probe = LogisticRegression(C=100, max_iter=2000).fit(last.x.numpy(), task.y)
    assert probe.score(last.x.numpy(), task.y) == 1
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=64, activation="relu"))
    with torch.no_grad():
        sae.W_enc[:, 7] = torch.from_numpy(probe.coef_[0]).float()
        sae.b_enc[7] = float(probe.intercept_[0])
    found = order_probing(Evaluation(evaluation.stream, sae, None), pairs=60)
    agent = found["tasks"]["agent"]
    assert agent["bow"] == 0.5
    assert agent["lm"]["last_token"] == agent["last_token"] == agent["top_1"]["last_token"] == 1
    assert agent["normalised"]["last_token"] == 1
    assert agent["texts"] == 120
    for reading in ("mean_pooled", "last_token"):
        of_tasks = [found["tasks"][name][reading] for name in ("agent", "agreement")]
        assert found[reading] == pytest.approx(np.mean(of_tasks))
    blind = SparseAutoencoder(SAEConfig(d_in=D, d_sae=64, activation="relu"))
    with torch.no_grad():
        blind.b_enc.fill_(-1e6)
    found = order_probing(Evaluation(evaluation.stream, blind, None), pairs=60)
    assert found["mean_pooled"] == found["last_token"] == 0.5
    assert found["normalised"] == {"mean_pooled": 0, "last_token": 0}
    assert found["ailing"] == "no latent is active on any text"
    json.dumps(found, allow_nan=False)


def test_permuted_labels_give_chance_even_where_a_latent_is_the_label(evaluation, monkeypatch):
    n = 400
    task = Task([[]] * n, [[9]] * n, np.arange(n) % 2 == 0, np.arange(n) < n // 2, np.arange(n))
    latent = torch.from_numpy(task.y).float()[:, None].expand(-1, 3)

    class Texts:
        def pooled(self):
            return latent

    monkeypatch.setattr(word_order, "pooled_latents", lambda *_: csr_array(latent.numpy()))
    monkeypatch.setattr(word_order, "_readings", lambda *_: (Texts(), Texts()))
    monkeypatch.setattr(evaluation, "autoencoders", lambda _, **options: {"sae": None})
    found = word_order._probe(evaluation, "it", task, 2, {})
    assert found["sae"]["last_token"] == found["sae"]["mean_pooled"] == 1
    for reading in ("mean_pooled", "last_token"):
        assert found["shuffled"][reading] == pytest.approx(0.5, abs=0.1)


def test_embeddings_know_no_order():
    """At the tokens' embeddings, means over a text are its bag of words, whatever is read from them."""
    stream = ActivationStream(StreamConfig(), model=LanguageModel("testbed", hook="hook_embed"))
    sae, random = (SparseAutoencoder(SAEConfig(d_in=D, d_sae=64, k=4), seed=seed) for seed in (0, 1))
    found = order_probing(Evaluation(stream, sae, random), pairs=40)
    assert found["bow"] == found["mean_pooled"] == found["lm"]["mean_pooled"] == 0.5
    assert found["normalised"]["mean_pooled"] is None
    assert found["tasks"]["agent"]["last_token"] == 0.5  # a full stop
    assert set(found["controls"]) == {"shuffled", "random", "lm_neurons"}
    for name in ("random", "lm_neurons"):
        assert found["controls"][name]["mean_pooled"] == 0.5


def test_what_is_read_is_the_text_and_its_last_token(evaluation):
    task = tasks(evaluation, 6)["agreement"]
    whole, last = word_order._readings(evaluation, task)
    for row, (context, text) in enumerate(zip(task.context, task.texts, strict=True)):
        tokens = torch.tensor([[evaluation.stream.text.bos, *context, *text]])
        x = evaluation.stream.model.activations(tokens)[0]
        torch.testing.assert_close(whole.pooled()[row], x[-len(text) :].mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last.pooled()[row], x[-1], rtol=1e-4, atol=1e-5)
        assert whole.pos[whole.row == row].tolist() == list(range(1 + len(context), 1 + len(context) + len(text)))


def test_results_are_the_same_again_and_whatever_was_probed_before(stream_of, tmp_path):
    (tmp_path / "more.jsonl").write_text(blimp(8))
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=64, k=4))
    one = order_probing(Evaluation(stream_of(), sae, None), pairs=30)
    two = order_probing(Evaluation(stream_of(), sae, None, files={"blimp": [str(tmp_path / "more.jsonl")]}), pairs=30)
    assert two["tasks"].pop("more")["texts"] == 16
    assert two["tasks"] == one["tasks"]


def blimp(pairs: int) -> str:
    sentences = [("the wolf chased the baker .", "the baker chased the wolf ."), ("so the dog hid", "hid dog the so")]
    lines = [dict(zip(("sentence_good", "sentence_bad"), sentences[i % 2], strict=True)) for i in range(pairs)]
    return "\n".join(json.dumps(line | {"UID": "x"}) for line in lines) + "\n\n"


def test_blimp_files(testbed, tmp_path):
    path, draw = tmp_path / "order.jsonl", np.random.default_rng(0)
    path.write_text(blimp(6))
    task = read_blimp(path, testbed.tokenizer, 5, draw)
    assert task.y.tolist() == [True] * 5 + [False] * 5
    ids = Language().token_id
    assert task.texts[0] == [ids[word] for word in ["the", "wolf", "chased", "the", "baker", "."]]
    assert task.texts[6] == [ids[word] for word in ["hid", "dog", "the", "so"]]
    assert len(set(task.train[[0, 2, 4, 5, 7, 9]])) == 1  # the same words
    assert len(set(task.train[[1, 3, 6, 8]])) == 1
    assert task.train[0] != task.train[1]
    for line in ('{"sentence_good": "so"}', "so", "[]", '{"sentence_good": "so", "sentence_bad": 3}'):
        path.write_text(blimp(2).strip() + "\n" + line)
        with pytest.raises(UserError, match=r"order.jsonl:3 must be a JSON object with sentence_good and"):
            read_blimp(path, testbed.tokenizer, 9, draw)
    path.write_text(blimp(3))
    with pytest.raises(UserError, match="has 3 pairs; at least 4"):
        read_blimp(path, testbed.tokenizer, 9, draw)
    with pytest.raises(UserError, match="nowhere can't be read"):
        read_blimp(tmp_path / "nowhere", testbed.tokenizer, 9, draw)


def test_senteval_files(testbed, tmp_path):
    path, draw = tmp_path / "bigram_shift.txt", np.random.default_rng(0)
    sides = ["tr"] * 10 + ["va"] * 4 + ["te"] * 6
    lines = [f"{side}\t{'OI'[n % 2]}\t{'the dog hid' if n % 2 else 'dog the hid'}" for n, side in enumerate(sides)]
    path.write_text("\n".join(lines))
    task = read_senteval(path, testbed.tokenizer, 100, draw)
    assert (task.train.sum(), (~task.train).sum()) == (10, 6)
    ids = Language().token_id
    for text, is_i in zip(task.texts, task.y, strict=True):
        assert text == [ids[word] for word in ("the dog hid" if is_i else "dog the hid").split()]
    assert (
        read_senteval(path, testbed.tokenizer, 4, np.random.default_rng(1)).train.tolist() == [True] * 4 + [False] * 4
    )
    for text, message in (
        (["tr\tO"], "bigram_shift.txt:1 must be tr, va or te"),
        (["xx\tO\tthe dog"], "bigram_shift.txt:1 must be tr, va or te"),
        (["tr\tO\t "], "bigram_shift.txt:1 must be tr, va or te"),
        ([*lines, "te\tU\tthe dog"], "has 3 labels; order probing needs 2"),
        (lines[:11], "must have both labels among the texts of tr, and of te"),
    ):
        path.write_text("\n".join(text))
        with pytest.raises(UserError, match=message):
            read_senteval(path, testbed.tokenizer, 100, draw)


def test_text_of_ones_own_takes_files(testbed, tmp_path):
    text = TextRows(["the dog hid . " * 9] * 30, testbed.tokenizer, 16)
    stream = ActivationStream(StreamConfig(context=16, buffer_tokens=64), model=testbed, rows=text)
    evaluation = Evaluation(stream, SparseAutoencoder(SAEConfig(d_in=D, d_sae=64, k=4)), None)
    with pytest.raises(UserError, match=r"has \d places in \d+ held-out rows to exchange two words, and 32 are needed"):
        order_probing(evaluation)
    (tmp_path / "order.jsonl").write_text(blimp(8))
    lines = [f"{side}\t{n % 2}\t{'the dog hid' if n % 2 else 'hid the dog'}" for side in ("tr", "te") for n in range(8)]
    (tmp_path / "shift.txt").write_text("\n".join(lines))
    evaluation.files = {"blimp": [str(tmp_path / "order.jsonl")], "senteval": [str(tmp_path / "shift.txt")]}
    found = order_probing(evaluation)
    assert list(found["tasks"]) == ["order", "shift"]
    assert found["tasks"]["shift"]["lm"] == {"mean_pooled": 1, "last_token": 1}
    assert found["tasks"]["shift"]["bow"] == 0.5
    task = read_blimp(tmp_path / "order.jsonl", testbed.tokenizer, 8, np.random.default_rng(0))
    full = replace(task, context=[[9] * 15] * len(task.texts))
    with pytest.raises(UserError, match="order: text 0 has no token to read among the 16 of stream.context"):
        word_order._readings(evaluation, full)
