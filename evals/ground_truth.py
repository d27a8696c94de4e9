"""Ground truth: known variables of the embedded language in a dictionary.

A variable is a binary label of tokens, such as "topic=sailing" or "plural". Two questions are asked of each:

    recovered   the share of the variable's effect on the activations that 5 latents reconstruct (`variable_effects.py`)
    f1          how well one latent's firing predicts it, over the tokens where it applies:
                precision = fired and true / fired      recall = fired and true / true
                F1 = 2 fired and true / (fired + true)

Latents are chosen on one half of the documents and scored on the other, for F1 the one with the best F1. The main figure
`recovered` is the mean over variables. `detected` is the share of variables with F1 >= 0.8. `top_5` is the accuracy of a
probe (`probes.py`) on five latents, with the same halves and as many true as false tokens; 0.5 is chance. The chance level
of F1 is not 0 (always firing scores 2p / (1 + p), p the share of true tokens). The control `shuffled`, which selects latents
by permuted labels, shows it.

F1, `detected` and `top_5` only see the encoder. A trained encoder on a random decoder detects most of these variables, so
the random control is close to the dictionary there. `recovered` also depends on the decoder.

Scoring latents by F1 against known properties follows Gao et al. (arXiv 2406.04093) and Karvonen et al. (arXiv 2408.00113),
who used probes and board states.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from ..engine.errors import UserError
from ..engine.testbed import lexicon as lex
from ..engine.testbed.language import KINDS, ROLES, SECTIONS, facts
from .evaluation import Autoencoder, Evaluation, TextActivations
from .intervals import Outcomes, interval
from .probes import Split, balanced, top_k
from .variable_effects import recovered

DETECTED = 0.8
LATENTS = 5  # latents of the main figure
KS = (1, 2, LATENTS, 10, 20)
LEAST = 25  # true and false tokens that a variable needs in each half
MOST = 500  # true and false tokens that a probe sees in each half
_VALUES = {
    "section": SECTIONS, "kind": KINDS, "role": ROLES, "topic": tuple(lex.TOPICS), "tone": lex.TONES,
    "item": lex.ORDINALS,
}  # fmt: skip


def ground_truth(evaluation: Evaluation, *, rows: int = 1024) -> dict[str, Any]:
    """Measure the recovery of every known variable, its best single latent and a top-5 probe, on `rows` held-out documents.

    Returns `variables`, each with the share `recovered`, the best latent with its f1, precision and recall (None if it never
    fires) on the half not used for selection, the probe's accuracy `top_5` and the number of tokens; `recovered_by`, the
    mean share by number of latents; `detected_at`, the share of variables at every F1 from 0.5 to 0.95; and `controls`, the
    means of the random dictionary, the model's neurons and shuffled labels. `recovered` is None for a transcoder, whose
    decoder writes to another hook.

    Raises UserError for a text other than the embedded language, and for too few rows.
    """
    collected = evaluation.labelled(rows)
    half = evaluation.generator("ground truth halves").permutation(len(collected)) % 2 == 0
    choosing = half[collected.row.cpu().numpy()]
    truth = variables(collected, choosing)
    if not truth:
        raise UserError(f"rows: {rows} is not allowed; too few tokens for any variable, give at least 100")
    autoencoders = evaluation.autoencoders(collected, mean=False)
    results = {name: _scores(evaluation, collected, d, truth, choosing) for name, d in autoencoders.items()}
    results["shuffled"] = _scores(evaluation, collected, autoencoders["sae"], truth, choosing, shuffled=True)
    intervals = _intervals(evaluation, results)
    by_variable = results.pop("sae")
    f1 = np.array([variable["f1"] for variable in by_variable.values()])
    levels = [round(0.5 + 0.05 * step, 2) for step in range(10)]
    return {
        **_summary(by_variable),
        "detected_at": [{"f1": level, "share": float((f1 >= level).mean())} for level in levels],
        "variables": by_variable,
        "controls": {name: _summary(control) for name, control in results.items()},
        "intervals": intervals,
        "tokens": len(collected.x),
        "rows": len(collected),
    }


def variables(collected: TextActivations, choosing: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (applies, true), bool [n] each, of variables with at least `LEAST` true and `LEAST` false tokens both inside
    and outside `choosing` [n]."""
    truth: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for label, names in _VALUES.items():
        values = collected.label(label).numpy()
        for value, name in enumerate(names):
            if name != "none":
                truth[f"{label}={name}"] = values >= 0, values == value
    plural, fact = collected.label("plural").numpy(), collected.label("fact").numpy()
    noun = collected.label("role").numpy() != ROLES.index("copula")
    forget = np.array([known.forget for known in facts()])
    truth["plural noun"] = (plural >= 0) & noun, plural == 1
    truth["fact to forget"] = fact >= 0, forget[fact]
    for label in ("agent_is_human", "subject_is_human"):
        values = collected.label(label).numpy()
        truth[label] = values >= 0, values == 1
    return {
        name: (applies, applies & true)
        for name, (applies, true) in truth.items()
        if min((applies & y & side).sum() for y in (true, ~true) for side in (choosing, ~choosing)) >= LEAST
    }


