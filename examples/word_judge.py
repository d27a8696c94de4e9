"""A judge for `temposae eval autointerp` without a language model: it explains a latent by the words that are marked.

    temposae eval autointerp --sae runs/demo --judge-command 'python examples/word_judge.py'

It shows what a judge reads and answers. Its score is the least that a language model should reach: it knows the words on
which a latent fired, and nothing about what they have in common or where they stand.
"""

import re
import sys

LEAD = "the words "


def answer(prompt: str) -> str:
    """Answer a prompt for an explanation, in which words are marked, or for the examples that an explanation fits."""
    if (description := re.search(rf"^Description: {LEAD}(.*)$", prompt, re.M)) is None:
        marked = re.findall(r"<<(.+?)>>", prompt.partition("\n\n")[2])
        return LEAD + " ".join(dict.fromkeys(marked))
    words = set(description[1].split())
    examples = re.findall(r"^(\d+)\. (.*)$", prompt, re.M)
    return ", ".join(number for number, text in examples if words & set(text.split())) or "None"


if __name__ == "__main__":
    print(answer(sys.stdin.read()))
