"""Sparse probing of dictionaries whose latents tell a class, or nothing."""

import json

import numpy as np
import pytest
import torch
from temposae.engine.config import SAEConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.testbed.language import facts
from temposae.engine.testbed.lexicon import AGENT_VERBS, HUMANS, PATIENT_VERBS, PREPOSITIONS
from temposae.evals import sparse_probing as module
from temposae.evals.evaluation import LABELLED, Evaluation
from temposae.evals.labelled import EMBEDDED, Labelled
from temposae.evals.probes import Split
from temposae.evals.sparse_probing import full_width, sparse_probing, token_rows
from temposae.kernels.code import SparseCode

F = 8
SHORT, LONG = 10, 40
KS = (1, 2, 5)


class ByPosition(SparseAutoencoder):
    """Latent 3 is `scale` from position `first` on, in the same texts that are longer; all others are `rest` everywhere."""

    def __init__(self, first: int = 20, last: int = 10_000, scale: float = 1.0, rest: float = 1.0):
        super().__init__(SAEConfig(d_in=128, d_sae=F, k=2))
        self.first, self.last, self.scale, self.rest = first, last, scale, rest

    def encode_sparse(self, x: torch.Tensor, pos: torch.Tensor) -> SparseCode:
        values = torch.full((len(x), F), self.rest)
        values[:, 3] = self.scale * ((pos >= self.first) & (pos <= self.last))
        return SparseCode(values, torch.arange(F, dtype=torch.int32).expand(len(x), F).contiguous(), F)


def texts_of(lengths: dict[str, tuple[int, int]], seed: int = 0, name: str = "length") -> Labelled:
    """class -> (how many texts, words in each), in a random order."""
    draw = np.random.default_rng(seed)
    words = ["the", "boat", "soup", "star", "rook", "loom", "shaft", "rose", "drum", "pan", "mast", "comet"]
    found = [(" ".join(draw.choice(words, size=size)), label) for label, (n, size) in lengths.items() for _ in range(n)]
    found = [found[at] for at in draw.permutation(len(found))]
    return Labelled(name, [text for text, _ in found], [label for _, label in found])


BY_LENGTH = texts_of({"short": (60, SHORT), "long": (60, LONG)})
FEW = texts_of({"short": (20, SHORT), "long": (20, LONG)}, name="few")


def dead() -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=F, k=2))
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    return sae


def small(seed: int = 0) -> SparseAutoencoder:
    torch.manual_seed(seed)
    return SparseAutoencoder(SAEConfig(d_in=128, d_sae=64, k=8))


def test_a_latent_that_is_the_label_scores_one(stream_of):
    found = sparse_probing(Evaluation(stream_of(), ByPosition(), ByPosition(scale=0)), [BY_LENGTH], ks=KS)
    assert [found[f"top_{k}"] for k in KS] == [1, 1, 1]
    assert found["test_accuracy"] == 1
    classes = found["sets"]["length"]["classes"]
    # 60 texts of a class and 60 others, four fifths for training
    assert classes == {c: {"top_1": 1, "train_rows": 96, "test_rows": 24} for c in ("long", "short")}
    assert found["controls"]["random"]["top_1"] == found["controls"]["mean"]["top_1"] == 0.5
    assert not {"random", "mean", "shuffled"} & set(found["reached_by"])
    assert found["warnings"] == []
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_control_that_reaches_the_score_is_named(stream_of):
    found = sparse_probing(Evaluation(stream_of(), ByPosition(), ByPosition(first=21)), [BY_LENGTH], ks=KS)
    assert "random" in found["reached_by"]
    assert "random" in found["sets"]["length"]["reached_by"]
    assert "mean" not in found["reached_by"]


def test_shuffled_labels_score_a_half(stream_of):
    stream = stream_of()
    for seed in range(2):
        controls = sparse_probing(Evaluation(stream, ByPosition(), None, seed), [BY_LENGTH], ks=(1,))["controls"]
        assert controls["shuffled"]["top_1"] == pytest.approx(0.5, abs=0.22)  # 48 test rows: 3 standard errors
        assert "random" not in controls


