"""Order-sensitive sparse probing: what latents tell that the words alone, in any order, do not.

Sparse probing (see `probes`) on texts in two classes that have the same bags of words, so that only their order tells the
class. Two readings of a text: its latents' mean over the tokens, and those at its last token. Beside them

    bow          a logistic regression on how often each token is there: 0.5 where classes have the same bags
    lm           one on all D of the model's own activations, read in the same way: what there is to find
    normalised   (accuracy - bow) / (lm - bow), None where lm is no better than bow
    controls     `random` and `lm_neurons` in the dictionary's place; `shuffled`, its probes on labels permuted in training
                 and in testing (in training alone, a latent that tells the class is all right or all wrong by chance)

Tasks of the embedded language: `agent` (is the one that acts human: "the wolf chased the baker ." or the other way round)
and `agreement` (is the subject plural, read before the copula: "the boats near the mast" or "the mast near the boats"), both
behind the opening of a document, of which nothing is read. Further ones come from files: BLiMP's layout (Warstadt et al.,
arXiv 1912.00582; a line is a JSON object with `sentence_good` and `sentence_bad`), and SentEval's (Conneau and Kiela,
arXiv 1803.05449; a line is tr, va or te, the label, and the text, parted by tabs).

Both texts of a pair are in training or both in testing, and so are all pairs that have the same words: parted, a test text
would have its bag of words in training under the other label, and a probe on the bag would be right less often than chance,
which is no control.
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
from .probes import Split, accuracy, ailing, top_k

READINGS = ("mean_pooled", "last_token")


@dataclass
class Task:
    """R texts as token ids, what stands before each (`context`, not read from), their class y [R], and which are for
    training [R] (the others are for testing)."""

    context: list[list[int]]
    texts: list[list[int]]
    y: np.ndarray
    train: np.ndarray

    @classmethod
    def of_pairs(cls, pairs: Iterable[tuple[list[int], list[int], list[int]]], draw: np.random.Generator) -> "Task":
        """From (context, text of the class, text not of it); for training half of them, those of the same words together."""
        context, true, false = (list(column) for column in zip(*pairs, strict=True))
        bags = [tuple(sorted(first + second)) for first, second in zip(true, false, strict=True)]
        number = {bag: i for i, bag in enumerate(dict.fromkeys(bags))}
        train = draw.permutation(len(number))[[number[bag] for bag in bags]] < len(number) / 2
        y = np.repeat([True, False], len(true))
        return cls(context * 2, true + false, y, np.tile(train, 2))


def order_probing(evaluation: Evaluation, *, pairs: int = 512, k: int = 5) -> dict[str, Any]:
    """Test accuracy of probes on k latents, by task and in the mean over tasks, of the dictionary and its controls.

    `pairs` of the embedded language's tasks, and as many texts at most of each file, which is a task by its name. `top_1`
    has probes on a single latent. Raises UserError where there is no task, and for a file that can't be read.
    """
    began = time.monotonic()
    tasks: dict[str, Task] = {}
    pairs = evaluation.rows(pairs)
    if evaluation.is_testbed:
        language = evaluation.stream.text.language  # pyright: ignore[reportAttributeAccessIssue]
        tasks["agent"] = Task.of_pairs(_agents(language, pairs), evaluation.generator("order agent"))
        tasks["agreement"] = Task.of_pairs(_agreements(language, pairs), evaluation.generator("order agreement"))
    tokenizer = evaluation.stream.model.tokenizer
    for path in (expand_path(file, "file") for file in evaluation.files.get("blimp", ())):
        tasks[path.stem] = read_blimp(path, tokenizer, pairs, evaluation.generator(f"order {path.stem}"))
    for path in (expand_path(file, "file") for file in evaluation.files.get("senteval", ())):
        tasks[path.stem] = read_senteval(path, tokenizer, pairs, evaluation.generator(f"order {path.stem}"))
    if not tasks:
        name = evaluation.stream.name
        raise UserError(f"order: {name} has no tasks of its own; give --file blimp=PATH or --file senteval=PATH")
    by_autoencoder: dict[str, dict[str, Any]] = {}
    for name, task in tasks.items():
        for autoencoder, scores in _probe(evaluation, name, task, k).items():
            by_autoencoder.setdefault(autoencoder, {})[name] = scores
    means = {autoencoder: _mean(list(of_tasks.values())) for autoencoder, of_tasks in by_autoencoder.items()}
    return {
        **means.pop("sae"),
        "k": k,
        "tasks": {
            name: by_autoencoder["sae"][name] | {"texts": len(task.y), "test": int((~task.train).sum())}
            for name, task in tasks.items()
        },
        "controls": means,
        "seconds": round(time.monotonic() - began, 2),
    }


def read_blimp(path: Path, tokenizer: Any, most: int, draw: np.random.Generator) -> Task:
    """The first `most` pairs of a file in BLiMP's layout; the good sentences are the class."""
    pairs: list[tuple[list[int], list[int], list[int]]] = []
    keys = ("sentence_good", "sentence_bad")
    for number, line in _lines(path, most):
        try:
            record = json.loads(line)
            good, bad = (_ids(tokenizer, record[key].strip()) for key in keys)
            pairs.append(([], good, bad))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"blimp: {path}:{number} is not allowed; it must be JSON with {' and '.join(keys)}"
            ) from None
    if len(pairs) < 4:
        raise UserError(f"blimp: {path} has {len(pairs)} pairs; at least 4 are needed")
    return Task.of_pairs(pairs, draw)


