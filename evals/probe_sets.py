"""The labelled texts of the package sae-probes (https://github.com/sae-probes/sae-probes), read without importing it.

The package imports libraries for models, dictionaries and boosted trees. Only its data files are used here, so

    pip install --no-deps sae-probes

is enough. Its folder data/cleaned_data has a file NUMBER_NAME.csv.zst per data set, with columns `prompt` and `target`. Of
the 155 files of version 0.4.2, the 113 with two classes are data sets of the paper (arXiv 2502.16681). The table beside the
folder says which these are.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

import numpy as np

from ..engine.errors import UserError, near, shown
from ..engine.storage.files import digest_of_folder
from ..engine.storage.path_names import expand_path
from .labelled import Labelled

#: short texts on different subjects; the baseline with smollm2 is from 0.68 to 1.00 on three of them (docs/evals.md)
QUICK = (
    "24_headline_isiran", "96_spam_is", "155_athlete_sport_basketball", "125_world_country_Italy", "95_toxic_is",
    "130_temp_cat_Frequency", "134_context_type_Belief_states", "41_truthqa_tf", "129_arith_mc_A",
)  # fmt: skip
GROUPS = ("quick", "all")
INSTALL = "pip install --no-deps sae-probes"
LEAST = 200  # texts of a set: 100 for testing, and as many for training
_NAME = re.compile(r"\d+_[^/\\]+")
_OPTIONS = ("texts", "path")
_TABLE, _BINARY = "probing_datasets_MASTER.csv.zst", "Binary Classification"


class ProbeSet(NamedTuple):
    """A data set, its file, and the number of texts to read (None: all)."""

    name: str
    file: Path
    texts: int | None


def is_probe_set(source: str) -> bool:
    """Whether a `--set` names data sets of sae-probes: NUMBER_NAME, quick or all, with options after a "?"."""
    name = source.partition("?")[0]
    if name.lower().endswith((".csv", ".jsonl")):
        return False
    return name in GROUPS or _NAME.fullmatch(name) is not None


def why_not_there(sources: Sequence[str]) -> str | None:
    """Why the data of these sources can't be read; None if all of it is there."""
    try:
        probe_sets(sources)
    except UserError as error:
        return str(error)
    return None


def probe_sets(sources: Sequence[str]) -> list[ProbeSet]:
    """The data sets that the sources name (none: quick), each once.

    "24_headline_isiran?texts=600" reads 600 texts, "all?path=FOLDER" an unpacked copy of the package. Raises UserError for
    an unknown name or option, or if the package is missing.
    """
    found: dict[str, ProbeSet] = {}
    for source in sources or GROUPS[:1]:
        name, options = _parsed(source)
        files = _files(_folder(options.get("path")))
        if name not in (*GROUPS, *files):
            raise UserError(
                f"--set: {shown(name)} is not allowed; it is no data set of sae-probes; {near(name, files)}"
            )
        texts = None if "texts" not in options else int(options["texts"])
        chosen = {"all": list(files), "quick": [known for known in QUICK if known in files]}.get(name, [name])
        for known in chosen:
            if known in found and (found[known].texts, found[known].file) != (texts, files[known]):
                raise UserError(f"--set: {known} is given twice, with other options; give each set once")
            found[known] = ProbeSet(known, files[known], texts)
    if not found:
        raise UserError(f"--set: quick is not allowed; the folder has none of {', '.join(QUICK)}")
    return list(found.values())


def source_digests(sources: Sequence[str]) -> dict[str, str | None]:
    """What the sources are: the package's version, or the digest of a `path`. None if it is not there."""
    digests: dict[str, str | None] = {}
    for source in sources or GROUPS[:1]:
        path = _parsed(source)[1].get("path")
        if path is None:
            digests[source] = _version()
        else:
            folder = expand_path(path, "--set")
            digests[source] = digest_of_folder(folder) if folder.is_dir() else None
    return digests


