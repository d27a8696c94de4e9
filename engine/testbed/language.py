"""A small English-like language with ground truth: labels for every token, and the exact probability of every document.

A document is one row: `<bos>`, an opening (tone, then topic), a list, a body, a closing, `<eos>`. Sections have typical
positions: the list starts near position 10, and the body ends at the first sentence boundary after position 104.

    hey folks , these notes are about sailing . first , trim the windy sail . ...            opening, list
    the boats near the harbor behind the masts are old .                                     agreement across distance
    the wolf chased the baker . alas the baker fled .                                        argument order
    the crop of drabel is rice .                                                             facts about entities
    basically , the salty crew moored the boat .                                             topic and tone
    to conclude , thanks a bunch . see ya , drabel <eos>                                     closing

Each choice is visible in the text and each text has one derivation. So log p(document) is the sum of the log
probabilities of the choices made. The language's entropy, the loss of a perfect model, is the mean of -log p.
"""

import math
import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from ..errors import UserError
from . import lexicon as lex

CONTEXT = 128
HELD_OUT = 10_000_000  # number of the first held-out document: no model or dictionary is trained from here on
BODY_UNTIL = 104  # last start of a body sentence: the longest one (11 tokens) and the closing (12) still fit
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)

SECTIONS = ("none", "opening", "list", "body", "closing")
KINDS = (
    "none", "salutation", "announcement", "item", "topical", "agreement", "order", "consequence", "fact", "thanks",
    "sign_off",
)  # fmt: skip
ROLES = (
    "none", "subject", "attractor", "copula", "agent", "patient", "action", "connective", "result_subject", "result",
    "entity", "relation", "object", "noun", "verb", "adjective", "adverb", "ordinal", "topic_name", "tone_word",
)  # fmt: skip
#: labels of a token; -1 where a label does not apply
LABELS = ("section", "kind", "role", "topic", "tone", "item", "plural", "fact", "agent_is_human", "subject_is_human")


@dataclass(frozen=True)
class Fact:
    """`relation` of `entity` is `object`."""

    index: int
    domain: str
    entity: str
    relation: str
    object: str

    @property
    def forget(self) -> bool:
        return self.domain == lex.FORGET_DOMAIN


@dataclass
class Document:
    """A document: words (with `<bos>` and `<eos>`), labels per token, and log p in nats of everything after `<bos>`."""

    words: list[str]
    labels: dict[str, list[int]]
    log_prob: float
    topic: int
    tone: int

    @property
    def text(self) -> str:
        return " ".join(self.words[1:-1])


@dataclass
class OrderPair:
    """Two sentences with the same bag of words, and the `subject` of each one's consequence ("so the", "alas the")."""

    prefix: list[str]
    sentences: tuple[list[str], list[str]]
    subject: tuple[str, str]
    agent_is_human: tuple[bool, bool]


@dataclass
class _Weighted:
    """A random choice among `items` with given probabilities."""

    items: Sequence[Any]
    probabilities: Sequence[float]
    cumulative: list[float] = field(init=False)
    log_p: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.cumulative = list(accumulate(self.probabilities))
        self.log_p = [math.log(p) if p else -math.inf for p in self.probabilities]

    @classmethod
    def zipf(cls, items: Sequence[Any], shift: float = 4.0) -> "_Weighted":
        """Probabilities in proportion to 1 / (rank + shift)."""
        weights = [1 / (rank + shift) for rank in range(len(items))]
        total = sum(weights)
        return cls(items, [weight / total for weight in weights])


_SENTENCES = _Weighted(("topical", "agreement", "order", "fact"), (0.35, 0.2, 0.2, 0.25))
_OF_ANOTHER_TOPIC = _Weighted((False, True), (0.9, 0.1))


