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

import time
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
from .collect import CHUNK, Coder, Collected, Evaluation, collect, joined, padded

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
    began = time.monotonic()
    given = _of_language(evaluation, rows) if evaluation.is_testbed else _of_vocabulary(evaluation)
    if len(_letters(given)) < 2:
        what = f"rows: {rows}" if evaluation.is_testbed else f"model: {evaluation.stream.model.name}"
        raise UserError(f"{what} is not allowed; at least 2 letters need {WORDS} words each")
    whole = Collected(torch.zeros(0, 0), torch.zeros(0, 0), given.x, given.pos, given.pos)
    coders = evaluation.coders(whole)
    any_letter = _shuffled(given, evaluation.generator("absorption shuffled"))
    results = _by_letter(given, coders) | _by_letter(any_letter, {"shuffled": coders["sae"]})
    means = {name: _means(found) for name, found in results.items()}
    own = means.pop("sae")
    f1, told = own["mean_main_f1"], []
    if f1 is None:
        told.append(f"no letter is told with an F1 above {KNOWN} by the model's own activations")
    elif f1 < LITTLE:
        told.append(f"letters have hardly a latent (F1 {f1:.2f} in the mean), so that little can be absorbed")
    return {
        **own,
        "letters": results["sae"],
        "controls": means,
        "warnings": told,
        "protocol": {
            "min_GT_probe_f1": KNOWN,
            "min_feats_for_eval": LETTERS,
            "f1_jump_threshold": SPLIT,
            "max_k_value": MOST,
            "k_sparse_probe_l1_decay": L1_DECAY,
            "k_sparse_probe_batch_size": BATCH,
            "k_sparse_probe_num_epochs": EPOCHS,
            "eval_k_sparse_probe_batch_size": len(given.test),
            "precalc_k_sparse_probe_sae_acts": True,
            "prompt_template": None if given.place is None else "{word}" + ASKED,
            "prompt_token_pos": given.place,
        },
        "tokens": len(given.train) + len(given.test),
        "seconds": round(time.monotonic() - began, 2),
    }


def _letters(given: _Words) -> dict[str, int]:
    """The letters with enough words for training, and some for testing -> how many words."""
    own, tested = given.letter[given.train], set(given.letter[given.test])
    size = {str(a): len(np.unique(given.word[given.train][own == a])) for a in np.unique(own)}
    return {a: count for a, count in size.items() if count >= WORDS and a in tested}


def _by_letter(given: _Words, coders: Mapping[str, Coder]) -> dict[str, dict[str, dict[str, Any]]]:
    """What each coder has by letter, as `absorption` returns it of the dictionary."""
    train, test, letter, letters = given.train, given.test, given.letter, _letters(given)
    x = given.x.cpu().numpy()
    probes = {a: _fit(x[train], letter[train] == a) for a in letters}
    told = {a: np.asarray(probe.predict(x[test])) for a, probe in probes.items()}
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name, coder in coders.items():
        f, W_dec = _latents(coder, given), coder.W_dec.detach().cpu().numpy()
        weights = l1_probe(f[train], np.stack([letter[train] == a for a in letters], 1))
        results[name] = {}
        for (a, probe), weight in zip(probes.items(), weights, strict=True):
            ranked = np.argsort(-weight, kind="stable")[:MOST]
            sides = ((f[np.ix_(rows, ranked)], letter[rows] == a) for rows in (train, test))
            count, main_f1 = _main(*sides)
            main = ranked[:count]
            chosen = test[told[a] & (letter[test] == a)]
            results[name][a] = {
                "words": letters[a],
                "probe_f1": _f1(letter[test] == a, told[a]),
                "main": main.tolist(),
                "main_f1": main_f1,
                "known": len(chosen),
                **_absorbed(x[chosen], f[chosen], W_dec, probe.coef_[0], main),
            }
    return results


def _shuffled(given: _Words, draw: np.random.Generator) -> _Words:
    """The same words with each other's letters."""
    _, first, word = np.unique(given.word, return_index=True, return_inverse=True)
    return replace(given, letter=draw.permutation(given.letter[first])[word])


def _of_language(evaluation: Evaluation, rows: int) -> _Words:
    """Content words of the embedded language's documents; training and testing on different documents."""
    collected, draw = evaluation.labelled(rows), evaluation.generator("absorption")
    words = collected.tokens[collected.kept].cpu().numpy()
    letter = np.array([word[0] for word in Language().vocabulary])[words]
    wanted = np.isin(collected.label("role").numpy(), [ROLES.index(role) for role in CONTENT])
    of_test = draw.permutation(np.arange(len(collected)) % 2)[collected.row.cpu().numpy()]
    order = draw.permutation(np.flatnonzero(wanted))
    sides: list[list[np.ndarray]] = [[], []]
    for word in np.unique(words[wanted]):
        mine = order[words[order] == word]
        for side in (0, 1):
            sides[side].append(mine[of_test[mine] == side][: TIMES // 2])
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
    for own in (by_letter[a] for a in sorted(by_letter)):
        chosen = [own[at] for at in draw.permutation(len(own))[:per_letter]]
        words += chosen
        of_test += [at % 2 for at in range(len(chosen))]
    if not words:
        raise UserError(f"model: {stream.model.name} is not allowed; its tokenizer has no words to ask for")
    prompts = [_prompt(evaluation, words, number, draw) for number in range(len(words))]
    at_word = torch.tensor([at for _, at in prompts])
    ids = [prompt[: stream.positions] for prompt, _ in prompts]
    collected = collect(stream, padded(ids, stream), len(words))
    chosen = (collected.pos == at_word.to(collected.pos.device)[collected.row]).nonzero()[:, 0]
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
    others = [at for at in draw.choice(len(words), min(len(words), EXAMPLES + 1), replace=False) if at != number]
    examples = (f" {words[at][1]}{ASKED} {words[at][1][0].upper()}\n" for at in others[:EXAMPLES])
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    before = bos + tokenizer("".join(examples), add_special_tokens=False)["input_ids"]
    after = tokenizer(ASKED, add_special_tokens=False)["input_ids"]
    return [*before, words[number][0], *after], len(before)


def _latents(coder: Coder, given: _Words) -> np.ndarray:
    """A coder's latents of the tokens that are used, dense [n, F]; zero for others."""
    used = torch.from_numpy(np.concatenate([given.train, given.test])).to(given.x.device)
    code = joined([coder.encode_sparse(given.x[i], given.pos[i]) for i in used.split(CHUNK)]).to_dense()
    found = code.new_zeros(len(given.x), code.shape[1])
    return found.index_copy_(0, used, code).cpu().numpy()


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
    found = np.zeros((Y.shape[1], f.shape[1]), np.float32)
    found[:, used] = W.detach().numpy()
    return found


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
    others = np.where(cosine >= FRACTION_COSINE, added, 0).clip(0)
    others[:, main] = 0
    r = np.sort(others, axis=1)[:, -MOST_ABSORBING:].sum(1)
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


def _f1(y: np.ndarray, found: np.ndarray) -> float:
    return float(2 * (y & found).sum() / max(y.sum() + found.sum(), 1))


def _means(letters: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    told = [of for of in letters.values() if of["probe_f1"] > KNOWN and of["known"]]
    figures = {
        "mean_absorption": [of["absorption"] for of in told],
        "mean_absorption_fraction": [of["absorption_fraction"] for of in told],
        "mean_split": [len(of["main"]) for of in told],
        "mean_main_f1": [of["main_f1"] for of in told],
    }
    return {name: float(np.mean(values)) if values else None for name, values in figures.items()}
