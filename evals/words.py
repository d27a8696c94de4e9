"""Words as tokens spell them, and pairs of texts from any text that differ in the order of two adjacent words.

    last night the old grey dog slept in | the warm barn        as written
    last night the old grey dog slept in | warm the barn        swapped; the context before the two words is not read

As in SentEval's bigram shift (Conneau et al., arXiv 1805.01070), grammar separates the two classes. Here both texts of a
pair have the same tokens, so a bag of words is at chance exactly, and the same last word, so its identity says nothing. Only
words of lower-case letters are exchanged, because a capital or a comma in the wrong place would be a shortcut.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..engine.errors import UserError
from .evaluation import Evaluation, TextActivations
from .positions import held_out

CONTEXT, AFTER = 8, 1  # words before the two, and after them
LONGEST = 40  # tokens of context and text
LEAST = 32  # pairs


def spelled(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token as it continues another word, with the space before it. The decoders of sentencepiece (Llama 2's)
    and of whole words drop the space of a token that stands alone."""
    alone = [tokenizer.decode([token]) for token in ids]
    word = next((i for i, text in enumerate(alone) if text.strip().isascii() and text.strip().isalpha()), None)
    if word is None:
        return alone
    return [tokenizer.decode([ids[word], token]).removeprefix(alone[word]) for token in ids]


def swapped_pairs(evaluation: Evaluation, rows: int, most: int) -> list[tuple[list[int], list[int], list[int]]]:
    """At most `most` triples of context, text as written, and text with its first two words exchanged, as token ids.

    Read from windows of `CONTEXT` + 2 + `AFTER` words, one after the other in `rows` held-out rows, without special tokens
    and tokens that are left out. All texts together have at most as many tokens as the rows. Raises UserError if there are
    fewer than `LEAST`.
    """
    stream, collected = evaluation.stream, held_out(evaluation, rows)
    longest = min(LONGEST, stream.positions - 1)
    windows = list(_windows(stream.model.tokenizer, stream.source.special, collected, longest))
    order, budget, pairs = (
        evaluation.generator("order swapped words").permutation(len(windows)),
        collected.kept.numel(),
        [],
    )
    for window, (start, middle, end) in (windows[i] for i in order[:most].tolist()):
        budget -= 2 * len(window)
        if budget < 0:
            break
        swapped = window[middle:end] + window[start:middle] + window[end:]
        pairs.append((window[:start], window[start:], swapped))
    if len(pairs) < LEAST:
        raise UserError(
            f"{stream.text.name} has {len(pairs)} places in {len(collected)} held-out rows to exchange two words, and "
            f"{LEAST} are needed; give --file blimp=PATH or --file senteval=PATH"
        )
    return pairs


def _windows(
    tokenizer: Any, special: torch.Tensor, collected: TextActivations, most: int
) -> Iterator[tuple[list[int], tuple[int, int, int]]]:
    """Windows of words, and where in them the two words to be exchanged start and end."""
    ids = collected.tokens[collected.kept].unique()
    ids = ids[~torch.isin(ids, special)].tolist()
    text = dict(zip(ids, spelled(tokenizer, ids), strict=True))
    size = CONTEXT + 2 + AFTER
    for tokens, kept in zip(collected.tokens.tolist(), collected.kept.tolist(), strict=True):
        words: list[list[int]] = []  # in a row so far, each with its space
        for token, is_kept in zip(tokens, kept, strict=True):
            if not is_kept or token not in text:
                words = []
            elif text[token].startswith(" "):
                if len(words) == size:  # the last word is whole
                    yield from _window(words, text, most)
                    words = []
                words.append([token])
            elif words:
                words[-1].append(token)


def _window(
    words: list[list[int]], text: dict[int, str], most: int
) -> Iterator[tuple[list[int], tuple[int, int, int]]]:
    first, second = ("".join(text[token] for token in word) for word in words[CONTEXT : CONTEXT + 2])
    plain = all(word[1:].isalpha() and word.islower() for word in (first, second))
    window = [token for word in words for token in word]
    if plain and first != second and len(window) <= most:
        start = sum(map(len, words[:CONTEXT]))
        end = start + len(words[CONTEXT])
        yield window, (start, end, end + len(words[CONTEXT + 1]))
