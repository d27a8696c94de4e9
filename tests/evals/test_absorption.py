"""Absorption in a dictionary of which it is known which words another latent has taken over."""

import json
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from temposae.engine.config import SAEConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.testbed.language import ROLES, Language
from temposae.evals.absorption import EACH, _absorbed, _by_letter, _of_vocabulary, _Words, absorption, l1_probe
from temposae.evals.evaluation import Evaluation, TextActivations
from temposae.evals.row_budget import Sizes

from .planted import Planted

ROWS, SIZE, FEW = 16, 20, 7
B, S, TAKEN, D = 0, 1, 2, 6  # directions: of the letters, of words that were taken over, and three to spare


def documents(taken: int, letters: str = "bs") -> TextActivations:
    """Every row has the same words: 20 of each letter, of which the first `taken` words of "s" have a direction of their own
    too; 7 of "g"; and 20 of "c" that are no content words."""
    vocabulary = Language().vocabulary
    x, tokens, roles = [], [], []
    for letter in letters + "gc":
        count = FEW if letter == "g" else SIZE
        tokens += [t for t, word in enumerate(vocabulary) if word[0] == letter][:count]
        roles += [ROLES.index("none" if letter == "c" else "noun")] * count
        for nth in range(count):
            x.append(torch.zeros(D))
            if letter in letters:
                x[-1]["bs".index(letter)] = 1
            if letter == "s" and nth < taken:
                x[-1][TAKEN] = 1
    kept = torch.ones(ROWS, len(tokens), dtype=torch.bool)
    row, pos = kept.nonzero(as_tuple=True)
    labels = {"role": np.tile(np.array(roles, np.int16), (ROWS, 1))}
    return TextActivations(torch.tensor(tokens).repeat(ROWS, 1), kept, torch.stack(x).repeat(ROWS, 1), pos, row, labels)


def dictionary(*writes: list[float], misses: bool = True) -> SparseAutoencoder:
    """A latent of "b" and one of "s", the latter with holes where a word was taken over if it `misses`, and there a latent
    for each of `writes`, which are decoder rows."""
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=2 + len(writes), activation="relu", k=2))
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.W_dec.zero_()
        sae.W_dec[B, B] = sae.W_dec[S, S] = sae.W_enc[B, B] = sae.W_enc[S, S] = 1
        sae.W_enc[TAKEN, S] = -2 if misses else 0
        for nth, row in enumerate(writes):
            sae.W_enc[TAKEN, 2 + nth] = 1
            sae.W_dec[2 + nth] = torch.tensor(row)
    return sae


WHOLE = [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]  # the letter's direction and the word's own


def test_a_latent_that_takes_over_a_word_gives_its_share_of_the_words():
    whole = dictionary(WHOLE, misses=False)
    found = absorption(Planted(dictionary(WHOLE), documents(taken=1), whole))
    assert set(found["letters"]) == {"b", "s"}  # "g" has too few words, those of "c" are not of content
    s, b = found["letters"]["s"], found["letters"]["b"]
    assert (s["words"], s["probe_f1"], s["main"], s["known"]) == (SIZE, 1, [S], 6 * SIZE)
    assert (s["missed"], s["absorbed"], s["absorption"]) == (6, 6, 1 / SIZE)
    assert s["main_f1"] == pytest.approx(2 * 0.95 / 1.95)  # all that it finds is right, and it finds 19 of 20
    assert (b["main"], b["main_f1"], b["missed"], b["absorption"]) == ([B], 1, 0, 0)
    # without its main latent, the word's own is all that stands for the letter
    assert (s["absorption_fraction"], b["absorption_fraction"]) == (pytest.approx(1 / SIZE), 0)
    assert (found["mean_absorption"], found["mean_main_f1"]) == (1 / SIZE / 2, (s["main_f1"] + 1) / 2)
    assert (found["mean_absorption_fraction"], found["mean_split"]) == (pytest.approx(1 / SIZE / 2), 1)
    nothing = {"mean_absorption": 0, "mean_absorption_fraction": 0, "mean_split": 1, "mean_main_f1": 1}
    # nothing is missed; the regression leans on the word's own direction by a thousandth
    assert found["controls"]["random"] == pytest.approx(nothing, abs=2e-3)
    assert found["warnings"] == []
    assert set(found["controls"]) == {"random", "lm_neurons", "mean", "shuffled"}
    json.dumps(found, allow_nan=False)


