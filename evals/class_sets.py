"""Texts with classes for TPP, and with a binary attribute for SCR: the mean activation and mean latents of each text.

The embedded language has its own labels. Other texts come from labelled sets (`labelled.py`, `paired_sets.py`). They are run
through the model in parts, and only the means are kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csc_array, vstack

from ..engine.errors import UserError
from ..engine.testbed.lexicon import TONES, TOPICS
from .chosen_sets import sets_read
from .evaluation import Autoencoder, Evaluation, TextActivations, collect
from .labelled import Labelled, load_labelled
from .paired_sets import Paired, load_paired
from .pooling import pooled_latents
from .sparse_probing import CONTEXT, TEXTS_AT_ONCE, check_classes, token_rows

LANGUAGE = "the embedded language"


@dataclass
class Latents:
    """Mean latents f float32 [R, F] over the kept tokens of each text, sparse by columns, and W_dec float64 [F, D].

    If padding counts, `unread` [R, T] is 1 / kept tokens where a position is not kept, and `zeros` [T, F] has the latents of
    a zero activation at each position.
    """

    f: csc_array
    W_dec: np.ndarray
    unread: np.ndarray | None = None
    zeros: np.ndarray | None = None

    def ablated(self, chosen: np.ndarray) -> np.ndarray:
        """What ablation of the `chosen` latents takes from the mean, in units of their rows of W_dec: [R, n]."""
        f = self.f[:, chosen].toarray().astype(np.float64)
        return f if self.unread is None or self.zeros is None else f + self.unread @ self.zeros[:, chosen]


@dataclass
class ClassSet:
    """R texts: mean activations x float64 [R, D], latents by autoencoder, class `codes` [R] of `classes`.

    For SCR, `attribute` bool [R] and `pairs` of classes. The first class of a pair goes with the attribute's first value
    (False). `train`: share of training texts. `context`: tokens of a text at most.
    """

    name: str
    x: np.ndarray
    latents: dict[str, Latents]
    codes: np.ndarray
    classes: list[str]
    train: float
    context: int
    attribute: np.ndarray | None = None
    pairs: Sequence[tuple[int, int]] = ()


def class_sets(evaluation: Evaluation, rows: int, *, paired: bool, padding: bool) -> Iterator[ClassSet]:
    """The evaluation's labelled sets one by one, for SCR each pair of classes; without sets the embedded language.

    Raises UserError for another text without sets, for a set that is given twice, and for too few texts.
    """
    sources = sets_read("scr" if paired else "tpp", evaluation.sets)
    if not sources:
        yield _embedded(evaluation, rows, paired, padding)
        return
    names: set[str] = set()
    for source in sources:
        loaded: Paired | Labelled
        if paired:
            loaded = load_paired(source, evaluation.generator(f"scr {source} texts"))
        else:
            loaded = load_labelled(source, evaluation.generator(f"tpp {source} texts"))
            check_classes(loaded.name, np.array(loaded.labels))
        if loaded.name in names:
            raise UserError(f"sets: {loaded.name} is given twice; give each set its own name")
        names.add(loaded.name)
        if isinstance(loaded, Paired):
            yield from _pairs(evaluation, loaded, padding)
        else:
            classes, codes = np.unique(loaded.labels, return_inverse=True)
            x, latents, context = _of_texts(evaluation, loaded.texts, padding)
            yield ClassSet(loaded.name, x, latents, codes, classes.tolist(), 0.8, context)


def _embedded(evaluation: Evaluation, rows: int, paired: bool, padding: bool) -> ClassSet:
    collected = evaluation.labelled(rows)
    pooled = {
        name: _pooled(collected, autoencoder, padding)
        for name, autoencoder in evaluation.autoencoders(collected).items()
    }
    topic, tone = (collected.row_label(name).numpy() for name in ("topic", "tone"))
    pairs = [(a, a + 1) for a in range(0, len(TOPICS), 2)] if paired else []
    return ClassSet(
        LANGUAGE, collected.pooled().double().cpu().numpy(), pooled, topic, list(TOPICS), 0.5,
        collected.tokens.shape[1], tone == len(TONES) - 1, pairs,
    )  # fmt: skip


def _pairs(evaluation: Evaluation, paired: Paired, padding: bool) -> Iterator[ClassSet]:
    labels, attributes = np.array(paired.labels), np.array(paired.attributes)
    for pair in paired.pairs:
        chosen = np.flatnonzero(np.isin(labels, pair))
        x, latents, context = _of_texts(evaluation, [paired.texts[index] for index in chosen], padding)
        codes, attribute = (labels[chosen] == pair[1]).astype(int), attributes[chosen] == paired.values[1]
        yield ClassSet(paired.name, x, latents, codes, list(pair), 0.8, context, attribute, [(0, 1)])


def _of_texts(
    evaluation: Evaluation, texts: Sequence[str], padding: bool
) -> tuple[np.ndarray, dict[str, Latents], int]:
    """Mean activations and latents of texts, a part of the texts at a time, and the number of tokens read at most."""
    x, parts = list[np.ndarray](), dict[str, list[Latents]]()
    context = min(CONTEXT, evaluation.stream.positions)
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = texts[start : start + TEXTS_AT_ONCE]
        collected = collect(evaluation.stream, token_rows(evaluation.stream, part), len(part))
        x.append(collected.pooled().double().cpu().numpy())
        for name, autoencoder in evaluation.autoencoders(collected).items():
            parts.setdefault(name, []).append(_pooled(collected, autoencoder, padding, context))
    return np.concatenate(x), {name: _joined(latents) for name, latents in parts.items()}, context


def _pooled(collected: TextActivations, autoencoder: Autoencoder, padding: bool, context: int | None = None) -> Latents:
    f = pooled_latents(collected, autoencoder).tocsc()
    W_dec = autoencoder.W_dec.detach().double().cpu().numpy()
    if not padding:
        return Latents(f, W_dec)
    kept = collected.kept.cpu().numpy()
    T = context or kept.shape[1]
    unread = np.ones((len(kept), T))
    unread[:, : kept.shape[1]] -= kept
    unread /= np.maximum(kept.sum(1, keepdims=True), 1)
    pos = torch.arange(T, device=collected.x.device)
    zeros = autoencoder.encode_sparse(collected.x.new_zeros(T, collected.x.shape[1]), pos).to_dense()
    return Latents(f, W_dec, unread, zeros.double().cpu().numpy())


def _joined(parts: Sequence[Latents]) -> Latents:
    first, unread = parts[0], [part.unread for part in parts if part.unread is not None]
    f = vstack([part.f for part in parts], format="csc")
    return Latents(csc_array(f), first.W_dec, np.concatenate(unread) if unread else None, first.zeros)
