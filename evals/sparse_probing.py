"""Sparse probing: how well a few latents separate a class of texts from others.

The protocol of SAEBench (arXiv 2503.09532), which follows Gao et al. (arXiv 2406.04093) and Gurnee et al. (arXiv
2305.01610). The first 128 tokens of each text are read, including `<bos>` if the model has one. A latent's value is

    z_j = mean of f_j over the text's tokens, without padding and special tokens

Each class is compared with equally many texts of other classes, drawn evenly from these. The k latents with the largest
|mean of the class - mean of the others| on the training rows are selected, a logistic regression is fitted to them, and
`top_k` is its accuracy on the test rows, averaged over classes, then over sets. `test_accuracy` is that of a linear probe
on all latents. `best_epoch_accuracy` is SAEBench 0.6.0's figure for it, from the epoch with the best test accuracy. `llm`
is the same for the model's activations.

Controls use the same rows and splits: `random` (a dictionary with an untrained decoder), `lm_neurons` (each token's largest
activations), `mean` (one latent that is always active) and `shuffled` (the dictionary's latents with permuted labels).
On the embedded language six label sets of graded difficulty are measured, and the main figures are means over them. The
selection prefers latents with large activations, whose means vary most. On the hard sets the best latent by this rule is
often near chance although another separates the classes (docs/evals.md).

`top_1_error` is the standard error of `top_1` from the number of test rows. `reached_by` names controls whose `top_1` is
at least the dictionary's minus this error.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, vstack

from ..engine.errors import UserError
from ..engine.process.progress import progress_bar
from ..engine.stream import ActivationStream, TokenRows
from ..engine.stream.token_rows import TestbedRows
from ..engine.testbed.language import facts
from ..engine.testbed.lexicon import TONES
from .chosen_sets import sets_read
from .evaluation import Evaluation, TextActivations, collect, padded
from .intervals import Outcomes, interval, joined
from .labelled import EMBEDDED, Labelled, load_labelled
from .pooling import pooled_latents
from .probes import Matrix, Split, ailing, balanced, dense, halves, top_k, top_k_right

CONTEXT = 128
KS = (1, 2, 5, 10, 20, 50, 100)
ROWS = 1024  # documents of the embedded language
LEAST = 10  # texts per class; with fewer, one test row outweighs the differences of interest
TEXTS_AT_ONCE = 1024  # texts whose activations are in memory at once


@dataclass
class _Set:
    """Pooled latents [R, F] by autoencoder, sparse, and activations [R, D] as `llm`; the class of each row [R]. `train`:
    share of training rows."""

    name: str
    pooled: dict[str, Matrix]
    labels: np.ndarray
    train: float


def sparse_probing(
    evaluation: Evaluation, sets: Sequence[str | Path | Labelled] | None = None, *, ks: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Measure test accuracies of probes on the k best latents, for each of `ks` (default: `KS` up to F), on 1 and on all.

    `sets`: labels of the embedded language (`EMBEDDED`), files and published sets as for `load_labelled`, or `Labelled`
    texts; default: the evaluation's, or all of `EMBEDDED`. Latents that are dead or too small for a probe are named in
    `warnings` and have no scores. Raises UserError if k is above F, or a set has one class or too few texts of a class.
    """
    F = evaluation.sae.cfg.d_sae
    sets = sets_read("sparse_probing", evaluation.sets) or None if sets is None else sets
    ks = tuple(sorted({1, *(ks or (k for k in KS if k <= F))}))
    if ks[0] < 1 or ks[-1] > F:
        raise UserError(f"ks: {ks[0] if ks[0] < 1 else ks[-1]} is not allowed; the dictionary has F = {F} latents")
    if sets is None and not evaluation.is_testbed:
        raise UserError(f"sets: needed, because {evaluation.stream.text.name} has no labels; give labelled texts")
    results: dict[str, dict[str, Any]] = {}
    warnings: list[str] = []
    answers: dict[str, _Answers] = {}
    for labelled in _opened(evaluation, EMBEDDED if sets is None else sets):
        if labelled.name in results:
            raise UserError(f"sets: {labelled.name} is given twice; give each set its own name")
        answers[labelled.name] = _Answers(len(labelled.labels), len(np.unique(labelled.labels)))
        results[labelled.name] = _probe(evaluation, labelled, ks, warnings, answers[labelled.name])
    if not results:
        raise UserError("sets: empty; give at least one")
    sizes = [counts for result in results.values() for counts in result["classes"].values()]
    return {
        **_over([result["scores"] for result in results.values()]),
        "intervals": _intervals(evaluation, list(answers.values()), ks),
        "protocol": {
            "dataset_names": list(results),
            "probe_train_set_size": max(counts["train_rows"] for counts in sizes),
            "probe_test_set_size": max(counts["test_rows"] for counts in sizes),
            "context_length": min(CONTEXT, evaluation.stream.positions),
            "k_values": list(ks),
        },
        "sets": {name: result["scores"] | {"classes": result["classes"]} for name, result in results.items()},
        "warnings": warnings,
        "model": evaluation.stream.model.name,
        "hook": evaluation.stream.model.hook,
    }


