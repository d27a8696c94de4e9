"""The ring buffer: a fixed set of slots, mixed, in which every activation keeps its position, token, document and row."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UserError
from .narrow import LARGEST, narrowed, raw, widen_

PLACES = {"pos": torch.int32, "token": torch.int32, "document": torch.int64, "row": torch.int64}


@dataclass
class Batch:
    """Activations and where each came from.

    `acts`: hook -> [N, D]; `pos`, `token` [N] int32; `document`, `row` [N] int64: item n is the activation of `token[n]` at
    position `pos[n]` of row `row[n]` of the text, and the token is part of `document[n]`. A batch of sequences has [B, T]
    in place of [N]. `kept`, bool and on the CPU, says which of its tokens count: not padding, nor filtered out. `attribute`:
    what `ActivationStream.attribute` gives, where something asks for it.
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
        """Activations x [..., D] at pos [...] of unknown tokens: token and document are -1, each item a row of its own."""
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
        """Those at the last hook: what a transcoder is to give."""
        return list(self.acts.values())[-1]

    def at(self, *hooks: str) -> "Batch":
        """The same with these hooks only, in this order."""
        return replace(self, acts={hook: self.acts[hook] for hook in hooks})

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """`change` done to every tensor."""
        acts = {hook: change(x) for hook, x in self.acts.items()}
        kept, attribute = (None if value is None else change(value) for value in (self.kept, self.attribute))
        return Batch(acts, *(change(getattr(self, name)) for name in PLACES), kept=kept, attribute=attribute)

    def __getitem__(self, at: Tensor | slice) -> "Batch":
        return self.each(lambda value: value[at])

    def clone(self) -> "Batch":
        """A copy that the next batch doesn't overwrite."""
        return self.each(Tensor.clone)

    def flat(self) -> "Batch":
        """The tokens that are `kept`, [N]; those of sequences row after row."""
        if self.kept is None:
            return self
        dims = self.kept.ndim - 1
        kept = self.kept.flatten().nonzero().flatten().to(self.pos.device, non_blocking=True)
        return replace(self, kept=None).each(lambda value: value.flatten(0, dims).index_select(0, kept))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, activations as `acts.HOOK`; `from_tensors` undoes it."""
        found = {f"acts.{hook}": x for hook, x in self.acts.items()} | {name: getattr(self, name) for name in PLACES}
        return found if self.kept is None else found | {"kept": self.kept}

    @classmethod
    def from_tensors(cls, found: dict[str, Tensor]) -> "Batch":
        acts = {key.removeprefix("acts."): value for key, value in found.items() if key.startswith("acts.")}
        return cls(acts, *(found[name] for name in PLACES), kept=found.get("kept"))


class RingBuffer:
    """Serves its slots in random order; when half are served, those have been filled again, and all are permuted anew.

    `fill` gives fresh items, some at a time, or None when there are no more: then what is left is served to its end. An item
    is an activation or, with `context`, a whole sequence. Memory is taken once: capacity * (bytes of an item); batches are
    gathered into memory that is used again, with `grouped` in order of their positions. With `dtype` int8 or float8_e4m3fn
    slots hold codes and scales (`narrow`), and batches are bfloat16. Served slots are filled while the others are being
    served; on a GPU by a stream of its own, so that the language model runs beside the training step, and nothing waits but
    a permutation. Once `wanted` items have been put in, the rest is served to its end before any more are asked for. What
    comes depends on the items, not on how many `fill` gives at a time.
    """

    def __init__(
        self, capacity: int, widths: dict[str, int], dtype: torch.dtype, device: torch.device,
        fill: Callable[[], Batch | None], generator: torch.Generator, *, context: int | None = None, grouped: bool = False,
        wanted: int | None = None,
    ):  # fmt: skip
        self._wanted, self._put_in = wanted, 0
        self.capacity, self._fill, self._generator, self._grouped = capacity, fill, generator, grouped
        self._device, self._dtype, self._widths = device, dtype, widths
        self._shape = () if context is None else (context,)
        self._slots = self._empty(capacity, dtype)
        self._scales: dict[str, Tensor] = {}
        if dtype in LARGEST:
            self._dtype = torch.bfloat16
            self._scales = {hook: torch.zeros(capacity, *self._shape, device=device) for hook in widths}
        self._squares = torch.zeros(
            2, dtype=torch.float64, device=device
        )  # of rounding errors, and of what was rounded
        self._out: Batch | None = None
        self._left: Batch | None = None  # fresh items for which there was no slot
        # Of the order, _at items are served, and as many as _filled of their slots hold fresh ones again.
        self._order = torch.arange(capacity)
        self._order_there = self._order.to(device)
        self._at, self._filled = capacity, 0
        self._chunk = 0  # items that `fill` gave last
        # _ended: `fill` has no more. _final: nothing is put in before all that was there at the last permutation is served.
        self.begun = self._ended = self._final = False
        self._finite = torch.ones((), dtype=torch.bool, device=device)  # all that was filled since the permutation
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def next(self, n: int) -> Batch:
        """The next n items, without replacement; fewer, or none, at the end. Overwritten by the next call."""
        if self._final and not self._ended and self._at + n > len(self._order):
            self._want_more()
        if not self.begun or (not self._final and self._at >= len(self._order) // 2):
            self._permute()
        at = slice(self._at, min(self._at + n, len(self._order)))
        batch = self._gather(at)
        self._at = at.stop
        self._refill(self._at - self._chunk)
        return batch

    def contents(self, most: int | None = None) -> Batch:
        """Every item, or so many of them, in slot order. Fills the buffer if nothing has."""
        if not self.begun:
            self._permute()
        here = self._order.sort().values[:most]
        if not self._scales and len(here) == self.capacity:
            return self._slots
        out = self._empty(len(here), self._dtype)
        self._take(here, here.to(self._device), out)
        return out

    def _want_more(self) -> None:
        """Go on past `wanted`: from now on every free slot is filled again."""
        left = self._order[self._at :]
        free = torch.ones(self.capacity, dtype=torch.bool).index_fill_(0, left, False).nonzero().flatten()
        self._order = torch.cat([free, left])
        self._order_there = self._order.to(self._device)
        self._at, self._filled, self._wanted, self._final = len(free), 0, None, False

    @property
    def rounding(self) -> float:
        """Squared error of what the slots hold over the squared norm of what was given, so far. Waits for the device."""
        error, size = self._squares.tolist()
        return error / size if size else 0.0

    def _empty(self, n: int, dtype: torch.dtype) -> Batch:
        shape = (n, *self._shape)
        acts = {hook: torch.empty(*shape, d, dtype=dtype, device=self._device) for hook, d in self._widths.items()}
        places = {name: torch.empty(shape, dtype=kind, device=self._device) for name, kind in PLACES.items()}
        return Batch(acts, **places, kept=torch.zeros(shape, dtype=torch.bool) if self._shape else None)

    def _gather(self, at: slice) -> Batch:
        n = at.stop - at.start
        if self._out is None or len(self._out) < n:
            self._out = self._empty(n, self._dtype)
        here, there = self._order[at], self._order_there[at]
        if self._grouped:
            there = there[self._slots.pos[there].argsort(stable=True)]
        batch = self._out[slice(n)]
        self._take(here, there, batch)
        return batch

    def _take(self, here: Tensor, there: Tensor, batch: Batch) -> None:
        """Gather slots into `batch`; their numbers on the CPU and on the device."""
        for hook, slots in self._slots.acts.items():
            if self._scales:
                codes = raw(slots)[there].view(slots.dtype)
                widen_(batch.acts[hook], codes, self._scales[hook][there])
            else:
                torch.index_select(_wide(slots), 0, there, out=_wide(batch.acts[hook]))
        for name in PLACES:
            torch.index_select(getattr(self._slots, name), 0, there, out=getattr(batch, name))
        if self._slots.kept is not None and batch.kept is not None:
            torch.index_select(self._slots.kept, 0, here, out=batch.kept)

    def _refill(self, until: int) -> None:
        """Fill served slots until so many of them are, if there is so much that is fresh."""
        until = min(until, self._filled + self._missing)
        if self._filled >= until or self._ended:
            return
        if self._side is None:
            self._put(until)
        else:  # the slots have been read by what was launched before, and by nothing after
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._side):
                self._put(until)

    def _put(self, until: int) -> None:
        while self._filled < until:
            fresh = self._left if self._left is not None else self._fill()
            if fresh is None:
                self._ended = True
                return
            self._chunk = len(fresh)
            count = min(len(fresh), self._at - self._filled, self._missing)
            here, there = (order[self._filled : self._filled + count] for order in (self._order, self._order_there))
            for hook, slots in self._slots.acts.items():
                x = fresh.acts[hook][:count]
                # A sum is ten times as fast as a look at each. Where finite values overflow it, `_refuse` finds none.
                self._finite &= x.sum().isfinite()
                if self._scales:
                    codes, scale = narrowed(x, slots.dtype)
                    raw(slots).index_copy_(0, there, raw(codes))
                    self._scales[hook].index_copy_(0, there, scale)
                    error = codes.float() * scale[..., None] - x.float()
                    self._squares += torch.stack([error.double().square().sum(), x.double().square().sum()])
                else:
                    _wide(slots).index_copy_(0, there, _wide(x.to(slots.dtype).contiguous()))
            for name in PLACES:
                getattr(self._slots, name).index_copy_(0, there, getattr(fresh, name)[:count])
            if self._slots.kept is not None and fresh.kept is not None:
                self._slots.kept.index_copy_(0, here, fresh.kept[:count])
            self._left = fresh[slice(count, None)] if count < len(fresh) else None
            self._filled += count
            self._put_in += count

    @property
    def _missing(self) -> int:
        """How many items are yet to be put in, of those wanted."""
        return self.capacity if self._wanted is None else self._wanted - self._put_in

    def _permute(self) -> None:
        """Fill what is free, and put all that is there into a new order."""
        self._refill(self._at)
        self._final = self._ended or not self._missing
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)
        filled = torch.cat([self._order[: self._filled], self._order[self._at :]])
        self._order = torch.randperm(len(filled), generator=self._generator)
        if len(filled) < self.capacity:  # else they are all there are
            self._order = filled.sort().values[self._order]
        self._order_there = self._order.to(self._device)
        self._at, self._filled, self.begun = 0, 0, True
        if not self._finite:
            self._refuse()
            self._finite.fill_(True)

    def _refuse(self) -> None:
        """Name the first activations that are not finite, by row and position."""
        items = self.contents()
        for hook, x in items.acts.items():
            bad = ~x.isfinite().all(-1)
            if bool(bad.any()):
                row, pos, document = (value[bad] for value in (items.row, items.pos, items.document))
                first = int((row * 2**31 + pos).argmin())
                raise UserError(
                    f"activations: {int(bad.sum())} of {bad.numel()} at {hook} are NaN or infinite, the first at "
                    f"position {int(pos[first])} of document {int(document[first])}; they must be finite"
                )

    def state(self) -> dict[str, Tensor]:
        """Everything that is needed to go on exactly here."""
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)
        found = {f"slots.{key}": value for key, value in self._slots.tensors().items()}
        found |= {f"scales.{hook}": scale for hook, scale in self._scales.items()} | {"squares": self._squares}
        if self._left is not None:
            found |= {f"left.{key}": value for key, value in self._left.tensors().items()}
        wanted = -1 if self._wanted is None else self._wanted
        numbers = (self._at, self._filled, self._chunk, self.begun, self._ended, self._put_in, wanted, self._final)
        return found | {"order": self._order, "numbers": torch.tensor(numbers)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        left = {key: value for key, value in state.items() if key.startswith("left.")}
        for key, slots in self._slots.tensors().items():
            slots.copy_(state[f"slots.{key}"])
        for hook, scale in self._scales.items():
            scale.copy_(state[f"scales.{hook}"])
        self._squares.copy_(state["squares"])
        there = {"left.kept": torch.device("cpu")}
        found = {k.removeprefix("left."): value.to(there.get(k, self._device)) for k, value in left.items()}
        self._left = Batch.from_tensors(found) if found else None
        self._order = state["order"]
        self._order_there = self._order.to(self._device)
        numbers = state["numbers"].tolist()
        numbers += (0, -1, 0)[len(numbers) - 5 :]  # version 0.1.0 had the first five
        self._at, self._filled, self._chunk, begun, ended, self._put_in, wanted, final = numbers
        self._wanted = None if wanted < 0 else wanted
        self.begun, self._ended, self._final = bool(begun), bool(ended), bool(final)


def _wide(items: Tensor) -> Tensor:
    """The same memory in elements of 8 bytes where they fit: on a CPU torch copies rows of those twice as fast."""
    fits = items.ndim > 1 and items.shape[-1] * items.itemsize % 8 == 0
    return items.view(torch.int64) if fits else items
