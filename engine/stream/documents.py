"""Open a text as numbered documents, which are read when needed. A document is text or token ids."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..errors import UserError, near
from ..process import hub_access
from ..storage.path_names import expand_path
from .array_files import fingerprint
from .text_fields import Document, TextField, document
from .text_files import READERS, Delimited, TextFile, TextTooShort, kind_of, open_file, reading

IN_HAND = "documents given in Python"  # value of `stream.data` for documents in memory
LOOKED_AT = 20  # documents in memory that go into their fingerprint
_SAVED = ("state.json", "dataset_dict.json")  # files that `datasets` writes with save_to_disk
_BUILDERS = ("text", "json", "csv", "parquet", "arrow")  # builders of `datasets` for files of these kinds
#: settings of such builders, with the values for which our own readers give the same documents
_SETTINGS = {"sep": (",", "\t"), "delimiter": (None,), "header": ("infer",), "names": (None,), "column_names": (None,),
             "skiprows": (None,), "quotechar": ('"',), "quoting": (0,), "escapechar": (None,), "comment": (None,),
             "encoding": (None, "utf-8"), "field": (None,), "features": (None,)}  # fmt: skip


@runtime_checkable
class Documents(Protocol):
    """Numbered documents, the same at every call, with a `name` for messages.

    `read(start)` yields the documents from number `start` on, and raises `TextTooShort`, a UserError, if there are
    fewer. An optional `fingerprint()` returns a number that differs once the documents have changed.
    """

    name: str

    def read(self, start: int = 0) -> Iterator[Document]: ...


def check_data(data: str) -> Path:
    """The path of a text, which may also be a dataset's name. Raises UserError for a missing file."""
    if data == IN_HAND:
        raise UserError(f"data: the {IN_HAND} are not kept with a run; give them again, or a file of them")
    path = expand_path(data, "stream.data")
    if not path.exists():
        looks_local = data.startswith((".", "/", "~")) or kind_of(path) in READERS
        if looks_local or ("." in path.name and "/" not in data):
            file_names = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
            raise UserError(f"data: {data} does not exist{'; ' + near(path.name, file_names) if file_names else ''}")
    return path


def open_documents(
    data: str, text_field: str | None = None, *, split: str | None = None, subset: str | None = None
) -> Documents:
    """Open a file (see `text_files.READERS`), a folder of files or of a saved dataset, or a dataset by its name.

    `text_field` is the field with the text; by default `text`, otherwise `tokens` or `input_ids`. `split` (by default
    `train`) and `subset` (the dataset's configuration) are for folders and names. Raises UserError for anything else.
    """
    field, path = TextField(text_field), check_data(data)
    if not path.exists():
        return _of_hub(data, field, split, subset)
    if path.is_dir():
        return _of_folder(data, path, field, split, subset)
    if not path.is_file():
        raise UserError(f"data: {data} is not allowed; it is neither a file nor a folder")
    for name, value in (("split", split), ("subset", subset)):
        if value is not None:
            raise UserError(f"stream.{name}: {value} is not allowed; {data} is a file, which has no {name}s")
    return DocumentFiles(data, [open_file(path, field)], [path])


class DocumentList:
    """Documents in memory: strings, token ids, or dicts with a field of either, in an iterable that can be read
    repeatedly, or from a function without arguments that returns one, such as a generator function."""

    def __init__(
        self, documents: Iterable[Any] | Callable[[], Iterable[Any]], name: str, text_field: str | None = None
    ):
        self.documents, self.name, self.field = documents, name, TextField(text_field)
        if not callable(documents) and iter(documents) is documents:
            raise UserError(
                f"documents: a {type(documents).__name__} is not allowed, since it can be read only once, but held-out "
                "rows, a second epoch and a resumed run read it again; give a list, or the function that makes it"
            )

    def _all(self) -> Iterator[Any]:
        return iter(self.documents() if callable(self.documents) else self.documents)

    def read(self, start: int = 0) -> Iterator[Document]:
        documents = self._all()
        skipped = sum(1 for _ in islice(documents, start))
        if skipped < start:
            raise TextTooShort(self.name, start, skipped)
        for number, content in enumerate(documents, start):
            place = f"{self.name} document {number}"
            yield self.field.document(content, place) if isinstance(content, Mapping) else document(content, place)

    def fingerprint(self) -> int:
        return fingerprint(text="\0".join(str(content) for content in islice(self._all(), LOOKED_AT)))


class DocumentFiles:
    """The documents of several files, one after the other."""

    def __init__(self, name: str, files: list[TextFile], paths: list[Path]):
        self.name, self.files, self.paths = name, files, paths

    def read(self, start: int = 0) -> Iterator[Document]:
        to_skip = start
        for file in self.files:
            try:
                yield from file.read(to_skip)
                to_skip = 0
            except TextTooShort as shorter:
                to_skip -= shorter.document_count
        if to_skip:
            raise TextTooShort(self.name, start, start - to_skip)

    def fingerprint(self) -> int:
        with reading(self.name):
            return fingerprint(*self.paths)


