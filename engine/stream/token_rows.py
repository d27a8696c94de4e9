"""Rows of tokens, read when needed. A row holds one document or, if it is long, a part of it."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import StreamConfig
from ..errors import UserError
from ..testbed import language as lang
from .array_files import StoredArray
from .documents import DocumentList, Documents, open_documents
from .text_fields import Document

HELD_OUT_EVERY = 20  # one row in this many is held out for evaluation
COUNTS: tuple[str, ...] = ("documents", "empty_documents", "rows", "tokens")
_BATCH, _BATCH_LENGTH = 64, 2**20  # documents, and characters, to tokenise at once


@dataclass
class TokenRows:
    """B rows of up to T tokens, as int64 tensors.

    `tokens` [B, T] are padded at the end, and `length` [B] is without padding. `document` [B, T] is the number of each
    token's document in the text, -1 for padding. `row` [B] numbers training and held-out rows together."""

    tokens: Tensor
    length: Tensor
    document: Tensor
    row: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def slice(self, start: int, stop: int) -> "TokenRows":
        return TokenRows(*(value[start:stop] for value in vars(self).values()))

    def joined(self, other: "TokenRows") -> "TokenRows":
        """These rows followed by the others."""
        return TokenRows(*map(torch.cat, zip(vars(self).values(), vars(other).values(), strict=True)))


