"""Tokens -> language model -> ring buffer -> batches, positions kept all the way."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from ..config import MaskConfig, StreamConfig
from ..errors import UserError
from ..host import trim_host, tune_host
from ..progress import ProgressBar, progress_bar
from ..ranks import ALONE, Ranks
from ..stopwatch import Stopwatch
from .buffer import Batch, RingBuffer
from .cache import Cached, read_manifest
from .live import Live, Source, is_text
from .model import LanguageModel
from .narrow import LARGEST
from .own import Own, open_file, settle
from .text import RowSource, TestbedRows, TokenRows, open_text

GIVE_UP = 2**20  # tokens read one after the other of which the filters leave none

__all__ = ["ActivationStream", "Batch", "LanguageModel", "Own", "TokenRows"]


class ActivationStream:
    """Activations of a language model at one or more hooks, mixed over documents, each with its place.

        stream = ActivationStream(StreamConfig(model="testbed"))
        batch = stream.next(1024)          # batch.x [1024, D], batch.pos, batch.token, batch.document, batch.row

    The same config and seed give the same batches. Left out are padding, the tokenizer's special tokens (`drop_special`) and
    activations of extreme norm (`max_norm`). With `mode="sequences"` a batch holds whole rows, x [B, T, D], and `batch.kept`
    says which tokens those filters leave. A batch is overwritten by the next one. A ready `model` or source of `rows` may be
    given; else both are loaded as the config says. With `config.cache` activations come from there, `hooks` are those to be
    read (`config.hook` unless given), and `model` and `text` are loaded when they are first asked for.
    With `config.activations`, or `own` ones in hand, there are neither.

    Where torch.distributed runs with several processes (`ranks`, those unless given), each runs the model on an equal share
    of the text and all have the same buffer, the one that a single process would have; a cache and own activations each
    reads for itself.
    """

    def __init__(
        self,
        config: StreamConfig,
        *,
        tokens: int = 1_000_000,
        seed: int = 0,
        model: LanguageModel | None = None,
        rows: RowSource | None = None,
        hooks: Sequence[str] = (),
        own: Own | None = None,
        ranks: Ranks | None = None,
    ):
        tune_host()
        self.ranks = Ranks.here() if ranks is None else ranks
        self._model, self._text, self._text_seed = model, rows, seed
        self._attributes: dict[int, int] = {}
        if own is None and config.activations is not None:
            own = open_file(config.activations, seed=seed, repeat=config.repeat)
        self.own = own
        if own is not None:
            config = settle(config, own)
            self.source: Source = own
        elif config.cache is not None:
            manifest = read_manifest(config.cache)
            if hooks:
                config = config.model_copy(update={"hook": hooks[0]})
            config, self._text_seed = manifest.settle(config), manifest.seed
            self.source = Cached(str(config.cache), hooks=hooks or config.read_hooks, seed=seed, repeat=config.repeat)
        else:
            self.source = self._live(config, hooks)
            config = config.model_copy(update={"hook": self.model.hook})
        self.config = config
        self.d_in, self.positions = self.source.widths[str(config.hook)], self.source.positions
        dtype = torch.float8_e4m3fn if config.buffer_dtype == "fp8" else getattr(torch, config.buffer_dtype)
        scale = 4 if dtype in LARGEST else 0
        item = sum(width * dtype.itemsize + scale for width in self.source.widths.values()) + 24  # bytes of a token
        if config.buffer_gb is not None:
            self.buffer_tokens = int(config.buffer_gb * 1e9 / item)
        else:
            self.buffer_tokens = config.buffer_tokens or min(65536, max(2048, tokens))
        if config.mode == "sequences" and self.buffer_tokens < 2 * config.context:
            raise UserError(
                f"stream.buffer_tokens: {self.buffer_tokens} is not allowed; it must hold at least two sequences "
                f"({2 * config.context})"
            )
        self.config = config.model_copy(update={"buffer_tokens": self.buffer_tokens, "buffer_gb": None})
        self.watch = Stopwatch(self.source.device)
        self._sequences = config.mode == "sequences"
        self.dropped = {"special": 0, "high_norm": 0}
        self._filling: ProgressBar | None = None
        self._generator = torch.Generator().manual_seed(seed)
        try:
            self._buffer = RingBuffer(
                self.buffer_tokens // (self.positions if self._sequences else 1), self.source.widths,
                dtype, self.source.device, self._fill, self._generator,
                context=self.positions if self._sequences else None, grouped=config.mode == "grouped",
            )  # fmt: skip
        except RuntimeError:  # torch's word for out of memory
            raise UserError(
                f"stream.buffer_tokens: {self.buffer_tokens} is not allowed; "
                f"it takes {self.buffer_tokens * item / 2**30:,.1f} GiB, more than {self.source.device} has"
            ) from None

    def _live(self, config: StreamConfig, hooks: Sequence[str]) -> Live:
        self.config = config
        if hooks:
            self.model.use(hooks=hooks)
        if config.context > self.model.context:
            raise UserError(
                f"stream.context: {config.context} is not allowed; {config.model} has at most {self.model.context}"
            )
        return Live(self.model, self.text, config.context, config.rows_per_forward, self.ranks)

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
        return self._model

    @property
    def text(self) -> RowSource:
        """The rows of text; with a cache, opened when they are first asked for, at their beginning."""
        if self._text is None:
            config = self.config
            self._text = open_text(
                config.data, config.model, self.model.tokenizer, config.context, seed=self._text_seed,
                packing=config.packing, text_field=config.text_field, repeat=config.repeat,
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

    def config_at(self, own: StreamConfig) -> StreamConfig:
        """The settings, with the places that a dictionary of these looks at."""
        places = {"hook": own.hook or self.config.hook, "target": own.target, "second": own.second}
        return self.config.model_copy(update=places)

    def attribute(self, batch: Batch) -> Tensor:
        """A binary attribute of each token [N], int64, that a dictionary is not to be about: of the embedded language the
        tone of its document, which goes with the topic; elsewhere, where nothing is labelled, whether the token is in the
        second half of the row."""
        if self.own is not None or not isinstance(self.text, TestbedRows):
            return (batch.pos >= self.positions // 2).long()
        documents, back = batch.document.cpu().unique(return_inverse=True)
        for number in documents.tolist():
            if number not in self._attributes:
                self._attributes[number] = self.text.language.document(number).tone
        found = torch.tensor([self._attributes[number] for number in documents.tolist()])
        return found[back].to(batch.pos.device)

    def next(self, n: int) -> Batch:
        """The next `n` tokens (in sequences: n // T rows), without replacement from the buffer; fewer, or none, where the
        text has ended."""
        if n > self.buffer_tokens // 2:
            raise UserError(
                f"stream.buffer_tokens: {self.buffer_tokens} is not allowed; it must be at least twice the batch ({n})"
            )
        self._begin()
        return self._buffer.next(max(1, n // self.positions) if self._sequences else n)

    def sample(self) -> Batch:
        """What the buffer holds, [N, D], at most 65536 items: for means and the like. Changes nothing in what comes."""
        self._begin()
        return self._buffer.contents(65536 // (self.positions if self._sequences else 1)).flat()

    def held_out(self, rows: int) -> Iterator[TokenRows]:
        """Rows of text that training never sees, `rows_per_forward` at a time: `rows` of them, or all that there are."""
        return self.text.held_out(rows, self.config.rows_per_forward)

    def held_out_batches(self, rows: int) -> list[Batch]:
        """The activations of such rows at the model's hooks, tokens that count, row after row."""
        found = []
        for text in self.held_out(rows):
            kept = self.keep(text).to(self.source.device)
            row, pos = kept.nonzero(as_tuple=True)
            acts = {hook: x[kept] for hook, x in self.model.harvest(text.tokens).items()}
            places = (value.to(kept.device)[kept] for value in (text.tokens, text.document))
            token, document = places
            found.append(Batch(acts, pos.int(), token.int(), document.long(), text.row.to(row.device)[row].long()))
        return found

    def keep(self, rows: TokenRows) -> Tensor:
        """Which positions [B, T] count: no padding, and no special tokens where `drop_special`."""
        kept = is_text(rows)
        return kept & ~torch.isin(rows.tokens, self.source.special) if self.config.drop_special else kept

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
            with progress_bar("filling the buffer", total=self.buffer_tokens, unit="tokens") as self._filling:
                found = self._buffer.contents()
            self._filling = None
            if not len(found):
                self._refuse(self.counts.get("tokens", 0))

    def _fill(self) -> Batch | None:
        """The source's next activations, filtered; sequences in rows of T."""
        trim_host()
        read, epoch = 0, self.source.counts["epoch"]
        while True:
            with self.watch(self.source.label):
                fresh = self.source.next()
            if fresh is None:
                return None
            kept = self._kept(fresh)
            if bool(kept.any()):
                break
            read += len(fresh)
            if read > GIVE_UP or self.source.counts["epoch"] > epoch + 1:
                self._refuse(read)
        if self._filling is not None:
            self._filling.advance(int(kept.sum()))
        fresh = replace(fresh, kept=kept)
        return self._in_rows(fresh) if self._sequences else fresh.flat()

    def _refuse(self, read: int) -> NoReturn:
        filters = "(see stream.drop_special and stream.max_norm)"
        raise UserError(f"data: {self.source.name} holds no token to train on, {read:,} read {filters}")

    def _kept(self, fresh: Batch) -> Tensor:
        """Which tokens [M] the filters leave, on the CPU."""
        kept = torch.ones(len(fresh), dtype=torch.bool)
        if self.config.drop_special and fresh.kept is not None:
            kept = fresh.kept
            self.dropped["special"] += int((~kept).sum())
        if self.config.max_norm is not None:
            for x in fresh.acts.values():
                norm = x.float().norm(dim=1).cpu()
                high = kept & (norm > self.config.max_norm * norm[kept].median())
                self.dropped["high_norm"] += int(high.sum())
                kept = kept & ~high
        return kept

    def _in_rows(self, fresh: Batch) -> Batch:
        """[M] tokens of some rows as [B, T], zeros where there are none."""
        _, row = fresh.row.cpu().unique_consecutive(return_inverse=True)
        at = row * self.positions + fresh.pos.cpu()
        count = int(row[-1]) + 1

        def spread(value: Tensor) -> Tensor:
            empty = value.new_zeros(count * self.positions, *value.shape[1:])
            return empty.index_copy_(0, at.to(value.device), value).unflatten(0, (count, self.positions))

        return fresh.each(spread)

    def alone(self) -> None:
        """Go on in this process by itself."""
        self.ranks = ALONE
        if isinstance(self.source, Live):
            self.source.ranks = ALONE

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on exactly here: buffer, order, random state, place in the text."""
        found = self._buffer.state() | {f"source.{key}": value for key, value in self.source.state().items()}
        return found | {
            "random": self._generator.get_state(), "dropped": torch.tensor(list(self.dropped.values()))
        }  # fmt: skip

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._buffer.load_state(state)
        self.source.load_state(
            {key.removeprefix("source."): value for key, value in state.items() if key.startswith("source.")}
        )
        self._generator.set_state(state["random"].cpu())
        self.dropped = dict(zip(self.dropped, state["dropped"].tolist(), strict=True))
