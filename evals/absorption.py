"""Feature absorption: words that the latents of their first letter miss because another latent has taken them over.

After Chanin et al. (arXiv 2409.14507) and SAEBench 0.6.0 (https://github.com/adamkarvonen/SAEBench). With x the activation
of a word's token, p the unit direction of a logistic regression that tells words of a letter from others, and
a_j = f_j (W_dec_j . p) what latent j adds along p, for each letter:

    main latents   the k with the largest weights for the letter in a linear probe on f that is trained for all letters with
                   an L1 penalty (`l1_probe`); k grows while the F1 of a logistic regression on them grows by more than
                   `SPLIT`, which is the letter's feature having been split
    known          the regression on x knows the word: only these words are looked at
    absorbed       no main latent fires, and the latent with the largest a_j has a decoder cosine of at least `COSINE` with p
                   and a_j >= `SHARE` x . p
    fraction       with m the main latents' a_j added up and r those of the `MOST_ABSORBING` largest of other latents whose
                   cosine is at least `FRACTION_COSINE`: 0 where m >= x . p or r < `SHARE` x . p, else 1 where m <= 0, else
                   s / (s + m) with s = min(r, x . p - m)
    absorption     absorbed words / known words;  absorption_fraction: mean fraction of known words

A model is asked for words of its vocabulary in sentences like "tartan has the first letter: T"; training and test words
differ. Tokens of the embedded language are whole words, so that its model knows the letter only as a set of words that it
has seen: there, words of held-out documents are taken, the same ones for training and for testing. A dictionary with a
latent for each word and none for the letter scores high, so that the figure is for comparison with the controls and between
dictionaries.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import LinAlgWarning
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ..engine.errors import UserError
from ..engine.testbed.language import ROLES, Language
from .evaluation import CHUNK, Autoencoder, Evaluation, TextActivations, collect, joined, padded

ROWS, TIMES = 1024, 12  # documents, and how often a word is used at most, half for training and half for testing
WORDS = 8  # of a letter, fewer than which are left out
PER_LETTER = 400  # words of a vocabulary, half for training and half for testing, or as many as fit the run
FEWEST = 20  # of those
EXAMPLES = 10  # in a prompt, before the word that is asked for
ASKED = " has the first letter:"  # behind the word that is asked for
LETTERS = 20  # that must be told for a figure to be SAEBench's
KNOWN = 0.6  # F1 of the regression on x, up to which a letter counts for no mean: the model doesn't tell it
SPLIT, MOST = 0.03, 10  # main latents
COSINE, SHARE = 0.025, 0.4
FRACTION_COSINE, MOST_ABSORBING = 0.1, 3
L1_DECAY, EPOCHS, BATCH = 0.01, 50, 4096  # of the probe that main latents are chosen by
RATES = (1e-2, 1e-5)  # its learning rate, first and last
LITTLE = 0.5  # F1 of the main latents, below which there is hardly a latent of a letter to be absorbed
CONTENT = (
    "subject", "attractor", "agent", "patient", "action", "result", "entity", "object", "noun", "verb", "adjective",
    "adverb",
)  # fmt: skip


@dataclass
class _Words:
    """Tokens of words: x [n, D] at pos [n], each one's word and first letter [n], and which are for training and testing."""

    x: torch.Tensor
    pos: torch.Tensor
    word: np.ndarray
    letter: np.ndarray
    train: np.ndarray
    test: np.ndarray
    place: int | None = None  # of a word in its prompt, from the end


