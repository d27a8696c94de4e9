"""The source of activations: a language model that reads a text."""

from typing import Any

import torch
from torch import Tensor

from ..config import StreamConfig
from ..errors import UserError
from ..ranks import ALONE, Ranks
from .buffer import Batch
from .model import LanguageModel
from .token_rows import RowSource, TextRows, TokenRows

MOST_ROWS = 8  # times rows_per_forward: the limit on packed rows per pass, however short they are


class ModelSource:
    """An `ActivationSource` that runs a language model over `rows_per_forward` rows of text at a time.

    With `packing` a pass takes more rows, up to about the tokens of `rows_per_forward` full rows. Each of the `ranks`
    runs an equal share of the rows, and all receive all activations."""

    label = "model"

    def __init__(
        self, model: LanguageModel, text: RowSource, positions: int, rows_per_forward: int, ranks: Ranks = ALONE,
        *, packing: bool = False,
    ):  # fmt: skip
        self.ranks = ranks.apart()  # reading runs concurrently with training on a GPU
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
        # computed on the CPU, since a result from the device would have to be waited for
        token_index = is_text(rows).flatten().nonzero().flatten()
        pos = torch.arange(T, dtype=torch.int32).expand(B, T)
        places = (pos, rows.tokens.int(), rows.document, rows.row[:, None].expand(B, T))
        acts = self._harvest(rows, token_index)
        kept = ~torch.isin(rows.tokens.flatten()[token_index], self.special)
        return Batch(
            acts, *(place.flatten()[token_index].to(self.device, non_blocking=True) for place in places), kept=kept
        )

    def _rows(self) -> TokenRows:
        count = self.rows_per_forward * self.ranks.size
        rows = self.text.next(count)
        if not self.packing or len(rows) < count:
            return rows
        tokens = max(1, int(rows.length.sum()))
        extra_rows = min((count * self.positions - tokens) * count // tokens, (MOST_ROWS - 1) * count)
        return rows.joined(self.text.next(extra_rows)) if extra_rows > 0 else rows

    def _harvest(self, rows: TokenRows, token_index: Tensor) -> dict[str, Tensor]:
        """Activations [M, D] at the indices `token_index` [M] into the flattened tokens [B, T]."""
        rank, T = self.ranks.rank, rows.tokens.shape[1]
        rows_per_rank = -(-len(rows) // self.ranks.size) if self.packing else self.rows_per_forward
        rank_of_token = token_index // (rows_per_rank * T)
        local_index = (token_index[rank_of_token == rank] - rank * rows_per_rank * T).to(self.device, non_blocking=True)
        rank_rows = slice(rank * rows_per_rank, (rank + 1) * rows_per_rank)
        if not len(rows.tokens[rank_rows]):  # at the end of the text a rank may have none; the model needs one
            rank_rows = slice(1)
        acts = self.model.harvest(rows.tokens[rank_rows], rows.length[rank_rows] if self.packing else None)
        counts = rank_of_token.bincount(minlength=self.ranks.size).tolist()
        return {hook: self.ranks.rows(x.flatten(0, 1)[local_index], counts) for hook, x in acts.items()}

    def state(self) -> dict[str, Tensor]:
        return self.text.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.text.load_state(state)


def special_tokens(tokenizer: Any) -> Tensor:
    """Sorted ids [n] of the tokenizer's special tokens, if any. A token only for unknown words counts as text."""
    if tokenizer is None:
        return torch.zeros(0, dtype=torch.int64)
    special_ids, unknown_id = set(tokenizer.all_special_ids), tokenizer.unk_token_id
    roles = ("bos", "eos", "pad", "sep", "cls", "mask")
    if unknown_id not in [getattr(tokenizer, f"{role}_token_id") for role in roles]:
        special_ids.discard(unknown_id)
    return torch.tensor(sorted(special_ids), dtype=torch.int64)


def packs(config: StreamConfig, text: RowSource) -> bool:
    """Whether rows of similar length run together. The default is yes for text, unless the model is compiled."""
    return isinstance(text, TextRows) and not config.compile if config.packing is None else config.packing


def open_source(
    config: StreamConfig, model: LanguageModel, text: RowSource, ranks: Ranks = ALONE
) -> tuple[ModelSource, StreamConfig]:
    """The activations of a text, and the settings with the model's hook, the packing, and `rows_per_forward` reduced to
    what fits in `memory_gb`, unless it is set. Raises UserError if the model's context is shorter than `context`."""
    if config.context > model.context:
        raise UserError(f"stream.context: {config.context} is not allowed; {config.model} has at most {model.context}")
    model.memory = 1e9 * config.memory_gb
    update: dict[str, Any] = {"hook": model.hook, "packing": packs(config, text)}
    row_count = model.rows_of_activations(config.context)
    if "rows_per_forward" not in config.model_fields_set and row_count < config.rows_per_forward:
        update["rows_per_forward"] = row_count
    config = config.model_copy(update=update)
    source = ModelSource(model, text, config.context, config.rows_per_forward, ranks, packing=update["packing"])
    return source, config


def is_text(rows: TokenRows) -> Tensor:
    """Positions [B, T] that are not padding, bool."""
    return torch.arange(rows.tokens.shape[1]) < rows.length[:, None]