def _opened(evaluation: Evaluation, sets: Sequence[str | Path | Labelled]) -> Iterator[_Set]:
    """Load the sets one by one and pool their latents; the embedded language's documents are pooled once."""
    embedded: dict[str, Matrix] | None = None
    for source in sets:
        if isinstance(source, str) and source in EMBEDDED:
            collected = evaluation.labelled(ROWS)
            embedded = embedded or _pooled(evaluation, [collected])
            labels = _embedded_labels(evaluation, collected, source)
            known = labels != ""
            pooled = embedded if known.all() else {name: latents[known] for name, latents in embedded.items()}
            yield _Set(source, pooled, labels[known], 0.5)
        else:
            if not isinstance(source, Labelled):
                file = Path(str(source).partition("?")[0])
                source = load_labelled(str(source), evaluation.generator(f"sparse_probing/{file.name}/texts"))
            labels = np.array(source.labels)
            check_classes(source.name, labels)
            texts = (source.texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(labels), TEXTS_AT_ONCE))
            batches = (collect(evaluation.stream, token_rows(evaluation.stream, batch), len(batch)) for batch in texts)
            yield _Set(source.name, _pooled(evaluation, batches), labels, 0.8)


def _embedded_labels(evaluation: Evaluation, collected: TextActivations, name: str) -> np.ndarray:
    """A label of every document of the embedded language, by the names of `EMBEDDED`; "" where it does not apply.

    `items`: length of the list. `poison`: whether a fact about a poison is stated, of documents with facts. `number`: of the
    first subject of an agreement. `agent`: of the first action, human or animal. Documents have other nouns and actions, so
    the last two are hard to tell from the mean of a document.
    """
    text = evaluation.stream.text
    assert isinstance(text, TestbedRows)
    if name in ("topic", "tone"):
        return np.array(text.language.topics if name == "topic" else TONES)[collected.row_label(name).numpy()]
    if name == "items":
        return np.array(["three", "four"])[(collected.row_label("item").numpy() == 3).astype(int)]
    if name == "poison":
        fact = collected.labels["fact"]
        poison = np.array([known.forget for known in facts()])[fact] & (fact >= 0)
        return np.where((fact >= 0).any(1), np.where(poison.any(1), "poison", "other"), "")
    values = collected.labels["plural" if name == "number" else "agent_is_human"]
    first = values[np.arange(len(values)), (values >= 0).argmax(1)]
    return np.array(["singular", "plural", ""] if name == "number" else ["animal", "human", ""])[first]


def token_rows(stream: ActivationStream, texts: Sequence[str]) -> Iterator[TokenRows]:
    """The beginning of each text as a row of at most 128 tokens, including `<bos>` if the tokenizer has one."""
    tokenizer = stream.model.tokenizer
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    T = min(CONTEXT, stream.positions)
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return padded([(bos + text_ids)[:T] for text_ids in ids], stream)