def eight_letters(seed: int = 0) -> tuple[_Words, SparseAutoencoder]:
    """20 words of each of 8 letters, six times each for training and for testing; latent 0 is large on every word and says
    nothing, and latent 1 + n is the n-th letter's."""
    draw = np.random.default_rng(seed)
    word = np.repeat(np.arange(160), 12)
    letter = np.array(list("abcdefgh"))[word // 20]
    x = np.zeros((len(word), 9), np.float32)
    x[:, 0] = draw.normal(50, 20, len(word)).clip(1)
    x[np.arange(len(word)), 1 + word // 20] = draw.uniform(0.8, 1.2, len(word))
    sae = SparseAutoencoder(SAEConfig(d_in=9, d_sae=9, activation="relu", k=2))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(9))
        sae.W_dec.copy_(torch.eye(9))
    of_test = np.arange(len(word)) % 2 == 1
    given = _Words(
        torch.from_numpy(x), torch.zeros(len(word), dtype=torch.int64), word, letter,
        np.flatnonzero(~of_test), np.flatnonzero(of_test),
    )  # fmt: skip
    return given, sae


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_eight_letters_are_found_beside_a_large_latent_that_says_nothing(seed):
    given, sae = eight_letters(seed)
    found = _by_letter(given, {"sae": sae}, {})["sae"]
    assert {a: (of["main"], of["main_f1"]) for a, of in found.items()} == {
        a: ([1 + n], 1.0) for n, a in enumerate("abcdefgh")
    }
    f = given.x.numpy()
    above = [f[given.letter == a].mean(0) - f[given.letter != a].mean(0) for a in "abcdefgh"]
    assert any(difference.argmax() == 0 for difference in above)  # means would be led astray


def test_the_l1_probe_leaves_out_what_never_fires():
    given, _ = eight_letters()
    f = np.pad(given.x.numpy(), ((0, 0), (0, 4)))
    weights = l1_probe(f, given.letter[:, None] == np.array(list("abcdefgh")))
    assert weights.shape == (8, 13)
    assert not weights[:, 9:].any()
    assert weights.argmax(1).tolist() == list(range(1, 9))


def test_words_with_each_other_s_letters_have_no_main_latent():
    found = absorption(Planted(dictionary(), documents(taken=0)))
    shuffled = found["controls"]["shuffled"]
    assert found["mean_main_f1"] == 1
    # the regression can't tell them either, or a latent of 40 words is right about half of the time
    assert shuffled["mean_main_f1"] is None or shuffled["mean_main_f1"] < 0.75


def test_a_letter_that_two_latents_share_is_split_and_not_absorbed():
    found = absorption(Planted(dictionary(WHOLE), documents(taken=6)))["letters"]["s"]
    assert (found["main"], found["main_f1"], found["missed"], found["absorption"]) == ([S, 2], 1, 0, 0)


@pytest.mark.parametrize(
    ("writes", "absorbed"),
    [
        pytest.param([], 0, id="nothing fires"),
        pytest.param([[0, 0.5, 0, 50, 0, 0]], 0, id="cosine below 0.025"),
        pytest.param([[0, 0.5, 0, 10, 0, 0]], 6, id="cosine above 0.025"),
        pytest.param([[0, -1, 0, 0, 0, 0]], 0, id="against the letter"),
        pytest.param([[0, 0.45, 1, 0, 0, 0]], 6, id="45% of it"),
        pytest.param([[0, 0.3, 1, 0, 0, 0]], 0, id="30% of it"),
    ],
)
def test_a_word_is_absorbed_by_a_latent_that_stands_for_most_of_the_letter(writes, absorbed):
    found = absorption(Planted(dictionary(*writes), documents(taken=1)))["letters"]["s"]
    assert (found["missed"], found["absorbed"]) == (6, absorbed)


def test_words_that_the_model_does_not_know_count_for_nothing():
    collected = documents(taken=1)
    first = int(collected.tokens[0, SIZE])  # the word of "s" that was taken over now looks like one of "b"
    collected.x[collected.tokens[collected.kept] == first] = torch.eye(D)[B]
    found = absorption(Planted(dictionary(WHOLE), collected))["letters"]["s"]
    assert (found["known"], found["missed"]) == (6 * (SIZE - 1), 0)


def test_the_same_figures_again():
    sae = dictionary(WHOLE)
    found = [absorption(Planted(sae, documents(taken=1))) for _ in range(2)]
    assert found[0]["letters"] == found[1]["letters"]


def test_too_few_words_are_refused():
    with pytest.raises(UserError, match="rows: 1024 is not allowed; at least 2 letters need 8 words each"):
        absorption(Planted(dictionary(WHOLE), documents(taken=1, letters="s")))


def fraction(*a: float, cosine: float = 0.5) -> float:
    """Of a word with x . p = 1 whose main latent adds a[0] along p, and others a[1], a[2], ..., of that cosine."""
    directions = np.array([[1, 0], *[[cosine, np.sqrt(1 - cosine**2)]] * (len(a) - 1)])
    f = np.array([[a[0], *(value / cosine for value in a[1:])]])
    found, _ = _absorbed(np.array([[1.0, 0.0]]), f, directions, np.array([3.0, 0.0]), np.array([0]))
    return found["absorption_fraction"]


def test_the_fraction_is_what_others_stand_in_for():
    assert fraction(0.0, 0.5) == 1
    assert fraction(1.0, 0.5) == 0  # the main latent does it all
    assert fraction(0.5, 0.5) == pytest.approx(0.5)
    assert fraction(0.75, 0.5) == pytest.approx(0.25)  # no more than what the main latent leaves
    assert fraction(0.25, 0.5) == pytest.approx(0.5 / 0.75)
    assert fraction(0.5, 0.3) == 0  # below the share
    assert fraction(0.5, 0.15, 0.15, 0.15) == pytest.approx(0.45 / 0.95)
    assert fraction(0.5, 0.1, 0.1, 0.1, 0.1, 0.1) == 0  # the three largest only
    assert fraction(0.5, 0.5, cosine=0.09) == 0
    assert fraction(0.5, 0.5, cosine=0.11) == pytest.approx(0.5)


def test_a_letter_that_the_model_does_not_tell_counts_for_no_mean():
    """Words of "b" and of "s" look alike at random, so that the regression on x is at chance."""
    collected = documents(taken=0)
    collected.x = torch.randn(collected.x.shape, generator=torch.Generator().manual_seed(0))
    found = absorption(Planted(dictionary(), collected))
    assert max(of["probe_f1"] for of in found["letters"].values()) < 0.6
    assert (found["mean_absorption"], found["mean_main_f1"]) == (None, None)
    assert found["warnings"] == ["a probe on the model's own activations finds no letter with an F1 above 0.6"]


def test_a_dictionary_without_latents_of_letters_is_told_so():
    sae = SparseAutoencoder(SAEConfig(d_in=D, d_sae=1, activation="relu", k=1))
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.W_enc[TAKEN, 0] = 1
    found = absorption(Planted(sae, documents(taken=1)))
    assert found["mean_main_f1"] < 0.5
    f1 = f"{found['mean_main_f1']:.2f}"
    assert found["warnings"] == [f"few letters have a latent of their own (mean F1 {f1}), so the score says little"]


class Spelling:
    """A tokenizer of 20 words with "a" and 20 with "b", what a prompt has beside them, and what is no word to ask for."""

    bos_token_id, pad_token_id = 0, 0

    def __init__(self):
        words = [f" {letter}{chr(97 + n)}x" for letter in "ab" for n in range(20)]
        of_prompts = (" has", " the", " first", " letter:", " A", " B", " F", " H", " T", "\n")
        self.vocabulary = ["<bos>", *words, *of_prompts, "apart", " a", " b2", " \u00e4h"]

    def __len__(self):
        return len(self.vocabulary)

    def decode(self, ids):
        return "".join(self.vocabulary[i] for i in ids)

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [self.vocabulary.index(part) for part in re.findall(r"\n| ?[^ \n]+", text)]}


