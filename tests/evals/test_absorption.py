"""Absorption in a dictionary of which it is known which words another latent has taken over."""

import json

import numpy as np
import pytest
import torch
from temposae.engine.config import SAEConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.testbed.language import ROLES, Language
from temposae.evals.absorption import absorption
from temposae.evals.collect import Collected

from .planted import Planted

ROWS, SIZE, FEW = 16, 20, 7
B, S, TAKEN, D = 0, 1, 2, 6  # directions: of the letters, of words that were taken over, and three to spare


def documents(taken: int, letters: str = "bs") -> Collected:
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
    return Collected(torch.tensor(tokens).repeat(ROWS, 1), kept, torch.stack(x).repeat(ROWS, 1), pos, row, labels)


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
    assert (found["mean_absorption"], found["mean_main_f1"]) == (1 / SIZE / 2, (s["main_f1"] + 1) / 2)
    assert found["controls"]["random"] == {"mean_absorption": 0, "mean_main_f1": 1}  # nothing is missed
    assert set(found["controls"]) == {"random", "lm_neurons", "mean"}
    json.dumps(found, allow_nan=False)


def test_a_letter_that_two_latents_share_is_split_and_not_absorbed():
    found = absorption(Planted(dictionary(WHOLE), documents(taken=6)))["letters"]["s"]
    assert (found["main"], found["main_f1"], found["missed"], found["absorption"]) == ([S, 2], 1, 0, 0)


@pytest.mark.parametrize(
    ("writes", "absorbed"),
    [
        pytest.param([], 0, id="nothing fires"),
        pytest.param([[0, 0.01, 0, 1, 0, 0]], 0, id="cosine below 0.025"),
        pytest.param([[0, 0.1, 0, 1, 0, 0]], 6, id="cosine above 0.025"),
        pytest.param([[0, -1, 0, 0, 0, 0]], 0, id="against the letter"),
        pytest.param([WHOLE, WHOLE], 6, id="half of it"),
        pytest.param([WHOLE, WHOLE, WHOLE], 0, id="a third of it"),
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
