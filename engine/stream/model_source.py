"""Where activations come from: a language model as it reads its text."""

from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import StreamConfig
from ..ranks import ALONE, Ranks
from .buffer import Batch
from .model import LanguageModel
from .token_rows import RowSource, TextRows, TokenRows

MOST_ROWS = 8  # times rows_per_forward that are read at once, however short they are


class ActivationSource(Protocol):
    """Activations in the order of the text.

    `next` gives those of some whole rows, [M, D] for each hook, every token but padding, with `kept` [M] false for the
    tokenizer's own tokens (`<bos>` and the like, `special`); None when there are no more. `counts` are of what was read so
    far. `state` is all that is needed to go on exactly here. `name` is what messages call the text, and `label` what the
    time spent in `next` is called.
    """

    label: str
    special: Tensor
    widths: dict[str, int]
    positions: int
    device: torch.device

    @property
    def name(self) -> str: ...
    @property
    def counts(self) -> dict[str, int]: ...
    def next(self) -> Batch | None: ...
    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, state: dict[str, Tensor]) -> None: ...


class ModelSource:
    """A language model over rows of text, `rows_per_forward` at a time; with `packing`, as many rows as hold about that many
    full rows of tokens. Each of several `ranks` runs an equal share of the rows, and all get the activations of all."""

    label = "model"

    def __init__(
        self, model: LanguageModel, text: RowSource, positions: int, rows_per_forward: int, ranks: Ranks = ALONE,
        *, packing: bool = False,
    ):  # fmt: skip
        self.ranks = ranks.apart()  # from training, beside which a GPU reads on
        self.model, self.text, self.positions, self.rows_per_forward = model, text, positions, rows_per_forward
        self.packing = packing
        self.widths, self.device = model.widths, model.device
        self.special = special_tokens(model.tokenizer)

    @property
    def name(self) -> str:
        return self.text.name

    @property
    def counts(self) -> dict[str, int]:
        return self.text.counts | {"epoch": self.text.epoch}

    def next(self) -> Batch | None:
        rows = self._rows()
        B, T = rows.tokens.shape
        if B == 0:
            return None
        # Where the tokens lie is worked out on the CPU: of the device it would have to be waited for.
        token_index = is_text(rows).flatten().nonzero().flatten()
        pos = torch.arange(T, dtype=torch.int32).expand(B, T)
        places = (pos, rows.tokens.int(), rows.document, rows.row[:, None].expand(B, T))
        acts = self._harvest(rows, token_index)
        kept = ~torch.isin(rows.tokens.flatten()[token_index], self.special)
        return Batch(
            acts, *(place.flatten()[token_index].to(self.device, non_blocking=True) for place in places), kept=kept
        )

    def _rows(self) -> TokenRows:
        """The next rows of the text, for one forward pass."""
        count = self.rows_per_forward * self.ranks.size
        rows = self.text.next(count)
        if not self.packing or len(rows) < count:
            return rows
        tokens = max(1, int(rows.length.sum()))
        extra_rows = min((count * self.positions - tokens) * count // tokens, (MOST_ROWS - 1) * count)
        return rows.joined(self.text.next(extra_rows)) if extra_rows > 0 else rows

    def _harvest(self, rows: TokenRows, token_index: Tensor) -> dict[str, Tensor]:
        """Activations [M, D] at the places `token_index` [M] of the flattened tokens [B, T]."""
        rank, T = self.ranks.rank, rows.tokens.shape[1]
        rows_per_rank = -(-len(rows) // self.ranks.size) if self.packing else self.rows_per_forward
        rank_of_token = token_index // (rows_per_rank * T)
        local_index = (token_index[rank_of_token == rank] - rank * rows_per_rank * T).to(self.device, non_blocking=True)
        rank_rows = slice(rank * rows_per_rank, (rank + 1) * rows_per_rank)
        if not len(rows.tokens[rank_rows]):  # at the text's end there may be none
            rank_rows = slice(1)
        acts = self.model.harvest(rows.tokens[rank_rows], rows.length[rank_rows] if self.packing else None)
        counts = rank_of_token.bincount(minlength=self.ranks.size).tolist()
        return {hook: self.ranks.rows(x.flatten(0, 1)[local_index], counts) for hook, x in acts.items()}

    def state(self) -> dict[str, Tensor]:
        return self.text.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.text.load_state(state)


def special_tokens(tokenizer: Any) -> Tensor:
    """Ids [n] of the tokenizer's own tokens, in order. One that stands for unknown words alone is not among them: that is
    text. None where there is no tokenizer."""
    if tokenizer is None:
        return torch.zeros(0, dtype=torch.int64)
    special_ids, unknown_id = set(tokenizer.all_special_ids), tokenizer.unk_token_id
    roles = ("bos", "eos", "pad", "sep", "cls", "mask")
    if unknown_id not in [getattr(tokenizer, f"{role}_token_id") for role in roles]:
        special_ids.discard(unknown_id)
    return torch.tensor(sorted(special_ids), dtype=torch.int64)


def packs(config: StreamConfig, text: RowSource) -> bool:
    """Whether rows of similar length go through the model together: unless `config` says, where the text has short ones and
    no fixed shape is compiled for."""
    return isinstance(text, TextRows) and not config.compile if config.packing is None else config.packing


def bounded(config: StreamConfig, model: LanguageModel) -> StreamConfig:
    """The settings with as many `rows_per_forward` as `memory_gb` has room for, unless they are given."""
    model.memory = 1e9 * config.memory_gb
    if "rows_per_forward" in config.model_fields_set:
        return config
    row_count = min(config.rows_per_forward, model.rows_of_activations(config.context))
    return config if row_count == config.rows_per_forward else config.model_copy(update={"rows_per_forward": row_count})


def is_text(rows: TokenRows) -> Tensor:
    """Which positions [B, T] are not padding."""
    return torch.arange(rows.tokens.shape[1]) < rows.length[:, None]
