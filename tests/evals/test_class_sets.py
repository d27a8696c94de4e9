"""TPP and SCR on labelled texts: sizes, several sets beside each other, and what happens without a usable set."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from temposae.engine.config import SAEConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.testbed.language import Language
from temposae.evals import class_sets as module
from temposae.evals.class_sets import class_sets
from temposae.evals.evaluation import Evaluation
from temposae.evals.scr_tpp import _biased_and_even, _halves, scr, tpp


@pytest.fixture(scope="module")
def sae() -> SparseAutoencoder:
    return SparseAutoencoder(SAEConfig(d_in=128, d_sae=64, k=4), seed=1)


@pytest.fixture
def file(stream_of, tmp_path) -> Path:
    """Documents of the embedded language as words, with topic (sailing or cooking) and tone as labels."""
    evaluation = Evaluation(stream_of(), SparseAutoencoder(SAEConfig(d_in=128, d_sae=8, k=2)), None)
    collected = evaluation.labelled(512)
    words = np.array(Language().vocabulary)
    topic, tone = (collected.row_label(name).numpy() for name in ("topic", "tone"))
    with (tmp_path / "texts.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["body", "topic", "tone"])
        for row in np.flatnonzero(topic < 2):
            text = " ".join(words[collected.tokens[row, : 24 + row % 30][collected.kept[row, : 24 + row % 30]].numpy()])
            writer.writerow([text, ["sailing", "cooking"][topic[row]], ["formal", "casual"][tone[row]]])
    return tmp_path / "texts.csv"


def measured(stream, sae, sets, protocol="temposae") -> Evaluation:
    evaluation = Evaluation(stream, sae, None, sets=[str(source) for source in sets])
    evaluation.protocol = protocol
    return evaluation


COLUMNS = "?text=body&label=topic"


@pytest.mark.parametrize("protocol", ["temposae", "saebench"])
def test_a_file_with_one_label_is_for_tpp(file, stream_of, sae, protocol):
    found = tpp(measured(stream_of(), sae, ["tone", f"{file}{COLUMNS}"], protocol))
    assert found["sets"].keys() == {"texts.csv"}  # labels of the embedded language are for sparse probing
    assert found["sets"]["texts.csv"]["classes"] == ["cooking", "sailing"]
    assert found["clean_accuracy"] > 0.9  # topics have words of their own
    assert (found["protocol_name"], found["protocol"]["dataset_names"]) == (protocol, ["texts.csv"])
    assert found["rows"] == sum(1 for _ in file.open()) - 1
    assert found["intervals"]["score"]["low"] <= found["score"] <= found["intervals"]["score"]["high"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("protocol", ["temposae", "saebench"])
def test_a_file_with_two_labels_is_for_scr(file, stream_of, sae, protocol):
    source = f"{file}{COLUMNS}&attribute=tone"
    found = scr(measured(stream_of(), sae, [source, f"{file}{COLUMNS}"], protocol))
    assert found["sets"].keys() == {"texts.csv: cooking/sailing"}
    pair = found["sets"]["texts.csv: cooking/sailing"]
    assert pair["clean_class"] > 0.8
    assert pair["scr_metric"] == found["scr_metric"]
    assert found["protocol"]["column1_vals_lookup"] == {"texts.csv": [("cooking", "sailing")]}
    json.dumps(found, allow_nan=False)


def test_a_set_as_a_whole_or_in_parts_is_the_same(file, stream_of, sae, monkeypatch):
    source = f"{file}{COLUMNS}&attribute=tone"
    whole = next(class_sets(measured(stream_of(), sae, [source]), 0, paired=True, padding=True))
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", 7)
    parts = next(class_sets(measured(stream_of(), sae, [source]), 0, paired=True, padding=True))
    np.testing.assert_allclose(parts.x, whole.x, atol=1e-5)
    for name in ("sae", "lm_neurons"):
        every = np.arange(len(whole.latents[name].W_dec))
        np.testing.assert_allclose(
            parts.latents[name].ablated(every), whole.latents[name].ablated(every), atol=1e-4, rtol=1e-4
        )
    assert whole.latents["sae"].unread is not None
    assert (
        whole.latents["sae"].unread.shape[1] == whole.context == 128
    )  # padding to the context, not to the longest text


def test_sets_have_equal_weight(file, stream_of, sae, tmp_path):
    other = tmp_path / "other.csv"
    lines = file.read_text().splitlines()
    other.write_text("\n".join(lines[: len(lines) * 2 // 3]))
    one, two, both = (
        tpp(measured(stream_of(), sae, [f"{f}{COLUMNS}" for f in files])) for files in ([file], [other], [file, other])
    )
    assert both["score"] == pytest.approx((one["score"] + two["score"]) / 2)
    assert both["sets"]["other.csv"] == two["sets"]["other.csv"]
    assert (
        both["intervals"]["score"]["items"] == one["intervals"]["score"]["items"] + two["intervals"]["score"]["items"]
    )
    with pytest.raises(UserError, match=r"^sets: texts.csv is given twice; give each set its own name$"):
        tpp(measured(stream_of(), sae, [f"{file}{COLUMNS}", f"{file}{COLUMNS}&per_class=20"]))


def test_few_texts_are_refused(stream_of, sae, tmp_path):
    (tmp_path / "few.csv").write_text("text,label\n" + "a,x\n" * 12 + "a,y\n" * 3)
    with pytest.raises(UserError, match=r"^sets: few.csv has 3 texts of class y; give at least 10 of each class$"):
        tpp(measured(stream_of(), sae, [tmp_path / "few.csv"]))


def test_sizes_are_those_of_saebench():
    """Of the texts taken of a published pair, 2500 and 1250 of a class: 4000 rows for training and 1000 for testing,
    biased or not."""
    kinds = np.repeat([0, 1, 2, 3], [2500, 1250, 1250, 2500])
    groups = _halves(kinds, range(4), np.random.default_rng(0), 0.8)
    for side, size in ((0, 4000), (1, 1000)):
        biased, even = _biased_and_even([group[side] for group in groups], True)
        assert (len(biased), len(even)) == (size, size)
        assert np.bincount(kinds[biased]).tolist() == [size // 2, 0, 0, size // 2]
        assert np.bincount(kinds[even]).tolist() == [size // 4] * 4
        assert set(even[: size // 4]) < set(biased)
    own = _biased_and_even(
        [group[0] for group in _halves(np.repeat([0, 1, 2, 3], 10), range(4), np.random.default_rng(0))], False
    )
    assert [len(rows) for rows in own] == [10, 20]
