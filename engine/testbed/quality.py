"""Measure the embedded language model against the ground truth of its language."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from . import lexicon as lex
from .language import PAD, Language, connective

LogitsOf = Callable[[torch.Tensor], torch.Tensor]  # tokens [B, T] -> logits [B, T, V]


@torch.no_grad()
def measure(logits_of: LogitsOf, language: Language, start: int, documents: int = 400, prompts: int = 400) -> dict:
    """Measure the held-out loss, the language's entropy on the same documents (nats per token), and three accuracies.

    `loss_over_entropy` is loss / (-sum log p / tokens), 1 for a perfect model. `fact_completion` is the share of facts,
    in both phrasings, whose object is the most likely next token. `order_pairs` is the share of minimal pairs in which
    *both* sentences are continued with the right participant. `agreement` is the share of subjects, with a disagreeing
    noun in between, whose verb gets the right number.
    """
    rows, log_prob = language.tokens(start, documents)
    tokens = torch.from_numpy(rows)
    total = 0.0
    for chunk in tokens.split(64):
        logits = logits_of(chunk[:, :-1])
        total += F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), ignore_index=PAD, reduction="sum").item()
    predicted = int((tokens[:, 1:] != PAD).sum())
    loss, entropy = total / predicted, -float(log_prob.sum()) / predicted

    ids = language.token_id
    fact_prompts = language.fact_prompts(start)
    answers = _next_token_logits(logits_of, language, [words for words, _ in fact_prompts]).argmax(-1)
    is_right = [int(a) == ids[fact.object] for a, (_, fact) in zip(answers, fact_prompts, strict=True)]

    pairs = language.order_pairs(prompts, start)
    sentence_prompts = [
        pair.prefix + sentence + [connective(subject), "the"]
        for pair in pairs
        for sentence, subject in zip(pair.sentences, pair.subject, strict=True)
    ]
    answers = _next_token_logits(logits_of, language, sentence_prompts).argmax(-1).tolist()
    expected = [ids[subject] for pair in pairs for subject in pair.subject]
    hits = [a == e for a, e in zip(answers, expected, strict=True)]
    both_right = [hits[i] and hits[i + 1] for i in range(0, len(hits), 2)]

    agreement = language.agreement_prompts(prompts, start)
    probs = _next_token_logits(logits_of, language, [words for words, _ in agreement]).softmax(-1)
    singular, plural = (probs[:, [ids[w] for w in lex.COPULAS[number]]].sum(-1) for number in ("singular", "plural"))
    agrees = [bool(p > s) == truth for s, p, (_, truth) in zip(singular, plural, agreement, strict=True)]
    return {
        "loss": loss,
        "entropy": entropy,
        "loss_over_entropy": loss / entropy,
        "fact_completion": sum(is_right) / len(is_right),
        "order_pairs": sum(both_right) / len(both_right),
        "agreement": sum(agrees) / len(agrees),
    }


def _next_token_logits(logits_of: LogitsOf, language: Language, prompts: Sequence[list[str]]) -> torch.Tensor:
    """Return logits [len(prompts), V] of the token after each prompt."""
    rows = [[language.token_id[w] for w in words] for words in prompts]
    last_logits = []
    for begin in range(0, len(rows), 128):
        chunk = rows[begin : begin + 128]
        longest = max(map(len, chunk))
        tokens = torch.tensor([row + [PAD] * (longest - len(row)) for row in chunk])
        logits = logits_of(tokens)
        last_logits.append(logits[torch.arange(len(chunk)), torch.tensor([len(row) - 1 for row in chunk])])
    return torch.cat(last_logits)
