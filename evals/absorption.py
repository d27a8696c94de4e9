"""Feature absorption: words missed by the latents of their first letter because another latent has absorbed them.

After Chanin et al. (arXiv 2409.14507) and SAEBench 0.6.0 (https://github.com/adamkarvonen/SAEBench). x is the activation
at a word's token, p the unit direction of a logistic regression that separates the words of one letter from all others, and
a_j = f_j (W_dec_j . p) the contribution of latent j along p. For each letter:

    main latents   the k latents with the largest weights for the letter in a linear probe on f, trained on all letters with
                   an L1 penalty (`l1_probe`). k grows while the F1 of a logistic regression on them grows by more than
                   `SPLIT`: the letter's feature is split over k latents
    known          words that the regression on x classifies correctly; only these are examined
    absorbed       no main latent fires, and the latent with the largest a_j has a decoder cosine of at least `COSINE` with p
                   and a_j >= `SHARE` x . p
    fraction       m = sum of a_j over the main latents, r = sum of the `MOST_ABSORBING` largest a_j of other latents with a
                   cosine of at least `FRACTION_COSINE`: 0 if m >= x . p or r < `SHARE` x . p, else 1 if m <= 0, else
                   s / (s + m) with s = min(r, x . p - m)
    absorption     absorbed words / known words;  absorption_fraction: mean fraction over known words

The model is prompted with words of its vocabulary, as in "tartan has the first letter: T". Training and test words differ.
If the run allows fewer prompts than words, each prompt supplies its last `EACH` words: with a tenth of the words, the
regression on x knows few letters, and nothing is measured. SAEBench reads the last word only.
The tokens of the embedded language are whole words, so its model knows a letter only as a set of words. There the words
come from held-out documents, and training and testing use the same words. A dictionary with one latent per word and none
per letter scores high, so compare the score only with the controls and between dictionaries.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import LinAlgWarning
from scipy.sparse import csr_array
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ..engine.errors import UserError
from ..engine.process.progress import progress_bar
from ..engine.stream import ActivationStream
from ..engine.testbed.language import ROLES, Language
from .evaluation import CHUNK, Autoencoder, Evaluation, TextActivations, collected_rows, joined, padded
from .intervals import Outcomes, interval
from .words import spelled

ROWS, TIMES = 1024, 12  # documents; uses per word at most, half for training and half for testing
WORDS = 8  # letters with fewer words are left out
PER_LETTER = 400  # words of a vocabulary at most, half for training and half for testing
FEWEST = 60  # at least, if the run allows fewer
EXAMPLES = 10  # in a prompt, before the word in question
EACH = 8  # words of a prompt that are read, if the run allows fewer prompts than words
ASKED = " has the first letter:"  # follows the word in question
LETTERS = 20  # letters that the model must know for a result in SAEBench's format
KNOWN = 0.6  # F1 of the regression on x above which the model knows a letter; others are left out of means
SPLIT, MOST = 0.03, 10  # for main latents: gain in F1, and how many at most
COSINE, SHARE = 0.025, 0.4
FRACTION_COSINE, MOST_ABSORBING = 0.1, 3
L1_DECAY, EPOCHS, BATCH = 0.01, 50, 4096  # of the probe that selects main latents
RATES = (1e-2, 1e-5)  # its first and last learning rate
LITTLE = 0.5  # warn below this mean F1 of main latents; a letter without latents can't be absorbed
CONTENT = (
    "subject", "attractor", "agent", "patient", "action", "result", "entity", "object", "noun", "verb", "adjective",
    "adverb",
)  # fmt: skip


@dataclass
class _Words:
    """Tokens of words: x [n, D] at pos [n], the word and first letter of each [n], and indices for training and testing."""

    x: torch.Tensor
    pos: torch.Tensor
    word: np.ndarray
    letter: np.ndarray
    train: np.ndarray
    test: np.ndarray
    place: int | None = None  # of the word in its prompt, counted from the end; None if there is no one place
    each: int = 1  # words read of a prompt


@torch.no_grad()
def absorption(evaluation: Evaluation, *, rows: int = ROWS) -> dict[str, Any]:
    """Measure absorption of first letters, on the embedded language of content words in `rows` documents.

    Returns `mean_absorption`, `mean_absorption_fraction`, `mean_split` (main latents per letter) and `mean_main_f1`: means
    over letters whose regression on x has an F1 above `KNOWN`, None without such a letter. `letters` {letter: words,
    probe_f1, main (latents), main_f1, known, missed, absorbed, absorption, absorption_fraction} counts test tokens.
    `controls` has the means of each control. `shuffled` assigns each word another word's letter. `protocol` has the settings
    by SAEBench's names. Raises UserError if fewer than two letters have `WORDS` words, and for a context too short for the
    prompts.
    """
    words = _of_language(evaluation, rows) if evaluation.is_testbed else _of_vocabulary(evaluation)
    if len(_letters(words)) < 2:
        setting = f"rows: {rows}" if evaluation.is_testbed else f"model: {evaluation.stream.model.name}"
        raise UserError(f"{setting} is not allowed; at least 2 letters need {WORDS} words each")
    activations = TextActivations(torch.zeros(0, 0), torch.zeros(0, 0), words.x, words.pos, words.pos)
    autoencoders = evaluation.autoencoders(activations)
    any_letter = _shuffled(words, evaluation.generator("absorption shuffled"))
    outcomes: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    results = _by_letter(words, autoencoders, outcomes) | _by_letter(any_letter, {"shuffled": autoencoders["sae"]}, {})
    means = {name: _means(letters) for name, letters in results.items()}
    scores = means.pop("sae")
    f1, messages = scores["mean_main_f1"], []
    if f1 is None:
        messages.append(f"a probe on the model's own activations finds no letter with an F1 above {KNOWN}")
    elif f1 < LITTLE:
        messages.append(f"few letters have a latent of their own (mean F1 {f1:.2f}), so the score says little")
    return {
        **scores,
        "letters": results["sae"],
        "controls": means,
        "intervals": {
            "mean_absorption": _interval(words, results["sae"], outcomes, evaluation.generator("absorption intervals"))
        },
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
        "words_per_prompt": words.each,
        "tokens": len(words.train) + len(words.test),
    }


def _letters(words: _Words) -> dict[str, int]:
    """Words for training of each letter that has enough of them, and some for testing."""
    train_letters, test_letters = words.letter[words.train], set(words.letter[words.test])
    size = {str(a): len(np.unique(words.word[words.train][train_letters == a])) for a in np.unique(train_letters)}
    return {a: count for a, count in size.items() if count >= WORDS and a in test_letters}


def _interval(
    words: _Words, letters: Mapping[str, Mapping[str, Any]], outcomes: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]],
    draw: np.random.Generator,
) -> dict[str, Any] | None:  # fmt: skip
    """Interval of mean absorption over the test words, all uses of a word together."""
    counted_letters = [a for a, scores in letters.items() if _counts(scores)]
    if not counted_letters:
        return None
    names, word = np.unique(words.word[words.test], return_inverse=True)
    number = dict(zip(words.test.tolist(), word.tolist(), strict=True))
    parts = {}
    for name, by_letter in outcomes.items():
        gained, counted = np.zeros((2, len(names), len(counted_letters)))
        for column, a in enumerate(counted_letters):
            tokens, absorbed = by_letter[a]
            at = [number[token] for token in tokens.tolist()]
            np.add.at(gained[:, column], at, absorbed)
            np.add.at(counted[:, column], at, 1)
        parts[name] = Outcomes(gained, counted)
    return interval(parts, draw)


def _by_letter(
    words: _Words, autoencoders: Mapping[str, Autoencoder],
    outcomes: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]],
) -> dict[str, dict[str, dict[str, Any]]]:  # fmt: skip
    """`letters` as `absorption` returns them, for each autoencoder. `outcomes` gets the known words' tokens of each letter
    and which of them are absorbed."""
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
            best = f[:, ranked].toarray()
            sides = ((best[rows], letter[rows] == a) for rows in (train, test))
            count, main_f1 = _main(*sides)
            main = ranked[:count]
            chosen = test[predicted[a] & (letter[test] == a)]
            scores, absorbed = _absorbed(x[chosen], f[chosen].toarray(), W_dec, probe.coef_[0], main)
            outcomes.setdefault(name, {})[a] = chosen, absorbed
            results[name][a] = {
                "words": letters[a],
                "probe_f1": _f1(letter[test] == a, predicted[a]),
                "main": main.tolist(),
                "main_f1": main_f1,
                "known": len(chosen),
                **scores,
            }
    return results


def _shuffled(words: _Words, draw: np.random.Generator) -> _Words:
    _, first, word = np.unique(words.word, return_index=True, return_inverse=True)
    return replace(words, letter=draw.permutation(words.letter[first])[word])


def _of_language(evaluation: Evaluation, rows: int) -> _Words:
    """Content words of the embedded language, from different documents for training and testing."""
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
    """Single-token words, each in a prompt that asks for its first letter; different words for training and testing."""
    stream, draw = evaluation.stream, evaluation.generator("absorption")
    by_letter: dict[str, list[tuple[int, str]]] = {}
    for token, word in enumerate(spelled(stream.model.tokenizer, range(len(stream.model.tokenizer)))):
        bare = word.removeprefix(" ")
        if len(bare) > 1 and bare != word and bare.isascii() and bare.isalpha():
            by_letter.setdefault(bare[0].lower(), []).append((token, bare))
    words, of_test = [], []
    allowed = evaluation.rows(len(by_letter) * PER_LETTER)
    each = 1 if allowed == len(by_letter) * PER_LETTER else EACH
    per_letter = min(PER_LETTER, max(FEWEST, each * allowed // max(1, len(by_letter))))
    for candidates in (by_letter[a] for a in sorted(by_letter)):
        chosen = [candidates[i] for i in draw.permutation(len(candidates))[:per_letter]]
        words += chosen
        of_test += [i % 2 for i in range(len(chosen))]
    if not words:
        raise UserError(f"model: {stream.model.name} is not allowed; its tokenizer has no single-token words")
    order = np.arange(len(words)) if each == 1 else draw.permutation(len(words))
    prompts = [
        _prompt(evaluation, words, order[start : start + each].tolist(), draw) for start in range(0, len(words), each)
    ]
    x, pos, number = _at_words(stream, prompts)
    letter, side = np.array([word[0].lower() for _, word in words]), np.array(of_test)
    after = stream.model.tokenizer(ASKED, add_special_tokens=False)["input_ids"]
    return _Words(
        x, pos, number, letter[number], np.flatnonzero(side[number] == 0), np.flatnonzero(side[number] == 1),
        -1 - len(after) if each == 1 else None, each,
    )  # fmt: skip


#: token ids, and the number of each word that is read, by its position
_Prompt = tuple[list[int], dict[int, int]]


def _prompt(
    evaluation: Evaluation, words: list[tuple[int, str]], numbers: list[int], draw: np.random.Generator
) -> _Prompt:  # fmt: skip
    """A prompt that ends in these words, after other words as examples."""
    tokenizer = evaluation.stream.model.tokenizer

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    drawn = draw.choice(len(words), min(len(words), EXAMPLES + 1), replace=False)
    example_words = [words[index][1] for index in drawn if index not in numbers][: EXAMPLES + 1 - len(numbers)]
    examples = (f" {word}{ASKED} {word[0].upper()}\n" for word in example_words)
    prompt = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt += ids("".join(examples))
    places = {}
    for place, number in enumerate(numbers, 1):
        token, word = words[number]
        places[len(prompt)] = number
        prompt += [token, *ids(ASKED)] + (ids(f" {word[0].upper()}\n") if place < len(numbers) else [])
    return prompt, places


def _at_words(stream: ActivationStream, prompts: list[_Prompt]) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Activations [n, D] at the words that the prompts read, their positions [n] and numbers [n]. Only these are kept,
    because a prompt has many times as many tokens. Words that massive activations leave out are missing, and so are prompts
    longer than the context."""
    lengths = [len(ids) for ids, _ in prompts]
    prompts = [prompt for prompt in prompts if len(prompt[0]) <= stream.positions]
    if 2 * len(prompts) < len(lengths):
        raise UserError(
            f"stream.context: {stream.positions} is not allowed; absorption's prompts have up to {max(lengths)} tokens"
        )
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    with progress_bar("collecting activations", total=len(prompts), unit="prompts") as bar:
        for rows in padded([ids for ids, _ in prompts], stream):
            collected, first = collected_rows(stream, rows), bar.done
            numbers = torch.full(rows.tokens.shape, -1)
            for row, (_, places) in enumerate(prompts[first : first + len(rows)]):
                numbers[row, list(places)] = torch.tensor(list(places.values()))
            number = numbers[collected.row.cpu(), collected.pos.cpu()]
            chosen = (number >= 0).to(collected.x.device)
            parts.append((collected.x[chosen], collected.pos[chosen], number[number >= 0]))
            bar.advance(len(rows))
    x, pos, number = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return x, pos, number.numpy()