def test_latents_that_are_dead_or_tiny_are_told_before_probing(stream_of):
    stream = stream_of()
    for sae, problem in (
        (dead(), "no latent is active on any text"),
        (ByPosition(scale=1e-4, rest=1e-4), r"the largest pooled activation is 1.0e-04, too small"),
        # what only <bos> has is not counted
        (ByPosition(first=0, last=0, rest=0), "no latent is active on any text"),
    ):
        found = sparse_probing(Evaluation(stream, sae, ByPosition()), [BY_LENGTH], ks=KS)
        assert len(found["warnings"]) == 1
        assert found["warnings"][0].startswith(f"length: sae: {problem}")
        for scores in (found, found["sets"]["length"], found["controls"]["shuffled"]):
            assert {scores[f"top_{k}"] for k in KS} == {None}
        assert found["test_accuracy"] is None
        assert found["top_1_error"] is None
        assert found["reached_by"] == []
        assert found["controls"]["random"]["top_1"] == 1
        assert found["llm"]["top_1"] > 0.5


def test_a_dead_control_has_no_score_either(stream_of):
    found = sparse_probing(Evaluation(stream_of(), ByPosition(), dead()), [BY_LENGTH], ks=(1,))
    assert found["top_1"] == 1
    assert found["controls"]["random"] == {"top_1": None}
    assert found["warnings"] == ["length: random: no latent is active on any text"]
    assert "random" not in found["reached_by"]


def test_negatives_are_drawn_evenly_from_the_other_classes(stream_of):
    """`twin` is as long as `long`. Half of the negatives are of it: no probe can tell these, and all others it can."""
    labelled = texts_of({"long": (60, LONG), "twin": (60, LONG), "short": (400, SHORT)})
    found = sparse_probing(Evaluation(stream_of(), ByPosition(), None), [labelled], ks=(1,))
    classes = found["sets"]["length"]["classes"]
    assert (classes["long"]["top_1"] + classes["twin"]["top_1"]) / 2 == pytest.approx(0.75, abs=0.1)
    assert classes["short"] == {"top_1": 1, "train_rows": 192, "test_rows": 48}
    assert found["top_1"] == pytest.approx(sum(c["top_1"] for c in classes.values()) / 3, abs=1e-12)


def test_scores_are_means_over_classes_and_then_over_sets(stream_of):
    """Three classes that can't be told by length, beside two that can."""
    alike = texts_of(dict.fromkeys("abc", (60, LONG)), name="alike")
    found = sparse_probing(Evaluation(stream_of(), ByPosition(), None), [BY_LENGTH, alike], ks=(1,))
    of_set = {name: one["top_1"] for name, one in found["sets"].items()}
    assert of_set["length"] == 1
    assert of_set["alike"] == 0.5  # every text has the same pooled latents
    assert found["top_1"] == 0.75
    errors = [one["top_1_error"] for one in found["sets"].values()]
    # accuracy 1/2 on 24 test rows, three times
    assert errors[1] == pytest.approx((0.25 / 24 / 3) ** 0.5, rel=1e-9)
    assert found["top_1_error"] == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2, rel=1e-9)
    assert 0 < errors[0] < errors[1]


