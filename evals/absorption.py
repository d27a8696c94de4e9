"""Feature absorption: words that the latents of their first letter miss because another latent has taken them over.

After the description of Chanin et al. (arXiv 2409.14507). With x the activation of a word's token and p the unit direction
of a logistic regression that tells words of a letter from others, for each letter:

    main latents   the k that are most above their mean on other words; k grows while the F1 of a logistic regression on
                   them grows by more than `SPLIT`, which is the letter's feature having been split
    missed         the regression on x knows the word, and no main latent fires
    absorbed       missed, and of all latents f that fire the one with the largest f_j (W_dec_j . p) has a decoder cosine
                   of at least `COSINE` with p and at least `SHARE` of what all that point along p add together
    absorption     absorbed / words that the regression on x knows

Tokens of the embedded language are whole words, so that a model knows the letter only as a set of words it has seen. Words
are the same in training and test documents, and a dictionary with a latent for each word, and none for the letter, scores
high: the figure is for comparison with the controls and between dictionaries.
"""

import time
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from ..engine.errors import UserError
from ..engine.testbed.language import ROLES, Language
from .collect import CHUNK, Coder, Collected, Evaluation, joined
from .probes import Split

ROWS, TIMES = 1024, 12  # documents, and how often a word is used at most, half for training and half for testing
WORDS = 8  # of a letter, fewer than which are left out
SPLIT, COSINE, SHARE = 0.03, 0.025, 0.4
MOST = 10  # main latents
CONTENT = (
    "subject", "attractor", "agent", "patient", "action", "result", "entity", "object", "noun", "verb", "adjective",
    "adverb",
)  # fmt: skip


@torch.no_grad()
def absorption(evaluation: Evaluation, *, rows: int = ROWS) -> dict[str, Any]:
    """Absorption of the first letters of content words in `rows` documents of the embedded language.

    Returns `mean_absorption` (over letters, None where no word was known), `mean_main_f1` (low where no latents stand for
    letters, so that there is little to be absorbed), `letters` {letter: words, probe_f1, main (latents), main_f1, known,
    missed, absorbed, absorption} with counts of test tokens, and `controls` with the means of each. Raises UserError for a
    text without labels, or where no two letters have `WORDS` words.
    """
    began, collected = time.monotonic(), evaluation.labelled(rows)
    train, test, words, letter = _words(collected, evaluation.generator("absorption"))
    size = {a: len(np.unique(words[train][letter[train] == a])) for a in np.unique(letter[train])}
    letters = [a for a, count in size.items() if count >= WORDS]
    if len(letters) < 2:
        raise UserError(f"rows: {rows} is not allowed; at least 2 letters need {WORDS} words each: give more documents")
    x = collected.x.cpu().numpy()
    probes = {a: _fit(x[train], letter[train] == a) for a in letters}
    used = np.concatenate([train, test])
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name, coder in evaluation.coders(collected).items():
        f, W_dec = _latents(coder, collected, used), coder.W_dec.detach().cpu().numpy()
        half = f[: len(train)], f[len(train) :]
        results[name] = {}
        for a, probe in probes.items():
            y = letter[train] == a, letter[test] == a
            knows = np.asarray(probe.predict(x[test]))
            main, main_f1 = _main(Split(half[0], y[0], half[1], y[1]))
            missed, absorbed = _absorbed(half[1][knows & y[1]], W_dec, probe.coef_[0], main)
            known = int((knows & y[1]).sum())
            results[name][str(a)] = {
                "words": size[a],
                "probe_f1": _f1(y[1], knows),
                "main": main.tolist(),
                "main_f1": main_f1,
                "known": known,
                "missed": missed,
                "absorbed": absorbed,
                "absorption": absorbed / known if known else None,
            }
    means = {
        name: {"mean_absorption": _mean(found, "absorption"), "mean_main_f1": _mean(found, "main_f1")}
        for name, found in results.items()
    }
    return {
        **means.pop("sae"),
        "letters": results["sae"],
        "controls": means,
        "rows": len(collected),
        "seconds": round(time.monotonic() - began, 2),
    }


def _words(collected: Collected, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens for training and for testing, from different documents, and of all n tokens the word and its first letter."""
    vocabulary = Language().vocabulary
    words = collected.tokens[collected.kept].cpu().numpy()
    letter = np.array([word[0] for word in vocabulary])[words]
    wanted = np.isin(collected.label("role").numpy(), [ROLES.index(role) for role in CONTENT])
    of_test = draw.permutation(np.arange(len(collected)) % 2)[collected.row.cpu().numpy()]
    order = draw.permutation(np.flatnonzero(wanted))
    sides: list[list[np.ndarray]] = [[], []]
    for word in np.unique(words[wanted]):
        mine = order[words[order] == word]
        for side in (0, 1):
            sides[side].append(mine[of_test[mine] == side][: TIMES // 2])
    return np.concatenate(sides[0]), np.concatenate(sides[1]), words, letter


def _latents(coder: Coder, collected: Collected, used: np.ndarray) -> np.ndarray:
    """A coder's latents of some of the tokens, dense."""
    at = torch.from_numpy(used).to(collected.x.device).split(CHUNK)
    return joined([coder.encode_sparse(collected.x[i], collected.pos[i]) for i in at]).to_dense().cpu().numpy()


def _main(split: Split) -> tuple[np.ndarray, float]:
    """The letter's latents, the one most above its mean on other words first, and the F1 of a regression on them."""
    means = [split.train_X[split.train_y == side].mean(0, dtype=np.float64) for side in (True, False)]
    order, k = np.argsort(means[1] - means[0], kind="stable")[:MOST], 1

    def f1(k: int) -> float:
        chosen = order[:k]
        found = np.asarray(_fit(split.train_X[:, chosen], split.train_y).predict(split.test_X[:, chosen]))
        return _f1(split.test_y, found)

    best = f1(1)
    while k < len(order) and (more := f1(k + 1)) > best + SPLIT:
        best, k = more, k + 1
    return order[:k], best


def _absorbed(f: np.ndarray, W_dec: np.ndarray, w: np.ndarray, main: np.ndarray) -> tuple[int, int]:
    """Of words [n, F] known by the direction w [D]: how many the main latents miss, and how many of those are absorbed."""
    missed = f[(f[:, main] == 0).all(1)]
    along = W_dec @ (w / max(np.linalg.norm(w), 1e-12))
    added = missed * along
    strongest = added.argmax(1)
    most = added[np.arange(len(missed)), strongest]
    cosine = along / np.maximum(np.linalg.norm(W_dec, axis=1), 1e-12)
    absorbed = (most > 0) & (cosine[strongest] >= COSINE) & (most >= SHARE * added.clip(0).sum(1))
    return len(missed), int(absorbed.sum())


def _fit(X: np.ndarray, y: np.ndarray) -> LogisticRegression:
    """Words of a letter are few, and count as much as the others do."""
    return LogisticRegression(solver="newton-cholesky", class_weight="balanced").fit(X, y)  # few columns, many rows


def _f1(y: np.ndarray, found: np.ndarray) -> float:
    return float(2 * (y & found).sum() / max(y.sum() + found.sum(), 1))


def _mean(letters: dict[str, dict[str, Any]], key: str) -> float | None:
    values = [found[key] for found in letters.values() if found[key] is not None]
    return float(np.mean(values)) if values else None
