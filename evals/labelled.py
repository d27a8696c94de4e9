"""Labelled texts for probing: your own .csv or .jsonl file, or one of eight published data sets.

The published sets are those of SAEBench (https://github.com/adamkarvonen/SAEBench, v0.6.0), by the names used there. They
are read from the Parquet files on the Hugging Face hub, never through a loading script. A downloaded copy can be used
instead: "fancyzhx/ag_news?path=FOLDER".

At most `PER_CLASS` texts are taken per class, balanced by gender or rating in the sets that have these columns, and by the
attribute of a file. `paired_sets.py` reads classes together with their attribute.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from ..engine.errors import UserError, near
from ..engine.process import hub_access
from ..engine.storage.path_names import expand_path

PER_CLASS = 2500  # half of the protocol's 4000 rows for training and 1000 for testing; the rest are other classes
#: labels of the embedded language's documents, from easy to hard; nothing is loaded for these
EMBEDDED = ("topic", "tone", "items", "poison", "number", "agent")
_SHUFFLED = 10_000  # size of the shuffle buffer for a published set
_TRAIN = "data/train-*.parquet"
_LICENCE, _LONG = 150, 384  # characters dropped at the start of a source file, and needed after these

#: text, class (None: not used), and the value that is balanced within a class
Example = tuple[str, str | None, Any]
#: the examples that are used, of all examples and the classes wanted
Take = Callable[[Iterable[Example], tuple[str, ...]], list[Example]]


@dataclass(frozen=True)
class Labelled:
    """Texts, their classes, and a name for the results. Raises UserError if their numbers differ."""

    name: str
    texts: list[str]
    labels: list[str]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            counts = f"{len(self.texts)} texts and {len(self.labels)} labels"
            raise UserError(f"sets: {self.name} has {counts}; give one label per text")


@dataclass(frozen=True)
class Published:
    """A data set on the hub. `classes_by_file`: parquet files, and the classes taken from them. `sides`: number of values
    that are balanced within a class."""

    repo: str
    examples: Callable[[dict[str, Any]], Iterable[Example]]
    classes_by_file: dict[str, tuple[str, ...]]
    sides: int = 1


@dataclass(frozen=True)
class Source:
    """A labelled source, parsed: a file with the names of its columns, or a published set; `pairs`: as given, "A/B"."""

    name: str
    file: Path
    published: bool
    columns: tuple[str, str, str | None]  # text, label, attribute
    folder: str | None
    per_class: int
    pairs: tuple[str, ...]


def parsed(source: str) -> Source:
    """Parse NAME?option=value&option=value. Raises UserError for a name or an option that is not allowed."""
    name, _, query = source.partition("?")
    given = parse_qsl(query, keep_blank_values=True)
    options = dict(given)
    file, published = expand_path(name, "set"), name in PUBLISHED
    if not published and file.suffix.lower() not in (".csv", ".jsonl"):
        names = near(name, (*EMBEDDED, *PUBLISHED))
        raise UserError(f"sets: {name} is not allowed; give a .csv or .jsonl file or a set's name; {names}")
    allowed = ("per_class", "path") if published else ("per_class", "text", "label", "attribute", "pair")
    for option in options:
        if option not in allowed:
            raise UserError(f"sets: {source} has no option {option!r}; allowed are {', '.join(allowed)}")
    count = options.get("per_class", str(PER_CLASS))
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"sets: {source} has per_class = {count!r}, which is not allowed; give a number of texts")
    columns = options.get("text", "text"), options.get("label", "label"), options.get("attribute")
    pairs = tuple(value for option, value in given if option == "pair")
    if pairs and columns[2] is None:
        raise UserError(f"sets: {source} has pairs without an attribute; give attribute=COLUMN")
    return Source(name, file, published, columns, options.get("path"), int(count), pairs)


def load_labelled(source: str, draw: np.random.Generator) -> Labelled:
    """Load the texts of `source`, shuffled by `draw`, without empty ones.

    `source` is a file, "reviews.csv" or "reviews.jsonl", with columns `text` and `label`, or others:
    "FILE?text=body&label=stars". Or it is a name of `PUBLISHED`, with "?path=FOLDER" for a copy of its repository.
    "per_class=200" takes fewer texts per class. With "attribute=COLUMN", a file's classes have equally many texts of both
    values, as far as there are enough. Raises UserError for anything else, and for a source that can't be read.
    """
    asked = parsed(source)
    name, published = asked.name, PUBLISHED.get(asked.name)
    if published is None:
        name, examples = asked.file.name, read_file(asked)
        shuffled = (examples[index] for index in draw.permutation(len(examples)))
        classes = {label for _, label, _ in examples if label is not None}
        found = _first(shuffled, classes, asked.per_class, 1 if asked.columns[2] is None else 2)
    else:
        take: Take = lambda examples, classes: _first(examples, classes, asked.per_class, published.sides)
        found = read_hub(name, published, asked.folder, draw, take)
    return Labelled(name, [text for text, _, _ in found], [str(label) for _, label, _ in found])


def read_file(source: Source) -> list[Example]:
    """All examples of a file. Raises UserError if its attribute doesn't have exactly two values."""
    examples = list(_from_file(source.file, *source.columns))
    if source.columns[2] is not None:
        values = sorted({side for _, _, side in examples})
        if len(values) != 2:
            shown = ", ".join(value[:20] for value in values[:5]) + (", ..." if len(values) > 5 else "")
            raise UserError(
                f"sets: {source.file} has {len(values)} values of {source.columns[2]!r} ({shown}); an attribute needs two"
            )
    return examples


