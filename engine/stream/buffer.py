"""Batches of activations with their positions, tokens, documents and rows, and the ring buffer that mixes them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UserError
from .quantize import LARGEST, narrowed, raw, widen_

PLACES = {"pos": torch.int32, "token": torch.int32, "document": torch.int64, "row": torch.int64}


@dataclass
class Batch:
    """Activations and their origin.

    `acts` maps hooks to [N, D]. `pos`, `token` [N] int32 and `document`, `row` [N] int64: activation n belongs to
    `token[n]` at position `pos[n]` of row `row[n]`, in `document[n]`. Batches of sequences have [B, T] in place of [N].
    `kept` (bool, on the CPU) is false for padding and filtered tokens. `attribute` is that of
    `ActivationStream.attribute`, if requested.
    """

    acts: dict[str, Tensor]
    pos: Tensor
    token: Tensor
    document: Tensor
    row: Tensor
    kept: Tensor | None = None
    attribute: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, pos: Tensor) -> "Batch":
        """A batch of x [..., D] at pos [...] with unknown tokens and documents (-1), each activation in its own row."""
        nowhere = torch.full_like(pos, -1)
        row = torch.arange(pos.numel(), device=pos.device).view(pos.shape)
        return cls({"x": x}, pos.int(), nowhere.int(), nowhere.long(), row)

    def __len__(self) -> int:
        return len(self.pos)

    @property
    def x(self) -> Tensor:
        """The activations at the first hook."""
        return next(iter(self.acts.values()))

    @property
    def target(self) -> Tensor:
        """The activations at the last hook, which a transcoder predicts."""
        return next(reversed(self.acts.values()))

    def at(self, *hooks: str) -> "Batch":
        """The same batch with only these hooks, in this order."""
        return replace(self, acts={hook: self.acts[hook] for hook in hooks})

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply `change` to every tensor."""
        acts = {hook: change(x) for hook, x in self.acts.items()}
        kept, attribute = (None if value is None else change(value) for value in (self.kept, self.attribute))
        return Batch(acts, *(change(getattr(self, name)) for name in PLACES), kept=kept, attribute=attribute)

    def __getitem__(self, index: Tensor | slice) -> "Batch":
        return self.each(lambda value: value[index])

    def clone(self) -> "Batch":
        """A copy, which the next batch does not overwrite."""
        return self.each(Tensor.clone)

    def flat(self) -> "Batch":
        """The `kept` tokens as [N], row after row."""
        if self.kept is None:
            return self
        dims = self.kept.ndim - 1
        kept = self.kept.flatten().nonzero().flatten().to(self.pos.device, non_blocking=True)
        return replace(self, kept=None).each(lambda value: value.flatten(0, dims).index_select(0, kept))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors but `attribute` by name, activations as `acts.HOOK`; the inverse of `from_tensors`."""
        tensors = {f"acts.{hook}": x for hook, x in self.acts.items()} | {name: getattr(self, name) for name in PLACES}
        return tensors if self.kept is None else tensors | {"kept": self.kept}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Batch":
        return cls(with_prefix(tensors, "acts."), *(tensors[name] for name in PLACES), kept=tensors.get("kept"))


class RingBuffer:
    """A fixed set of slots, served in random order without replacement.

    Served slots are refilled while the others are served. When half are served, all slots are permuted again. An item
    is an activation or, with `context`, a sequence. `fill` returns some fresh items, or None at the end, after which
    the remaining items are served. Once `item_limit` items were put in, those are served before `fill` is called again.
    Batches depend on the items, not on how many of them `fill` returns at a time.

    Slots are allocated once, capacity * (bytes per item), and batches reuse their memory; `grouped` sorts a batch by
    position. With `dtype` int8 or float8_e4m3fn slots hold codes and scales (`quantize`), and batches are bfloat16. On
    a GPU, slots are refilled on a side stream, so that the language model runs concurrently with training.
    """

    def __init__(
        self, capacity: int, widths: dict[str, int], dtype: torch.dtype, device: torch.device,
        fill: Callable[[], Batch | None], generator: torch.Generator, *, context: int | None = None,
        grouped: bool = False, item_limit: int | None = None,
    ):  # fmt: skip
        self._item_limit, self._items_put = item_limit, 0
        self.capacity, self._fill, self._generator, self._grouped = capacity, fill, generator, grouped
        self._device, self._dtype, self._widths = device, dtype, widths
        self._item_shape = () if context is None else (context,)
        self._slots = self._empty_batch(capacity, dtype)
        self._scales: dict[str, Tensor] = {}
        if dtype in LARGEST:
            self._dtype = torch.bfloat16
            self._scales = {hook: torch.zeros(capacity, *self._item_shape, device=device) for hook in widths}
        self._squares = torch.zeros(2, dtype=torch.float64, device=device)  # sums of error^2 and x^2 of rounded slots
        self._batch_memory: Batch | None = None
        self._surplus: Batch | None = None  # fresh items that found no free slot
        # the first _served slots of the order are served, and the first _refilled of those hold fresh items
        self._set_order(torch.arange(capacity), served=capacity)
        self._last_fill_size = 0  # items that `fill` last returned
        # _ended: `fill` has no more items. _final: no item is put in until all that are there have been served.
        self.begun = self._ended = self._final = False
        self._all_finite = torch.ones((), dtype=torch.bool, device=device)  # of the items put in since the permutation
        self._side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def next(self, n: int) -> Batch:
        """Draw the next n items; fewer, or none, at the end. The next call overwrites the batch."""
        if self._final and not self._ended and self._served + n > len(self._order):
            self._lift_item_limit()
        if not self.begun or (not self._final and self._served >= len(self._order) // 2):
            self._permute()
        span = slice(self._served, min(self._served + n, len(self._order)))
        batch = self._gather(span)
        self._served = span.stop
        self._refill(self._served - self._last_fill_size)
        return batch

    def contents(self, limit: int | None = None) -> Batch:
        """The items in slot order, at most `limit`. Fills the buffer on first use."""
        if not self.begun:
            self._permute()
        cpu_index = self._order.sort().values[:limit]
        if not self._scales and len(cpu_index) == self.capacity:
            return self._slots
        batch = self._empty_batch(len(cpu_index), self._dtype)
        self._gather_into(cpu_index, cpu_index.to(self._device), batch)
        return batch

    def _lift_item_limit(self) -> None:
        """Continue past `item_limit`: refill every free slot from now on."""
        unserved = self._order[self._served :]
        free_slots = torch.ones(self.capacity, dtype=torch.bool).index_fill_(0, unserved, False).nonzero().flatten()
        self._set_order(torch.cat([free_slots, unserved]), served=len(free_slots))
        self._item_limit, self._final = None, False

    def _set_order(self, order: Tensor, served: int) -> None:
        self._order, self._device_order = order, order.to(self._device)
        self._served, self._refilled = served, 0

    @property
    def rounding(self) -> float:
        """Squared rounding error of all slots so far, relative to the squared norm. Synchronises with the device."""
        squared_error, squared_norm = self._squares.tolist()
        return squared_error / squared_norm if squared_norm else 0.0

    def _empty_batch(self, n: int, dtype: torch.dtype) -> Batch:
        shape = (n, *self._item_shape)
        acts = {hook: torch.empty(*shape, d, dtype=dtype, device=self._device) for hook, d in self._widths.items()}
        places = {name: torch.empty(shape, dtype=dtype, device=self._device) for name, dtype in PLACES.items()}
        return Batch(acts, **places, kept=torch.zeros(shape, dtype=torch.bool) if self._item_shape else None)

    def _gather(self, span: slice) -> Batch:
        n = span.stop - span.start
        if self._batch_memory is None or len(self._batch_memory) < n:
            self._batch_memory = self._empty_batch(n, self._dtype)
        cpu_index, device_index = self._order[span], self._device_order[span]
        if self._grouped:
            device_index = device_index[self._slots.pos[device_index].argsort(stable=True)]
        batch = self._batch_memory[slice(n)]
        self._gather_into(cpu_index, device_index, batch)
        return batch

    def _gather_into(self, cpu_index: Tensor, device_index: Tensor, batch: Batch) -> None:
        """Gather slots into `batch`. Both indices hold the same slots, except for their order if `grouped`."""
        for hook, slots in self._slots.acts.items():
            if self._scales:
                codes = raw(slots)[device_index].view(slots.dtype)
                widen_(batch.acts[hook], codes, self._scales[hook][device_index])
            else:
                torch.index_select(_as_int64(slots), 0, device_index, out=_as_int64(batch.acts[hook]))
        for name in PLACES:
            torch.index_select(getattr(self._slots, name), 0, device_index, out=getattr(batch, name))
        if self._slots.kept is not None and batch.kept is not None:
            torch.index_select(self._slots.kept, 0, cpu_index, out=batch.kept)

    def _refill(self, target: int) -> None:
        """Fill served slots until `target` of them hold fresh items, as far as there are any."""
        target = min(target, self._refilled + self._items_missing)
        if self._refilled >= target or self._ended:
            return
        if self._side_stream is None:
            self._put_fresh(target)
        else:  # kernels that read these slots were all launched before
            self._side_stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._side_stream):
                self._put_fresh(target)

    def _put_fresh(self, target: int) -> None:
        while self._refilled < target:
            fresh = self._surplus if self._surplus is not None else self._fill()
            if fresh is None:
                self._ended = True
                return
            self._last_fill_size = len(fresh)
            count = min(len(fresh), self._served - self._refilled, self._items_missing)
            span = slice(self._refilled, self._refilled + count)
            cpu_index, device_index = self._order[span], self._device_order[span]
            for hook, slots in self._slots.acts.items():
                x = fresh.acts[hook][:count]
                # ten times faster than checking each value; if finite values overflow the sum, `_refuse` finds none
                self._all_finite &= x.sum().isfinite()
                if self._scales:
                    codes, scale = narrowed(x, slots.dtype)
                    raw(slots).index_copy_(0, device_index, raw(codes))
                    self._scales[hook].index_copy_(0, device_index, scale)
                    error = codes.float() * scale[..., None] - x.float()
                    self._squares += torch.stack([error.double().square().sum(), x.double().square().sum()])
                else:
                    _as_int64(slots).index_copy_(0, device_index, _as_int64(x.to(slots.dtype).contiguous()))
            for name in PLACES:
                getattr(self._slots, name).index_copy_(0, device_index, getattr(fresh, name)[:count])
            if self._slots.kept is not None and fresh.kept is not None:
                self._slots.kept.index_copy_(0, cpu_index, fresh.kept[:count])
            self._surplus = fresh[slice(count, None)] if count < len(fresh) else None
            self._refilled += count
            self._items_put += count

    @property
    def _items_missing(self) -> int:
        return self.capacity if self._item_limit is None else self._item_limit - self._items_put

    def _permute(self) -> None:
        self._refill(self._served)
        self._final = self._ended or not self._items_missing
        if self._side_stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side_stream)
        filled_slots = torch.cat([self._order[: self._refilled], self._order[self._served :]])
        order = torch.randperm(len(filled_slots), generator=self._generator)
        self._set_order(filled_slots.sort().values[order], served=0)
        self.begun = True
        if not self._all_finite:
            self._refuse()
            self._all_finite.fill_(True)

    def _refuse(self) -> None:
        """Raise UserError, naming the first activation that is not finite, if there is one."""
        items = self.contents()
        for hook, x in items.acts.items():
            is_bad = ~x.isfinite().all(-1)
            if bool(is_bad.any()):
                row, pos, document = (value[is_bad] for value in (items.row, items.pos, items.document))
                first = int((row * 2**31 + pos).argmin())
                raise UserError(
                    f"activations: {int(is_bad.sum())} of {is_bad.numel()} at {hook} are NaN or infinite, the first at "
                    f"position {int(pos[first])} of document {int(document[first])}; they must be finite"
                )

    def state(self) -> dict[str, Tensor]:
        if self._side_stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side_stream)
        state = {f"slots.{key}": value for key, value in self._slots.tensors().items()}
        state |= {f"scales.{hook}": scale for hook, scale in self._scales.items()} | {"squares": self._squares}
        if self._surplus is not None:
            state |= {f"left.{key}": value for key, value in self._surplus.tensors().items()}
        item_limit = -1 if self._item_limit is None else self._item_limit
        numbers = [self._served, self._refilled, self._last_fill_size, self.begun, self._ended]
        numbers += [self._items_put, item_limit, self._final]
        return state | {"order": self._order, "numbers": torch.tensor(numbers)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for key, slots in self._slots.tensors().items():
            slots.copy_(state[f"slots.{key}"])
        for hook, scale in self._scales.items():
            scale.copy_(state[f"scales.{hook}"])
        self._squares.copy_(state["squares"])
        surplus = with_prefix(state, "left.")
        surplus = {key: value.to("cpu" if key == "kept" else self._device) for key, value in surplus.items()}
        self._surplus = Batch.from_tensors(surplus) if surplus else None
        self._set_order(state["order"], served=0)
        numbers = state["numbers"].tolist()
        numbers += (0, -1, 0)[len(numbers) - 5 :]  # version 0.1.0 stored the first five
        self._served, self._refilled, self._last_fill_size, begun, ended, self._items_put, item_limit, final = numbers
        self._item_limit = None if item_limit < 0 else item_limit
        self.begun, self._ended, self._final = bool(begun), bool(ended), bool(final)


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, by the rest of their name."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _as_int64(items: Tensor) -> Tensor:
    """The same memory as 8-byte elements, if they fit: torch copies rows of those twice as fast on a CPU."""
    fits = items.ndim > 1 and items.shape[-1] * items.itemsize % 8 == 0
    return items.view(torch.int64) if fits else items
