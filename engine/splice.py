"""Splice a dictionary into a transformer_lens model: its reconstruction replaces the activations at a hook."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

#: hooks of a block, without the prefix blocks.N., that run after the block's attention
_BEHIND_ATTENTION = re.compile(
    r"attn\.hook_(z|result|out|pattern)|attn_out|resid_mid|resid_post|mlp|ln2|ln1_post|^hook_out"
)
Start = int | Callable[[], int]
Hooks = list[tuple[str | Callable[[str], bool], Callable[..., Any]]]


class Positions:
    """Positions of the tokens at a hook; see `SparseAutoencoder.fwd_hooks`.

    Without `start`, they continue after the earlier tokens in the last attention before the hook, which has T queries and
    earlier + T keys. A TransformerBridge may not show its cache in this way, so a single token without earlier keys is
    refused, as are earlier keys at a hook before the first attention.
    """

    def __init__(self, hook: str, start: Start | None, feature: str):
        self.hook, self.start, self.feature = hook, start, feature
        self._earlier: int | None = None  # earlier tokens in the attention before the hook
        hook_match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
        block = int(hook_match[1]) - (not _BEHIND_ATTENTION.search(hook_match[2])) if hook_match else -1
        self._is_late = block < 0
        scores = f"blocks.{max(block, 0)}.attn.hook_attn_scores"
        #: count earlier tokens in the attention
        self.hooks: Hooks = [] if start is not None else [(lambda name: name == scores, self._count_earlier)]

    def _count_earlier(self, scores: Tensor, hook: Any = None) -> None:
        earlier = scores.shape[-1] - scores.shape[-2]
        if self._is_late and earlier:
            self._refuse(f"{earlier} earlier tokens are in a key-value cache")
        self._earlier = earlier

    def of(self, x: Tensor, along_rows: bool) -> Tensor:
        """Return pos [B, T] for x [B, T, D]."""
        if self.start is not None:
            first_position = self.start() if callable(self.start) else self.start
        else:
            first_position = 0 if self._is_late else self._earlier or 0
            if x.shape[1] == 1 and not first_position:
                self._refuse("a single token passes, which may follow others in a key-value cache")
        if along_rows and first_position:
            raise UserError(
                f"start: {first_position} is not allowed; this dictionary has {self.feature}, which needs whole rows, so "
                "generate without a key-value cache (use_past_kv_cache=False)"
            )
        return torch.arange(first_position, first_position + x.shape[1], device=x.device).expand(x.shape[:2])

    def _refuse(self, reason: str) -> None:
        raise UserError(
            f"start: needed at {self.hook}, because this dictionary has {self.feature} and {reason}; give the first token's "
            "position, as start=0 or start=lambda: cache[0].past_keys.shape[1], or generate with use_past_kv_cache=False"
        )


def hooks(
    sae: Any, hook: str, target: str | None, edit: Callable[[Tensor], Tensor] | None, error_term: bool,
    start: Start | None,
) -> Hooks:  # fmt: skip
    """See `SparseAutoencoder.fwd_hooks`."""
    feature = sae.looks_at_positions
    positions = None if feature is None else Positions(hook, start, feature)
    read_inputs: list[Tensor] = []

    def keep_input(x: Tensor, hook: Any = None) -> Tensor:
        read_inputs[:] = [x.flatten(2)]
        return x

    def replace(x: Tensor, hook: Any = None) -> Tensor:
        return replaced(x.flatten(2)).reshape(x.shape)  # hook_z has heads [B, T, H, d_head]

    def replaced(x: Tensor) -> Tensor:
        sae_input = read_inputs.pop() if target is not None else x
        pos = () if positions is None else (positions.of(sae_input, sae.looks_along_rows),)
        x_hat = sae(sae_input, *pos) if edit is None else sae.decode(edit(sae.encode(sae_input, *pos)))
        if not error_term:
            return x_hat.to(x.dtype)
        with torch.no_grad():
            error = x - (x_hat if edit is None else sae(sae_input, *pos)).to(x.dtype)
        return x_hat.to(x.dtype) + error

    position_hooks = [] if positions is None else positions.hooks
    return [*position_hooks, *([(hook, replace)] if target is None else [(hook, keep_input), (target, replace)])]