def asked(context: int = 128) -> tuple[Evaluation, list[torch.Tensor]]:
    """An evaluation whose activations are the token ids, and the rows that the model was given."""
    given: list[torch.Tensor] = []

    def read(rows):
        given.extend(rows.tokens)
        return {"somewhere": rows.tokens[..., None].float()}, rows.document >= 0

    model = SimpleNamespace(name="speller", tokenizer=Spelling(), device="cpu")
    stream = SimpleNamespace(
        text=None,
        model=model,
        positions=context,
        config=SimpleNamespace(rows_per_forward=16),
        read=read,
    )
    sae = SparseAutoencoder(SAEConfig(d_in=1, d_sae=4, activation="relu", k=1))
    return Evaluation(cast(Any, stream), sae, None), given


def test_a_model_is_asked_for_the_words_of_its_vocabulary():
    evaluation, rows = asked()
    given = _of_vocabulary(evaluation)
    spelling = Spelling()
    assert sorted(given.x[:, 0].tolist()) == list(
        range(1, 44)
    )  # each word once, and those of prompts, where they stand
    assert set(given.x[given.train, 0].tolist()).isdisjoint(given.x[given.test, 0].tolist())
    assert Counter(given.letter[given.train]) == {"a": 10, "b": 10, "f": 1, "h": 1, "t": 1}
    assert Counter(given.letter[given.test]) == {"a": 10, "b": 10}
    for row, x, pos, letter in zip(rows, given.x[:, 0].int().tolist(), given.pos.tolist(), given.letter, strict=True):
        assert spelling.decode([x])[1] == letter
        *examples, last = spelling.decode(row.tolist()).removeprefix("<bos>").split("\n")
        assert (len(examples), last) == (10, f"{spelling.decode([x])} has the first letter:")
        assert all(re.fullmatch(r" .+ has the first letter: (.)", e)[1] == e[1].upper() for e in examples)
        assert row[pos] == x
        assert not any(example.startswith(f"{spelling.decode([x])} ") for example in examples)


