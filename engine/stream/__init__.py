"""Tokens -> language model -> ring buffer -> batches. Every activation keeps its position."""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...kernels.torch_modes import default_modes
from ..config import MaskConfig, StreamConfig
from ..errors import UserError
from ..process.cpu_memory import trim_host, tune_host
from ..process.progress import ProgressBar, progress_bar
from ..process.stopwatch import Stopwatch
from ..ranks import ALONE, Ranks
from .arrays import ArraySource
from .buffer import Batch, RingBuffer, with_prefix
from .cache import CacheSource, read_manifest
from .documents import IN_HAND, DocumentList, check_data
from .model import LanguageModel
from .model_source import ModelSource, is_text, open_source, packs
from .norm_filter import SAMPLE, NormFilter, describe
from .quantize import LARGEST
from .token_rows import RowSource, TestbedRows, TextRows, TokenRows, open_text
from .without_model import OwnSource, open_own, settle
from .world_source import WorldSource

GIVE_UP = 2**20  # consecutive tokens that the filters may leave out before a text is refused
#: `next` returns the activations of some whole rows in the order of the text, without padding, [M, D] per hook, or None
#: at the end. `kept` [M] is false for the `special` tokens. `name` is the text's name in messages, `label` names the
#: time spent in `next`. `counts` counts what was read so far. `state` and `load_state` resume exactly.
ActivationSource = ArraySource | WorldSource | CacheSource | ModelSource


