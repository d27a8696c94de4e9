"""Order probing: sparse probing of classes that differ only in the order of their words.

Sparse probing (see `probes`) on texts of two classes with the same bags of words. A text is represented by its latents' mean
over tokens, or by the latents at its last token. For comparison:

    bow          logistic regression on token counts; 0.5 if the classes have the same bags of words
    lm           logistic regression on all D activations of the model: an estimate of the best possible accuracy
    normalised   (accuracy - bow) / (lm - bow), None if lm is no better than bow
    controls     `random` and `lm_neurons` instead of the dictionary; `shuffled`, with labels permuted in training and test
                 sets (in training only, a latent that separates the classes would be all right or all wrong by chance)

The embedded language has two tasks: `agent` (the agent is human: "the wolf chased the baker ." or the reverse) and
`agreement` (the subject is plural, before the copula: "the boats near the mast" or "the mast near the boats"). Both texts
follow the opening of a document, which is not read. Files add tasks, in BLiMP's layout (Warstadt et al., arXiv 1912.00582;
each line a JSON object with `sentence_good` and `sentence_bad`) or SentEval's (Conneau and Kiela, arXiv 1803.05449; each
line tr, va or te, the label and the text, separated by tabs). Without files, another text has one task: whether two adjacent
words of its held-out rows are exchanged (`words`).

Both texts of a pair, and all pairs with the same words, are on the same side of the train/test split. Otherwise a test text
would have its bag of words in training with the other label, and the bag-of-words probe would score below chance.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine.errors import UserError
from ..engine.storage.path_names import expand_path
from ..engine.testbed.language import Language
from .evaluation import Evaluation, TextActivations, collect, padded
from .intervals import Outcomes, interval, joined
from .pooling import pooled_latents
from .probes import Matrix, Split, accuracy, ailing, top_k_right
from .words import swapped_pairs

READINGS = ("mean_pooled", "last_token")


@dataclass
class Task:
    """R texts as token ids, the `context` before each (not read), their class y [R], and bool `train` [R], false for
    testing."""

    context: list[list[int]]
    texts: list[list[int]]
    y: np.ndarray
    train: np.ndarray
    bag: np.ndarray  # number of the bag of words [R]; texts with one are resampled together

    @classmethod
    def of_pairs(cls, pairs: Iterable[tuple[list[int], list[int], list[int]]], draw: np.random.Generator) -> "Task":
        """From (context, text of the class, other text); half for training, pairs with the same words together."""
        context, true, false = (list(column) for column in zip(*pairs, strict=True))
        bags = [tuple(sorted(first + second)) for first, second in zip(true, false, strict=True)]
        number = {bag: i for i, bag in enumerate(dict.fromkeys(bags))}
        bag = np.array([number[words] for words in bags])
        train = draw.permutation(len(number))[bag] < len(number) / 2
        y = np.repeat([True, False], len(true))
        return cls(context * 2, true + false, y, np.tile(train, 2), np.tile(bag, 2))


def order_probing(evaluation: Evaluation, *, pairs: int = 1024, k: int = 5) -> dict[str, Any]:
    """Measure test accuracy of probes on k latents by task and averaged over tasks, of the dictionary and its controls.

    Uses `pairs` pairs per task of the embedded language, and at most as many texts of each file, which is a task named after
    the file. `top_1` has probes on one latent. Raises UserError for a file that can't be read, and without files for a text
    with too few words to exchange.
    """
    began = time.monotonic()
    tasks: dict[str, Task] = {}
    rows, most, pairs = pairs, max(1, pairs // evaluation.share), evaluation.rows(pairs)
    if evaluation.is_testbed:
        language = evaluation.stream.text.language  # pyright: ignore[reportAttributeAccessIssue]
        tasks["agent"] = Task.of_pairs(_agents(language, pairs), evaluation.generator("order agent"))
        tasks["agreement"] = Task.of_pairs(_agreements(language, pairs), evaluation.generator("order agreement"))
    tokenizer = evaluation.stream.model.tokenizer
    for kind, read in (("blimp", read_blimp), ("senteval", read_senteval)):
        for path in (expand_path(file, "file") for file in evaluation.files.get(kind, ())):
            tasks[path.stem] = read(path, tokenizer, pairs, evaluation.generator(f"order {path.stem}"))
    if not tasks:
        task_pairs = swapped_pairs(evaluation, rows, most)
        tasks["swapped words"] = Task.of_pairs(task_pairs, evaluation.generator("order swapped words"))
    by_autoencoder: dict[str, dict[str, Any]] = {}
    outcomes: dict[str, dict[str, dict[str, Outcomes]]] = {}  # by reading, autoencoder and task
    for name, task in tasks.items():
        for autoencoder, scores in _probe(evaluation, name, task, k, outcomes).items():
            by_autoencoder.setdefault(autoencoder, {})[name] = scores
    means = {autoencoder: _mean(list(by_task.values())) for autoencoder, by_task in by_autoencoder.items()}
    return {
        **means.pop("sae"),
        "k": k,
        "tasks": {
            name: by_autoencoder["sae"][name] | {"texts": len(task.y), "test": int((~task.train).sum())}
            for name, task in tasks.items()
        },
        "controls": means,
        "intervals": {
            reading: interval(
                {name: joined(by_task.values()) for name, by_task in by_name.items()},
                evaluation.generator("order intervals"),
            )
            for reading, by_name in outcomes.items()
        },
        "seconds": round(time.monotonic() - began, 2),
    }


def read_blimp(path: Path, tokenizer: Any, most: int, draw: np.random.Generator) -> Task:
    """Read the first `most` pairs of a file in BLiMP's layout; the good sentences are the class."""
    pairs: list[tuple[list[int], list[int], list[int]]] = []
    keys = ("sentence_good", "sentence_bad")
    for number, line in _lines(path, most):
        try:
            record = json.loads(line)
            good, bad = (_ids(tokenizer, record[key].strip()) for key in keys)
            pairs.append(([], good, bad))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"blimp: {path}:{number} must be a JSON object with {' and '.join(keys)}") from None
    if len(pairs) < 4:
        raise UserError(f"blimp: {path} has {len(pairs)} pairs; at least 4 are needed")
    return Task.of_pairs(pairs, draw)