class StreamedDocuments:
    """Records streamed by `datasets`, from a hub or from files that only it can read."""

    def __init__(self, name: str, records: Any, field: TextField, origin: str):
        self.name, self.field, self._records, self._origin = name, field, records, origin
        first_record = next(iter(records), None)
        if first_record is None:
            raise UserError(f"data: {name} is empty; it must hold text")
        self.column = field.column(first_record, name)

    def read(self, start: int = 0) -> Iterator[Document]:
        with reading(self.name):
            records = iter(self._records.skip(start - 1) if start else self._records)
            if start and next(records, None) is None:
                raise TextTooShort(self.name, start, 0)
            for number, record in enumerate(records, start):
                place = f"{self.name} document {number}"
                if self.field.name in (None, self.column):
                    yield document(record.get(self.column), f"{place}, column {self.column},")
                else:
                    yield self.field.document(record, place)

    def fingerprint(self) -> int:
        return fingerprint(text=self._origin)


def _of_folder(data: str, path: Path, field: TextField, split: str | None, subset: str | None) -> Documents:
    """Open a dataset saved with `save_to_disk`, or the files of a folder that belong to a split and subset."""
    if any((path / name).is_file() for name in _SAVED):
        if subset is not None:
            raise UserError(f"stream.subset: {subset} is not allowed; {data} is a saved dataset, which has none")
        return _saved(data, path, field, split)
    with reading(data, "can't be loaded"):
        builder = _builder(str(path), data, subset)
        files_by_split = _files_by_split(builder)
        root = path.absolute()
        for file in chain.from_iterable(files_by_split.values()):
            if not Path(file).absolute().is_relative_to(root) or ".." in Path(file).parts:
                raise UserError(f"data: {data} is not allowed; its README names {file}, which lies outside of it")
        if not files_by_split:
            raise UserError(f"data: {data} holds no files of text")
        split = _split(data, split, list(files_by_split))
        files = files_by_split[split]
        kind = str(getattr(builder, "name", ""))
        if kind not in _BUILDERS:
            raise UserError(f"data: {data} holds files of {kind}, which are not read as text")
        config = builder.config
        has_default_settings = all(getattr(config, name, values[0]) in values for name, values in _SETTINGS.items())
        if not has_default_settings or any(kind_of(Path(file)) not in READERS for file in files):
            return StreamedDocuments(data, builder.as_streaming_dataset(split=split), field, "\0".join(files))
    paths = [Path(file) for file in files]
    readers = [Delimited(path, field, config.sep) if kind == "csv" else open_file(path, field) for path in paths]
    return DocumentFiles(data, readers, paths)


def _files_by_split(builder: Any) -> dict[str, list[str]]:
    return {str(name): [str(file) for file in files] for name, files in (builder.config.data_files or {}).items()}


def _saved(data: str, path: Path, field: TextField, split: str | None) -> DocumentFiles:
    splits: list[str] = []
    if (path / "dataset_dict.json").is_file():
        splits = [str(name) for name in _json(path / "dataset_dict.json", "splits")]
        path = path / _file_name(_split(data, split, splits), data)
    elif split is not None:
        raise UserError(f"stream.split: {split} is not allowed; {data} is a saved dataset without splits")
    files = [path / _file_name(str(file["filename"]), data) for file in _json(path / "state.json", "_data_files")]
    return DocumentFiles(data, [READERS[".arrow"](file, field) for file in files], files)


def _json(path: Path, key: str) -> list[Any]:
    with reading(str(path)):
        value = json.loads(path.read_text())[key]
        if not isinstance(value, list):
            raise ValueError(f"{key} is not a list")
        return value


def _file_name(name: str, data: str) -> str:
    """Check that a name is a plain file name, so that it can't lead outside of the folder."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"data: {data} is not allowed; it names {name[:60]}, which lies outside of it")
    return name


def _of_hub(data: str, field: TextField, split: str | None, subset: str | None) -> StreamedDocuments:
    is_here = hub_access.why_not() is None  # before importing `datasets`, which reads the offline settings once
    with reading(data, "can't be loaded", is_here):
        builder = _builder(data, data, subset)
        files = [*chain.from_iterable(_files_by_split(builder).values())]
        if local_file := next((file for file in files if "://" not in file), None):
            raise UserError(f"data: {data} is not allowed; it names {local_file}, a local file")
        splits = builder.as_streaming_dataset()
        name = _split(data, split, [str(name) for name in splits])
        return StreamedDocuments(data, splits[name], field, "\0".join([name, *files]))


def _builder(path: str, data: str, subset: str | None) -> Any:
    """The builder with which `datasets` reads a folder or a name. Code that comes with a dataset is never run."""
    import datasets

    def subsets() -> list[str]:
        return [str(name) for name in datasets.get_dataset_config_names(path)]

    if subset is not None and subset not in subsets():
        raise UserError(f"stream.subset: {subset} is not allowed; {data} has {', '.join(subsets()[:20])}")
    try:
        return datasets.load_dataset_builder(path, subset)
    except ValueError as error:
        if subset is not None or "onfig name is missing" not in str(error):
            raise
        raise UserError(f"stream.subset: needed for {data}; it must be one of {', '.join(subsets()[:20])}") from None


def _split(data: str, split: str | None, split_names: list[str]) -> str:
    name = split or "train"
    if name not in split_names:
        reason = f"{split} is not allowed" if split is not None else "needed, since there is no train"
        raise UserError(f"stream.split: {reason}; {data} has {', '.join(split_names[:20]) or 'none'}")
    return name