def stored_at(source: str) -> Path | None:
    """The file or folder that a source is read from; None for the hub and the embedded language."""
    name, _, query = source.partition("?")
    folder = dict(parse_qsl(query)).get("path")
    if folder is not None:
        return expand_path(folder, "set")
    return None if name in EMBEDDED or name in PUBLISHED else expand_path(name, "set")


def _first(examples: Iterable[Example], classes: Iterable[str], per_class: int, sides: int) -> list[Example]:
    """The first texts of each class, balanced over sides. Reads no more than needed."""
    found: list[Example] = []
    most = -(-per_class // sides)
    open_classes = set(classes)
    counts: Counter[tuple[str, Any]] = Counter()
    for text, label, side in examples:
        if label in open_classes and counts[label, side] < most and text.strip():
            found.append((text, label, side))
            counts[label, side] += 1
            if sum(count == most for (counted_label, _), count in counts.items() if counted_label == label) == sides:
                open_classes.remove(label)
        if not open_classes:
            break
    return found


def _from_file(path: Path, text: str, label: str, attribute: str | None) -> Iterator[Example]:
    columns = (text, label) if attribute is None else (text, label, attribute)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            for number, record in _csv(lines) if path.suffix.lower() == ".csv" else _jsonl(lines):
                for column in columns:
                    if record.get(column) is None:
                        raise UserError(
                            f"sets: {path} line {number} has no {column!r}; it has {', '.join(map(str, record))}"
                        )
                yield str(record[text]), key(record[label]), None if attribute is None else key(record[attribute])
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"sets: {path} can't be read: {' '.join(str(error).split())}") from None


def _csv(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**30)  # texts may be longer than the 128 KiB that are usual
    reader = csv.DictReader(lines)
    for record in reader:
        yield reader.line_num, record


def _jsonl(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is not a JSON object")
            yield number, {key: _without_surrogates(value) for key, value in record.items()}


def _without_surrogates(value: Any) -> Any:
    """Replace halves of surrogate pairs, which no tokenizer accepts."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


def key(value: Any) -> str:
    """A label as text; 1, 1.0 and "1" are equal."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_hub(
    name: str, published: Published, folder: str | None, draw: np.random.Generator, take: Take
) -> list[Example]:
    """The examples that `take` takes, of a published set on the hub or in a copy of its repository."""
    why = hub_access.why_not() if folder is None else None  # before `datasets` reads the offline setting on import
    import datasets

    root = f"hf://datasets/{published.repo}" if folder is None else expand_path(folder, "set")
    found: list[Example] = []
    for files, classes in published.classes_by_file.items():
        try:
            stored = datasets.load_dataset("parquet", data_files=f"{root}/{files}", split="train", streaming=True)
            examples = (example for record in stored for example in published.examples(record) if example[1] in classes)
            found += take(_drawn(examples, draw), classes)
        except Exception as error:
            reason = why or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(
                f"sets: {name} can't be read from {root} ({reason}); download {published.repo} with its folders, "
                f"and give {name}?path=FOLDER"
            ) from error
    labels = {label for _, label, _ in found}
    for files, classes in published.classes_by_file.items():
        for label in classes:
            if label not in labels:
                raise UserError(f"sets: {name} has no text of class {label} in {root}/{files}")
    return found