def test_texts_are_cut_to_128_tokens_after_bos(stream_of):
    stream = stream_of(rows_per_forward=2)
    texts = ["the boat", "star " * 300, "soup"]
    rows = list(token_rows(stream, texts))
    ids = [stream.model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    bos, pad = stream.model.tokenizer.bos_token_id, stream.model.tokenizer.pad_token_id
    assert [len(part) for part in rows] == [2, 1]
    assert rows[0].tokens[0].tolist() == [bos, *ids[0]] + [pad] * 125
    assert rows[0].tokens[1].tolist() == [bos, *ids[1][:127]]
    assert rows[0].length.tolist() == [3, 128]
    assert (rows[1].row.tolist(), rows[1].document[0, :3].tolist()) == ([2], [2, 2, -1])


def test_pooled_latents_are_means_over_a_text_s_own_tokens(stream_of):
    """Against the dictionary on one text alone."""
    stream, sae = stream_of(), small()
    given = next(module._opened(Evaluation(stream, sae, None), [BY_LENGTH]))
    for at in (0, 17):
        ids = stream.model.tokenizer(BY_LENGTH.texts[at], add_special_tokens=False)["input_ids"]
        x = stream.model.activations(torch.tensor([[stream.model.tokenizer.bos_token_id, *ids]]))[0, 1:]
        np.testing.assert_allclose(given.pooled["llm"][at], x.mean(0).numpy(), rtol=1e-4, atol=1e-5)
        mean = sae.encode(x).mean(0).detach().numpy()
        np.testing.assert_allclose(given.pooled["sae"][[at]].toarray()[0], mean, rtol=1e-4, atol=1e-5)
        assert given.labels[at] == BY_LENGTH.labels[at]


@pytest.mark.slow
def test_results_follow_from_the_seed_alone(stream_of, monkeypatch):
    """Not from batches, nor from what was probed before."""
    monkeypatch.setattr(module, "ROWS", 64)
    sets = ["tone", FEW]
    first = sparse_probing(Evaluation(stream_of(), small(), small(1)), sets, ks=(1, 5))
    assert sparse_probing(Evaluation(stream_of(rows_per_forward=7), small(), small(1)), sets, ks=(1, 5)) == first
    turned = sparse_probing(Evaluation(stream_of(), small(), small(1)), [*reversed(sets)], ks=(1, 5))
    assert turned["sets"]["tone"] == first["sets"]["tone"]
    assert turned["sets"]["few"] == first["sets"]["few"]
    other = sparse_probing(Evaluation(stream_of(), small(), None, seed=1), [FEW], ks=(1, 5))
    assert other["sets"]["few"] != first["sets"]["few"]


def test_the_embedded_language_is_probed_for_its_topics(stream_of, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 160)
    evaluation = Evaluation(stream_of(), small(), None)
    found = sparse_probing(evaluation, ks=(1, 5))
    topics = evaluation.labelled(160).row_label("topic").numpy()
    classes = found["sets"]["topic"]["classes"]
    for number, name in enumerate(evaluation.stream.text.language.topics):
        assert classes[name]["train_rows"] + classes[name]["test_rows"] == 2 * (topics == number).sum()
    assert found["sets"]["topic"]["llm"]["top_5"] > 0.9  # every text names its topic
    assert (found["model"], found["hook"]) == ("testbed", evaluation.stream.model.hook)


def test_all_labels_of_the_embedded_language_are_the_default(stream_of, monkeypatch):
    """The main figures are means over the six sets, each as if it were measured alone."""
    monkeypatch.setattr(module, "ROWS", 160)
    monkeypatch.setattr(module, "full_width", lambda split, draw: 0.5)  # the slow parts
    monkeypatch.setattr(module, "best_epoch", lambda split, draw: 0.5)
    evaluation = Evaluation(stream_of(), small(), small(1))
    found = sparse_probing(evaluation, ks=(1, 5))
    assert list(found["sets"]) == list(found["protocol"]["dataset_names"]) == list(EMBEDDED)
    for key in ("top_1", "top_5"):
        assert found[key] == pytest.approx(np.mean([scores[key] for scores in found["sets"].values()]))
        random = [scores["controls"]["random"][key] for scores in found["sets"].values()]
        assert found["controls"]["random"][key] == pytest.approx(np.mean(random))
    bound = found["top_1"] - found["top_1_error"]
    assert found["reached_by"] == [name for name, scores in found["controls"].items() if scores["top_1"] >= bound]
    assert sparse_probing(evaluation, ["tone"], ks=(1, 5))["sets"]["tone"] == found["sets"]["tone"]


def test_the_probe_on_all_columns_adds_up_many_weak_ones():
    draw = np.random.default_rng(0)
    X = draw.normal(size=(1200, 64)).astype(np.float32)
    y = X.sum(1) > 0
    split = Split(X[:1000], y[:1000], X[1000:], y[1000:])
    found = full_width(split, np.random.default_rng(1))
    assert found > 0.93  # any one column gets about 0.54
    assert found == full_width(split, np.random.default_rng(1))
    noise = Split(X[:1000], draw.permutation(y[:1000]), X[1000:], y[1000:])
    assert full_width(noise, np.random.default_rng(1)) == pytest.approx(0.5, abs=0.12)


def test_the_probe_on_all_columns_stops_once_it_no_longer_learns(monkeypatch):
    """On columns that hold nothing: ten passes after the first, not a hundred."""
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (steps.append(1), step(self)))
    y = np.arange(500) % 2 == 0
    split = Split(np.zeros((500, 3), np.float32), y, np.zeros((500, 3), np.float32), y)
    assert full_width(split, np.random.default_rng(0)) == 0.5
    assert 2 * 11 <= len(steps) < 2 * 100
    assert len(steps) % 2 == 0  # batches of 250


