"""Rows of tokens: one document per row (a long one in several), each row with its length and its document's number."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UserError, near
from ..progress import progress_bar
from ..testbed import language as lang

HELD_OUT_EVERY = 20  # of a text, every 20th row is kept for evaluation


@dataclass
class TokenRows:
    """`tokens` [B, T] int64, padded behind; `length` [B]; `document` [B] int64."""

    tokens: Tensor
    length: Tensor
    document: Tensor


class RowSource(Protocol):
    """Rows by number, the same at every call, without end: a finite text begins again.

    `bos` is the token that rows begin with, if any; `held_out_rows` how many rows are held out, None for any number.
    """

    bos: int | None
    held_out_rows: int | None

    def rows(self, start: int, count: int, *, held_out: bool = False) -> TokenRows: ...


class TestbedRows:
    """Documents of the embedded language, made as they are asked for. Evaluation starts where no training ever gets."""

    bos: int | None = lang.BOS
    held_out_rows: int | None = None

    def __init__(self, context: int, seed: int = 0, language: lang.Language | None = None):
        if context > lang.CONTEXT:
            raise UserError(
                f"stream.context: {context} is not allowed; the embedded language has at most {lang.CONTEXT}"
            )
        self.language = language or lang.Language(seed=seed)
        self.context = context

    def rows(self, start: int, count: int, *, held_out: bool = False) -> TokenRows:
        start += lang.HELD_OUT if held_out else 0
        tokens = torch.from_numpy(self.language.tokens(start, count)[0])[:, : self.context]
        return TokenRows(tokens, (tokens != lang.PAD).sum(1), torch.arange(start, start + count))


class TextRows:
    """Documents of a text, cut into rows of `context` tokens that each begin with `<bos>` where the tokenizer has one."""

    def __init__(self, texts: Iterable[str], tokenizer: Any, context: int, enough_tokens: int, name: str):
        self.bos: int | None = tokenizer.bos_token_id
        start = [] if self.bos is None else [self.bos]
        room = context - len(start)
        rows: list[list[int]] = []
        documents: list[int] = []
        seen = 0
        with progress_bar(f"tokenizing {name}", total=enough_tokens, unit="tokens") as bar:
            for number, text in enumerate(texts):
                ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
                for at in range(0, len(ids), room):
                    rows.append(start + ids[at : at + room])
                    documents.append(number)
                seen += len(ids)
                bar.advance(len(ids))
                if seen > enough_tokens * HELD_OUT_EVERY / (HELD_OUT_EVERY - 1):
                    break
        if len(rows) < 2:
            raise UserError(f"data: {name} gives {seen} tokens in {len(rows)} rows; at least 2 rows of text are needed")
        pad = tokenizer.pad_token_id or 0
        self._length = torch.tensor([len(row) for row in rows])
        self._tokens = torch.full((len(rows), context), pad, dtype=torch.int32)
        for number, row in enumerate(rows):
            self._tokens[number, : len(row)] = torch.tensor(row, dtype=torch.int32)
        self._document = torch.tensor(documents)
        kept = torch.zeros(len(rows), dtype=torch.bool)
        kept[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] = True
        kept[-1] |= not bool(kept.any())
        self._held_out, self._train = kept.nonzero().flatten(), (~kept).nonzero().flatten()
        self.held_out_rows: int | None = len(self._held_out)

    def rows(self, start: int, count: int, *, held_out: bool = False) -> TokenRows:
        among = self._held_out if held_out else self._train
        at = among[torch.arange(start, start + count) % len(among)]
        return TokenRows(self._tokens[at].long(), self._length[at], self._document[at])


def open_text(data: str | None, model: str, tokenizer: Any, context: int, enough_tokens: int, seed: int) -> RowSource:
    """`data` as rows: a .txt file (documents parted by blank lines), a .jsonl file or a dataset (their `text` field)."""
    if data is None:
        if model == "testbed":
            return TestbedRows(context, seed)
        raise UserError(f"data: {model} needs text: give a .txt or .jsonl file, or a dataset's name or folder")
    path = Path(data).expanduser()
    if path.is_file():
        texts: Iterable[str] = _jsonl(path) if path.suffix == ".jsonl" else _plain(path)
    else:
        texts = _dataset(data, path)
    return TextRows(texts, tokenizer, context, enough_tokens, data)


def _plain(path: Path) -> Iterator[str]:
    try:
        content = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data: {path} can't be read as UTF-8 text ({error})") from None
    if not content.strip():
        raise UserError(f"data: {path} is empty; it must hold text")
    yield from (part for part in content.split("\n\n") if part.strip())


def _jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f'data: {path} line {number} is not a JSON object with a "text" field (UTF-8)'
                ) from None
            yield text


def _dataset(name: str, path: Path) -> Iterator[str]:
    if (name.startswith((".", "/", "~")) and not path.exists()) or (
        "." in path.name and not path.exists() and "/" not in name
    ):
        here = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        raise UserError(f"data: {name} does not exist{'; ' + near(path.name, here) if here else ''}")
    import datasets

    try:
        found = datasets.load_dataset(str(path) if path.is_dir() else name, split="train", streaming=True)
        first = next(iter(found), None)
    except Exception as error:  # as for models: one line, whatever was raised
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"data: {name!r} can't be loaded ({type(error).__name__}: {reason})") from error
    if first is None or "text" not in first:
        raise UserError(f'data: {name} has no "text" field; it has {", ".join(first or {}) or "no rows"}')
    for row in found:
        yield row["text"]  # pyright: ignore[reportArgumentType, reportCallIssue]