@torch.no_grad()
def absorption(evaluation: Evaluation, *, rows: int = ROWS) -> dict[str, Any]:
    """Absorption of first letters; in the embedded language of content words in `rows` documents.

    Returns `mean_absorption`, `mean_absorption_fraction`, `mean_split` (main latents of a letter) and `mean_main_f1`, over
    the letters that the regression on x tells with an F1 above `KNOWN` (None where there is none); `letters` {letter: words,
    probe_f1, main (latents), main_f1, known, missed, absorbed, absorption, absorption_fraction}, counts being of test
    tokens; `controls` with the means of each, `shuffled` among them, where words have each other's letters; `warnings`;
    `protocol` (settings by SAEBench's names). Raises UserError where no two letters have `WORDS` words.
    """
    words = _of_language(evaluation, rows) if evaluation.is_testbed else _of_vocabulary(evaluation)
    if len(_letters(words)) < 2:
        setting = f"rows: {rows}" if evaluation.is_testbed else f"model: {evaluation.stream.model.name}"
        raise UserError(f"{setting} is not allowed; at least 2 letters need {WORDS} words each")
    activations = TextActivations(torch.zeros(0, 0), torch.zeros(0, 0), words.x, words.pos, words.pos)
    autoencoders = evaluation.autoencoders(activations)
    any_letter = _shuffled(words, evaluation.generator("absorption shuffled"))
    results = _by_letter(words, autoencoders) | _by_letter(any_letter, {"shuffled": autoencoders["sae"]})
    means = {name: _means(letters) for name, letters in results.items()}
    scores = means.pop("sae")
    f1, messages = scores["mean_main_f1"], []
    if f1 is None:
        messages.append(f"no letter is told with an F1 above {KNOWN} by the model's own activations")
    elif f1 < LITTLE:
        messages.append(f"letters have hardly a latent (F1 {f1:.2f} in the mean), so that little can be absorbed")
    return {
        **scores,
        "letters": results["sae"],
        "controls": means,
        "warnings": messages,
        "protocol": {
            "min_GT_probe_f1": KNOWN,
            "min_feats_for_eval": LETTERS,
            "f1_jump_threshold": SPLIT,
            "max_k_value": MOST,
            "k_sparse_probe_l1_decay": L1_DECAY,
            "k_sparse_probe_batch_size": BATCH,
            "k_sparse_probe_num_epochs": EPOCHS,
            "eval_k_sparse_probe_batch_size": len(words.test),
            "precalc_k_sparse_probe_sae_acts": True,
            "prompt_template": None if words.place is None else "{word}" + ASKED,
            "prompt_token_pos": words.place,
        },
        "tokens": len(words.train) + len(words.test),
    }


def _letters(words: _Words) -> dict[str, int]:
    """The letters with enough words for training, and some for testing -> how many words."""
    train_letters, test_letters = words.letter[words.train], set(words.letter[words.test])
    size = {str(a): len(np.unique(words.word[words.train][train_letters == a])) for a in np.unique(train_letters)}
    return {a: count for a, count in size.items() if count >= WORDS and a in test_letters}


def _by_letter(words: _Words, autoencoders: Mapping[str, Autoencoder]) -> dict[str, dict[str, dict[str, Any]]]:
    """What each autoencoder has by letter, as `absorption` returns it of the dictionary."""
    train, test, letter, letters = words.train, words.test, words.letter, _letters(words)
    x = words.x.cpu().numpy()
    probes = {a: _fit(x[train], letter[train] == a) for a in letters}
    predicted = {a: np.asarray(probe.predict(x[test])) for a, probe in probes.items()}
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name, autoencoder in autoencoders.items():
        f, W_dec = _latents(autoencoder, words), autoencoder.W_dec.detach().cpu().numpy()
        weights = l1_probe(f[train], np.stack([letter[train] == a for a in letters], 1))
        results[name] = {}
        for (a, probe), weight in zip(probes.items(), weights, strict=True):
            ranked = np.argsort(-weight, kind="stable")[:MOST]
            sides = ((f[np.ix_(rows, ranked)], letter[rows] == a) for rows in (train, test))
            count, main_f1 = _main(*sides)
            main = ranked[:count]
            chosen = test[predicted[a] & (letter[test] == a)]
            results[name][a] = {
                "words": letters[a],
                "probe_f1": _f1(letter[test] == a, predicted[a]),
                "main": main.tolist(),
                "main_f1": main_f1,
                "known": len(chosen),
                **_absorbed(x[chosen], f[chosen], W_dec, probe.coef_[0], main),
            }
    return results


def _shuffled(words: _Words, draw: np.random.Generator) -> _Words:
    """The same words with each other's letters."""
    _, first, word = np.unique(words.word, return_index=True, return_inverse=True)
    return replace(words, letter=draw.permutation(words.letter[first])[word])