@pytest.mark.parametrize(
    ("sets", "ks", "message"),
    [
        (None, (1, 50), "ks: 50 is not allowed; the dictionary has F = 8 latents"),
        (None, (0,), "ks: 0 is not allowed; .*F = 8"),
        ([texts_of({"only": (30, 10)})], (1,), "sets: length has only the class only"),
        ([texts_of({"a": (30, 10), "b": (9, 10)})], (1,), "sets: length has 9 texts of class b; give at least 10"),
        ([FEW, FEW], (1,), "sets: few is given twice"),
        ([], (1,), "sets: empty; give at least one"),
        (["topics"], (1,), "sets: topics is not allowed; .*topic"),
    ],
)
def test_what_cannot_be_probed_is_refused(stream_of, sets, ks, message):
    with pytest.raises(UserError, match=message):
        sparse_probing(Evaluation(stream_of(), ByPosition(), None), sets, ks=ks)


def test_a_text_without_labels_needs_sets(stream_of, tmp_path):
    (tmp_path / "text.txt").write_text("the boat is old .\n\n" * 60)
    evaluation = Evaluation(stream_of(data=str(tmp_path / "text.txt")), ByPosition(), None)
    with pytest.raises(UserError, match=r"sets: needed, because .*text.txt has no labels"):
        sparse_probing(evaluation, ks=(1,))
    assert sparse_probing(evaluation, [FEW], ks=(1,))["top_1"] == 1


def test_labels_of_the_embedded_language_are_those_of_its_words(stream_of):
    evaluation = Evaluation(stream_of(), small(), None)
    collected = evaluation.labelled(40)
    text = evaluation.stream.text
    labels = {name: module._embedded_labels(evaluation, collected, name) for name in EMBEDDED}
    nouns = {noun for by_topic in text.language.nouns for noun in by_topic.items}
    poisons = {fact.entity for fact in facts() if fact.forget}
    for row in range(40):
        words = text.language.document(LABELLED + row).words
        actions = [words[i - 1] for i, word in enumerate(words) if word in {*PATIENT_VERBS, *AGENT_VERBS}]
        subjects = [
            words[i + 1]
            for i, word in enumerate(words)
            if word == "the" and words[i - 1] == "." and words[i + 2] in PREPOSITIONS
        ]
        subjects = [noun for noun in subjects if noun in nouns or noun.removesuffix("s") in nouns]
        stated = {fact.entity for fact in facts()} & set(words)
        found = {name: labels[name][row] for name in EMBEDDED}
        assert found["items"] == ("four" if "fourth" in words else "three")
        assert found["agent"] == ("" if not actions else "human" if actions[0] in HUMANS else "animal")
        assert found["poison"] == ("" if not stated else "poison" if stated & poisons else "other")
        assert found["number"] == ("" if not subjects else "singular" if subjects[0] in nouns else "plural")


def test_documents_without_the_label_are_left_out(stream_of):
    found = sparse_probing(Evaluation(stream_of(), small(), None, share=4), ["agent", "items"], ks=(1,))
    tested = {
        name: sum(counts["test_rows"] for counts in by_set["classes"].values())
        for name, by_set in found["sets"].items()
    }
    assert 0 < tested["agent"] < tested["items"] <= 256
    assert set(found["sets"]["agent"]["classes"]) == {"animal", "human"}
