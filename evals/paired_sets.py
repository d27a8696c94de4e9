"""Labelled texts with a binary attribute, for SCR: your own .csv or .jsonl file, or one of the two sets of SAEBench.

A file names the column, "FILE?text=bio&label=profession&attribute=gender". SCR compares two classes at a time. A file with
more than two names them: "pair=nurse/professor", repeated for several. The first class of a pair goes with the first value
of the attribute, in alphabetical order.

The published pairs are those of SAEBench 0.6.0: professions with the gender of the person (bias_in_bios), and products with
the rating of the review (Amazon).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from urllib.parse import parse_qsl

import numpy as np

from ..engine.errors import UserError
from .labelled import AMAZON, BIOS, Example, Published, in_columns, key, parsed, read_file, read_hub

LEAST = 10  # texts of each class with each value; with fewer, a test set has less than two of them

Pair = tuple[str, str]
Cell = tuple[str | None, str]  # a class and a value of the attribute


@dataclass(frozen=True)
class Paired:
    """Texts with the class and the attribute of each. `values`: the attribute's two values, in the order of the pairs."""

    name: str
    texts: list[str]
    labels: list[str]
    attributes: list[str]
    pairs: list[Pair]
    values: Pair


@dataclass(frozen=True)
class _PairedSet:
    """A published set read by its pairs. `values`: ids of the attribute's values, and their names."""

    published: Published
    pairs: list[Pair]
    values: Mapping[str, str]


def has_pairs(source: str) -> bool:
    """Whether a source of labelled texts has a second attribute: a file with `attribute=`, or a set of `PAIRED`."""
    name, _, query = source.partition("?")
    return name in PAIRED or "attribute" in dict(parse_qsl(query))


def load_paired(source: str, draw: np.random.Generator) -> Paired:
    """Load the texts of the pairs of classes of `source`, shuffled by `draw`.

    A class has at most `per_class` texts with the value that it has in the biased training set, and half as many with the
    other, so that biased and balanced training sets can be of one size. Raises UserError for a source that can't be read,
    without pairs, and with fewer than `LEAST` texts of a class with a value.
    """
    asked = parsed(source)
    published = PAIRED.get(asked.name)
    if published is None:
        name, read = asked.file.name, read_file(asked)
        examples = [read[index] for index in draw.permutation(len(read))]
        values = tuple(sorted({side for _, _, side in read}))
        pairs = _pairs_of(name, {str(label) for _, label, _ in read}, asked.pairs, asked.columns[1])
        found = _taken(examples, (), most=_most(pairs, values, asked.per_class))
    else:
        name, pairs, values = asked.name, published.pairs, tuple(published.values.values())
        take = partial(_taken, most=_most(pairs, values, asked.per_class), names=published.values)
        found = read_hub(name, published.published, asked.folder, draw, take)
    first, second = values
    texts, labels, attributes = ([str(example[column]) for example in found] for column in range(3))
    paired = Paired(name, texts, labels, attributes, pairs, (first, second))
    counts = Counter(zip(paired.labels, paired.attributes, strict=True))
    for cell in ((label, value) for pair in pairs for label in pair for value in values):
        if counts[cell] < LEAST:
            raise UserError(
                f"sets: {name} has {counts[cell]} texts of class {cell[0]} with {cell[1]}; SCR needs {LEAST} of each"
            )
    return paired


def _pairs_of(name: str, classes: set[str], given: tuple[str, ...], column: str) -> list[Pair]:
    """The pairs that were given as A/B, or the only two classes."""
    if not given:
        if len(classes) != 2:
            raise UserError(
                f"sets: {name} has {len(classes)} classes of {column!r}; SCR compares two, so give pair=A/B, or several"
            )
        first, second = sorted(classes)
        return [(first, second)]
    pairs = []
    for pair in given:
        cuts = [index for index, letter in enumerate(pair) if letter == "/"]
        fits = [(a, b) for cut in cuts for a, b in [(pair[:cut], pair[cut + 1 :])] if {a, b} <= classes and a != b]
        if len(fits) != 1:
            shown = ", ".join(sorted(classes)[:8])
            raise UserError(f"sets: pair={pair} is not allowed; give two classes of {name} as A/B; it has {shown}")
        pairs += fits
    return pairs


def _most(pairs: Iterable[Pair], values: tuple[str, ...], per_class: int) -> dict[Cell, int]:
    """The number of texts to take of each class and value."""
    most: dict[Cell, int] = {}
    for pair in pairs:
        for index, label in enumerate(pair):
            for number, value in enumerate(values):
                count = per_class if number == index else -(-per_class // 2)
                most[label, value] = max(count, most.get((label, value), 0))
    return most


def _taken(
    examples: Iterable[Example], _: tuple[str, ...], *, most: Mapping[Cell, int], names: Mapping[str, str] | None = None
) -> list[Example]:
    """The first texts of each cell, with the attribute by name. Reads no more than needed."""
    open_cells = dict(most)
    found: list[Example] = []
    for text, label, side in examples:
        value = key(side) if names is None else names.get(key(side), "")
        if open_cells.get((label, value)) and text.strip():
            found.append((text, label, value))
            open_cells[label, value] -= 1
            if not open_cells[label, value]:
                del open_cells[label, value]
                if not open_cells:
                    break
    return found


_PROFESSIONS = {
    "21": "professor", "13": "nurse", "1": "architect", "11": "journalist", "25": "surgeon", "22": "psychologist",
    "2": "attorney", "26": "teacher",
}  # fmt: skip
_PRODUCTS = {
    "24": "Books", "26": "CDs_and_Vinyl", "30": "Software", "6": "Electronics", "18": "Pet_Supplies",
    "11": "Office_Products", "3": "Industrial_and_Scientific", "1": "Toys_and_Games",
}  # fmt: skip


def _in_pairs(classes: Mapping[str, str]) -> list[Pair]:
    """The first class with the second, the third with the fourth, and so on."""
    names = list(classes.values())
    return list(zip(names[::2], names[1::2], strict=True))


#: name -> set, by the names of `labelled.PUBLISHED`
PAIRED = {
    f"{BIOS}_class_set1": _PairedSet(
        in_columns(BIOS, "hard_text", "profession", _PROFESSIONS, "gender"),
        _in_pairs(_PROFESSIONS),
        {"0": "male", "1": "female"},
    ),
    AMAZON: _PairedSet(
        in_columns(AMAZON, "text", "category", _PRODUCTS, "rating"), _in_pairs(_PRODUCTS), {"1": "1", "5": "5"}
    ),
}