def test_a_short_run_reads_several_words_of_each_prompt():
    """With as many prompts as the run allows, more words are asked for, each once and where it stands."""
    evaluation, rows = asked()
    evaluation.sizes = Sizes(other_rows=10)
    given = _of_vocabulary(evaluation)
    assert (len(rows), given.each, given.place) == (6, EACH, None)
    assert sorted(given.x[:, 0].tolist()) == list(range(1, 44))
    first = [int(row.tolist().index(int(x))) for row, x in zip((rows[0],), given.x[:1, 0], strict=True)]
    assert first == given.pos[:1].tolist()
    spelling = Spelling()
    for x, letter in zip(given.x[:, 0].int().tolist(), given.letter, strict=True):
        assert spelling.decode([x])[1] == letter
    for row in rows[:-1]:
        *examples, last = spelling.decode(row.tolist()).removeprefix("<bos>").split("\n")
        assert (len(examples), len(set(examples))) == (10, 10)
        assert all(re.fullmatch(r" .+ has the first letter: (.)", e)[1] == e[1].upper() for e in examples)
        assert last.endswith("has the first letter:")


def test_activations_of_words_are_all_that_is_kept(monkeypatch):
    """Prompts have ten times as many tokens as words, and a batch of them is in memory at a time."""
    evaluation, rows = asked()
    kept = [len(part) for part in _of_vocabulary(evaluation).x.split(1)]
    assert sum(kept) == 43 < sum(map(len, rows)) / 10


def test_a_context_too_short_for_the_prompts_is_refused():
    evaluation, _ = asked(context=40)
    with pytest.raises(
        UserError, match=r"^stream.context: 40 is not allowed; absorption's prompts have up to \d\d tokens"
    ):
        absorption(evaluation)
