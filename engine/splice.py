"""A dictionary within a transformer_lens model, in place of the activations at a hook, at the positions that they have."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import UserError

if TYPE_CHECKING:
    from .sae import SparseAutoencoder

#: of a hook's name behind its block, where the block's attention has been computed before it
_BEHIND_ATTENTION = re.compile(
    r"attn\.hook_(z|result|out|pattern)|attn_out|resid_mid|resid_post|mlp|ln2|ln1_post|^hook_out"
)
Start = int | Callable[[], int]
Hooks = list[tuple[str | Callable[[str], bool], Callable[..., Any]]]


class Positions:
    """Positions of the tokens that pass a hook.

    They begin at `start`, a number or a function that gives it. Unless it is given, they begin at the number of earlier
    tokens for which the last attention before the hook has keys: queries [T], keys [earlier + T]. A HookedTransformer shows
    its key-value cache there, and a TransformerBridge may not. So a single token without earlier keys is refused. At a hook
    before the first attention positions begin at 0, and earlier keys in that attention are an error.
    """

    def __init__(self, hook: str, start: Start | None, what: str):
        self.hook, self.start, self.what = hook, start, what
        self._earlier: int | None = None  # keys of earlier tokens that the attention before the hook had
        place = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
        block = int(place[1]) - (not _BEHIND_ATTENTION.search(place[2])) if place else -1
        self._is_late = block < 0
        self._scores = f"blocks.{max(block, 0)}.attn.hook_attn_scores"

    def hooks(self) -> Hooks:
        """What looks at the attention; nothing where the start is given."""
        if self.start is not None:
            return []
        return [(lambda name: name == self._scores, self._look)]

    def _look(self, scores: Tensor, hook: Any = None) -> None:
        earlier = scores.shape[-1] - scores.shape[-2]
        if self._is_late and earlier:
            self._refuse(f"{earlier} earlier tokens are in a key-value cache")
        self._earlier = earlier

    def of(self, x: Tensor, along_rows: bool) -> Tensor:
        """pos [B, T] of x [B, T, D]."""
        if self.start is not None:
            first = self.start() if callable(self.start) else self.start
        else:
            first = 0 if self._is_late else self._earlier or 0
            if x.shape[1] == 1 and not first:
                self._refuse("a single token passes, which may have others before it in a key-value cache")
        if along_rows and first:
            raise UserError(
                f"start: {first} is not allowed; this dictionary has {self.what}, which looks along whole rows, so generate "
                "without a key-value cache (use_past_kv_cache=False)"
            )
        return torch.arange(first, first + x.shape[1], device=x.device).expand(x.shape[:2])

    def _refuse(self, why: str) -> None:
        raise UserError(
            f"start: needed at {self.hook}, because this dictionary has {self.what} and {why}; give the first token's "
            "position, as start=0 or start=lambda: cache[0].past_keys.shape[1], or generate with use_past_kv_cache=False"
        )


def hooks(
    sae: "SparseAutoencoder", hook: str, target: str | None, edit: Callable[[Tensor], Tensor] | None, error_term: bool,
    start: Start | None,
) -> Hooks:  # fmt: skip
    """See `SparseAutoencoder.fwd_hooks`."""
    what = sae.looks_at_positions
    positions = None if what is None else Positions(hook, start, what)
    read: list[Tensor] = []

    def keep(x: Tensor, hook: Any = None) -> Tensor:
        read[:] = [x.flatten(2)]
        return x

    def replace(x: Tensor, hook: Any = None) -> Tensor:
        return replaced(x.flatten(2)).reshape(x.shape)  # heads [B, T, H, d_head], as at hook_z, side by side

    def replaced(x: Tensor) -> Tensor:
        given = read.pop() if target is not None else x
        pos = () if positions is None else (positions.of(given, sae.looks_along_rows),)
        x_hat = sae(given, *pos) if edit is None else sae.decode(edit(sae.encode(given, *pos)))
        if not error_term:
            return x_hat.to(x.dtype)
        with torch.no_grad():
            error = x - (x_hat if edit is None else sae(given, *pos)).to(x.dtype)
        return x_hat.to(x.dtype) + error

    looking = [] if positions is None else positions.hooks()
    return [*looking, *([(hook, replace)] if target is None else [(hook, keep), (target, replace)])]
