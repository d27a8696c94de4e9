"""Row counts of the evals and a time estimate for `core`, from the model's cost per token.

Cost is counted in multiply-adds per token: the parameters of the layers that a token goes through, and of the head. A row
for explained variance goes through the layers up to the hook and the dictionaries' encoders. A row for CE goes through the
layers after the hook and the head, once per replacement.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.config import EvalConfig
from ..engine.stream import ActivationStream, LanguageModel

ROWS, CE_ROWS = 256, 96  # at most, and always with the embedded model
FEWEST, FEWEST_CE, FEWEST_OTHERS = 32, 6, 128  # fewer rows give noise
SHARE = 1 / 5  # of the cost of the run's own passes through the model, half of it for each of the two kinds of rows
FIXED = 4  # replacements in any case: none, zeros (at counted tokens, and everywhere), the mean


@dataclass(frozen=True)
class Cost:
    """Multiply-adds per token: `before` is up to the hooks, `behind` from the last hook to the logits."""

    before: int
    behind: int

    @classmethod
    def of(cls, model: LanguageModel) -> "Cost":
        bridge = model.bridge
        blocks: list[Any] = list(getattr(bridge, "blocks", [])) or [bridge]
        layers = [sum(p.numel() for p in block.parameters()) for block in blocks]
        head = int(bridge.cfg.d_model) * int(bridge.cfg.d_vocab)
        hook_layers = [int(match[1]) if (match := re.match(r"blocks\.(\d+)\.", hook)) else 0 for hook in model.hooks]
        behind_its_layer = model.hooks[-1].endswith("hook_resid_post")
        first = 0 if model.tail(model.hooks[-1]) is None else hook_layers[-1] + behind_its_layer
        return cls(sum(layers[: max(hook_layers) + 1]), sum(layers[first:]) + head)


@dataclass(frozen=True)
class Sizes:
    """Rows of text for `core`, for its CE, and the limit for other evals (None: no limit)."""

    rows: int = ROWS
    ce_rows: int = CE_ROWS
    other_rows: int | None = None

    def of(self, name: str) -> list[int] | int | None:
        """The limits of the eval `name`."""
        return [self.rows, self.ce_rows] if name == "core" else self.other_rows


def row_counts(stream: ActivationStream, config: EvalConfig, tokens: int, latents: Sequence[int]) -> Sizes:
    """Rows of text for dictionaries with these numbers of `latents`, trained on `tokens` tokens.

    The rows of `config` have priority. With the embedded model, `core` reads 256 rows and 96 for CE. With another model, the
    cost of each kind of rows is limited to a tenth of that of the model's passes over the run's tokens up to the hook, but
    at least 32 and 6 rows. The other evals then read rows for a quarter of the run's tokens, at least 128.
    """
    rows, ce_rows, other_rows = ROWS, CE_ROWS, None
    if stream.model.name != "testbed":
        cost = Cost.of(stream.model)
        budget = SHARE / 2 * tokens * cost.before
        row, ce_row = row_costs(cost, stream, latents)
        rows = min(ROWS, max(FEWEST, round(budget / row)))
        ce_rows = min(CE_ROWS, max(FEWEST_CE, round(budget / ce_row)))
        other_rows = max(FEWEST_OTHERS, tokens // (4 * stream.positions))
    rows = config.rows or rows
    return Sizes(rows, min(rows, config.ce_rows or ce_rows), other_rows)


def row_costs(cost: Cost, stream: ActivationStream, latents: Sequence[int]) -> tuple[float, float]:
    """Multiply-adds of a row for explained variance, and the additional ones of a row for CE."""
    encoders = stream.model.d_model * sum(latents)
    replaced = (FIXED + len(latents)) * cost.behind
    return stream.positions * (cost.before + encoders), stream.positions * (replaced + encoders)


def forecast(stream: ActivationStream, rows: int, ce_rows: int, latents: Sequence[int], pace: float | None) -> str:
    """Progress line with the amount of work and, given `pace` (seconds per multiply-add), the time it takes."""
    row, ce_row = row_costs(Cost.of(stream.model), stream, latents)
    seconds = "" if pace is None else f", about {max(1, round(pace * (rows * row + ce_rows * ce_row)))} s"
    return f"evaluation: {rows} rows x {len(latents)} dictionaries, CE on {ce_rows} of them{seconds}"


def pace_of_training(stream: ActivationStream) -> float | None:
    """Seconds per multiply-add of the model's passes in training; None if there were none."""
    seconds, tokens = stream.watch.total.get("model", 0.0), stream.counts.get("tokens", 0)
    return seconds / (tokens * Cost.of(stream.model).before) if seconds and tokens else None