def _of_language(evaluation: Evaluation, rows: int) -> _Words:
    """Content words of the embedded language's documents; training and testing on different documents."""
    collected, draw = evaluation.labelled(rows), evaluation.generator("absorption")
    words = collected.tokens[collected.kept].cpu().numpy()
    letter = np.array([word[0] for word in Language().vocabulary])[words]
    is_content = np.isin(collected.label("role").numpy(), [ROLES.index(role) for role in CONTENT])
    of_test = draw.permutation(np.arange(len(collected)) % 2)[collected.row.cpu().numpy()]
    order = draw.permutation(np.flatnonzero(is_content))
    sides: list[list[np.ndarray]] = [[], []]
    for word in np.unique(words[is_content]):
        tokens = order[words[order] == word]
        for side in (0, 1):
            sides[side].append(tokens[of_test[tokens] == side][: TIMES // 2])
    train, test = map(np.concatenate, sides)
    return _Words(collected.x, collected.pos, words, letter, train, test)


def _of_vocabulary(evaluation: Evaluation) -> _Words:
    """Words that are one token, each in a prompt that asks for its first letter; training and testing on different words."""
    stream, draw = evaluation.stream, evaluation.generator("absorption")
    by_letter: dict[str, list[tuple[int, str]]] = {}
    for token in range(len(stream.model.tokenizer)):
        word = stream.model.tokenizer.decode([token])
        bare = word.removeprefix(" ")
        if len(bare) > 1 and bare != word and bare.isascii() and bare.isalpha():
            by_letter.setdefault(bare[0].lower(), []).append((token, bare))
    words, of_test = [], []
    per_letter = max(FEWEST, evaluation.rows(len(by_letter) * PER_LETTER) // max(1, len(by_letter)))
    for candidates in (by_letter[a] for a in sorted(by_letter)):
        chosen = [candidates[i] for i in draw.permutation(len(candidates))[:per_letter]]
        words += chosen
        of_test += [i % 2 for i in range(len(chosen))]
    if not words:
        raise UserError(f"model: {stream.model.name} is not allowed; its tokenizer has no words to ask for")
    prompts = [_prompt(evaluation, words, number, draw) for number in range(len(words))]
    word_position = torch.tensor([start for _, start in prompts])
    ids = [prompt[: stream.positions] for prompt, _ in prompts]
    collected = collect(stream, padded(ids, stream), len(words))
    chosen = (collected.pos == word_position.to(collected.pos.device)[collected.row]).nonzero()[:, 0]
    letter, side = np.array([word[0].lower() for _, word in words]), np.array(of_test)
    number = collected.row[chosen].cpu().numpy()  # a prompt longer than the context has lost its word
    return _Words(
        collected.x[chosen], collected.pos[chosen], number, letter[number],
        np.flatnonzero(side[number] == 0), np.flatnonzero(side[number] == 1),
        -1 - len(stream.model.tokenizer(ASKED, add_special_tokens=False)["input_ids"]),
    )  # fmt: skip


def _prompt(
    evaluation: Evaluation, words: list[tuple[int, str]], number: int, draw: np.random.Generator
) -> tuple[list[int], int]:
    """Token ids of examples and of the word, and where the word is; an example may not be the word itself."""
    tokenizer = evaluation.stream.model.tokenizer
    example_indices = [
        index for index in draw.choice(len(words), min(len(words), EXAMPLES + 1), replace=False) if index != number
    ]
    examples = (f" {words[index][1]}{ASKED} {words[index][1][0].upper()}\n" for index in example_indices[:EXAMPLES])
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    before = bos + tokenizer("".join(examples), add_special_tokens=False)["input_ids"]
    after = tokenizer(ASKED, add_special_tokens=False)["input_ids"]
    return [*before, words[number][0], *after], len(before)


def _latents(autoencoder: Autoencoder, words: _Words) -> np.ndarray:
    """An autoencoder's latents of the tokens that are used, dense [n, F]; zero for others."""
    used = torch.from_numpy(np.concatenate([words.train, words.test])).to(words.x.device)
    code = joined([autoencoder.encode_sparse(words.x[i], words.pos[i]) for i in used.split(CHUNK)]).to_dense()
    latents = code.new_zeros(len(words.x), code.shape[1])
    return latents.index_copy_(0, used, code).cpu().numpy()


@torch.enable_grad()
def l1_probe(f: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights W [L, F] of linear probes on latents f [n, F], one for each of L letters, of which word n has those in y
    bool [n, L].

        loss = mean_{n,l} BCE(f W^T + b, y), positives of a letter weighted by its negatives / its positives
               + `L1_DECAY` * mean_l sum_j |W_lj|

    by Adam from zero with an L2 decay of 1e-6, in `EPOCHS` of batches of `BATCH`, the learning rate going exponentially from
    the first to the last of `RATES` (SAEBench 0.6.0's settings). Latents that never fire have weight 0.
    """
    used = np.flatnonzero(f.any(0))
    X, Y = torch.from_numpy(np.ascontiguousarray(f[:, used])).float(), torch.from_numpy(y).float()
    W, b = torch.zeros(Y.shape[1], len(used), requires_grad=True), torch.zeros(Y.shape[1], requires_grad=True)
    rarer = (len(Y) - Y.sum(0)) / Y.sum(0)
    adam = torch.optim.Adam([W, b], lr=RATES[0], weight_decay=1e-6)
    slower = torch.optim.lr_scheduler.ExponentialLR(adam, (RATES[1] / RATES[0]) ** (1 / EPOCHS))
    draw = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(X), generator=draw).split(BATCH):
            loss = F.binary_cross_entropy_with_logits(X[rows] @ W.T + b, Y[rows], pos_weight=rarer)
            adam.zero_grad()
            (loss + L1_DECAY * W.abs().sum(1).mean()).backward()
            adam.step()
        slower.step()
    weights = np.zeros((Y.shape[1], f.shape[1]), np.float32)
    weights[:, used] = W.detach().numpy()
    return weights


def _main(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> tuple[int, float]:
    """How many of the ranked latents [n, k] are main ones, and the F1 of a regression on those."""
    (X, y), (test_X, test_y), k = train, test, 1

    def f1(k: int) -> float:
        return _f1(test_y, np.asarray(_fit(X[:, :k], y).predict(test_X[:, :k])))

    best = f1(1)
    while k < X.shape[1] and (more := f1(k + 1)) > best + SPLIT:
        best, k = more, k + 1
    return k, best


def _absorbed(x: np.ndarray, f: np.ndarray, W_dec: np.ndarray, w: np.ndarray, main: np.ndarray) -> dict[str, Any]:
    """Of known words x [n, D], f [n, F] and the regression's w [D]: how many are missed and absorbed, and the fraction."""
    p = w / max(np.linalg.norm(w), 1e-12)
    along, whole = W_dec @ p, x @ p
    cosine = along / np.maximum(np.linalg.norm(W_dec, axis=1), 1e-12)
    added = f * along
    missed = (f[:, main] == 0).all(1)
    strongest = added.argmax(1)
    most = added[np.arange(len(f)), strongest]
    absorbed = missed & (cosine[strongest] >= COSINE) & (whole > 0) & (most >= SHARE * whole)
    m = added[:, main].sum(1)
    contributions = np.where(cosine >= FRACTION_COSINE, added, 0).clip(0)
    contributions[:, main] = 0
    r = np.sort(contributions, axis=1)[:, -MOST_ABSORBING:].sum(1)
    s = np.minimum(r, whole - m)
    shared = np.where(m <= 0, 1, s / np.where(s + m > 0, s + m, 1))
    fraction = np.where((m >= whole) | (r < SHARE * whole) | (whole <= 0), 0, shared.clip(0, 1))
    return {
        "missed": int(missed.sum()),
        "absorbed": int(absorbed.sum()),
        "absorption": float(absorbed.mean()) if len(f) else None,
        "absorption_fraction": float(fraction.mean()) if len(f) else None,
    }


def _fit(X: np.ndarray, y: np.ndarray) -> LogisticRegression:
    """Words of a letter are few, and count as much as the others do."""
    with warnings.catch_warnings():
        for kind in (ConvergenceWarning, LinAlgWarning):  # of its own solver, after which it goes on with lbfgs
            warnings.simplefilter("ignore", kind)
        return LogisticRegression(solver="newton-cholesky", class_weight="balanced").fit(X, y)  # few columns, many rows


def _f1(y: np.ndarray, predicted: np.ndarray) -> float:
    return float(2 * (y & predicted).sum() / max(y.sum() + predicted.sum(), 1))


def _means(letters: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    counted = [scores for scores in letters.values() if scores["probe_f1"] > KNOWN and scores["known"]]
    figures = {
        "mean_absorption": [scores["absorption"] for scores in counted],
        "mean_absorption_fraction": [scores["absorption_fraction"] for scores in counted],
        "mean_split": [len(scores["main"]) for scores in counted],
        "mean_main_f1": [scores["main_f1"] for scores in counted],
    }
    return {name: float(np.mean(values)) if values else None for name, values in figures.items()}