def _latents(autoencoder: Autoencoder, words: _Words) -> csr_array:
    """Latents [n, F] of the tokens used for training or testing; zero for others. Sparse, because F may be large."""
    used = torch.from_numpy(np.concatenate([words.train, words.test])).to(words.x.device)
    code = joined([autoencoder.encode_sparse(words.x[i], words.pos[i]) for i in used.split(CHUNK)])
    token, latent, value = (t.cpu().numpy() for t in (used[code.rows], code.indices, code.values))
    return csr_array((value, (token, latent)), shape=(len(words.x), code.n_latents))


@torch.enable_grad()
def l1_probe(f: csr_array | np.ndarray, y: np.ndarray) -> np.ndarray:
    """Train L linear probes on latents f [n, F] for labels y bool [n, L]; returns their weights W [L, F].

        loss = mean_{n,l} BCE(f W^T + b, y), positives of a letter weighted by its negatives / its positives
               + `L1_DECAY` * mean_l sum_j |W_lj|

    The settings are SAEBench 0.6.0's: Adam from zero, L2 decay 1e-6, `EPOCHS` epochs in batches of `BATCH`, and a learning
    rate that falls exponentially from the first to the last of `RATES`. Latents that never fire have weight 0.
    """
    f = csr_array(f, dtype=np.float32)
    used = np.unique(f.indices[f.data != 0])
    X, Y = csr_array(f[:, used]), torch.from_numpy(y).float()
    W, b = torch.zeros(Y.shape[1], len(used), requires_grad=True), torch.zeros(Y.shape[1], requires_grad=True)
    pos_weight = (len(Y) - Y.sum(0)) / Y.sum(0)
    adam = torch.optim.Adam([W, b], lr=RATES[0], weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, (RATES[1] / RATES[0]) ** (1 / EPOCHS))
    draw = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(Y), generator=draw).split(BATCH):
            batch = X[rows.numpy()].tocoo()
            at = torch.from_numpy(np.stack([batch.row, batch.col]).astype(np.int64))
            latents = torch.sparse_coo_tensor(at, torch.from_numpy(batch.data), batch.shape, check_invariants=False)
            logits = torch.sparse.mm(latents, W.T) + b
            loss = F.binary_cross_entropy_with_logits(logits, Y[rows], pos_weight=pos_weight)
            adam.zero_grad()
            (loss + L1_DECAY * W.abs().sum(1).mean()).backward()
            adam.step()
        schedule.step()
    weights = np.zeros((Y.shape[1], f.shape[1]), np.float32)  # pyright: ignore[reportOptionalSubscript]
    weights[:, used] = W.detach().numpy()
    return weights