def read_senteval(path: Path, tokenizer: Any, most: int, draw: np.random.Generator) -> Task:
    """`most` texts for training (tr) and for testing (te) of a file in SentEval's layout, drawn at random; of its two labels
    the first in the alphabet is the class."""
    records: list[list[str]] = []
    for number, line in _lines(path, None):
        record = line.split("\t")
        if len(record) != 3 or not record[2].strip() or record[0] not in ("tr", "va", "te"):
            raise UserError(
                f"senteval: {path}:{number} is not allowed; it must be tr, va or te, a label, a text, by tabs"
            )
        records.append(record)
    labels = sorted({label for _, label, _ in records})
    if len(labels) != 2:
        raise UserError(f"senteval: {path} has {len(labels)} labels; order probing takes 2")
    chosen = [
        [
            records[i]
            for i in draw.permutation([n for n, record in enumerate(records) if record[0] == side])[:most].tolist()
        ]
        for side in ("tr", "te")
    ]
    if any(len({label for _, label, _ in side}) < 2 for side in chosen):
        raise UserError(f"senteval: {path} must have both labels among the texts of tr, and of te")
    train = np.arange(len(chosen[0]) + len(chosen[1])) < len(chosen[0])
    records = chosen[0] + chosen[1]
    y = np.array([label == labels[0] for _, label, _ in records])
    return Task([[]] * len(records), [_ids(tokenizer, text) for _, _, text in records], y, train)


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
    """Each prompt beside the one that has its subject and the noun that disagrees with it the other way round."""
    ids = language.token_id
    plurals = {noun + "s" for nouns in language.nouns for noun in nouns.items}
    for words, plural in language.agreement_prompts(count):
        start = len(words) - words[::-1].index(".")
        text = words[start:]
        # nouns follow "the"; the first one is the subject
        nouns = [index + 1 for index, word in enumerate(text) if word == "the"]
        attractor = next(index for index in nouns if (text[index] in plurals) != plural)
        other = list(text)
        other[nouns[0]], other[attractor] = text[attractor], text[nouns[0]]
        true, false = (text, other) if plural else (other, text)
        yield [ids[w] for w in words[1:start]], [ids[w] for w in true], [ids[w] for w in false]


def _readings(evaluation: Evaluation, task: Task) -> tuple[TextActivations, TextActivations]:
    """The tokens of each text, and the last of each alone. What is longer than a row ends where the row does."""
    stream = evaluation.stream
    bos = [] if stream.text.bos is None else [stream.text.bos]
    wholes = [(bos + c + t)[: stream.positions] for c, t in zip(task.context, task.texts, strict=True)]
    collected = collect(stream, padded(wholes, stream), len(wholes))
    start = torch.tensor([len(bos) + len(context) for context in task.context])
    column = torch.arange(collected.tokens.shape[1])
    text = collected.kept & (column >= start[:, None])
    last = torch.where(text, column, -1).amax(1)
    if bool((last < 0).any()):
        first = int((last < 0).nonzero()[0])
        raise UserError(f"order: text {first} has no token to read in the {stream.positions} of stream.context")

    return collected.only(text), collected.only(text & (column == last[:, None]))


def _probe(evaluation: Evaluation, name: str, task: Task, k: int) -> dict[str, dict[str, Any]]:
    """Scores of every autoencoder, and of the dictionary on permuted labels as `shuffled`, on one task."""
    flat = np.concatenate(task.texts)
    owner = np.repeat(np.arange(len(task.texts)), [len(text) for text in task.texts])
    words, word = np.unique(flat, return_inverse=True)
    bag = np.zeros((len(task.texts), len(words)), np.float32)
    np.add.at(bag, (owner, word), 1)
    bow = accuracy(_split(task, bag))
    results: dict[str, dict[str, Any]] = {}
    readings = dict(zip(READINGS, _readings(evaluation, task), strict=True))
    autoencoders = evaluation.autoencoders(readings["mean_pooled"], mean=False)
    lm = {reading: accuracy(_split(task, texts.pooled(None).cpu().numpy())) for reading, texts in readings.items()}
    for reading, texts in readings.items():
        for autoencoder_name, autoencoder in autoencoders.items():
            latents = texts.pooled(autoencoder).cpu().numpy()
            split, draw = _split(task, latents), evaluation.generator(f"order {name} {reading} shuffled")
            permuted = replace(split.shuffled(draw), test_y=draw.permutation(split.test_y))
            splits = {autoencoder_name: split} | ({"shuffled": permuted} if autoencoder_name == "sae" else {})
            for key, probe_split in splits.items():
                scores = top_k(probe_split, (1, min(k, latents.shape[1])))
                result = results.setdefault(key, {"bow": bow, "lm": lm, "normalised": {}, "top_1": {}, "ailing": None})
                result[reading], result["top_1"][reading] = scores[min(k, latents.shape[1])], scores[1]
                room = lm[reading] - bow
                result["normalised"][reading] = (result[reading] - bow) / room if room > 0 else None
                result["ailing"] = result["ailing"] or ailing(latents)
    return results


def _split(task: Task, X: np.ndarray) -> Split:
    return Split(X[task.train], task.y[task.train], X[~task.train], task.y[~task.train])


def _mean(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Over tasks, of every figure, and of each in a dict of them; what is None in a task is left out of it."""
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