def _pooled(evaluation: Evaluation, batches: Iterable[TextActivations]) -> dict[str, Matrix]:
    latents: dict[str, list[csr_array]] = {}
    llm: list[np.ndarray] = []
    for batch in batches:
        for name, autoencoder in evaluation.autoencoders(batch).items():
            latents.setdefault(name, []).append(pooled_latents(batch, autoencoder))
        llm.append(batch.pooled().cpu().numpy())
    return {name: csr_array(vstack(parts)) for name, parts in latents.items()} | {"llm": np.concatenate(llm)}


def check_classes(name: str, labels: np.ndarray) -> None:
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        content = f"only the class {classes[0]}" if len(classes) else "no texts"
        raise UserError(f"sets: {name} has {content}; give at least two classes")
    if counts.min() < LEAST:
        rarest = f"{counts.min()} texts of class {classes[counts.argmin()]}"
        raise UserError(f"sets: {name} has {rarest}; give at least {LEAST} of each class")


class _Answers:
    """Which test rows the probes of a set get right: float [R, C] by autoencoder and k, and `tested` [R, C]."""

    def __init__(self, rows: int, classes: int):
        self.tested = np.zeros((rows, classes))
        self.right: dict[str, dict[int, np.ndarray]] = {}

    def add(self, name: str, code: int, rows: np.ndarray, right: dict[int, np.ndarray]) -> None:
        self.tested[rows, code] = 1
        for k, correct in right.items():
            by_k = self.right.setdefault(name, {})
            by_k.setdefault(k, np.zeros_like(self.tested))[rows, code] = correct


def _intervals(evaluation: Evaluation, answers: list[_Answers], ks: tuple[int, ...]) -> dict[str, Any]:
    """Intervals of the accuracies over documents, by score."""
    names = [name for name in answers[0].right if all(name in of_set.right for of_set in answers)]
    if "sae" not in names:
        return {}
    found = {}
    for k in ks:
        parts = {name: [Outcomes(of_set.right[name][k], of_set.tested) for of_set in answers] for name in names}
        outcomes = {name: joined(of_sets) for name, of_sets in parts.items()}
        found[f"top_{k}"] = interval(outcomes, evaluation.generator("sparse_probing/intervals"))
    return found


def _probe(
    evaluation: Evaluation, text_set: _Set, ks: tuple[int, ...], warnings: list[str], answers: _Answers
) -> dict[str, Any]:
    """`scores` of a set, averaged over classes, and top-1 accuracy and row counts of its `classes`. Fills in `answers`."""
    check_classes(text_set.name, text_set.labels)
    unusable = {name: reason for name, pooled in text_set.pooled.items() if (reason := ailing(pooled)) is not None}
    warnings += [f"{text_set.name}: {name}: {reason}" for name, reason in unusable.items()]
    names, codes = np.unique(text_set.labels, return_inverse=True)
    no_scores = {f"top_{k}": None for k in ks}
    scores: list[dict[str, Any]] = []
    classes: dict[str, dict[str, Any]] = {}
    with progress_bar(f"probing {text_set.name}", total=len(names), unit="classes") as bar:
        for code, label in enumerate(names):
            purpose = f"sparse_probing/{text_set.name}/{label}"
            y = codes == code
            rows = balanced(y, evaluation.generator(f"{purpose}/rows"), groups=codes)
            accuracies: dict[str, dict[str, Any]] = {}
            tested = trained = 0
            for name, pooled in text_set.pooled.items():
                full = name in ("sae", "llm")
                if name in unusable:
                    full_scores = ("test_accuracy", "best_epoch_accuracy") if full else ()
                    accuracies[name] = no_scores | dict.fromkeys(full_scores)
                    continue
                split = halves(pooled, y, rows, evaluation.generator(f"{purpose}/split"), train=text_set.train)
                trained, tested = len(split.train_y), len(split.test_y)
                correct = top_k_right(split, ks)
                if name != "llm" and split.test_rows is not None:
                    answers.add(name, code, split.test_rows, correct)
                accuracies[name] = _named({k: float(of_k.mean()) for k, of_k in correct.items()})
                if full:
                    accuracies[name]["test_accuracy"] = full_width(split, evaluation.generator(f"{purpose}/full"))
                    accuracies[name]["best_epoch_accuracy"] = best_epoch(split, evaluation.generator(f"{purpose}/full"))
            accuracies["shuffled"] = no_scores
            if "sae" not in unusable:
                draw, permuted = evaluation.generator(f"{purpose}/shuffled"), y.copy()
                # test labels too, or else a latent that equals the class would score 0 or 1 at random
                permuted[rows] = draw.permutation(y[rows])
                split = halves(text_set.pooled["sae"], permuted, rows, draw, train=text_set.train)
                accuracies["shuffled"] = _named(top_k(split, ks))
            sae, llm = accuracies.pop("sae"), accuracies.pop("llm")
            error = None if sae["top_1"] is None else _error(sae["top_1"], tested)
            scores.append({**sae, "top_1_error": error, "llm": llm, "controls": accuracies})
            classes[str(label)] = {"top_1": sae["top_1"], "train_rows": trained, "test_rows": tested}
            bar.advance(1)
    return {"scores": _over(scores), "classes": classes}


