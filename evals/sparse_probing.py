"""Sparse probing: how well a class of texts can be told by a few latents, and by how few.

The protocol of SAEBench (arXiv 2503.09532), which follows Gao et al. (arXiv 2406.04093) and Gurnee et al. (arXiv
2305.01610). Of every text the first 128 tokens are read, after `<bos>` where the model has one, and a latent j counts with

    z_j = mean of f_j over the text's tokens, padding and special tokens left out

For each class, its texts stand against as many of the other classes, drawn evenly from those. On the training rows the k
latents with the largest |mean of the class - mean of the others| are chosen, a logistic regression is fitted to those, and
`top_k` is its accuracy on the test rows: mean over classes, then over sets. `test_accuracy` is that of a linear probe on
all latents, and `best_epoch_accuracy` the one that SAEBench 0.6.0 gives for that: of the epoch with the best test accuracy.
`llm` is measured in the same way on the activations themselves.

Controls, with the same rows and splits: `random` (the dictionary whose decoder was never trained), `lm_neurons` (each
token's largest activations), `mean` (one latent that is always on) and `shuffled` (the dictionary's latents, the rows'
labels permuted). `top_1_error` is the standard error of `top_1` from the number of test rows. `reached_by` names the
controls that come as near as that, or above: what they reach too says nothing about the dictionary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine.errors import UserError
from ..engine.process.progress import progress_bar
from ..engine.stream import ActivationStream, TokenRows
from ..engine.stream.token_rows import TestbedRows
from ..engine.testbed.lexicon import TONES
from .evaluation import Evaluation, TextActivations, collect, padded
from .labelled import EMBEDDED, Labelled, load_labelled
from .probes import Split, ailing, balanced, halves, top_k

CONTEXT = 128
KS = (1, 2, 5, 10, 20, 50, 100)
ROWS = 1024  # documents of the embedded language
LEAST = 10  # texts of a class: with fewer, one test row is worth more than the differences of interest
_TEXTS_AT_ONCE = 1024  # texts whose activations are held at once


@dataclass
class _Set:
    """Pooled latents [R, F] by autoencoder, `llm` among them, and the class of each row [R]. `train`: share of rows
    that train."""

    name: str
    pooled: dict[str, np.ndarray]
    labels: np.ndarray
    train: float


def sparse_probing(
    evaluation: Evaluation, sets: Sequence[str | Path | Labelled] | None = None, *, ks: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Test accuracies of probes on the k best latents, for each of `ks` (1 is always measured) and on all. Without `ks`
    those of `KS`, as far as there are latents.

    `sets`: `topic` (the default there) and `tone` of the embedded language, files and published sets as `load_labelled`
    takes them, or `Labelled` texts. Latents that are dead or too small for a probe are told in `warnings`, and have no
    scores. Raises UserError where k is above F, or a set has one class, or too few texts of a class.
    """
    F = evaluation.sae.cfg.d_sae
    ks = tuple(sorted({1, *(ks or (k for k in KS if k <= F))}))
    if ks[0] < 1 or ks[-1] > F:
        raise UserError(f"ks: {ks[0] if ks[0] < 1 else ks[-1]} is not allowed; the dictionary has F = {F} latents")
    if sets is None and not evaluation.is_testbed:
        raise UserError(f"sets: none given, and {evaluation.stream.text.name} has no labels; give labelled texts")
    results: dict[str, dict[str, Any]] = {}
    warnings: list[str] = []
    for labelled in _opened(evaluation, EMBEDDED[:1] if sets is None else sets):
        if labelled.name in results:
            raise UserError(f"sets: {labelled.name} is given twice; give each set a name of its own")
        results[labelled.name] = _probe(evaluation, labelled, ks, warnings)
    if not results:
        raise UserError("sets: none given; give at least one")
    sizes = [counts for result in results.values() for counts in result["classes"].values()]
    return {
        **_over([result["scores"] for result in results.values()]),
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
    """The sets with their pooled latents, one after the other; those of the embedded language are pooled once."""
    embedded: dict[str, np.ndarray] | None = None
    for source in sets:
        if isinstance(source, str) and source in EMBEDDED:
            collected = evaluation.labelled(ROWS)
            embedded = embedded or _pooled(evaluation, [collected])
            text = evaluation.stream.text
            assert isinstance(text, TestbedRows)
            names = np.array(text.language.topics if source == "topic" else TONES)
            yield _Set(source, embedded, names[collected.of_rows(source).numpy()], 0.5)
        else:
            if not isinstance(source, Labelled):
                file = Path(str(source).partition("?")[0])
                source = load_labelled(str(source), evaluation.generator(f"sparse_probing/{file.name}/texts"))
            labels = np.array(source.labels)
            _check(source.name, labels)
            texts = (source.texts[start : start + _TEXTS_AT_ONCE] for start in range(0, len(labels), _TEXTS_AT_ONCE))
            batches = (collect(evaluation.stream, token_rows(evaluation.stream, batch), len(batch)) for batch in texts)
            yield _Set(source.name, _pooled(evaluation, batches), labels, 0.8)


def token_rows(stream: ActivationStream, texts: Sequence[str]) -> Iterator[TokenRows]:
    """The beginning of each text as a row of at most 128 tokens, `<bos>` first where the tokenizer has one."""
    tokenizer = stream.model.tokenizer
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    T = min(CONTEXT, stream.positions)
    ids = [
        (bos + text_ids)[:T]
        for text_ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    ]
    return padded(ids, stream)


def _pooled(evaluation: Evaluation, batches: Iterable[TextActivations]) -> dict[str, np.ndarray]:
    latents: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for name, autoencoder in {**evaluation.autoencoders(batch), "llm": None}.items():
            latents.setdefault(name, []).append(batch.pooled(autoencoder).cpu().numpy())
    return {name: np.concatenate(pooled) for name, pooled in latents.items()}


def _check(name: str, labels: np.ndarray) -> None:
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise UserError(
            f"sets: {name} has {f'only the class {classes[0]}' if len(classes) else 'no texts'}; give at least two"
        )
    if counts.min() < LEAST:
        raise UserError(
            f"sets: {name} has {counts.min()} texts of class {classes[counts.argmin()]}; give at least {LEAST} of each"
        )


def _probe(evaluation: Evaluation, text_set: _Set, ks: tuple[int, ...], warnings: list[str]) -> dict[str, Any]:
    """`scores` of a set, its means over classes, and `classes`, what each class had."""
    _check(text_set.name, text_set.labels)
    ill = {name: ailment for name, pooled in text_set.pooled.items() if (ailment := ailing(pooled)) is not None}
    warnings += [f"{text_set.name}: {name}: {ailment}" for name, ailment in ill.items()]
    names, codes = np.unique(text_set.labels, return_inverse=True)
    nothing = {f"top_{k}": None for k in ks}
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
                if name in ill:
                    accuracies[name] = nothing | dict.fromkeys(("test_accuracy", "best_epoch_accuracy") if full else ())
                    continue
                split = halves(pooled, y, rows, evaluation.generator(f"{purpose}/split"), train=text_set.train)
                trained, tested = len(split.train_y), len(split.test_y)
                accuracies[name] = _named(top_k(split, ks))
                if full:
                    accuracies[name]["test_accuracy"] = full_width(split, evaluation.generator(f"{purpose}/full"))
                    accuracies[name]["best_epoch_accuracy"] = best_epoch(split, evaluation.generator(f"{purpose}/full"))
            accuracies["shuffled"] = nothing
            if "sae" not in ill:
                draw, any_y = evaluation.generator(f"{purpose}/shuffled"), y.copy()
                # test labels too: a latent that is the class would else score 0 or 1, as the coin falls
                any_y[rows] = draw.permutation(y[rows])
                split = halves(text_set.pooled["sae"], any_y, rows, draw, train=text_set.train)
                accuracies["shuffled"] = _named(top_k(split, ks))
            sae, llm = accuracies.pop("sae"), accuracies.pop("llm")
            error = None if sae["top_1"] is None else _error(sae["top_1"], tested)
            scores.append({**sae, "top_1_error": error, "llm": llm, "controls": accuracies})
            classes[str(label)] = {"top_1": sae["top_1"], "train_rows": trained, "test_rows": tested}
            bar.advance(1)
    return {"scores": _over(scores), "classes": classes}


def full_width(split: Split, draw: np.random.Generator) -> float:
    """Test accuracy of a linear probe on all columns (`_epochs`), whose training ends with 10 epochs without a lower loss;
    test rows decide nothing."""
    best, since, last = math.inf, 0, 0.0
    for loss, accuracy in _epochs(split, draw):
        best, since, last = (loss, 0, accuracy) if loss < best else (best, since + 1, accuracy)
        if since == 10:
            break
    return last


def best_epoch(split: Split, draw: np.random.Generator) -> float:
    """The best test accuracy that the same probe has after any epoch, until 10 without a better one: SAEBench 0.6.0's
    figure, too high by as much as choosing by test rows makes it."""
    best, since = 0.0, 0
    for _, accuracy in _epochs(split, draw):
        best, since = (accuracy, 0) if accuracy > best else (best, since + 1)
        if since == 10:
            break
    return best


def _epochs(split: Split, draw: np.random.Generator) -> Iterator[tuple[float, float]]:
    """Training loss and test accuracy after each of 100 epochs of a linear probe on all columns: binary cross-entropy, AdamW
    at 1e-2 from zero, batches of 250 rows."""
    x, y = torch.from_numpy(split.train_X).float(), torch.from_numpy(split.train_y).float()
    test_x = torch.from_numpy(split.test_X).float()
    weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-2)
    for _ in range(100):
        summed = 0.0
        for rows in torch.from_numpy(draw.permutation(len(y))).split(250):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(x[rows] @ weight + bias, y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            summed += loss.item() * len(rows)
        with torch.no_grad():
            predicted = test_x @ weight + bias > 0
        yield summed, float((predicted.numpy() == split.test_y).mean())


def _named(accuracies: dict[int, float]) -> dict[str, float]:
    return {f"top_{k}": value for k, value in accuracies.items()}


def _error(accuracy: float, rows: int) -> float:
    """Standard error of an accuracy on so many rows; one more right and one more wrong, lest it be zero at 1."""
    p = (accuracy * rows + 1) / (rows + 2)
    return math.sqrt(p * (1 - p) / rows)


def _over(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of all figures, None where one is; the error of a mean for `top_1_error`; and which controls reach `top_1`."""
    means = _mean([{key: value for key, value in score.items() if key != "reached_by"} for score in scores])
    errors = [score["top_1_error"] for score in scores]
    means["top_1_error"] = None if None in errors else math.hypot(*errors) / len(errors)
    near = -math.inf if means["top_1"] is None else means["top_1"] - means["top_1_error"]
    controls = {name: control["top_1"] for name, control in means["controls"].items()}
    means["reached_by"] = [
        name for name, top_1 in controls.items() if None not in (top_1, means["top_1"]) and top_1 >= near
    ]
    return means


def _mean(scores: list[Any]) -> Any:
    if isinstance(scores[0], dict):
        return {key: _mean([score[key] for score in scores]) for key in scores[0]}
    return None if None in scores else sum(scores) / len(scores)