def load(probe_set: ProbeSet, draw: np.random.Generator) -> Labelled:
    """Texts and labels in the file's order; with a limit, equally many of each class, drawn by `draw`.

    Raises UserError for a file that can't be read, without the two columns or with other than two classes, and for fewer
    than `LEAST` texts.
    """
    where = f"--set: {probe_set.name}"
    try:
        records = [(record["prompt"], record["target"]) for record in _lines(probe_set.file)]
    except KeyError as error:
        raise UserError(f"{where}: {probe_set.file} has no column {error}; it needs prompt and target") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{where}: {probe_set.file} can't be read: {' '.join(str(error).split())}") from None
    labels = np.array([target for _, target in records])
    classes = np.unique(labels)
    if len(classes) != 2:
        raise UserError(f"{where}: {probe_set.file} has {len(classes)} classes; it must have two")
    kept = np.arange(len(records))
    if probe_set.texts is not None and probe_set.texts < len(records):
        of_class = [np.flatnonzero(labels == label) for label in classes]
        drawn = [draw.permutation(rows)[: probe_set.texts // 2] for rows in of_class]
        kept = np.sort(np.concatenate(drawn))
    if len(kept) < LEAST:
        raise UserError(f"{where}: {len(kept)} texts are too few; at least {LEAST} are needed")
    return Labelled(probe_set.name, [records[row][0] for row in kept], [str(labels[row]) for row in kept])


def _parsed(source: str) -> tuple[str, dict[str, str]]:
    name, _, query = source.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for option, value in options.items():
        if option not in _OPTIONS:
            raise UserError(f"--set: {shown(source)} has no option {option!r}; allowed are {', '.join(_OPTIONS)}")
        if option == "texts" and (not value.isdecimal() or int(value) < LEAST):
            raise UserError(f"--set: texts = {shown(value)} is not allowed; it must be a number of at least {LEAST}")
    return name, options


def _folder(path: str | None) -> Path:
    """The folder of data files, in the installed package or under `path`."""
    if path is not None:
        root = expand_path(path, "--set")
        places = [root, root / "cleaned_data", root / "data" / "cleaned_data", root / "sae_probes/data/cleaned_data"]
    else:
        spec = find_spec("sae_probes")  # imports nothing
        places = [Path(place) / "data" / "cleaned_data" for place in (spec and spec.submodule_search_locations) or ()]
    folder = next((place for place in places if _files(place)), None)
    if folder is None:
        if path is None:
            raise UserError(
                f"its data is not installed; {INSTALL}, or name a copy of the package, --set quick?path=FOLDER"
            )
        raise UserError(f"--set: path = {shown(path)} is not allowed; it holds no data of sae-probes ({INSTALL})")
    return folder


def _files(folder: Path) -> dict[str, Path]:
    """Files by name of the data set, in the order of their numbers. If the folder's table is there, only those with two
    classes."""
    found = {}
    for file in folder.glob("*_*.csv*") if folder.is_dir() else ():
        name, _, ending = file.name.partition(".csv")
        if ending in ("", ".zst") and _NAME.fullmatch(name):
            found[name] = file
    if found and (table := folder.parent / _TABLE).is_file():
        of_kind = {line["Dataset save name"]: line["Data type"] for line in _lines(table)}
        found = {name: file for name, file in found.items() if of_kind.get(f"cleaned_data/{name}.csv") == _BINARY}
    return dict(sorted(found.items(), key=lambda item: (int(item[0].partition("_")[0]), item[0])))


def _lines(file: Path) -> list[dict[str, str]]:
    csv.field_size_limit(2**30)
    with _opened(file) as lines:
        return list(csv.DictReader(lines))


@contextmanager
def _opened(file: Path) -> Iterator[Iterable[str]]:
    if file.suffix == ".zst":
        import pyarrow

        stream = io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))  # type: ignore[arg-type]
    else:
        stream = file.open("rb")
    with io.TextIOWrapper(stream, "utf-8", newline="") as lines:
        yield lines


def _version() -> str | None:
    try:
        return f"sae-probes {version('sae-probes')}"
    except PackageNotFoundError:
        return None