def read_senteval(path: Path, tokenizer: Any, most: int, draw: np.random.Generator) -> Task:
    """Draw `most` texts for training (tr) and testing (te) from a file in SentEval's layout. The class is the first of the
    two labels in alphabetical order."""
    by_side: dict[str, list[list[str]]] = {"tr": [], "va": [], "te": []}
    for number, line in _lines(path, None):
        side, *record = line.split("\t")
        if len(record) != 2 or not record[1].strip() or side not in by_side:
            raise UserError(f"senteval: {path}:{number} must be tr, va or te, a label and a text, separated by tabs")
        by_side[side].append(record)
    labels = sorted({label for records in by_side.values() for label, _ in records})
    if len(labels) != 2:
        raise UserError(f"senteval: {path} has {len(labels)} labels; order probing needs 2")
    train, test = (
        [by_side[side][i] for i in draw.permutation(len(by_side[side]))[:most].tolist()] for side in ("tr", "te")
    )
    if any(len({label for label, _ in records}) < 2 for records in (train, test)):
        raise UserError(f"senteval: {path} must have both labels among the texts of tr, and of te")
    y = np.array([label == labels[0] for label, _ in train + test])
    texts = [_ids(tokenizer, text) for _, text in train + test]
    return Task([[]] * len(texts), texts, y, np.arange(len(texts)) < len(train), np.arange(len(texts)))


def _lines(path: Path, most: int | None) -> list[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"order: {path} can't be read ({type(error).__name__})") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:most]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _agents(language: Language, count: int) -> Iterable[tuple[list[int], list[int], list[int]]]:
    ids = language.token_id
    for pair in language.order_pairs(count):
        context, *texts = ([ids[word] for word in words] for words in (pair.prefix[1:], *pair.sentences))
        true, false = texts if pair.agent_is_human[0] else texts[::-1]
        yield context, true, false


def _agreements(language: Language, count: int) -> Iterable[tuple[list[int], list[int], list[int]]]:
    """Each prompt and a copy with the subject and the disagreeing noun exchanged."""
    ids = language.token_id
    plurals = {noun + "s" for nouns in language.nouns for noun in nouns.items}
    for words, plural in language.agreement_prompts(count):
        start = len(words) - words[::-1].index(".")
        text = words[start:]
        # nouns follow "the"; the first one is the subject
        nouns = [index + 1 for index, word in enumerate(text) if word == "the"]
        attractor = next(index for index in nouns if (text[index] in plurals) != plural)
        exchanged = list(text)
        exchanged[nouns[0]], exchanged[attractor] = text[attractor], text[nouns[0]]
        true, false = (text, exchanged) if plural else (exchanged, text)
        yield [ids[w] for w in words[1:start]], [ids[w] for w in true], [ids[w] for w in false]


