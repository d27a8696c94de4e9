"""The embedded language: labels, ground truth, exact probabilities."""

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from temposae.engine.testbed import language as lang
from temposae.engine.testbed import lexicon as lex
from temposae.engine.testbed.language import KINDS, ROLES, SECTIONS, Language, facts


@pytest.fixture(scope="module")
def language() -> Language:
    return Language()


def test_documents_are_the_same_on_every_call_and_fit(language):
    for index in (0, 7, lang.HELD_OUT):
        document = language.document(index)
        assert document == Language().document(index)
        assert document.words[0] == "<bos>"
        assert document.words[-1] == "<eos>"
        assert len(document.words) <= lang.CONTEXT
        assert all(len(values) == len(document.words) for values in document.labels.values())
        assert set(document.words) <= set(language.vocabulary)
    assert language.document(1).words != language.document(2).words
    assert Language(seed=1).document(0).words != language.document(0).words


def test_sections_are_tied_to_position(language):
    section = language.labels(0, 300)["section"]
    assert (section[:, 1] == SECTIONS.index("opening")).all()
    assert (section[:, 12] == SECTIONS.index("list")).all()
    assert (section[:, 60] == SECTIONS.index("body")).all()
    begins = (section == SECTIONS.index("closing")).argmax(1)
    assert begins.min() > lang.BODY_UNTIL
    assert begins.max() <= lang.BODY_UNTIL + 11


def test_facts(language):
    assert len(facts()) == 240
    assert sum(fact.forget for fact in facts()) == 60
    assert len({(fact.entity, fact.relation) for fact in facts()}) == 240
    for domain, relations in lex.FACTS.items():
        for relation, objects in relations.items():
            found = Counter(f.object for f in facts() if (f.domain, f.relation) == (domain, relation))
            assert set(found) == set(objects.split())
    tokens, labels = language.tokens(0, 50)[0], language.labels(0, 50)
    at = labels["role"] == ROLES.index("object")
    assert at.sum() > 50
    for token, fact in zip(tokens[at], labels["fact"][at], strict=True):
        assert language.vocabulary[token] == facts()[fact].object


def test_topic_and_tone_correlate_as_told():
    assert len(lex.TOPICS) >= 8
    for correlation in (0.0, 0.5, 1.0):
        language = Language(correlation)
        documents = [language.document(i, labelled=False) for i in range(600)]
        preferred = np.mean([d.tone == d.topic % len(lex.TONES) for d in documents])
        assert preferred == pytest.approx((1 + correlation) / 2, abs=0.05)
        counts = Counter(d.topic for d in documents)
        assert set(counts) == set(range(len(lex.TOPICS)))
    with pytest.raises(ValueError, match="correlation: 1.5"):
        Language(1.5)


def test_order_pairs_have_one_bag_of_words_and_two_meanings(language):
    for pair in language.order_pairs(50):
        first, second = pair.sentences
        assert Counter(first) == Counter(second)
        assert first != second
        assert first[-1] == second[-1]
        assert pair.subject[0] != pair.subject[1]
        assert pair.agent_is_human == tuple(sentence[1] in lex.HUMANS for sentence in pair.sentences)


def test_order_sentences_in_documents_are_labelled(language):
    tokens, labels = language.tokens(0, 60)[0], language.labels(0, 60)
    humans = [language.token_id[w] for w in lex.HUMANS]
    agent = labels["role"] == ROLES.index("agent")
    assert (np.isin(tokens[agent], humans) == labels["agent_is_human"][agent]).all()
    subject = labels["role"] == ROLES.index("result_subject")
    assert (np.isin(tokens[subject], humans) == labels["subject_is_human"][subject]).all()
    connective = labels["role"] == ROLES.index("connective")
    alas = tokens[connective] == language.token_id["alas"]
    assert (alas == labels["subject_is_human"][connective]).all()


def test_agreement_prompts_have_a_noun_that_misleads(language):
    for words, plural in language.agreement_prompts(50):
        sentence = words[len(words) - words[::-1].index(".") :]
        subject, *others = [word for the, word in pairwise(sentence) if the == "the"]
        assert subject.endswith("s") == plural
        assert any(word.endswith("s") != plural for word in others)


def test_content_words_are_in_one_list_only(language):
    plurals = [noun + "s" for topic in language.nouns for noun in topic.items]
    words = lex.words_of(
        lex.HUMANS, lex.ANIMALS, lex.PATIENT_VERBS, lex.AGENT_VERBS, lex.PATIENT_RESULTS, lex.AGENT_RESULTS,
        lex.PREPOSITIONS, lex.PREDICATES, lex.ORDINALS, lex.TOPICS, lex.FACTS, plurals,
        list(dict.fromkeys(fact.entity for fact in facts())),
    )  # fmt: skip
    assert [word for word, count in Counter(words).items() if count > 1] == []


def test_probability_of_openings_matches_their_frequency(language):
    """exp(log p) of everything up to the announcement, against how often it is written."""
    documents = [language.document(i) for i in range(4000)]
    openings = Counter(" ".join(d.words[1 : d.words.index(".")]) for d in documents)
    topic, tone = "sailing", "formal"  # preferred: (1 + 0.5) / 2 of 1/8, shared by 3 salutations
    for salutation in lex.TONE_WORDS[tone][0]:
        expected = 1 / len(lex.TOPICS) * 0.75 / 3
        seen = openings[f"{salutation} , these notes are about {topic}"] / len(documents)
        assert seen == pytest.approx(expected, abs=4 * (expected / len(documents)) ** 0.5)


def test_log_prob_is_the_sum_of_the_choices(language):
    """One document's log p: every choice counted where it is made, and the rank of every topical word."""
    index = next(i for i in range(99) if KINDS.index("fact") in language.document(i).labels["kind"])
    document, total = language.document(index), 0.0

    of_topics = [*language.nouns, *language.verbs, *language.imperatives, *language.adjectives]

    class Spy(lang._Writer):
        def pick(self, options):
            nonlocal total
            before = self.log_prob
            chosen = super().pick(options)
            total += self.log_prob - before
            assert self.log_prob - before == pytest.approx(-np.log(len(options)))
            return chosen

        def draw(self, choice):
            nonlocal total
            before = self.log_prob
            chosen = super().draw(choice)
            if not any(choice is words for words in of_topics):  # those are counted below
                total += self.log_prob - before
            assert sum(choice.probabilities) == pytest.approx(1)
            return chosen

    written = Spy(language, random.Random(f"0/{index}")).document()
    assert written.words == document.words
    ranks = _content_ranks(language, document)
    content = sum(np.log(1 / (rank + 4.0) / sum(1 / (i + 4.0) for i in range(n))) for rank, n in ranks)
    assert written.log_prob == pytest.approx(total + content)


def _content_ranks(language: Language, document) -> list[tuple[int, int]]:
    """Rank of every topical word in its list, and the length of that list."""
    lists = [
        c.items for part in (language.nouns, language.verbs, language.imperatives, language.adjectives) for c in part
    ]
    found = []
    roles = [ROLES[r] if r >= 0 else "none" for r in document.labels["role"]]
    for word, role in zip(document.words, roles, strict=True):
        if role in ("noun", "subject", "attractor", "verb", "adjective"):
            stem = word.removesuffix("s") if any(word.removesuffix("s") in items for items in lists) else word
            items = next(items for items in lists if stem in items)
            found.append((list(items).index(stem), len(items)))
    return found
