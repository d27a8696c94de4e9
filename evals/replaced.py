"""What the language model makes of its text with the value at a hook replaced: next-token loss, and KL from the clean model.

Layers before the hook run once for all replacements, or not at all where the value there is known (`stream.reader.Tail`).
Only tokens that are asked about go through the head, `LOGITS` numbers at a time, so that memory doesn't grow with the
vocabulary, the number of replacements or the length of rows. A model that can't be cut at the hook runs whole, a
replacement at a time.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..engine.stream import LanguageModel
from ..engine.stream.model import COPIES

LOGITS = 2**23  # that are held at once, a few times over: 32 MiB in float32
HIDDEN = 2**25  # numbers that go into the head, held at once over all replacements

#: the value at the hook, [B, T, D], worked out when it is needed
Value = Callable[[], Tensor]


def rows_at_once(model: LanguageModel, context: int, width: int, replacements: int) -> int:
    """How many rows of `context` tokens are run at once: one where the model runs whole, with all of its logits."""
    if model.tail(model.hooks[-1]) is None:
        return 1
    most = min(HIDDEN, model.memory / 16)  # in float32, a quarter of what there is
    return max(1, int(most // (context * width * (1 + replacements))))


@torch.no_grad()
def losses_and_kl(
    model: LanguageModel, tokens: Tensor, x: Tensor, at: Tensor, values: Mapping[str, Value]
) -> dict[str, Tensor]:
    """[2, n] for `clean` and for each of `values`: next-token loss and KL(p_clean || p), in nats, float64 on the CPU.

    `tokens` [B, T] int64; `x` [B, T, D] what they have at the last of the model's hooks, where a value takes its place; `at`
    bool [B, T]: the n tokens asked about. A token without a next one has the loss of an arbitrary token.
    """
    tokens, at = tokens.to(model.device), at.to(model.device).flatten()
    wanted = tokens.roll(-1, 1).flatten()[at]
    hook = model.hooks[-1]
    tail = model.tail(hook)
    if tail is not None:
        clean = tail.begin(tokens, x).flatten(0, 1)[at]
        hidden = {name: tail.replaced(tokens, value()).flatten(0, 1)[at] for name, value in values.items()}
        most = int(min(LOGITS, model.memory / (4 * COPIES)))
        return _compared(tail.logits, clean, hidden, wanted, max(1, most // model.vocabulary))
    clean = model.logits(tokens).flatten(0, 1)[at]
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        other = value()
        logits = model.logits(tokens, lambda _, other=other: other, hook).flatten(0, 1)[at]
        found |= _compared(lambda logits: logits, clean, {name: logits}, wanted, max(1, LOGITS // clean.shape[1]))
    return found


def _compared(
    head: Callable[[Tensor], Tensor], clean: Tensor, others: Mapping[str, Tensor], wanted: Tensor, size: int
) -> dict[str, Tensor]:
    """Losses and KL of `others` from `clean`, each [n, ...], of which `head` makes logits [n, V], `size` at a time."""
    n = len(clean)
    found = {name: torch.zeros(2, n, dtype=torch.float64) for name in ("clean", *others)}
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        log_p = head(clean[part]).float().log_softmax(-1)
        p = log_p.exp()
        found["clean"][0, part] = _losses(log_p, wanted[part])
        for name, hidden in others.items():
            log_q = head(hidden[part]).float().log_softmax(-1)
            found[name][0, part] = _losses(log_q, wanted[part])
            found[name][1, part] = torch.sub(log_p, log_q, out=log_q).mul_(p).sum(-1).double().cpu()
    return found


def _losses(log_q: Tensor, wanted: Tensor) -> Tensor:
    return -log_q.gather(1, wanted[:, None])[:, 0].double().cpu()
