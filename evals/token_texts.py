"""The texts of a tokenizer's tokens."""

from typing import Any

PART = "\ufffd"  # decoded from a token that is part of a character


class TokenTexts:
    """The texts of tokens, each decoded once."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.known = tokenizer, dict[int, str]()

    def of(self, token: int) -> str:
        """What a token adds to a text. Some tokenizers drop the space before the first token, others put one between any
        two tokens."""
        if token not in self.known:
            alone, twice = self._decode([token]), self._decode([token] * 2)
            self.known[token] = (twice.removeprefix(alone) if twice.startswith(alone) else "") or alone
        return self.known[token]

    def along(self, tokens: list[int]) -> list[str]:
        """The texts of consecutive tokens. A character of several tokens is the text of the last; the others have none."""
        texts = [self.of(token) for token in tokens]
        for i in range(len(tokens)):
            for end in range(i + 2, min(i + 4, len(tokens)) + 1):
                if PART in texts[i] and PART not in (character := self._decode(tokens[i:end])):
                    texts[i:end] = [""] * (end - i - 1) + [character]
        return texts

    def _decode(self, tokens: list[int]) -> str:
        if self.tokenizer is None:  # the model is given ids
            return "".join(f" {token}" for token in tokens)
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
