"""Rows of tokens, read as they are needed: one document in each, a long one in several."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..testbed import language as lang
from .array_files import StoredArray
from .documents import DocumentList, Documents, open_documents
from .text_fields import Document

HELD_OUT_EVERY = 20  # of a text, every 20th row is kept for evaluation
COUNTS: tuple[str, ...] = ("documents", "empty_documents", "rows", "tokens")
_BATCH = 64  # documents tokenised at once, fewer where they are long
_BATCH_LENGTH = 2**20  # characters


@dataclass
class TokenRows:
    """`tokens` [B, T] int64, padded behind; `length` [B]; `document` [B, T] of each token, -1 on padding; `row` [B].

    Documents and rows are numbered from 0 in the text, rows over training and held-out ones alike. All are int64.
    """

    tokens: Tensor
    length: Tensor
    document: Tensor
    row: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def slice(self, start: int, stop: int) -> "TokenRows":
        tensors = (getattr(self, name)[start:stop] for name in ("tokens", "length", "document", "row"))
        return TokenRows(*tensors)

    def joined(self, other: "TokenRows") -> "TokenRows":
        """These rows and then the others."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("tokens", "length", "document", "row"))
        return TokenRows(*(torch.cat(pair) for pair in pairs))


class RowSource(Protocol):
    """Rows of a text one after the other, from a place that can be gone back to.

    `bos` is the token that rows begin with, if any; `held_out_rows` how many rows `held_out` can give at most, None where
    that is unknown or without end; `epoch` how often the text has begun again. `counts` are of what `next` has read since
    the start, over all epochs: `documents` (those with tokens) and `empty_documents` that have ended, `rows` given and
    `tokens` in them (`<bos>` included, padding not).
    """

    name: str
    bos: int | None
    held_out_rows: int | None
    epoch: int
    counts: dict[str, int]

    def next(self, count: int) -> TokenRows:
        """The next `count` training rows. At its end a text begins again or, if it doesn't repeat, gives what is left."""
        ...

    def held_out(self, count: int, size: int) -> Iterator[TokenRows]:
        """Up to `count` rows that training never sees, `size` at a time, always the first ones. Disturbs nothing."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on exactly here: a few numbers."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class TestbedRows:
    """Documents of the embedded language, made as they are asked for, one in each row; numbers of both are the same.

    Evaluation starts where no training ever gets.
    """

    bos: int | None = lang.BOS
    held_out_rows: int | None = None

    def __init__(self, context: int, seed: int = 0, language: lang.Language | None = None):
        if context > lang.CONTEXT:
            raise UserError(
                f"stream.context: {context} is not allowed; the embedded language has at most {lang.CONTEXT}"
            )
        self.name, self.context, self.epoch = "the embedded language", context, 0
        self.language = language or lang.Language(seed=seed)
        self.counts = dict.fromkeys(COUNTS, 0)

    def next(self, count: int) -> TokenRows:
        rows = self.documents(self.counts["rows"], count)
        self.counts["rows"] += count
        self.counts["documents"] += count
        self.counts["tokens"] += int(rows.length.sum())
        return rows

    def held_out(self, count: int, size: int) -> Iterator[TokenRows]:
        for start in range(0, count, size):
            yield self.documents(lang.HELD_OUT + start, min(size, count - start))

    def documents(self, start: int, count: int) -> TokenRows:
        """Documents by their numbers."""
        tokens = torch.from_numpy(self.language.tokens(start, count)[0])[:, : self.context]
        row = torch.arange(start, start + count)
        is_token = tokens != lang.PAD
        return TokenRows(tokens, is_token.sum(1), torch.where(is_token, row[:, None], -1), row)

    def state(self) -> dict[str, Tensor]:
        return {"counts": torch.tensor([self.counts[name] for name in COUNTS])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.counts.update(zip(COUNTS, state["counts"].tolist(), strict=True))


class TextRows:
    """Documents of a text, cut into rows of up to `context` tokens.

    A row holds one document or a part of it, padded behind. It begins with `<bos>` where the tokenizer has one, unless
    `bos` is False; True demands one. A document of token ids may bring its `<bos>` along. Every 20th row is held out, of
    fewer rows the last. `vocabulary`: how many tokens the model embeds, the tokenizer's unless given; no other token is
    let through. Without a tokenizer documents must be token ids. The state tells whether the text is still the same.
    """

    def __init__(
        self,
        documents: Documents | Iterable[Any],
        tokenizer: Any,
        context: int,
        *,
        bos: bool | None = None,
        repeat: bool = True,
        name: str = "the text",
        vocabulary: int | None = None,
    ):
        self.documents = documents if isinstance(documents, Documents) else DocumentList(documents, name)
        self.name, self.tokenizer, self.context = self.documents.name, tokenizer, context
        self.repeat = repeat
        self.vocabulary: int = len(tokenizer) if vocabulary is None else vocabulary
        self.bos: int | None = None if bos is False else self._tokenizer_token("bos_token_id")
        if bos and self.bos is None:
            has_none = getattr(tokenizer, "bos_token_id", None) is None
            reason = (
                "the tokenizer has no <bos> token"
                if has_none
                else "the model has no embedding of the tokenizer's <bos>"
            )
            raise UserError(f"stream.bos: true is not allowed; {reason}")
        self.pad: int = self._tokenizer_token("pad_token_id") or 0
        self.epoch = 0
        self.counts = dict.fromkeys(COUNTS, 0)
        document_counts = Counter[str]()
        compute_fingerprint = getattr(self.documents, "fingerprint", None)
        self._fingerprint: int | None = None if compute_fingerprint is None else compute_fingerprint()
        first_rows = list(islice(_RowReader(self, document_counts), HELD_OUT_EVERY))
        if len(first_rows) < 2:
            if not document_counts.total():
                raise UserError(f"data: {self.name} is empty; it must hold text")
            token_count = sum(row.length for row in first_rows)
            raise UserError(
                f"data: {self.name} gives {token_count} tokens in {len(first_rows)} rows; at least 2 rows of text are needed"
            )
        self._refuse_unknown(first_rows)
        is_short = len(first_rows) < HELD_OUT_EVERY
        # the number of the first row that is held out
        self._held_out_number = len(first_rows) - 1 if is_short else HELD_OUT_EVERY - 1
        self.held_out_rows: int | None = 1 if is_short else None
        self._reader = _RowReader(self, self.counts)

    def next(self, count: int) -> TokenRows:
        rows: list[_TokenRow] = []
        while len(rows) < count:
            row = next(self._reader, None)
            if row is not None:
                if not self._is_held_out(row):
                    rows.append(row)
                continue
            if self._reader.row <= self._held_out_number:  # no text to begin again with
                raise UserError(f"data: {self.name} has changed: it holds no more than {self._reader.row} rows")
            if not self.repeat:
                break
            self.epoch += 1
            self._reader = _RowReader(self, self.counts)
        self.counts["rows"] += len(rows)
        self.counts["tokens"] += sum(row.length for row in rows)
        return self._as_token_rows(rows)

    def held_out(self, count: int, size: int) -> Iterator[TokenRows]:
        rows = islice(filter(self._is_held_out, _RowReader(self, Counter())), count)
        while chunk := list(islice(rows, size)):
            yield self._as_token_rows(chunk)

    def _tokenizer_token(self, name: str) -> int | None:
        """One of the tokenizer's own tokens, if the model embeds it: transformer_lens adds some that no model knows, or that
        stand for unknown words."""
        token_id, token_name = getattr(self.tokenizer, name, None), name.removesuffix("_id")
        if token_id is None or not 0 <= token_id < self.vocabulary:
            return None
        is_unknown = token_id == getattr(self.tokenizer, "unk_token_id", None)
        is_same_token = getattr(self.tokenizer, token_name, None) == getattr(self.tokenizer, "unk_token", None)
        return None if is_unknown and not is_same_token else token_id

    def _refuse_unknown(self, rows: "list[_TokenRow]") -> None:
        """Refuse a text of which the tokenizer knows no word."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        tokens = np.concatenate([row.tokens[: row.length] for row in rows])
        tokens = tokens if self.bos in (None, unknown) else tokens[tokens != self.bos]
        if unknown is not None and len(tokens) and bool((tokens == unknown).all()):
            raise UserError(f"data: the model's tokenizer knows no word of {self.name}; all of its tokens are unknown")

    def _is_held_out(self, row: "_TokenRow") -> bool:
        return row.number % HELD_OUT_EVERY == self._held_out_number

    def _as_token_rows(self, rows: "list[_TokenRow]") -> TokenRows:
        tokens = np.array([row.tokens for row in rows], np.int64).reshape(-1, self.context)
        document = np.array([row.document for row in rows], np.int64).reshape(-1, self.context)
        length, number = np.array([(row.length, row.number) for row in rows], np.int64).reshape(-1, 2).T.copy()
        return TokenRows(*map(torch.from_numpy, (tokens, length, document, number)))

    def state(self) -> dict[str, Tensor]:
        place = (self._reader.document, self._reader.used, self._reader.row, self.epoch)
        state = {"place": torch.tensor(place), "counts": torch.tensor([self.counts[name] for name in COUNTS])}
        return state if self._fingerprint is None else state | {"fingerprint": torch.tensor([self._fingerprint])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self._fingerprint is not None and int(state.get("fingerprint", [self._fingerprint])[0]) != self._fingerprint:
            raise UserError(f"data: {self.name} has changed: it is not the text that was read before the stop")
        document, used, row, self.epoch = state["place"].tolist()
        self.counts.update(zip(COUNTS, state["counts"].tolist(), strict=True))
        self._reader = _RowReader(self, self.counts, document, used, row)


@dataclass
class _TokenRow:
    """`tokens` [T] and `document` [T], both int64."""

    tokens: np.ndarray
    document: np.ndarray
    length: int
    number: int


class _RowReader:
    """Rows of a text from a place on: the next is number `row` and goes on after `used` tokens of document `document`.

    Between two rows these three numbers are all there is to know. `counts` is told of documents when they have ended.
    """

    def __init__(self, text: TextRows, counts: dict[str, int], document: int = 0, used: int = 0, row: int = 0):
        self.text, self.counts = text, counts
        self.document, self.used, self.row = document, used, row
        self._contents = self._tokenised_documents()
        self._ids: np.ndarray | StoredArray | None = None  # all of document number `document`, once it is needed

    def __iter__(self) -> "_RowReader":
        return self

    def __next__(self) -> _TokenRow:
        text = self.text
        ids = self._current_ids()
        if ids is None:
            raise StopIteration
        tokens, document = np.full(text.context, text.pad), np.full(text.context, -1)
        length = 0
        if text.bos is not None:
            tokens[0] = text.bos
            length = 1
        piece = ids[self.used : self.used + text.context - length]
        length += len(piece)
        tokens[length - len(piece) : length] = self._checked_ids(piece)
        document[:length] = self.document
        self.used += len(piece)
        if self.used == len(ids):
            self._end_document("documents")
        self.row += 1
        return _TokenRow(tokens, document, length, self.row - 1)

    def _current_ids(self) -> np.ndarray | StoredArray | None:
        """The tokens of document number `document`, empty ones passed over; None at the text's end."""
        while self._ids is None:
            self._ids = next(self._contents, None)
            if self.used and (self._ids is None or len(self._ids) <= self.used):  # only where a state has been loaded
                raise UserError(
                    f"data: {self.text.name} has changed: document {self.document} had more than {self.used} tokens"
                )
            if self._ids is None:
                return None
            if not len(self._ids):
                self._end_document("empty_documents")
        return self._ids

    def _end_document(self, kind: str) -> None:
        self.counts[kind] += 1
        self.document, self.used, self._ids = self.document + 1, 0, None

    def _checked_ids(self, piece: np.ndarray) -> np.ndarray:
        wrong_ids = piece[(piece < 0) | (piece >= self.text.vocabulary)]
        if len(wrong_ids):
            raise UserError(
                f"data: {self.text.name} document {self.document} holds token {wrong_ids[0]}, which is not allowed; "
                f"the model has 0 to {self.text.vocabulary - 1}"
            )
        return piece

    def _tokenised_documents(self) -> Iterator[np.ndarray | StoredArray]:
        """Token ids [n] of each document from number `document` on, without the `<bos>` that one may begin with."""
        documents = self.text.documents.read(self.document)
        while batch := _next_documents(documents):
            texts = [_without_surrogates(document) for document in batch if isinstance(document, str)]
            ids_of_texts = iter(())
            if any(texts) and self.text.tokenizer is None:
                raise UserError(
                    f"data: {self.text.name} holds text, and the model has no tokenizer; give token ids (a .npy file, or "
                    "a column tokens or input_ids)"
                )
            if texts:
                tokenizer = self.text.tokenizer or _no_tokens
                ids_of_texts = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
            for document in batch:
                ids = np.asarray(next(ids_of_texts), np.int64) if isinstance(document, str) else document
                if len(ids) and ids[0:1][0] == self.text.bos:
                    ids = ids.behind(1) if isinstance(ids, StoredArray) else ids[1:]
                yield ids


def open_text(
    data: str | None,
    model: str,
    tokenizer: Any,
    context: int,
    *,
    seed: int,
    bos: bool | None = None,
    text_field: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    repeat: bool = True,
    vocabulary: int | None = None,
) -> RowSource:
    """`data` as rows of `context` tokens; without it, for `testbed`, documents of the embedded language of that `seed`.

    `data` is a file, a folder or a dataset's name, of which `text_field` is read (`documents.open_documents`).
    `vocabulary`: how many tokens the model embeds.
    """
    if data is not None:
        documents = open_documents(data, text_field, split=split, subset=subset)
        return TextRows(documents, tokenizer, context, bos=bos, repeat=repeat, vocabulary=vocabulary)
    if model != "testbed":
        raise UserError(
            f"data: {model} needs text: give a .txt, .jsonl, .json, .csv, .tsv, .parquet or .npy file, or a dataset's name "
            "or folder"
        )
    for name, value in (("text_field", text_field), ("split", split), ("subset", subset)):
        if value not in (None, "text"):
            raise UserError(f"stream.{name}: {value} is not allowed without data; the embedded language has no {name}s")
    if bos is False:
        raise UserError(
            "stream.bos: false is not allowed without data; documents of the embedded language have a <bos>"
        )
    return TestbedRows(context, seed)


def _next_documents(documents: Iterator[Document]) -> list[Document]:
    batch: list[Document] = []
    length = 0
    while len(batch) < _BATCH and length < _BATCH_LENGTH and (document := next(documents, None)) is not None:
        batch.append(document)
        length += len(document)
    return batch


def _no_tokens(texts: list[str], **_: Any) -> dict[str, Any]:
    """Of empty documents."""
    return {"input_ids": [[] for _ in texts]}


def _without_surrogates(text: str) -> str:
    """Without halves of surrogate pairs, which JSON may hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
