"""Tokens -> language model -> ring buffer -> batches, positions kept all the way."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..config import StreamConfig
from ..errors import UserError
from ..host import tune_host
from .buffer import Batch, RingBuffer
from .model import LanguageModel
from .text import RowSource, TokenRows, open_text

__all__ = ["ActivationStream", "Batch", "LanguageModel", "TokenRows"]


class ActivationStream:
    """Activations of a language model at one hook, mixed over documents, each with its position, token and document.

        stream = ActivationStream(StreamConfig(model="testbed"), tokens=1_000_000)
        batch = stream.next(1024)          # batch.x [1024, D], batch.pos, batch.token, batch.document

    The same config and seed give the same batches. `tokens` says for how many tokens text should be read ahead; a text
    that ends sooner begins again. The first token of a row is left out where it is `<bos>` (`drop_bos`), padding always.
    A ready `model` or source of `rows` may be given; else both are loaded as the config says.
    """

    def __init__(
        self,
        config: StreamConfig,
        *,
        tokens: int = 1_000_000,
        seed: int = 0,
        model: LanguageModel | None = None,
        rows: RowSource | None = None,
    ):
        tune_host()
        self.model = model or LanguageModel(config.model, hook=config.hook)
        if config.context > self.model.context:
            raise UserError(
                f"stream.context: {config.context} is not allowed; {config.model} has at most {self.model.context}"
            )
        self.buffer_tokens = config.buffer_tokens or min(65536, max(2048, tokens))
        self.config = config.model_copy(update={"hook": self.model.hook, "buffer_tokens": self.buffer_tokens})
        self.text = rows or open_text(config.data, config.model, self.model.tokenizer, config.context, tokens, seed)
        self.d_in, self.positions = self.model.d_model, config.context
        self.row = 0  # the next row of text to be read
        self._generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, config.buffer_dtype)
        try:
            self._buffer = RingBuffer(self.buffer_tokens, self.d_in, dtype, self.model.device, self._harvest)
        except RuntimeError:  # torch's word for out of memory
            size = self.buffer_tokens * (self.d_in * dtype.itemsize + 24) / 2**30
            raise UserError(
                f"stream.buffer_tokens: {self.buffer_tokens} is not allowed; "
                f"it takes {size:,.1f} GiB, more than {self.model.device} has"
            ) from None

    def next(self, n: int) -> Batch:
        """The next `n` activations, without replacement from the buffer."""
        if n > self.buffer_tokens // 2:
            raise UserError(
                f"stream.buffer_tokens: {self.buffer_tokens} is not allowed; it must be at least twice the batch ({n})"
            )
        return self._buffer.next(n, self._generator)

    def moments(self) -> tuple[Tensor, float]:
        """Mean activation [D] and mean norm, fp32, of what the buffer holds. Changes nothing in what comes."""
        self._buffer.next(0, self._generator)  # fills it if nothing has
        x = self._buffer.contents().x.float()
        return x.mean(0), float(x.norm(dim=1).mean())

    def held_out(self, rows: int) -> Iterator[TokenRows]:
        """Rows of text that training never sees, `rows_per_forward` at a time: `rows` of them, or all that there are."""
        step = self.config.rows_per_forward
        rows = rows if self.text.held_out_rows is None else min(rows, self.text.held_out_rows)
        for start in range(0, rows, step):
            yield self.text.rows(start, min(step, rows - start), held_out=True)

    def keep(self, rows: TokenRows) -> Tensor:
        """Which positions [B, T] count: no padding, and no `<bos>` in front where `drop_bos`."""
        kept = torch.arange(rows.tokens.shape[1]) < rows.length[:, None]
        if self.config.drop_bos and self.text.bos is not None:
            kept[:, 0] &= rows.tokens[:, 0] != self.text.bos
        return kept

    def _harvest(self, wanted: int) -> Batch:
        """At least `wanted` kept activations, from as many whole rows as that takes."""
        parts: list[Batch] = []
        while sum(map(len, parts)) < wanted:
            rows = self.text.rows(self.row, self.config.rows_per_forward)
            self.row += self.config.rows_per_forward
            kept = self.keep(rows)
            if not bool(kept.any()):
                raise UserError(f"data: rows {self.row - len(kept)} to {self.row - 1} hold no token to train on")
            pos = torch.arange(kept.shape[1], dtype=torch.int32).expand(kept.shape)[kept]
            document = rows.document[:, None].expand(kept.shape)[kept]
            x = self.model.activations(rows.tokens)[kept.to(self.model.device)]
            self._refuse_nan(x, pos, document)
            device = self.model.device
            parts.append(Batch(x, pos.to(device), rows.tokens[kept].int().to(device), document.to(device)))
        return Batch(*(torch.cat([getattr(p, name) for p in parts]) for name in ("x", "pos", "token", "document")))

    def _refuse_nan(self, x: Tensor, pos: Tensor, document: Tensor) -> None:
        bad = ~torch.isfinite(x).all(dim=1)
        if bool(bad.any()):  # one sync per forward pass of the language model
            first = int(bad.nonzero()[0])
            raise UserError(
                f"activations: {int(bad.sum())} of {len(x)} at {self.model.hook} are NaN or infinite, the first at "
                f"position {int(pos[first])} of document {int(document[first])}; they must be finite"
            )

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on exactly here: buffer, order, random state, row of text."""
        return self._buffer.state() | {"random": self._generator.get_state(), "row": torch.tensor(self.row)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._buffer.load_state(state)
        self._generator.set_state(state["random"].cpu())
        self.row = int(state["row"])
