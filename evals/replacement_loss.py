"""Next-token loss of the language model, and KL from the clean model, with the value at a hook replaced.

Layers before the hook run once for all replacements, or not at all if the value there is known (`stream.reader.Tail`). Only
the selected tokens go through the head, `LOGITS` numbers at a time, so memory doesn't grow with the vocabulary, the number
of replacements or the length of rows. A model that can't be cut at the hook runs whole, one replacement at a time.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..engine.stream import LanguageModel
from ..engine.stream.model import COPIES

LOGITS = 2**23  # in memory at once, with a few copies: 32 MiB in float32
HIDDEN = 2**25  # inputs of the head in memory at once, over all replacements

#: computes the value at the hook, [B, T, D]
Value = Callable[[], Tensor]


def rows_at_once(model: LanguageModel, context: int, width: int, replacements: int) -> int:
    """Rows of `context` tokens per pass; one if the model runs whole, with all of its logits."""
    if model.tail(model.hooks[-1]) is None:
        return 1
    most = min(HIDDEN, model.memory / 16)  # in float32, a quarter of the memory
    return max(1, int(most // (context * width * (1 + replacements))))


@torch.no_grad()
def losses_and_kl(
    model: LanguageModel, tokens: Tensor, x: Tensor, selected: Tensor, values: Mapping[str, Value]
) -> dict[str, Tensor]:
    """Next-token loss and KL(p_clean || p) in nats, float64 [2, n] on the CPU, for `clean` and for each of `values`.

    `tokens` int64 [B, T]; `x` [B, T, D], their activations at the last of the model's hooks, which the values replace;
    `selected` bool [B, T], the n tokens to evaluate. The loss of a row's last token is that of an arbitrary next token.
    """
    tokens, selected = tokens.to(model.device), selected.to(model.device).flatten()
    targets = tokens.roll(-1, 1).flatten()[selected]
    hook = model.hooks[-1]
    tail = model.tail(hook)
    if tail is not None:
        clean = tail.begin(tokens, x).flatten(0, 1)[selected]
        hidden = {name: tail.replaced(tokens, value()).flatten(0, 1)[selected] for name, value in values.items()}
        most = int(min(LOGITS, model.memory / (4 * COPIES)))
        return _compared(tail.logits, clean, hidden, targets, max(1, most // model.vocabulary))
    clean = model.logits(tokens).flatten(0, 1)[selected]
    results: dict[str, Tensor] = {}
    for name, value in values.items():
        replacement = value()
        logits = model.logits(tokens, lambda _, replacement=replacement: replacement, hook).flatten(0, 1)[selected]
        results |= _compared(lambda logits: logits, clean, {name: logits}, targets, max(1, LOGITS // clean.shape[1]))
    return results


def _compared(
    head: Callable[[Tensor], Tensor], clean: Tensor, replaced: Mapping[str, Tensor], targets: Tensor, size: int
) -> dict[str, Tensor]:
    """Losses and KL of `replaced` from `clean`, each [n, ...]; `head` maps them to logits [n, V], `size` at a time."""
    n = len(clean)
    results = {name: torch.zeros(2, n, dtype=torch.float64) for name in ("clean", *replaced)}
    for start in range(0, n, size):
        chunk = slice(start, min(start + size, n))
        log_p = head(clean[chunk]).float().log_softmax(-1)
        p = log_p.exp()
        results["clean"][0, chunk] = _losses(log_p, targets[chunk])
        for name, hidden in replaced.items():
            log_q = head(hidden[chunk]).float().log_softmax(-1)
            results[name][0, chunk] = _losses(log_q, targets[chunk])
            results[name][1, chunk] = torch.sub(log_p, log_q, out=log_q).mul_(p).sum(-1).double().cpu()
    return results


def _losses(log_q: Tensor, targets: Tensor) -> Tensor:
    return -log_q.gather(1, targets[:, None])[:, 0].double().cpu()