def _readings(evaluation: Evaluation, task: Task) -> tuple[TextActivations, TextActivations]:
    """Activations at all tokens of each text, and at its last token. Texts are cut at the end of the row."""
    stream = evaluation.stream
    bos = [] if stream.text.bos is None else [stream.text.bos]
    ids = [(bos + c + t)[: stream.positions] for c, t in zip(task.context, task.texts, strict=True)]
    collected = collect(stream, padded(ids, stream), len(ids))
    start = torch.tensor([len(bos) + len(context) for context in task.context])
    column = torch.arange(collected.tokens.shape[1])
    text = collected.kept & (column >= start[:, None])
    last = torch.where(text, column, -1).amax(1)
    if bool((last < 0).any()):
        first = int((last < 0).nonzero()[0])
        raise UserError(f"order: text {first} has no token to read among the {stream.positions} of stream.context")
    return collected.only(text), collected.only(text & (column == last[:, None]))


def _probe(
    evaluation: Evaluation, name: str, task: Task, k: int, outcomes: dict[str, dict[str, dict[str, Outcomes]]]
) -> dict[str, dict[str, Any]]:
    """Scores on one task of every autoencoder, and of the dictionary with permuted labels (`shuffled`). Adds the task to
    `outcomes`."""
    flat = np.concatenate(task.texts)
    owner = np.repeat(np.arange(len(task.texts)), [len(text) for text in task.texts])
    words, word = np.unique(flat, return_inverse=True)
    bag = np.zeros((len(task.texts), len(words)), np.float32)
    np.add.at(bag, (owner, word), 1)
    bow = accuracy(_split(task, bag))
    results: dict[str, dict[str, Any]] = {}
    readings = dict(zip(READINGS, _readings(evaluation, task), strict=True))
    autoencoders = evaluation.autoencoders(readings["mean_pooled"], mean=False)
    lm = {reading: accuracy(_split(task, texts.pooled().cpu().numpy())) for reading, texts in readings.items()}
    for reading, texts in readings.items():
        for autoencoder_name, autoencoder in autoencoders.items():
            latents = pooled_latents(texts, autoencoder)
            split, draw = _split(task, latents), evaluation.generator(f"order {name} {reading} shuffled")
            permuted = replace(split.shuffled(draw), test_y=draw.permutation(split.test_y))
            splits = {autoencoder_name: split} | ({"shuffled": permuted} if autoencoder_name == "sae" else {})
            most = min(k, split.train_X.shape[1])
            for key, probe_split in splits.items():
                correct, gap = top_k_right(probe_split, (1, most)), lm[reading] - bow
                scores = {n: float(of_n.mean()) for n, of_n in correct.items()}
                if key != "shuffled":
                    outcomes.setdefault(reading, {}).setdefault(key, {})[name] = _by_bag(task, correct[most])
                result = results.setdefault(key, {"bow": bow, "lm": lm, "normalised": {}, "top_1": {}, "ailing": None})
                result[reading], result["top_1"][reading] = scores[most], scores[1]
                result["normalised"][reading] = (result[reading] - bow) / gap if gap > 0 else None
                result["ailing"] = result["ailing"] or ailing(latents)
    return results


def _by_bag(task: Task, correct: np.ndarray) -> Outcomes:
    """Right answers on the test texts, summed over the texts of each bag of words."""
    bags, number = np.unique(task.bag[~task.train], return_inverse=True)
    gained, counted = (np.bincount(number, values, minlength=len(bags))[:, None] for values in (correct, None))
    return Outcomes(gained, counted.astype(np.float64))


def _split(task: Task, X: Matrix) -> Split:
    return Split(X[task.train], task.y[task.train], X[~task.train], task.y[~task.train])


def _mean(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over tasks of all figures, nested ones too, without the tasks in which a figure is None."""
    means: dict[str, Any] = {}
    for key, value in scores[0].items():
        values = [task_scores[key] for task_scores in scores]
        if isinstance(value, dict):
            means[key] = _mean(values)
        elif key == "ailing":
            means[key] = next((v for v in values if v), None)
        else:
            known = [v for v in values if v is not None]
            means[key] = sum(known) / len(known) if known else None
    return means