def best_latents(
    fired: csr_array, applies: np.ndarray, learned: np.ndarray, true: np.ndarray, choosing: np.ndarray
) -> list[dict[str, Any]]:
    """For each of V variables, select the latent with the best F1 on the tokens `choosing` [n] and score it on the others.

    `fired` is 1 where a latent fires [n, F]; `applies`, `learned` (labels for the selection) and `true` are bool [V, n].
    Among equal latents, takes the first. Returns latent, f1, precision and recall of each variable.
    """
    hits, counts = _counts(fired, learned & choosing), _counts(fired, applies & choosing)
    latents = (2 * hits / (counts + (learned & choosing).sum(1, keepdims=True)).clip(1)).argmax(1)
    cells = np.arange(len(latents)), latents
    hits, counts = _counts(fired, true & ~choosing)[cells], _counts(fired, applies & ~choosing)[cells]
    positives = (true & ~choosing).sum(1)
    return [
        {
            "latent": int(latent),
            "f1": float(2 * hit / max(count + positive, 1)),
            "precision": float(hit / count) if count else None,
            "recall": float(hit / positive) if positive else None,
        }
        for latent, hit, count, positive in zip(latents, hits, counts, positives, strict=True)
    ]


def _counts(fired: csr_array, where: np.ndarray) -> np.ndarray:
    """Firings of each latent where `where` [V, n] is true: [V, F]."""
    return (fired.T @ where.T.astype(np.float64)).T


def _scores(
    evaluation: Evaluation,
    collected: TextActivations,
    autoencoder: Autoencoder,
    truth: dict[str, tuple[np.ndarray, np.ndarray]],
    choosing: np.ndarray,
    *,
    shuffled: bool = False,
) -> dict[str, dict[str, Any]]:
    """`variables` as `ground_truth` returns them; with `shuffled`, latents and probes come from permuted labels."""
    code = collected.code(autoencoder)
    assert code.offsets is not None
    shape = len(collected.x), code.n_latents
    values, indices, offsets = (tensor.cpu().numpy() for tensor in (code.values, code.indices, code.offsets))
    acts = csr_array((values, indices, offsets), shape=shape)
    # A latent fires above zero; neurons can be negative.
    fired = csr_array(((values > 0).astype(np.float64), indices, offsets), shape=shape)
    applies, true = (np.stack(side) for side in zip(*truth.values(), strict=True))
    learned = true.copy()
    if shuffled:
        for index, name in enumerate(truth):
            draw, chosen = evaluation.generator(f"ground truth shuffled {name}"), applies[index] & choosing
            learned[index, chosen] = draw.permutation(learned[index, chosen])
    scores = dict(zip(truth, best_latents(fired, applies, learned, true, choosing), strict=True))
    x, W_dec = (tensor.detach().cpu().double().numpy() for tensor in (collected.x, autoencoder.W_dec))
    if evaluation.sae.cfg.d_out is None:
        by_k = recovered(x, acts, W_dec, list(zip(applies, learned, true, strict=True)), choosing, KS)
    else:
        by_k = dict.fromkeys(KS)
    for index, score in enumerate(scores.values()):
        score["recovered_by"] = {str(k): None if share is None else float(share[index]) for k, share in by_k.items()}
        score["recovered"] = score["recovered_by"][str(LATENTS)]
    for name, (where, y) in truth.items():
        draw = evaluation.generator(f"ground truth probe {name}")
        train, test = (_drawn(y, where & side, draw) for side in (choosing, ~choosing))
        split = Split(acts[train].toarray(), y[train], acts[test].toarray(), y[test])
        if shuffled:
            split = split.shuffled(draw)
        scores[name] |= {"top_5": top_k(split, (5,))[5], "tokens": int(where.sum())}
    return scores


def _drawn(y: np.ndarray, where: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Indices of as many true as false tokens from `where` [n], at most `MOST` of each."""
    among = np.flatnonzero(where)
    tokens = among[balanced(y[among], draw)]
    return np.concatenate([tokens[y[tokens]][:MOST], tokens[~y[tokens]][:MOST]])


def _intervals(evaluation: Evaluation, results: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Intervals of `_summary`'s figures over variables."""

    def of(value: Callable[[dict[str, Any]], float | None], *, bounded: bool = True) -> dict[str, Any] | None:
        values = {name: [value(variable) for variable in scores.values()] for name, scores in results.items()}
        if None in values["sae"]:
            return None
        outcomes = {name: Outcomes.of(np.array(scores), bounded=bounded) for name, scores in values.items()}
        return interval(outcomes, evaluation.generator("ground truth intervals"))

    return {
        "recovered": of(lambda variable: variable["recovered"], bounded=False),
        "detected": of(lambda variable: float(variable["f1"] >= DETECTED)),
        "mean_f1": of(lambda variable: variable["f1"]),
        "mean_top_5": of(lambda variable: variable["top_5"]),
    }


def _summary(scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    f1 = np.array([variable["f1"] for variable in scores.values()])
    shares = {str(k): [variable["recovered_by"][str(k)] for variable in scores.values()] for k in KS}
    by_k = {k: None if None in share else float(np.mean(share)) for k, share in shares.items()}
    return {
        "recovered": by_k[str(LATENTS)],
        "recovered_by": by_k,
        "detected": float((f1 >= DETECTED).mean()),
        "mean_f1": float(f1.mean()),
        "mean_top_5": float(np.mean([variable["top_5"] for variable in scores.values()])),
    }