class TestbedRows:
    """Documents of the embedded language. Row n is document n, and training never reaches held-out rows."""

    bos: int | None = lang.BOS

    def __init__(self, context: int, seed: int = 0, language: lang.Language | None = None):
        if context > lang.CONTEXT:
            limit = f"the embedded language has at most {lang.CONTEXT}"
            raise UserError(f"stream.context: {context} is not allowed; {limit}")
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
        """`count` documents from number `start` on."""
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

    A row holds one document or a part of it and is padded at the end. It begins with `<bos>` if the tokenizer has one
    and `bos` is not False; with True, a tokenizer without one is an error. A document of token ids may already begin
    with `<bos>`. Every 20th row is held out, or the last one if there are fewer than 20. Token ids must be below
    `vocabulary`, by default the tokenizer's. Without a tokenizer, documents must be token ids.
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
            reason = "the tokenizer has no <bos> token"
            if getattr(tokenizer, "bos_token_id", None) is not None:
                reason = "the model has no embedding for the tokenizer's <bos>"
            raise UserError(f"stream.bos: true is not allowed; {reason}")
        self.pad: int = self._tokenizer_token("pad_token_id") or 0
        self.epoch = 0
        self.counts = dict.fromkeys(COUNTS, 0)
        document_counts = Counter[str]()
        self._fingerprint: int | None = getattr(self.documents, "fingerprint", lambda: None)()
        first_rows = list(islice(_RowReader(self, document_counts), HELD_OUT_EVERY))
        if len(first_rows) < 2:
            if not document_counts.total():
                raise UserError(f"data: {self.name} is empty; it must hold text")
            token_count = sum(len(row.tokens) for row in first_rows)
            size = f"{token_count} tokens in {len(first_rows)} rows"
            raise UserError(f"data: {self.name} gives {size}; at least 2 rows of text are needed")
        self._refuse_unknown(np.concatenate([row.tokens for row in first_rows]))
        self._first_held_out = len(first_rows) - 1  # row number
        self._start_reading()

    def _start_reading(self, document: int = 0, used: int = 0, row: int = 0) -> None:
        self._reader = _RowReader(self, self.counts, document, used, row)
        self._rows = iter(self._reader)

    def next(self, count: int) -> TokenRows:
        rows: list[_TokenRow] = []
        while len(rows) < count:
            row = next(self._rows, None)
            if row is not None:
                if not self._is_held_out(row):
                    rows.append(row)
                continue
            if self._reader.row <= self._first_held_out:  # no training rows are left to start again with
                raise UserError(f"data: {self.name} has changed: it holds no more than {self._reader.row} rows")
            if not self.repeat:
                break
            self.epoch += 1
            self._start_reading()
        self.counts["rows"] += len(rows)
        self.counts["tokens"] += sum(len(row.tokens) for row in rows)
        return self._as_token_rows(rows)

    def held_out(self, count: int, size: int) -> Iterator[TokenRows]:
        rows = islice(filter(self._is_held_out, _RowReader(self, Counter())), count)
        while chunk := list(islice(rows, size)):
            yield self._as_token_rows(chunk)

    def _tokenizer_token(self, name: str) -> int | None:
        """The id of a special token, if the model embeds it. transformer_lens adds special tokens that are outside of
        the model's vocabulary or reuse the id of the unknown token."""
        token_id, token_name = getattr(self.tokenizer, name, None), name.removesuffix("_id")
        if token_id is None or not 0 <= token_id < self.vocabulary:
            return None
        is_unknown = token_id == getattr(self.tokenizer, "unk_token_id", None)
        is_same_token = getattr(self.tokenizer, token_name, None) == getattr(self.tokenizer, "unk_token", None)
        return None if is_unknown and not is_same_token else token_id

    def _refuse_unknown(self, tokens: np.ndarray) -> None:
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        tokens = tokens if self.bos in (None, unknown) else tokens[tokens != self.bos]
        if unknown is not None and len(tokens) and bool((tokens == unknown).all()):
            raise UserError(f"data: the model's tokenizer knows no word of {self.name}; all tokens are unknown")

    def _is_held_out(self, row: "_TokenRow") -> bool:
        return row.number % HELD_OUT_EVERY == self._first_held_out

    def _as_token_rows(self, rows: "list[_TokenRow]") -> TokenRows:
        tokens = torch.full((len(rows), self.context), self.pad)
        document = torch.full_like(tokens, -1)
        for index, row in enumerate(rows):
            tokens[index, : len(row.tokens)] = torch.from_numpy(row.tokens)
            document[index, : len(row.tokens)] = row.document
        length = torch.tensor([len(row.tokens) for row in rows], dtype=torch.int64)
        return TokenRows(tokens, length, document, torch.tensor([row.number for row in rows], dtype=torch.int64))

    def state(self) -> dict[str, Tensor]:
        place = (self._reader.document, self._reader.used, self._reader.row, self.epoch)
        state = {"place": torch.tensor(place), "counts": torch.tensor([self.counts[name] for name in COUNTS])}
        return state if self._fingerprint is None else state | {"fingerprint": torch.tensor([self._fingerprint])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self._fingerprint is not None and int(state.get("fingerprint", [self._fingerprint])[0]) != self._fingerprint:
            raise UserError(f"data: {self.name} has changed: it is not the text that was read before the stop")
        document, used, row, self.epoch = state["place"].tolist()
        self.counts.update(zip(COUNTS, state["counts"].tolist(), strict=True))
        self._start_reading(document, used, row)


#: `next(count)` gives the next training rows. At its end the text starts again, or fewer rows are returned.
#: `held_out(count, size)` gives the first rows that training never sees, `size` at a time. Rows begin with the token
#: `bos`, if any. `epoch` counts how often the text began again.
#: `counts` covers what `next` has read: finished `documents`, `empty_documents`, `rows`, `tokens` without padding.
RowSource = TestbedRows | TextRows


class _TokenRow(NamedTuple):
    """Row `number` of a text: `tokens` [length] int64, with `<bos>`, of document number `document`."""

    tokens: np.ndarray
    document: int
    number: int


class _RowReader:
    """Iterates once over the rows of a text. The next row is number `row` and starts after `used` tokens of document
    `document`. These three numbers are the whole state. Finished documents are added to `counts`."""

    def __init__(self, text: TextRows, counts: dict[str, int], document: int = 0, used: int = 0, row: int = 0):
        self.text, self.counts = text, counts
        self.document, self.used, self.row = document, used, row

    def __iter__(self) -> Iterator[_TokenRow]:
        first = np.array([] if self.text.bos is None else [self.text.bos], np.int64)
        piece_length = self.text.context - len(first)
        for ids in self._tokenised_documents():
            if self.used and len(ids) <= self.used:
                break
            if not len(ids):
                self.counts["empty_documents"] += 1
                self.document += 1
            for start in range(self.used, len(ids), piece_length):
                piece = ids[start : start + piece_length]
                wrong_ids = piece[(piece < 0) | (piece >= self.text.vocabulary)]
                if len(wrong_ids):
                    raise UserError(
                        f"data: {self.text.name} document {self.document} holds token {wrong_ids[0]}, which is not "
                        f"allowed; the model has tokens 0 to {self.text.vocabulary - 1}"
                    )
                row = _TokenRow(np.concatenate([first, piece.astype(np.int64)]), self.document, self.row)
                self.row, self.used = self.row + 1, start + len(piece)
                if self.used == len(ids):
                    self.counts["documents"] += 1
                    self.document, self.used = self.document + 1, 0
                yield row
        if self.used:  # only after loading a state
            number, name = self.document, self.text.name
            raise UserError(f"data: {name} has changed: document {number} had more than {self.used} tokens")

    def _tokenised_documents(self) -> Iterator[np.ndarray | StoredArray]:
        """Token ids [n] of each document from number `document` on, without an initial `<bos>`."""
        documents = self.text.documents.read(self.document)
        while batch := _next_documents(documents):
            texts = [document for document in batch if isinstance(document, str)]
            # JSON allows unpaired surrogates, and tokenizers reject them
            texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
            if any(texts) and self.text.tokenizer is None:
                raise UserError(
                    f"data: {self.text.name} holds text, and the model has no tokenizer; give token ids "
                    "(a .npy file, or a column tokens or input_ids)"
                )
            ids_of_texts = iter([[] for _ in texts])
            if any(texts):
                ids_of_texts = iter(self.text.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
            for document in batch:
                ids = np.asarray(next(ids_of_texts), np.int64) if isinstance(document, str) else document
                if len(ids) and ids[0:1][0] == self.text.bos:
                    ids = ids.without_first(1) if isinstance(ids, StoredArray) else ids[1:]
                yield ids


def open_text(config: StreamConfig, tokenizer: Any, *, seed: int, vocabulary: int | None = None) -> RowSource:
    """Open `config.data` as rows of tokens; without data, and for the model testbed only, documents of the embedded
    language with this `seed`. `vocabulary` is the number of tokens that the model embeds."""
    if config.data is not None:
        documents = open_documents(config.data, config.text_field, split=config.split, subset=config.subset)
        return TextRows(
            documents, tokenizer, config.context, bos=config.bos, repeat=config.repeat, vocabulary=vocabulary
        )
    if config.model != "testbed":
        raise UserError(
            f"data: {config.model} needs text: give a .txt, .jsonl, .json, .csv, .tsv, .parquet or .npy file, or a "
            "dataset's name or folder"
        )
    for name in ("text_field", "split", "subset"):
        if (value := getattr(config, name)) not in (None, "text"):
            raise UserError(f"stream.{name}: {value} is not allowed without data; the embedded language has no {name}s")
    if config.bos is False:
        raise UserError("stream.bos: false is not allowed without data; the embedded language always has a <bos>")
    return TestbedRows(config.context, seed)


def _next_documents(documents: Iterator[Document]) -> list[Document]:
    batch: list[Document] = []
    length = 0
    while len(batch) < _BATCH and length < _BATCH_LENGTH and (document := next(documents, None)) is not None:
        batch.append(document)
        length += len(document)
    return batch