def _drawn(examples: Iterable[Example], draw: np.random.Generator) -> Iterator[Example]:
    """All rows, shuffled in a buffer of `_SHUFFLED`, because a set may be sorted by class."""
    buffer: list[Example] = []
    for example in examples:
        if len(buffer) < _SHUFFLED:
            buffer.append(example)
            continue
        index = int(draw.integers(_SHUFFLED))
        yield buffer[index]
        buffer[index] = example
    yield from (buffer[index] for index in draw.permutation(len(buffer)))


def _by_suffix(record: dict[str, Any]) -> Iterable[Example]:
    """A source file with the language by its suffix, without its beginning, which is often the licence."""
    code = record["content"]
    if len(code) <= _LICENCE + _LONG:
        return []
    return [(code[_LICENCE:], _SUFFIXES.get(PurePosixPath(record["path"]).suffix), None)]


_SUFFIXES = {
    ".c": "C", ".h": "C", ".py": "Python", ".html": "HTML", ".java": "Java",
    ".php": "PHP", ".php3": "PHP", ".php4": "PHP", ".php5": "PHP", ".phps": "PHP", ".phpt": "PHP",
}  # fmt: skip
_TOPICS = {"0": "World", "1": "Sports", "2": "Business", "3": "Sci/Tech"}
_CATEGORIES = {
    "1": "Toys_and_Games",
    "2": "Cell_Phones_and_Accessories",
    "3": "Industrial_and_Scientific",
    "5": "Musical_Instruments",
    "6": "Electronics",
}
_RATINGS = {"1": "negative", "5": "positive"}
_PROFESSIONS = (
    {"0": "accountant", "1": "architect", "2": "attorney", "6": "dentist", "9": "filmmaker"},
    {"11": "journalist", "13": "nurse", "14": "painter", "18": "photographer", "19": "physician"},
    {"20": "poet", "21": "professor", "22": "psychologist", "25": "surgeon", "26": "teacher"},
)
_LANGUAGES = {"en-fr": "en", "fr-it": "fr", "de-en": "de", "es-fr": "es", "nl-pt": "nl"}
AMAZON, BIOS = "canrager/amazon_reviews_mcauley_1and5", "LabHC/bias_in_bios"
_CODE, _EUROPARL = "codeparrot/github-code", "Helsinki-NLP/europarl"


def in_columns(repo: str, text: str, label: str, classes: dict[str, str], side: str | None = None) -> Published:
    """A set with class ids in the column `label`, balanced over the values of the column `side`."""

    def examples(record: dict[str, Any]) -> Iterable[Example]:
        return [(record[text], classes.get(key(record[label])), None if side is None else record[side])]

    return Published(repo, examples, {_TRAIN: tuple(classes.values())}, 1 if side is None else 2)


#: name -> location, reader and classes
PUBLISHED: dict[str, Published] = {
    **{
        f"{BIOS}_class_set{number}": in_columns(BIOS, "hard_text", "profession", classes, "gender")
        for number, classes in enumerate(_PROFESSIONS, 1)
    },
    AMAZON: in_columns(AMAZON, "text", "category", _CATEGORIES, "rating"),
    f"{AMAZON}_sentiment": in_columns(AMAZON, "text", "rating", _RATINGS),
    _CODE: Published(_CODE, _by_suffix, {_TRAIN: ("C", "Python", "HTML", "Java", "PHP")}),
    "fancyzhx/ag_news": in_columns("fancyzhx/ag_news", "text", "label", _TOPICS),
    _EUROPARL: Published(
        _EUROPARL,
        lambda record: [(text, language, None) for language, text in record["translation"].items()],
        {f"{pair}/train-*.parquet": (language,) for pair, language in _LANGUAGES.items()},
    ),
}
