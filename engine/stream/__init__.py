"""Tokens -> language model -> ring buffer -> batches, positions kept all the way."""

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
from .arrays import ArraySource, open_file, settle
from .buffer import Batch, RingBuffer
from .cache import CacheSource, read_manifest
from .documents import IN_HAND, DocumentList, check_data
from .model import LanguageModel
from .model_source import ActivationSource, ModelSource, bounded, is_text, packs
from .norm_filter import SAMPLE, NormFilter
from .quantize import LARGEST
from .token_rows import RowSource, TestbedRows, TextRows, TokenRows, open_text

GIVE_UP = 2**20  # tokens read one after the other of which the filters leave none

__all__ = ["ActivationStream", "ArraySource", "Batch", "LanguageModel", "TokenRows"]


class ActivationStream:
    """Activations of a language model at one or more hooks, mixed over documents, each with its place.

        stream = ActivationStream(StreamConfig(model="testbed"))
        batch = stream.next(1024)          # batch.x [1024, D], batch.pos, batch.token, batch.document, batch.row

    The same config and seed give the same batches. Left out are padding, the tokenizer's special tokens (`drop_special`) and
    massive activations (`max_norm`; `norms` says which they were). With `mode="sequences"` a batch holds whole rows,
    x [B, T, D], and `batch.kept` says which tokens those filters leave. A batch is overwritten by the next one. `tokens` is
    how many will be asked for: the buffer is sized by it, and reads no more text than they need (one that asks for more gets
    more), in batches of about `batch`. A ready `model` or source of `rows` may be
    given; else both are loaded as the config says. With `config.cache` activations come from there, `hooks` are those to be
    read (`config.hook` unless given), and `model` and `text` are loaded when they are first asked for.
    With `config.activations`, or `own` ones in hand, there are neither.

    `documents` may take the place of `config.data`: strings, token ids, or dicts with the field `config.text_field`, in an
    iterable that can be read again and again, or from a function that gives one, such as a generator function. A generator
    itself can't go back, as held-out rows, a second epoch and a resumed run need, and is refused.

    Where torch.distributed runs with several processes (`ranks`, those unless given), each runs the model on an equal share
    of the text and all have the same buffer, the one that a single process would have; a cache and own activations each
    reads for itself.
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
        own: ArraySource | None = None,
        ranks: Ranks | None = None,
    ):
        tune_host()
        self.ranks = Ranks.here() if ranks is None else ranks
        self._model, self._text, self._text_seed = model, rows, seed
        self._tones: dict[int, int] = {}
        if own is None and config.activations is not None:
            own = open_file(config.activations, seed=seed, repeat=config.repeat)
        self.own = own
        if own is not None:
            config = settle(config, own)
            self.source: ActivationSource = own
        elif config.cache is not None:
            manifest = read_manifest(config.cache)
            if hooks:
                config = config.model_copy(update={"hook": hooks[0]})
            config, self._text_seed = manifest.settle(config), manifest.seed
            self.source = CacheSource(
                str(config.cache), hooks=hooks or config.read_hooks, seed=seed, repeat=config.repeat
            )
        else:
            if documents is not None:
                config = self._read_in_hand(config, documents, rows)
            self.source = self._model_source(config, hooks)
            config = self.config.model_copy(update={"hook": self.model.hook})
        self.norms = NormFilter(config.max_norm)
        self._batches_ahead: deque[Batch] = (
            deque()
        )  # what was read to find the limits of norms, before the buffer takes it
        self.config = config
        self.d_in, self.positions = self.source.widths[str(config.hook)], self.source.positions
        dtype = torch.float8_e4m3fn if config.buffer_dtype == "fp8" else getattr(torch, config.buffer_dtype)
        scale_bytes = 4 if dtype in LARGEST else 0
        token_bytes = sum(width * dtype.itemsize + scale_bytes for width in self.source.widths.values()) + 24
        if config.buffer_gb is not None:
            self.buffer_tokens = int(config.buffer_gb * 1e9 / token_bytes)
        else:
            usual_size = min(65536, max(8192, 4 * batch, tokens // 8))
            self.buffer_tokens = config.buffer_tokens or min(usual_size, max(2048, 2 * batch, tokens))
        if config.mode == "sequences" and self.buffer_tokens < 2 * config.context:
            raise UserError(
                f"stream.buffer_tokens: {self.buffer_tokens} is not allowed; it must hold at least two sequences "
                f"({2 * config.context})"
            )
        settings: dict[str, Any] = {"buffer_tokens": self.buffer_tokens, "buffer_gb": None}
        if isinstance(self.source, ModelSource):
            settings["packing"] = self.source.packing
        self.config = config.model_copy(update=settings)
        self.watch = Stopwatch(self.source.device)
        self._serves_sequences = config.mode == "sequences"
        self.dropped = {"special": 0, "high_norm": 0}
        self._fill_bar: ProgressBar | None = None
        self._generator = torch.Generator().manual_seed(seed)
        try:
            self._buffer = RingBuffer(
                self._item_count(self.buffer_tokens), self.source.widths,
                dtype, self.source.device, self._fill, self._generator,
                item_limit=-(-tokens // batch) * max(1, self._item_count(batch)),
                context=self.positions if self._serves_sequences else None, grouped=config.mode == "grouped",
            )  # fmt: skip
        except RuntimeError:  # torch's word for out of memory
            raise UserError(
                f"stream.buffer_tokens: {self.buffer_tokens} is not allowed; "
                f"it takes {self.buffer_tokens * token_bytes / 2**30:,.1f} GiB, more than {self.source.device} has"
            ) from None

    def _model_source(self, config: StreamConfig, hooks: Sequence[str]) -> ModelSource:
        self.config = config
        if self._text is None and config.data is not None:
            check_data(config.data)
        if hooks:
            self.model.use(hooks=hooks)
        if config.context > self.model.context:
            raise UserError(
                f"stream.context: {config.context} is not allowed; {config.model} has at most {self.model.context}"
            )
        packing = packs(config, self.text)
        self.config = config = bounded(config, self.model)
        return ModelSource(self.model, self.text, config.context, config.rows_per_forward, self.ranks, packing=packing)

    def _read_in_hand(self, config: StreamConfig, documents: Any, rows: RowSource | None) -> StreamConfig:
        """Take `documents` as the text; gives the settings, which say so."""
        conflicts = [name for name in ("data", "split", "subset") if getattr(config, name) not in (None, IN_HAND)]
        if conflicts or rows is not None:
            raise UserError(
                f"documents: not allowed beside {conflicts[0] if conflicts else 'rows'}; give one of the two"
            )
        self.config = config
        self._text = TextRows(
            DocumentList(documents, IN_HAND, config.text_field), self.model.tokenizer, config.context,
            bos=config.bos, repeat=config.repeat, vocabulary=self.model.vocabulary,
        )  # fmt: skip
        return config.model_copy(update={"data": IN_HAND})

    @property
    def model(self) -> LanguageModel:
        """The language model; with a cache, loaded when it is first asked for."""
        if self.own is not None:
            raise UserError(f"model: {self.own.name} has no language model; what needs one can't be had of it")
        if self._model is None:
            config = self.config
            self._model = LanguageModel(
                config.model, hooks=config.read_hooks, attention=config.attention, compile=config.compile
            )
            self._model.memory = 1e9 * config.memory_gb
        return self._model

    @property
    def text(self) -> RowSource:
        """The rows of text; with a cache, opened when they are first asked for, at their beginning."""
        if self._text is None:
            config = self.config
            self._text = open_text(
                config.data, config.model, self.model.tokenizer, config.context, seed=self._text_seed,
                bos=config.bos, text_field=config.text_field, split=config.split, subset=config.subset,
                repeat=config.repeat, vocabulary=self.model.vocabulary,
            )  # fmt: skip
        return self._text

    @property
    def name(self) -> str:
        """What messages call the model."""
        if self.own is not None:
            return self.own.name
        return self._model.name if self._model is not None else self.config.model

    def check_mask(self, mask: MaskConfig) -> None:
        """Refuse a mask that does not fit the stream's positions, is longer than its rows, or finds no positions."""
        if mask.kind != "none" and self.own is not None and not self.own.has_positions:
            raise UserError(f"sae.mask.kind: {mask.kind} is not allowed; {self.own.name} has no positions")
        mask.check_context(self.positions)
        if mask.kind != "none" and mask.positions > self.positions:
            raise UserError(
                f"sae.mask.positions: {mask.positions} is not allowed; rows have {self.positions} positions "
                "(stream.context), and latents of those behind would never be used"
            )

    def config_for(self, settings: StreamConfig) -> StreamConfig:
        """The settings, with the places that a dictionary of these `settings` looks at."""
        places = {"hook": settings.hook or self.config.hook, "target": settings.target, "second": settings.second}
        return self.config.model_copy(update=places)

    @default_modes()
    def attribute(self, batch: Batch) -> Tensor:
        """A binary attribute of each token [N], int64, that a dictionary is not to be about: of the embedded language the
        tone of its document, which goes with the topic; elsewhere, where nothing is labelled, whether the token is in the
        second half of the row."""
        if self.own is not None or not isinstance(self.text, TestbedRows):
            return (batch.pos >= self.positions // 2).long()
        documents, inverse = batch.document.cpu().unique(return_inverse=True)
        for number in documents.tolist():
            if number not in self._tones:
                self._tones[number] = self.text.language.document(number).tone
        tones = torch.tensor([self._tones[number] for number in documents.tolist()])
        return tones[inverse].to(batch.pos.device)

    @default_modes()
    def next(self, n: int) -> Batch:
        """The next `n` tokens (in sequences: n // T rows), without replacement from the buffer; fewer, or none, where the
        text has ended."""
        if n > self.buffer_tokens // 2:
            raise UserError(
                f"stream.buffer_tokens: {self.buffer_tokens} is not allowed; it must be at least twice the batch ({n})"
            )
        self._begin()
        return self._buffer.next(max(1, self._item_count(n)))

    @default_modes()
    def sample(self) -> Batch:
        """What the buffer holds, [N, D], at most 65536 items: for means and the like. Changes nothing in what comes."""
        self._begin()
        return self._buffer.contents(self._item_count(65536)).flat()

    def _item_count(self, tokens: int) -> int:
        """So many tokens in items of the buffer: rows of sequences, else tokens."""
        return tokens // self.positions if self._serves_sequences else tokens

    def held_out(self, rows: int) -> Iterator[TokenRows]:
        """Rows of text that training never sees, `rows_per_forward` at a time: `rows` of them, or all that there are."""
        return self.text.held_out(rows, self.config.rows_per_forward)

    @default_modes()
    def held_out_batches(self, rows: int) -> list[Batch]:
        """The activations of such rows at the model's hooks, tokens that count, row after row."""
        batches = []
        for token_rows in self.held_out(rows):
            acts_by_hook, kept = self.read(token_rows)
            row, pos = kept.nonzero(as_tuple=True)
            acts = {hook: x[kept] for hook, x in acts_by_hook.items()}
            fields = (value.to(kept.device)[kept] for value in (token_rows.tokens, token_rows.document))
            token, document = fields
            batches.append(
                Batch(acts, pos.int(), token.int(), document.long(), token_rows.row.to(row.device)[row].long())
            )
        return batches

    @default_modes()
    def read(self, rows: TokenRows) -> tuple[dict[str, Tensor], Tensor]:
        """What the model has at its hooks for rows of text, [B, T, D] by hook, and which tokens [B, T] count: those that
        training takes. Not padding, special tokens (`drop_special`) or massive activations (`max_norm`)."""
        acts, kept = self._read(rows)
        self._ensure_norm_limits(acts)
        return acts, kept & self.norms.ordinary(acts)

    def _read(self, rows: TokenRows) -> tuple[dict[str, Tensor], Tensor]:
        """As `read`, whatever the norms."""
        acts = self.model.harvest(rows.tokens, rows.length if packs(self.config, self.text) else None)
        kept = is_text(rows)
        if self.config.drop_special:
            kept &= ~torch.isin(rows.tokens, self.source.special)
        return acts, kept.to(next(iter(acts.values())).device)

    def _ensure_norm_limits(self, hooks: Iterable[str]) -> None:
        """Have the limits of norms at these hooks: where training or its checkpoint has none, from held-out text."""
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
        if not self.norms.tokens:  # else there are those that training left out
            self.norms.count(len(ordinary), torch.cat(pos)[~ordinary])

    def held_out_activations(self) -> Iterator[Batch]:
        """Of activations without a model, the rows that training never sees, without massive ones."""
        assert self.own is not None
        for batch in self.own.held_out():
            if not self.norms.knows(batch.acts):
                self.norms.calibrate(batch.acts)
            yield batch[self.norms.ordinary(batch.acts)]

    @property
    def buffer_error(self) -> float | None:
        """Squared error of activations kept in one byte, over their squared norm; None where they aren't."""
        return self._buffer.rounding if self.config.buffer_dtype in ("int8", "fp8") else None

    @property
    def counts(self) -> dict[str, int]:
        """What was read and what was left out so far: documents, rows, tokens, special, high_norm."""
        return self.source.counts | self.dropped

    def _begin(self) -> None:
        """Fill the buffer for the first time."""
        if not self._buffer.begun:
            with progress_bar("filling the buffer", total=self.buffer_tokens, unit="tokens") as self._fill_bar:
                contents = self._buffer.contents()
                if sentence := self.norms.sentence():
                    self._fill_bar.note(sentence)
            self._fill_bar = None
            if not len(contents):
                self._refuse(self.counts.get("tokens", 0))

    def _fill(self) -> Batch | None:
        """The source's next activations, filtered; sequences in rows of T."""
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
        """Read as much as it takes to tell which norms are massive; less than the buffer holds."""
        sample_size = min(SAMPLE, self.buffer_tokens // 2)
        tokens_missing, sample = sample_size, list[dict[str, Tensor]]()
        while tokens_missing > 0 and (fresh := self._from_source()) is not None:
            self._batches_ahead.append(fresh)
            kept = self._candidates(fresh).to(fresh.pos.device)
            sample.append({hook: x[kept] for hook, x in fresh.acts.items()})
            tokens_missing -= int(kept.sum())
            if self.source.counts["epoch"] > 1:  # a text with hardly a token that counts
                break
        if sample:
            chunks_by_hook = {hook: [chunk[hook] for chunk in sample] for hook in self.source.widths}
            self.norms.calibrate({hook: torch.cat(chunks)[:sample_size] for hook, chunks in chunks_by_hook.items()})

    def _refuse(self, tokens_read: int) -> NoReturn:
        filters = "(see stream.drop_special and stream.max_norm)"
        raise UserError(f"data: {self.source.name} holds no token to train on, {tokens_read:,} read {filters}")

    def _kept(self, fresh: Batch) -> Tensor:
        """Which tokens [M] the filters leave, on the CPU."""
        kept = self._candidates(fresh)
        self.dropped["special"] += int((~kept).sum())
        if self.config.max_norm is None:
            return kept
        massive = kept & ~self.norms.ordinary(fresh.acts).cpu()
        self.norms.count(int(kept.sum()), fresh.pos.cpu()[massive])
        self.dropped["high_norm"] += int(massive.sum())
        return kept & ~massive

    def _candidates(self, fresh: Batch) -> Tensor:
        """Which tokens [M] are the text's own, on the CPU."""
        if self.config.drop_special and fresh.kept is not None:
            return fresh.kept
        return torch.ones(len(fresh), dtype=torch.bool)

    def _as_sequences(self, fresh: Batch) -> Batch:
        """[M] tokens of some rows as [B, T], zeros where there are none."""
        _, row = fresh.row.cpu().unique_consecutive(return_inverse=True)
        token_index = row * self.positions + fresh.pos.cpu()
        row_count = int(row[-1]) + 1

        def spread(value: Tensor) -> Tensor:
            empty = value.new_zeros(row_count * self.positions, *value.shape[1:])
            return empty.index_copy_(0, token_index.to(value.device), value).unflatten(0, (row_count, self.positions))

        return fresh.each(spread)

    def alone(self) -> None:
        """Go on in this process by itself."""
        self.ranks = ALONE
        if isinstance(self.source, ModelSource):
            self.source.ranks = ALONE

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on exactly here: buffer, order, random state, place in the text."""
        state = self._buffer.state() | {f"source.{key}": value for key, value in self.source.state().items()}
        return state | {
            "random": self._generator.get_state(), "dropped": torch.tensor(list(self.dropped.values())),
            **self.norms.state(),
        }  # fmt: skip

    @default_modes()
    def load_state(self, state: dict[str, Tensor]) -> None:
        self.norms.load_state(state)
        self._buffer.load_state(state)
        self.source.load_state(
            {key.removeprefix("source."): value for key, value in state.items() if key.startswith("source.")}
        )
        self._generator.set_state(state["random"].cpu())
        self.dropped = dict(zip(self.dropped, state["dropped"].tolist(), strict=True))