def _main(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> tuple[int, float]:
    """Number of main latents among the ranked ones [n, k], and the F1 of a regression on them."""
    (X, y), (test_X, test_y), k = train, test, 1

    def f1(k: int) -> float:
        return _f1(test_y, np.asarray(_fit(X[:, :k], y).predict(test_X[:, :k])))

    best = f1(1)
    while k < X.shape[1] and (larger := f1(k + 1)) > best + SPLIT:
        best, k = larger, k + 1
    return k, best


def _absorbed(
    x: np.ndarray, f: np.ndarray, W_dec: np.ndarray, w: np.ndarray, main: np.ndarray
) -> tuple[dict[str, Any], np.ndarray]:
    """Missed and absorbed words, and the fraction, from known words x [n, D], f [n, F] and the regression's w [D]; and
    whether each word is absorbed, bool [n]."""
    p = w / max(np.linalg.norm(w), 1e-12)
    gain, projection = W_dec @ p, x @ p
    cosine = gain / np.maximum(np.linalg.norm(W_dec, axis=1), 1e-12)
    added = f * gain
    missed = (f[:, main] == 0).all(1)
    strongest = added.argmax(1)
    most = added[np.arange(len(f)), strongest]
    absorbed = missed & (cosine[strongest] >= COSINE) & (projection > 0) & (most >= SHARE * projection)
    m = added[:, main].sum(1)
    contributions = np.where(cosine >= FRACTION_COSINE, added, 0).clip(0)
    contributions[:, main] = 0
    r = np.sort(contributions, axis=1)[:, -MOST_ABSORBING:].sum(1)
    s = np.minimum(r, projection - m)
    ratio = np.where(m <= 0, 1, s / np.where(s + m > 0, s + m, 1))
    fraction = np.where((m >= projection) | (r < SHARE * projection) | (projection <= 0), 0, ratio.clip(0, 1))
    return {
        "missed": int(missed.sum()),
        "absorbed": int(absorbed.sum()),
        "absorption": float(absorbed.mean()) if len(f) else None,
        "absorption_fraction": float(fraction.mean()) if len(f) else None,
    }, absorbed


def _fit(X: np.ndarray, y: np.ndarray) -> LogisticRegression:
    with warnings.catch_warnings():
        for kind in (ConvergenceWarning, LinAlgWarning):  # the solver then continues with lbfgs
            warnings.simplefilter("ignore", kind)
        return LogisticRegression(solver="newton-cholesky", class_weight="balanced").fit(X, y)  # few columns, many rows


def _f1(y: np.ndarray, predicted: np.ndarray) -> float:
    return float(2 * (y & predicted).sum() / max(y.sum() + predicted.sum(), 1))


def _counts(scores: Mapping[str, Any]) -> bool:
    """Whether a letter counts for the means."""
    return bool(scores["probe_f1"] > KNOWN and scores["known"])


def _means(letters: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    counted = [scores for scores in letters.values() if _counts(scores)]
    figures = {
        "mean_absorption": [scores["absorption"] for scores in counted],
        "mean_absorption_fraction": [scores["absorption_fraction"] for scores in counted],
        "mean_split": [len(scores["main"]) for scores in counted],
        "mean_main_f1": [scores["main_f1"] for scores in counted],
    }
    return {name: float(np.mean(values)) if values else None for name, values in figures.items()}
