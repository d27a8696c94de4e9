"""Held-out text for `core`: activations read once for all dictionaries, and the model's losses with them replaced.

The text goes through the model up to the hook once. Up to `HELD` bytes of activations are kept, and the rest is read again
when it is needed. The layers after the hook run once for each replacement (`HeldOut.replace`).
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.errors import UserError
from ..engine.process.progress import progress_bar
from ..engine.storage.sealed import read_json, write_json
from ..engine.stream import ActivationStream, TokenRows
from ..engine.stream.norm_filter import has_variance
from ..kernels.numerics import sum_by
from .replacement_loss import losses_and_kl, rows_at_once
from .row_budget import CE_ROWS, ROWS, Cost, forecast, pace_of_training

#: x [n, D], pos [n] -> x_hat [n, D]
Reconstruct = Callable[[Tensor, Tensor], Tensor]
HELD = 2**29  # bytes of activations that are kept
SAEBENCH_ROWS = 16  # in a batch, by SAEBench's default
EVERYWHERE = "zero_everywhere"  # SAEBench's ablation
PARTIAL, SAVE_SECONDS = "temposae-effects/1", 10  # format of `SavedEffects`, and the least time between two writes


@dataclass
class RowBatch:
    """Rows of text from number `first` on, with activations at the input's and the target's hook [B, T, D], and `kept`
    [B, T]: which tokens count.

    For the n tokens that count: x [n, D], target [n, D_out], pos [n] in the row, and row [n] among all evaluated rows.
    """

    rows: TokenRows
    first: int
    kept: Tensor
    acts: tuple[Tensor, Tensor]

    @property
    def x(self) -> Tensor:
        return self.acts[0][self.kept].float()

    @property
    def target(self) -> Tensor:
        return self.acts[1][self.kept].float()

    @property
    def pos(self) -> Tensor:
        return self.kept.nonzero()[:, 1]

    @property
    def row(self) -> Tensor:
        return self.first + self.kept.nonzero()[:, 0]

    def slice(self, start: int, stop: int) -> "RowBatch":
        inputs, targets = (acts[start:stop] for acts in self.acts)
        return RowBatch(self.rows.slice(start, stop), self.first + start, self.kept[start:stop], (inputs, targets))

    def joined(self, other: "RowBatch") -> "RowBatch":
        """These rows, followed by the others."""
        inputs, targets = (torch.cat(pair) for pair in zip(self.acts, other.acts, strict=True))
        return RowBatch(self.rows.joined(other.rows), self.first, torch.cat([self.kept, other.kept]), (inputs, targets))


def in_batches_of(size: int, batches: Iterator[RowBatch]) -> Iterator[RowBatch]:
    """Regroup rows into batches of `size`."""
    rest: RowBatch | None = None
    for batch in batches:
        rows = batch if rest is None else rest.joined(batch)
        whole = len(rows.kept) // size * size
        for start in range(0, whole, size):
            yield rows.slice(start, start + size)
        rest = rows.slice(whole, len(rows.kept)) if whole < len(rows.kept) else None
    if rest is not None:
        yield rest


@dataclass
class Effect:
    """The effect of a replacement on the model: number, loss and KL of tokens that have a next one, summed by position
    [3, T] and by row [3, R]. `kl_of_all` is the KL summed over all `tokens`."""

    by_position: Tensor
    by_row: Tensor
    tokens: int = 0
    kl_of_all: float = 0.0


class SavedEffects:
    """The effects measured so far, in a file beside the results of a run: an interrupted evaluation continues after the last
    rows in it. `key` says what they depend on."""

    def __init__(self, path: Path, key: Mapping[str, Any]):
        self.path, self.key, self._saved_at = path, dict(key), time.monotonic()

    def load(self, effects: dict[str, Effect], rows: int) -> int:
        """Fill in the effects; returns how many rows they are of, 0 if the file is of something else or damaged."""
        try:
            saved = read_json(self.path, "core", "", form=PARTIAL)
        except UserError:
            return 0
        if saved["key"] != self._key(effects, rows):
            return 0
        for name, effect in effects.items():
            by_position, by_row, effect.tokens, effect.kl_of_all = saved["effects"][name]
            effect.by_position.copy_(torch.tensor(by_position, dtype=torch.float64))
            effect.by_row.copy_(torch.tensor(by_row, dtype=torch.float64))
        return saved["rows"]

    def save(self, effects: dict[str, Effect], rows: int, done: int) -> None:
        """Write the effects of the first `done` rows, at most every `SAVE_SECONDS`. Raises OSError."""
        if time.monotonic() - self._saved_at < SAVE_SECONDS:
            return
        values = {
            name: (effect.by_position.tolist(), effect.by_row.tolist(), effect.tokens, effect.kl_of_all)
            for name, effect in effects.items()
        }
        if all(effect.by_row.isfinite().all() and math.isfinite(effect.kl_of_all) for effect in effects.values()):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            saved = {"format": PARTIAL, "key": self._key(effects, rows), "rows": done, "effects": values}
            write_json(self.path, saved)
        self._saved_at = time.monotonic()

    def _key(self, effects: dict[str, Effect], rows: int) -> dict[str, Any]:
        """As it reads back from JSON."""
        return json.loads(json.dumps({**self.key, "replacements": sorted(effects), "ce_rows": rows}))


class HeldOut:
    """The first `rows` held-out rows of a stream's text with activations at the stream's hooks, and on the first `ce_rows`
    the model's losses. Read once for all dictionaries that are measured there.

    count int64 [T]: tokens by position; mean float64 [D_out]; spread [T] and spread_of_rows [R]: squared distance to it.
    """

    def __init__(self, stream: ActivationStream, rows: int = ROWS, ce_rows: int = CE_ROWS, latents: Sequence[int] = ()):
        """`latents`: the number of latents of each dictionary to measure, for a forecast of the time."""
        self.stream, self.device = stream, stream.model.device
        self._stored: list[RowBatch] = []
        self._row_limit = rows
        self.pace = pace_of_training(stream)
        if self.pace is not None:
            self._announce(rows, ce_rows, latents)
        T = stream.positions
        self.count, total = torch.zeros(T, dtype=torch.int64, device=self.device), torch.zeros((), device=self.device)
        self.rows, self.squares, size = 0, 0.0, 0
        with progress_bar("evaluation: reading the text", total=rows, unit="rows") as bar:
            began = time.monotonic()
            for batch in self._read():
                if self.pace is None:
                    passes = batch.kept.numel() * Cost.of(stream.model).before
                    self.pace = (time.monotonic() - began) / passes
                    self._announce(rows, ce_rows, latents)
                self.count += torch.bincount(batch.pos, minlength=T)
                total = total + batch.target.double().sum(0)
                self.squares += float(batch.target.double().square().sum())
                self.rows += len(batch.rows)
                size += sum(x.nbytes for x in {id(x): x for x in batch.acts}.values())
                if size <= HELD:
                    self._stored.append(batch)
                bar.advance(len(batch.rows))
        self.tokens, self.ce_rows = int(self.count.sum()), min(ce_rows, self.rows)
        if self.tokens < 2:
            raise UserError(
                f"data: {self.rows} held-out rows hold {self.tokens} tokens to evaluate on; at least 2 are needed"
            )
        self.mean = total / self.tokens
        self.spread = torch.zeros(T, dtype=torch.float64, device=self.device)
        self.spread_of_rows = torch.zeros(self.rows, dtype=torch.float64, device=self.device)
        self._spread_is_known = False
        self.effects: dict[str, Effect] = {}  # of the replacements that don't depend on a dictionary

    @property
    def varies(self) -> bool:
        """Whether there is variance to explain. Known after the first `visit`."""
        return has_variance(float(self.spread.sum()), self.squares)

    def _announce(self, rows: int, ce_rows: int, latents: Sequence[int]) -> None:
        if latents:
            text = forecast(self.stream, rows, min(rows, ce_rows), latents, self.pace)
            print(text, file=sys.stderr, flush=True)

    def _read(self) -> Iterator[RowBatch]:
        first = 0
        for rows in self.stream.held_out(self._row_limit):
            acts, kept = self.stream.read(rows)
            hook_acts = list(acts.values())
            yield RowBatch(rows, first, kept, (hook_acts[0], hook_acts[-1]))
            first += len(rows)

    def batches(self) -> Iterator[RowBatch]:
        """All batches in order: the stored ones, and then the others, read again."""
        yield from self._stored
        stored_rows = sum(len(batch.rows) for batch in self._stored)
        if stored_rows < self.rows:
            yield from (batch for batch in self._read() if batch.first >= stored_rows)

    def visit(self, visitors: Sequence[Callable[[RowBatch], None]]) -> None:
        """Call each of `visitors` with every batch, in one pass over the text."""
        with progress_bar("evaluation: reconstruction", total=self.rows, unit="rows") as bar:
            for batch in in_batches_of(SAEBENCH_ROWS, self.batches()):
                if not self._spread_is_known:
                    distance = (batch.target.double() - self.mean).square().sum(1)
                    self.spread += sum_by(batch.pos, distance, len(self.spread))
                    self.spread_of_rows += sum_by(batch.row, distance, self.rows)
                for visitor in visitors:
                    visitor(batch)
                bar.advance(len(batch.rows))
        self._spread_is_known = True

    def replace(self, by: Mapping[str, Reconstruct], saved: SavedEffects | None = None) -> dict[str, Effect]:
        """Run the model with the activations of tokens that count replaced by these functions of them. The effects of
        `clean`, `zero`, `mean` and zero everywhere are always included, and measured once. Continues what is `saved`."""
        fixed: dict[str, Reconstruct] = {
            "zero": lambda x, pos: torch.zeros_like(self.mean, dtype=x.dtype).expand(len(x), -1),
            "mean": lambda x, pos: self.mean.to(x.dtype).expand(len(x), -1),
        }
        known = bool(self.effects)
        replacements = dict(by) if known else {**fixed, **by}
        names = (*replacements, *(() if known else (EVERYWHERE,)))
        T, R = len(self.count), self.ce_rows
        effects = {name: Effect(torch.zeros(3, T).double(), torch.zeros(3, R).double()) for name in ("clean", *names)}
        size = rows_at_once(self.stream.model, T, len(self.mean), len(names))
        done = 0 if saved is None else saved.load(effects, R)
        passes = 1 + len(names)
        with progress_bar("evaluation: model behaviour", R * passes, "rows", done * passes) as bar:
            for batch in self.batches():
                if batch.first >= R:
                    break
                end = min(len(batch.rows), R - batch.first)
                for start in range(max(0, done - batch.first), end, size):
                    rows = slice(start, min(start + size, end))
                    self._effects_on(batch, rows, replacements, EVERYWHERE in names, effects)
                    bar.advance((rows.stop - rows.start) * passes)
                    if saved is not None:
                        saved.save(effects, R, batch.first + rows.stop)
        if saved is not None:
            saved.path.unlink(missing_ok=True)
        if not known:
            self.effects = {name: effects[name] for name in ("clean", *fixed, EVERYWHERE)}
        return self.effects | effects

    def _effects_on(
        self, batch: RowBatch, rows: slice, by: Mapping[str, Reconstruct], everywhere: bool, effects: dict[str, Effect]
    ) -> None:
        longest = int(batch.rows.length[rows].max())
        kept, tokens = batch.kept[rows, :longest], batch.rows.tokens[rows, :longest]
        x, target = (acts[rows, :longest] for acts in batch.acts)
        row, pos = kept.nonzero(as_tuple=True)
        if not len(row):
            return

        def spliced(reconstruct: Reconstruct) -> Tensor:
            fresh = target.clone()
            fresh[kept] = reconstruct(x[kept].float(), pos).to(fresh.dtype)
            return fresh

        values: dict[str, Callable[[], Tensor]] = {
            name: partial(spliced, reconstruct) for name, reconstruct in by.items()
        }
        if everywhere:
            values[EVERYWHERE] = lambda: torch.zeros_like(target)
        losses = losses_and_kl(self.stream.model, tokens, target, kept, values)
        row, pos = row.cpu(), pos.cpu()
        has_next = (pos + 1 < batch.rows.length[rows][row]).double()
        for name, (loss, kl) in losses.items():
            sums = torch.stack([has_next, loss * has_next, kl * has_next], 1)
            effect = effects[name]
            effect.by_position += sum_by(pos, sums, len(self.count)).T
            effect.by_row += sum_by(batch.first + rows.start + row, sums, self.ce_rows).T
            effect.tokens += len(kl)
            effect.kl_of_all += float(kl.sum())