class ActivationStream:
    """Activations of a language model at one or more hooks, mixed over documents, each with its position.

        stream = ActivationStream(StreamConfig(model="testbed"))
        batch = stream.next(1024)          # batch.x [1024, D], batch.pos, batch.token, batch.document, batch.row

    The same config and seed give the same batches. Padding, special tokens (`drop_special`) and massive activations
    (`max_norm`, reported by `norms`) are left out. With `mode="sequences"` a batch holds whole rows, x [B, T, D], and
    `batch.kept` marks the tokens that would not be left out. The next call overwrites a batch.

    `tokens` is how many will be requested, in batches of about `batch`. It sets the size of the buffer and how much
    text is read; more can still be requested. `model` and `rows` replace those that the config names. With
    `config.cache`, activations at `hooks` (default `config.hook`) come from a cache, and `model` and `text` are loaded
    on first use. With `config.activations`, `config.world`, or activations in memory as `own`, there is no model and no
    text.

    `documents` replaces `config.data`: an iterable of strings, token ids, or dicts with the field `config.text_field`,
    or a function that returns one, such as a generator function. It is read again for held-out rows, for each epoch and
    on resume, so a generator object is refused.

    With torch.distributed (`ranks`, by default all processes), each process runs the model on an equal share of the
    text, and all hold the buffer that a single process would have. A cache and `own` are read in full by each process.

    Raises UserError for settings that don't fit the model, the text or each other.
    """

    @default_modes()
    def __init__(
        self,
        config: StreamConfig,
        *,
        tokens: int = 1_000_000,
        batch: int = 1024,
        seed: int = 0,
        model: LanguageModel | None = None,
        rows: RowSource | None = None,
        documents: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
        hooks: Sequence[str] = (),
        own: OwnSource | None = None,
        ranks: Ranks | None = None,
    ):
        tune_host()
        self.ranks = Ranks.here() if ranks is None else ranks
        self._model, self._text, self._text_seed = model, rows, seed
        self._tone = functools.cache(lambda language, number: language.document(number).tone)
        self.config, self.own = config, open_own(config, seed) if own is None else own
        self.source = self._open_source(hooks, documents, seed)
        self.norms = NormFilter(self.config.max_norm)
        self._batches_ahead: deque[Batch] = deque()  # read to find the norm limits, not yet in the buffer
        self.d_in, self.positions = self.source.widths[str(self.config.hook)], self.source.positions
        self.watch = Stopwatch(self.source.device)
        self._serves_sequences = config.mode == "sequences"
        self.dropped = {"special": 0, "high_norm": 0}
        self._fill_bar: ProgressBar | None = None
        self._generator = torch.Generator().manual_seed(seed)
        self._buffer = self._make_buffer(tokens, batch)

    def _open_source(self, hooks: Sequence[str], documents: Any, seed: int) -> ActivationSource:
        config = self.config
        if self.own is not None:
            self.config = settle(config, self.own)
            return self.own
        if config.cache is not None:
            manifest = read_manifest(config.cache)
            if hooks:
                config = config.model_copy(update={"hook": hooks[0]})
            self.config, self._text_seed = manifest.settle(config), manifest.seed
            return CacheSource(
                str(config.cache), hooks=hooks or self.config.read_hooks, seed=seed, repeat=config.repeat
            )
        if documents is not None:
            self._use_documents(documents)
        elif self._text is None and config.data is not None:
            check_data(config.data)
        if hooks:
            self.model.use(hooks=hooks)
        source, self.config = open_source(self.config, self.model, self.text, self.ranks)
        return source

    def _use_documents(self, documents: Any) -> None:
        config = self.config
        conflicts = [name for name in ("data", "split", "subset") if getattr(config, name) not in (None, IN_HAND)]
        if self._text is not None:
            conflicts.append("rows")
        if conflicts:
            raise UserError(f"documents: not allowed beside {conflicts[0]}; give one of the two")
        self._text = TextRows(
            DocumentList(documents, IN_HAND, config.text_field), self.model.tokenizer, config.context,
            bos=config.bos, repeat=config.repeat, vocabulary=self.model.vocabulary,
        )  # fmt: skip
        self.config = config.model_copy(update={"data": IN_HAND})

    def _make_buffer(self, tokens: int, batch: int) -> RingBuffer:
        config, source = self.config, self.source
        dtype = torch.float8_e4m3fn if config.buffer_dtype == "fp8" else getattr(torch, config.buffer_dtype)
        scale_bytes = 4 if dtype in LARGEST else 0
        token_bytes = sum(width * dtype.itemsize + scale_bytes for width in source.widths.values()) + 24
        if config.buffer_gb is not None:
            self.buffer_tokens = int(config.buffer_gb * 1e9 / token_bytes)
        else:
            usual_size = min(65536, max(8192, 4 * batch, tokens // 8))
            self.buffer_tokens = config.buffer_tokens or min(usual_size, max(2048, 2 * batch, tokens))
        if self._serves_sequences and self.buffer_tokens < 2 * config.context:
            rule = f"it must hold at least two sequences ({2 * config.context})"
            raise UserError(f"stream.buffer_tokens: {self.buffer_tokens} is not allowed; {rule}")
        self.config = config.model_copy(update={"buffer_tokens": self.buffer_tokens, "buffer_gb": None})
        try:
            return RingBuffer(
                self._item_count(self.buffer_tokens), source.widths, dtype, source.device, self._fill, self._generator,
                item_limit=-(-tokens // batch) * max(1, self._item_count(batch)),
                context=self.positions if self._serves_sequences else None, grouped=config.mode == "grouped",
            )  # fmt: skip
        except RuntimeError:  # raised by torch when out of memory
            raise UserError(
                f"stream.buffer_tokens: {self.buffer_tokens} is not allowed; "
                f"it takes {self.buffer_tokens * token_bytes / 2**30:,.1f} GiB, more than {source.device} has"
            ) from None

    @property
    def model(self) -> LanguageModel:
        """The language model; with a cache, loaded on first use."""
        if self.own is not None:
            raise UserError(f"model: {self.own.name} can't be used here; this needs a language model")
        if self._model is None:
            c = self.config
            self._model = LanguageModel(c.model, hooks=c.read_hooks, attention=c.attention, compile=c.compile)
            self._model.memory = 1e9 * c.memory_gb
        return self._model

    @property
    def text(self) -> RowSource:
        """The rows of text; with a cache, opened at its beginning on first use."""
        if self._text is None:
            model = self.model
            self._text = open_text(self.config, model.tokenizer, seed=self._text_seed, vocabulary=model.vocabulary)
        return self._text

    @property
    def name(self) -> str:
        """The model's name in messages."""
        if self.own is not None:
            return self.own.name
        return self._model.name if self._model is not None else self.config.model

    def check_mask(self, mask: MaskConfig) -> None:
        """Raise UserError for a mask over more positions than the rows have, or where positions are unknown."""
        if mask.kind != "none" and self.own is not None and not self.own.has_positions:
            raise UserError(f"sae.mask.kind: {mask.kind} is not allowed; {self.own.name} has no positions")
        mask.check_context(self.positions)
        if mask.kind != "none" and mask.positions > self.positions:
            raise UserError(
                f"sae.mask.positions: {mask.positions} is not allowed; rows have {self.positions} positions "
                "(stream.context), so the latents of later ones would never be used"
            )

    def config_for(self, settings: StreamConfig) -> StreamConfig:
        """The stream's settings with the hooks of a dictionary trained with `settings`."""
        places = {"hook": settings.hook or self.config.hook, "target": settings.target, "second": settings.second}
        return self.config.model_copy(update=places)

    @default_modes()
    def attribute(self, batch: Batch) -> Tensor:
        """A binary attribute of each token [N], int64, that a dictionary should not encode.

        In the embedded language it is the tone of the document, which correlates with the topic. Unlabelled texts use
        whether the token is in the second half of its row."""
        if self.own is not None or not isinstance(self.text, TestbedRows):
            return (batch.pos >= self.positions // 2).long()
        documents, inverse = batch.document.cpu().unique(return_inverse=True)
        tones = torch.tensor([self._tone(self.text.language, number) for number in documents.tolist()])
        return tones[inverse].to(batch.pos.device)

    @default_modes()
    def next(self, n: int) -> Batch:
        """Draw the next `n` tokens (or n // T sequences) from the buffer without replacement; fewer, or none, at the
        end of the text. Raises UserError if `n` is more than half of the buffer."""
        if n > self.buffer_tokens // 2:
            rule = f"it must be at least twice the batch ({n})"
            raise UserError(f"stream.buffer_tokens: {self.buffer_tokens} is not allowed; {rule}")
        self._begin()
        return self._buffer.next(max(1, self._item_count(n)))

    @default_modes()
    def sample(self) -> Batch:
        """Up to 65536 tokens of the buffer, [N, D], for statistics. Does not change later batches."""
        self._begin()
        return self._buffer.contents(self._item_count(65536)).flat()

    def _item_count(self, tokens: int) -> int:
        """A number of tokens as a number of buffer items, which are sequences or tokens."""
        return tokens // self.positions if self._serves_sequences else tokens

    def held_out(self, rows: int) -> Iterator[TokenRows]:
        """Rows of text that training never sees, at most `rows` of them, `rows_per_forward` at a time."""
        return self.text.held_out(rows, self.config.rows_per_forward)

    @default_modes()
    def held_out_batches(self, rows: int) -> list[Batch]:
        """The activations of held-out rows at the model's hooks, without the tokens that are left out."""
        batches = []
        for token_rows in self.held_out(rows):
            acts_by_hook, kept = self.read(token_rows)
            row, pos = kept.nonzero(as_tuple=True)
            acts = {hook: x[kept] for hook, x in acts_by_hook.items()}
            token, document = (value.to(kept.device)[kept] for value in (token_rows.tokens, token_rows.document))
            batches.append(Batch(acts, pos.int(), token.int(), document, token_rows.row.to(row.device)[row]))
        return batches

    @default_modes()
    def read(self, rows: TokenRows) -> tuple[dict[str, Tensor], Tensor]:
        """The activations of rows of text by hook, [B, T, D], and a mask [B, T] of the tokens that training would use:
        no padding, special tokens (`drop_special`) or massive activations (`max_norm`)."""
        acts, kept = self._read(rows)
        self._ensure_norm_limits(acts)
        return acts, kept & self.norms.ordinary(acts)

    def _read(self, rows: TokenRows) -> tuple[dict[str, Tensor], Tensor]:
        """Like `read`, without the limit on norms."""
        acts = self.model.harvest(rows.tokens, rows.length if packs(self.config, self.text) else None)
        kept = is_text(rows)
        if self.config.drop_special:
            kept &= ~torch.isin(rows.tokens, self.source.special)
        return acts, kept.to(next(iter(acts.values())).device)

    def _ensure_norm_limits(self, hooks: Iterable[str]) -> None:
        """Find the norm limits from held-out text, if neither training nor its checkpoint has set them."""
        if self.norms.knows(hooks):
            return
        sample: list[dict[str, Tensor]] = []
        pos: list[Tensor] = []
        for rows in self.held_out(SAMPLE):
            acts, kept = self._read(rows)
            sample.append({hook: x[kept] for hook, x in acts.items()})
            pos.append(kept.nonzero()[:, 1])
            if sum(map(len, pos)) >= SAMPLE:
                break
        ordinary = self.norms.calibrate({hook: torch.cat([chunk[hook] for chunk in sample]) for hook in sample[0]})
        if not self.norms.tokens:  # otherwise the counts are those of training
            self.norms.count(len(ordinary), torch.cat(pos)[~ordinary])

    def held_out_activations(self) -> Iterator[Batch]:
        """Held-out rows of the user's own activations, without massive ones."""
        assert self.own is not None
        for batch in self.own.held_out():
            if not self.norms.knows(batch.acts):
                self.norms.calibrate(batch.acts)
            yield batch[self.norms.ordinary(batch.acts)]

    @property
    def buffer_error(self) -> float | None:
        """Squared error of int8 or fp8 activations in the buffer over their squared norm; None for other dtypes."""
        return self._buffer.rounding if self.config.buffer_dtype in ("int8", "fp8") else None

    @property
    def counts(self) -> dict[str, int]:
        """Number of documents, rows and tokens read, and of tokens left out (special, high_norm), so far."""
        return self.source.counts | self.dropped

    def _begin(self) -> None:
        if not self._buffer.begun:
            with progress_bar("filling the buffer", total=self.buffer_tokens, unit="tokens") as self._fill_bar:
                contents = self._buffer.contents()
                if sentence := describe(self.norms.report()):
                    self._fill_bar.note(sentence)
            self._fill_bar = None
            if not len(contents):
                self._refuse(self.counts.get("tokens", 0))

    def _fill(self) -> Batch | None:
        """Read and filter the next activations of the source; in sequences mode as [B, T]."""
        trim_host()
        tokens_read, epoch = 0, self.source.counts["epoch"]
        if not self.norms.knows(self.source.widths):
            self._read_ahead()
        while True:
            fresh = self._batches_ahead.popleft() if self._batches_ahead else self._from_source()
            if fresh is None:
                return None
            kept = self._kept(fresh)
            if bool(kept.any()):
                break
            tokens_read += len(fresh)
            if tokens_read > GIVE_UP or self.source.counts["epoch"] > epoch + 1:
                self._refuse(tokens_read)
        if self._fill_bar is not None:
            self._fill_bar.advance(int(kept.sum()))
        fresh = replace(fresh, kept=kept)
        return self._as_sequences(fresh) if self._serves_sequences else fresh.flat()

    def _from_source(self) -> Batch | None:
        with self.watch(self.source.label):
            return self.source.next()

    def _read_ahead(self) -> None:
        """Read a sample, at most half of the buffer, to find the norm limits."""
        sample_size = min(SAMPLE, self.buffer_tokens // 2)
        tokens_missing, sample = sample_size, list[dict[str, Tensor]]()
        while tokens_missing > 0 and (fresh := self._from_source()) is not None:
            self._batches_ahead.append(fresh)
            kept = self._candidates(fresh).to(fresh.pos.device)
            sample.append({hook: x[kept] for hook, x in fresh.acts.items()})
            tokens_missing -= int(kept.sum())
            if self.source.counts["epoch"] > 1:  # the text has hardly any token to train on
                break
        if sample:
            chunks_by_hook = {hook: [chunk[hook] for chunk in sample] for hook in self.source.widths}
            self.norms.calibrate({hook: torch.cat(chunks)[:sample_size] for hook, chunks in chunks_by_hook.items()})

    def _refuse(self, tokens_read: int) -> NoReturn:
        raise UserError(
            f"data: {self.source.name} has no token to train on; all {tokens_read:,} that were read are left out "
            "(see stream.drop_special and stream.max_norm)"
        )

    def _kept(self, fresh: Batch) -> Tensor:
        """Mask [M] of tokens that the filters keep, on the CPU. Updates the counts."""
        kept = self._candidates(fresh)
        self.dropped["special"] += int((~kept).sum())
        if self.config.max_norm is None:
            return kept
        massive = kept & ~self.norms.ordinary(fresh.acts).cpu()
        self.norms.count(int(kept.sum()), fresh.pos.cpu()[massive])
        self.dropped["high_norm"] += int(massive.sum())
        return kept & ~massive

    def _candidates(self, fresh: Batch) -> Tensor:
        """Mask [M] of tokens that are not special, on the CPU; all of them unless `drop_special`."""
        if self.config.drop_special and fresh.kept is not None:
            return fresh.kept
        return torch.ones(len(fresh), dtype=torch.bool)

    def _as_sequences(self, fresh: Batch) -> Batch:
        """Arrange tokens [M] of some rows as [B, T], with zeros for padding."""
        _, row = fresh.row.cpu().unique_consecutive(return_inverse=True)
        token_index = row * self.positions + fresh.pos.cpu()
        row_count = int(row[-1]) + 1

        def spread(value: Tensor) -> Tensor:
            empty = value.new_zeros(row_count * self.positions, *value.shape[1:])
            return empty.index_copy_(0, token_index.to(value.device), value).unflatten(0, (row_count, self.positions))

        return fresh.each(spread)

    def alone(self) -> None:
        """Continue in this process without the others."""
        self.ranks = ALONE
        if isinstance(self.source, ModelSource):
            self.source.ranks = ALONE

    def state(self) -> dict[str, Tensor]:
        """Tensors to resume from exactly: buffer, order, random state and place in the text."""
        state = self._buffer.state() | {f"source.{key}": value for key, value in self.source.state().items()}
        return state | {
            "random": self._generator.get_state(), "dropped": torch.tensor(list(self.dropped.values())),
            **self.norms.state(),
        }  # fmt: skip

    @default_modes()
    def load_state(self, state: dict[str, Tensor]) -> None:
        self.norms.load_state(state)
        self._buffer.load_state(state)
        self.source.load_state(with_prefix(state, "source."))
        self._generator.set_state(state["random"].cpu())
        self.dropped = dict(zip(self.dropped, state["dropped"].tolist(), strict=True))