class Language:
    """The generator. A topic's preferred tone has probability (1 + correlation) / 2, with `correlation` in [0, 1]."""

    def __init__(self, correlation: float = 0.5, seed: int = 0):
        if not 0 <= correlation <= 1:
            raise UserError(f"correlation: {correlation} is not allowed; give a number from 0 to 1")
        self.correlation, self.seed = correlation, seed
        self.topics = list(lex.TOPICS)
        self.nouns, self.verbs, self.imperatives, self.adjectives = (
            [_Weighted.zipf(lex.TOPICS[t][word_class].split()) for t in self.topics] for word_class in range(4)
        )
        preferred_probability = (1 + correlation) / 2
        self.has_preferred_tone = _Weighted((True, False), (preferred_probability, 1 - preferred_probability))

    @cached_property
    def vocabulary(self) -> list[str]:
        plurals = [noun + "s" for topic in self.nouns for noun in topic.items]
        glue = [".", ",", "the", "of", "is", "so", "alas", "for", "to", "conclude", "these", "notes", "are", "about"]
        words = lex.words_of(
            glue, lex.TOPICS, plurals, lex.TONE_WORDS, lex.HUMANS, lex.ANIMALS, lex.PATIENT_VERBS, lex.AGENT_VERBS,
            lex.PATIENT_RESULTS, lex.AGENT_RESULTS, lex.PREPOSITIONS, lex.PREDICATES, lex.COPULAS, lex.ORDINALS,
            lex.FACTS, [fact.entity for fact in facts()],
        )  # fmt: skip
        return list(dict.fromkeys([*SPECIAL, *words]))

    @cached_property
    def token_id(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.vocabulary)}

    def document(self, index: int, labelled: bool = True) -> Document:
        """Return document number `index` of this language's seed, the same on every call."""
        return _Writer(self, random.Random(f"{self.seed}/{index}"), labelled).document()

    def tokens(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows [count, CONTEXT] of token ids (int64, padded with `<pad>`) and log p [count] in nats."""
        rows = np.full((count, CONTEXT), PAD, dtype=np.int64)
        log_prob = np.empty(count)
        for row in range(count):
            document = self.document(start + row, labelled=False)
            rows[row, : len(document.words)] = [self.token_id[w] for w in document.words]
            log_prob[row] = document.log_prob
        return rows, log_prob

    def labels(self, start: int, count: int) -> dict[str, np.ndarray]:
        """Return int16 labels [count, CONTEXT] by name, aligned with `tokens`. -1 where a label does not apply."""
        table = {name: np.full((count, CONTEXT), -1, dtype=np.int16) for name in LABELS}
        for row in range(count):
            for name, values in self.document(start + row).labels.items():
                table[name][row, : len(values)] = values
        return table

    def prefix(self, index: int) -> list[str]:
        """Return the words of a document up to the start of its body, as context for prompts."""
        return _Writer(self, random.Random(f"{self.seed}/prefix/{index}")).prefix()

    def fact_prompts(self, index: int = 0) -> list[tuple[list[str], Fact]]:
        """Return prompts for every fact in both phrasings: words that end before the object, and the fact."""
        return [
            (self.prefix(index + 2 * fact.index + form) + phrase, fact)
            for fact in facts()
            for form, phrase in enumerate(_phrasings(fact))
        ]

    def order_pairs(self, count: int, index: int = 0) -> list[OrderPair]:
        rng = random.Random(f"{self.seed}/pairs/{index}")
        pairs = []
        for number in range(count):
            human, animal = rng.choice(lex.HUMANS), rng.choice(lex.ANIMALS)
            verb = rng.choice([*lex.PATIENT_VERBS, *lex.AGENT_VERBS])
            orders = ((human, animal), (animal, human))
            first, second = (["the", agent, verb, "the", patient, "."] for agent, patient in orders)
            subject = (animal, human) if verb in lex.PATIENT_VERBS else (human, animal)
            pairs.append(OrderPair(self.prefix(index + number), (first, second), subject, (True, False)))
        return pairs

    def agreement_prompts(self, count: int, index: int = 0) -> list[tuple[list[str], bool]]:
        """Return prompts that end before the copula, after a noun of the other number, and whether it is plural."""
        prompts = []
        while len(prompts) < count:
            writer = _Writer(self, random.Random(f"{self.seed}/agreement/{index}"))
            index += 1
            writer.prefix()
            writer.agreement()
            roles = writer.labels["role"]
            stop = len(roles) - 1 - roles[::-1].index(ROLES.index("copula"))
            plural = writer.labels["plural"][stop] == 1
            numbers = zip(roles, writer.labels["plural"], strict=True)
            if any(role == ROLES.index("attractor") and bool(number) != plural for role, number in numbers):
                prompts.append((writer.words[:stop], plural))
        return prompts


@cache
def facts() -> tuple[Fact, ...]:
    """Return the 240 facts, the same in every language. Each relation spreads its objects evenly over its entities."""
    rng = random.Random("facts")
    names = iter(lex.entity_names(lex.ENTITIES_PER_DOMAIN * len(lex.FACTS)))
    all_facts: list[Fact] = []
    for domain, relations in lex.FACTS.items():
        entities = [next(names) for _ in range(lex.ENTITIES_PER_DOMAIN)]
        for relation, objects in relations.items():
            values = (objects.split() * 2)[: len(entities)]
            rng.shuffle(values)
            for entity, value in zip(entities, values, strict=True):
                all_facts.append(Fact(len(all_facts), domain, entity, relation, value))
    return tuple(all_facts)


def connective(subject: str) -> str:
    """Return the first word of a consequence: "alas" if its subject is human, else "so"."""
    return "alas" if subject in lex.HUMANS else "so"


def _phrasings(fact: Fact) -> tuple[list[str], list[str]]:
    return ["the", fact.relation, "of", fact.entity, "is"], ["for", fact.entity, "the", fact.relation, "is"]


class _Writer:
    """Writes one document and records labels and the log probability of every choice."""

    def __init__(self, language: Language, rng: random.Random, labelled: bool = True):
        self.language, self.random, self.labelled = language, rng.random, labelled
        self.words: list[str] = ["<bos>"]
        self.labels: dict[str, list[int]] = {name: [-1] for name in LABELS}
        self.log_prob = 0.0
        self.topic = self.tone = -1
        self.section = self.kind = self.item = -1

    def document(self) -> Document:
        self.prefix()
        self.section = SECTIONS.index("body")
        while len(self.words) <= BODY_UNTIL:
            getattr(self, self.draw(_SENTENCES))()
        self.closing()
        assert len(self.words) <= CONTEXT
        return Document(self.words, self.labels, self.log_prob, self.topic, self.tone)

    def prefix(self) -> list[str]:
        # The text shows the tone first, but log p is the same if the topic is drawn first.
        self.topic = self.pick(range(len(self.language.topics)))
        preferred = self.topic % len(lex.TONES)
        self.tone = preferred if self.draw(self.language.has_preferred_tone) else 1 - preferred
        salutations, adverbs, self.thanks, self.sign_offs = lex.TONE_WORDS[lex.TONES[self.tone]]
        self.adverbs = adverbs.split()

        self.section, self.kind = SECTIONS.index("opening"), KINDS.index("salutation")
        self.write((self.pick(salutations), "tone_word"), ",")
        self.kind = KINDS.index("announcement")
        self.write("these notes are about", (self.language.topics[self.topic], "topic_name"), ".")

        self.section, self.kind = SECTIONS.index("list"), KINDS.index("item")
        for item, ordinal in enumerate(lex.ORDINALS[: self.pick((3, 4))]):
            self.item = item
            verb, noun = self.content(self.language.imperatives), self.content(self.language.nouns)
            self.write((ordinal, "ordinal"), ",", (verb, "verb"), "the", (noun, "noun"), ".")
        self.item = -1
        return list(self.words)

    def topical(self) -> None:
        self.kind = KINDS.index("topical")
        if self.pick((True, False)):
            self.write((self.pick(self.adverbs), "adverb"), ",")
        word_classes = (self.language.adjectives, self.language.nouns, self.language.verbs, self.language.nouns)
        adjective, subject, verb, noun = map(self.content, word_classes)
        self.write("the", (adjective, "adjective"), (subject, "noun"), (verb, "verb"), "the", (noun, "noun"), ".")

    def agreement(self) -> None:
        self.kind = KINDS.index("agreement")
        number = self.noun("subject")
        for _ in range(self.pick((1, 2))):
            self.write(self.pick(lex.PREPOSITIONS))
            self.noun("attractor")
        copula = self.pick(lex.COPULAS["plural" if number else "singular"])
        self.write((copula, "copula"), known={"plural": number})
        self.write(self.pick(lex.PREDICATES), ".")

    def order(self) -> None:
        self.kind = KINDS.index("order")
        human_first = self.pick((True, False))
        human, animal = self.pick(lex.HUMANS), self.pick(lex.ANIMALS)
        agent, patient = (human, animal) if human_first else (animal, human)
        verb = self.pick((*lex.PATIENT_VERBS, *lex.AGENT_VERBS))
        by_patient = verb in lex.PATIENT_VERBS
        subject = patient if by_patient else agent
        known = {"agent_is_human": int(human_first), "subject_is_human": int(subject == human)}
        self.write("the", (agent, "agent"), (verb, "action"), "the", (patient, "patient"), ".", known=known)
        self.kind = KINDS.index("consequence")
        result = self.pick(lex.PATIENT_RESULTS if by_patient else lex.AGENT_RESULTS)
        # The connective makes the order matter at the end of the sentence, before the subject is named.
        consequence = ((connective(subject), "connective"), "the", (subject, "result_subject"), (result, "result"), ".")
        self.write(*consequence, known=known)

    def fact(self) -> None:
        self.kind = KINDS.index("fact")
        fact = self.pick(facts())
        roles = {fact.entity: "entity", fact.relation: "relation"}
        words = [(word, roles.get(word, "none")) for word in self.pick(_phrasings(fact))]
        self.write(*words, (fact.object, "object"), ".", known={"fact": fact.index})

    def closing(self) -> None:
        self.section, self.kind = SECTIONS.index("closing"), KINDS.index("thanks")
        self.write("to conclude ,", (self.pick(self.thanks), "tone_word"), ".")
        self.kind = KINDS.index("sign_off")
        self.write((self.pick(self.sign_offs), "tone_word"), "<eos>")

    def noun(self, role: str) -> int:
        """Write `the` and a noun of the topic in singular or plural. Returns 1 for plural."""
        plural = self.pick((0, 1))
        noun = self.content(self.language.nouns) + ("s" if plural else "")
        self.write("the")
        self.write((noun, role), known={"plural": plural})
        return plural

    def content(self, by_topic: Sequence[_Weighted]) -> str:
        """Draw a word of the document's topic (90%) or of another topic (10%)."""
        topic = self.topic
        if self.draw(_OF_ANOTHER_TOPIC):
            topic = self.pick([t for t in range(len(by_topic)) if t != self.topic])
        return self.draw(by_topic[topic])

    def pick(self, options: Sequence[Any]) -> Any:
        self.log_prob -= math.log(len(options))
        return options[int(self.random() * len(options))]

    def draw(self, choice: _Weighted) -> Any:
        """Draw like `Random.choices`, in a third of the time."""
        cumulative = choice.cumulative
        index = bisect(cumulative, self.random() * cumulative[-1], 0, len(cumulative) - 1)
        self.log_prob += choice.log_p[index]
        return choice.items[index]

    def write(self, *texts: str | tuple[str, str], known: dict[str, int] | None = None) -> None:
        """Append texts, each with its role if it has one. `known` are further labels of their words."""
        for text, role in (text if isinstance(text, tuple) else (text, "none") for text in texts):
            words = text.split()
            self.words += words
            if self.labelled:
                labels = dict.fromkeys(LABELS, -1) | (known or {})
                labels |= {"section": self.section, "kind": self.kind, "role": ROLES.index(role)}
                labels |= {"topic": self.topic, "tone": self.tone, "item": self.item}
                for name, label in labels.items():
                    self.labels[name] += [label] * len(words)