def full_width(split: Split, draw: np.random.Generator) -> float:
    """Test accuracy of a linear probe on all columns (`_epochs`); training ends after 10 epochs without a lower loss."""
    best, waited, last = math.inf, 0, 0.0
    for loss, accuracy in _epochs(split, draw):
        best, waited, last = (loss, 0, accuracy) if loss < best else (best, waited + 1, accuracy)
        if waited == 10:
            break
    return last


def best_epoch(split: Split, draw: np.random.Generator) -> float:
    """Best test accuracy of the same probe after any epoch, until 10 epochs without a better one. SAEBench 0.6.0 reports
    this figure; it is biased upwards, because the test rows select the epoch."""
    best, waited = 0.0, 0
    for _, accuracy in _epochs(split, draw):
        best, waited = (accuracy, 0) if accuracy > best else (best, waited + 1)
        if waited == 10:
            break
    return best


def _epochs(split: Split, draw: np.random.Generator) -> Iterator[tuple[float, float]]:
    """Training loss and test accuracy after each of 100 epochs of a linear probe on all columns: binary cross-entropy,
    AdamW at 1e-2 from zero, batches of 250 rows."""
    X, y = split.train_X, torch.from_numpy(split.train_y).float()
    weight, bias = torch.zeros(X.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-2)
    for _ in range(100):
        summed = 0.0
        for rows in np.split(order := draw.permutation(len(y)), range(250, len(order), 250)):
            logits = torch.from_numpy(dense(X[rows])).float() @ weight + bias
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            summed += loss.item() * len(rows)
        predicted = split.test_X @ weight.detach().numpy() + bias.item() > 0
        yield summed, float((predicted == split.test_y).mean())


def _named(accuracies: dict[int, float]) -> dict[str, float]:
    return {f"top_{k}": value for k, value in accuracies.items()}


def _error(accuracy: float, rows: int) -> float:
    """Standard error of an accuracy on `rows` rows, with one right and one wrong answer added so that it is never 0."""
    p = (accuracy * rows + 1) / (rows + 2)
    return math.sqrt(p * (1 - p) / rows)


def _over(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of all figures, None if one is None; the error of the mean for `top_1_error`; and `reached_by`."""
    means = _mean([{key: value for key, value in score.items() if key != "reached_by"} for score in scores])
    errors = [score["top_1_error"] for score in scores]
    means["top_1_error"] = None if None in errors else math.hypot(*errors) / len(errors)
    means["reached_by"] = []
    if means["top_1"] is not None:
        controls, bound = means["controls"].items(), means["top_1"] - means["top_1_error"]
        means["reached_by"] = [name for name, d in controls if d["top_1"] is not None and d["top_1"] >= bound]
    return means


def _mean(scores: list[Any]) -> Any:
    if isinstance(scores[0], dict):
        return {key: _mean([score[key] for score in scores]) for key in scores[0]}
    return None if None in scores else sum(scores) / len(scores)
