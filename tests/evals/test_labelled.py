"""Labelled texts from files, and from small copies of the published sets in the layout that they have."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from temposae.engine.errors import UserError
from temposae.evals import labelled as module
from temposae.evals.labelled import PER_CLASS, PUBLISHED, Labelled, load_labelled

BIOS = "LabHC/bias_in_bios_class_set"
AMAZON = "canrager/amazon_reviews_mcauley_1and5"


def load(source: object, seed: int = 0) -> Labelled:
    return load_labelled(str(source), np.random.default_rng(seed))


def pairs(labelled: Labelled) -> set[tuple[str, str]]:
    return set(zip(labelled.texts, labelled.labels, strict=True))


def put(folder: Path, rows: list[dict], name: str = "data/train-00000-of-00001.parquet") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)


def test_a_csv_file_has_texts_and_labels(tmp_path):
    rows = [("one, two", "a"), ('with "quotes"\nand a second line', "b"), ("Grüße " + "x" * 200_000, "a"), ("  ", "a")]
    with (tmp_path / "set.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "other", "label"), *((text, "-", label) for text, label in rows)])
    found = load(tmp_path / "set.csv")
    assert found.name == "set.csv"
    assert pairs(found) == set(rows[:3])  # the empty one is left out


def test_a_jsonl_file_may_have_columns_of_other_names(tmp_path):
    rows = [{"body": f"text {n}", "stars": n % 2 * 4 + 1.0} for n in range(6)] + [{"body": "text 6", "stars": 1}]
    (tmp_path / "set.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    found = load(f"{tmp_path}/set.jsonl?text=body&label=stars")
    assert pairs(found) == {(f"text {n}", "5" if n % 2 else "1") for n in range(7)}


def test_half_a_surrogate_pair_becomes_a_text_that_can_be_tokenised(tmp_path):
    (tmp_path / "set.jsonl").write_text('{"text": "a \\ud83d b", "label": "x"}\n')
    assert load(tmp_path / "set.jsonl").texts == ["a � b"]


def test_the_order_follows_from_the_seed_and_a_class_has_no_more_than_asked_for(tmp_path):
    lines = [json.dumps({"text": f"{n}", "label": "ab"[n >= 50]}) for n in range(100)]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    whole = load(tmp_path / "set.jsonl")
    assert load(tmp_path / "set.jsonl") == whole
    assert load(tmp_path / "set.jsonl", seed=1).texts != whole.texts
    assert Counter(whole.labels) == {"a": 50, "b": 50}
    some = load(f"{tmp_path}/set.jsonl?per_class=20")
    assert Counter(some.labels) == {"a": 20, "b": 20}
    assert max(int(text) for text in some.texts[:20]) > 50 > min(int(text) for text in some.texts[:20])
    assert sorted(map(int, some.texts))[:20] != list(range(20))  # drawn, not the first of the file


@pytest.mark.parametrize(
    ("name", "content", "source", "message"),
    [
        ("x.csv", "text,class\na,b\n", "x.csv", "x.csv line 2 has no 'label'; it has text, class"),
        ("x.csv", "text,label\na\n", "x.csv", "x.csv line 2 has no 'label'"),
        ("x.jsonl", '{"text": "a", "label": "b"}\n{"label": "b"}', "x.jsonl", "x.jsonl line 2 has no 'text'; it has label"),
        ("x.jsonl", '{"text": "a", "label"\n', "x.jsonl", "x.jsonl can't be read: "),
        ("x.jsonl", "[1, 2]\n", "x.jsonl", "x.jsonl can't be read: line 1 is not a JSON object"),
        ("x.csv", b"text,label\n\xff,b\n", "x.csv", "x.csv can't be read: .*utf-8"),
        ("x.csv", "", "y.csv", "y.csv can't be read: .*No such file"),
        ("x.csv", "", "x.csv?txt=body", "x.csv\\?txt=body has no option 'txt'; allowed are per_class, text, label"),
        ("x.csv", "", "x.csv?per_class=0", "per_class = '0', which is not allowed"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, name, content, source, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"^sets: .*{message}") as refused:
        load(tmp_path / source)
    assert "\n" not in str(refused.value)


def test_texts_and_labels_must_be_as_many():
    with pytest.raises(UserError, match="sets: mine has 2 texts and 1 labels"):
        Labelled("mine", ["a", "b"], ["x"])


def test_biographies_of_the_wanted_professions_are_of_as_many_women_as_men(tmp_path):
    put(
        tmp_path,
        [
            {"hard_text": f"bio {n}", "profession": n % 28, "gender": int(n // 28 % 5 == 0)}
            for n in range(28 * 50)  # of each profession 10 women and 40 men
        ],
    )
    professions = ("accountant", "architect", "attorney", "dentist", "filmmaker")
    ids = dict(zip((0, 1, 2, 6, 9), professions, strict=True))
    found = load(f"{BIOS}1?path={tmp_path}&per_class=16")
    assert Counter(found.labels) == dict.fromkeys(professions, 16)
    for text, label in pairs(found):
        assert ids[int(text.split()[1]) % 28] == label
    women = Counter(label for text, label in pairs(found) if int(text.split()[1]) // 28 % 5 == 0)
    assert women == dict.fromkeys(professions, 8)
    # with fewer women than asked for, all of them
    assert Counter(load(f"{BIOS}2?path={tmp_path}&per_class=30").labels)["nurse"] == 10 + 15
    third = set(load(f"{BIOS}3?path={tmp_path}").labels)
    assert third == {"poet", "professor", "psychologist", "surgeon", "teacher"}


def test_reviews_are_told_by_category_or_by_rating(tmp_path):
    rows = [{"text": f"review {n}", "category": n % 34, "rating": (1.0, 5.0)[n // 34 % 2]} for n in range(34 * 8)]
    put(tmp_path, rows)
    by_category = load(f"{AMAZON}?path={tmp_path}")
    wanted = {
        1: "Toys_and_Games", 2: "Cell_Phones_and_Accessories", 3: "Industrial_and_Scientific", 5: "Musical_Instruments",
        6: "Electronics",
    }  # fmt: skip
    assert pairs(by_category) == {(r["text"], wanted[r["category"]]) for r in rows if r["category"] in wanted}
    by_rating = load(f"{AMAZON}_sentiment?path={tmp_path}")
    assert pairs(by_rating) == {(r["text"], "positive" if r["rating"] == 5 else "negative") for r in rows}


def test_source_files_are_told_by_their_ending_beside_a_loading_script(tmp_path):
    """Without their first 150 characters, a licence; those of no more than 384 besides are left out."""
    endings = {"C": "c", "Python": "py", "HTML": "html", "Java": "java", "PHP": "php", "JavaScript": "js", "C++": "cpp"}
    for shard in range(3):
        rows = [
            {
                "content": "(c)" * 50 + f"{language} {shard} ".ljust(384 + (shard < 2), "."),
                "repo_name": "me/it",
                "path": f"src.d/x.{ending}",
                "license": "mit",
            }
            for language, ending in endings.items()
        ]
        put(tmp_path, rows, f"data/train-{shard:05d}-of-01126.parquet")
    (tmp_path / "github-code.py").write_text("raise RuntimeError('a script was run')\n")
    found = load(f"codeparrot/github-code?path={tmp_path}")
    wanted = ("C", "Python", "HTML", "Java", "PHP")
    told = {(tuple(text.strip(".").split()), label) for text, label in pairs(found)}
    assert told == {((language, str(shard)), language) for language in wanted for shard in range(2)}


@pytest.mark.parametrize("held", [8, 10_000])
def test_news_are_told_by_topic(tmp_path, monkeypatch, held):
    monkeypatch.setattr(module, "_SHUFFLED", held)
    put(tmp_path, [{"text": f"news {n}", "label": n % 4} for n in range(40)])
    found = load(f"fancyzhx/ag_news?path={tmp_path}")
    topics = ("World", "Sports", "Business", "Sci/Tech")
    assert pairs(found) == {(f"news {n}", topics[n % 4]) for n in range(40)}
    assert len(found.texts) == 40
    assert load(f"fancyzhx/ag_news?path={tmp_path}") == found
    assert load(f"fancyzhx/ag_news?path={tmp_path}", seed=1).texts != found.texts != sorted(found.texts)


def test_each_language_is_read_from_one_pair(tmp_path):
    for pair in ("en-fr", "fr-it", "de-en", "es-fr", "nl-pt", "da-en"):
        rows = [
            {"translation": {language: f"{language} of {pair} {n}" for language in pair.split("-")}} for n in range(5)
        ]
        put(tmp_path, rows, f"{pair}/train-00000-of-00001.parquet")
    found = load(f"Helsinki-NLP/europarl?path={tmp_path}")
    source = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
    assert pairs(found) == {(f"{lang} of {pair} {n}", lang) for lang, pair in source.items() for n in range(5)}


def test_there_are_eight_published_sets_with_the_protocol_s_sizes():
    sizes = {name: sum(map(len, published.classes_by_file.values())) for name, published in PUBLISHED.items()}
    bios = {f"{BIOS}{n}": 5 for n in (1, 2, 3)}
    others = {"codeparrot/github-code": 5, "fancyzhx/ag_news": 4, "Helsinki-NLP/europarl": 5}
    assert sizes == bios | {AMAZON: 5, f"{AMAZON}_sentiment": 2} | others
    assert PER_CLASS == (4000 + 1000) / 2


def test_a_set_that_cannot_be_had_is_refused_with_what_to_do(tmp_path):
    """Tests have no network: HF_HUB_OFFLINE."""
    with pytest.raises(
        UserError, match=r"fancyzhx/ag_news can't be read from hf://.*give fancyzhx/ag_news\?path=FOLDER"
    ) as e:
        load("fancyzhx/ag_news")
    assert "\n" not in str(e.value)
    with pytest.raises(
        UserError, match=f"can't be read from {tmp_path} .*download Helsinki-NLP/europarl with its folders"
    ):
        load(f"Helsinki-NLP/europarl?path={tmp_path}")
    put(tmp_path, [{"text": "a", "label": 0}])
    with pytest.raises(UserError, match=r"ag_news has no text of class Sports in .*data/train-\*.parquet"):
        load(f"fancyzhx/ag_news?path={tmp_path}")
    with pytest.raises(UserError, match="can't be read from .*KeyError.*hard_text"):
        load(f"{BIOS}1?path={tmp_path}")
    with pytest.raises(UserError, match="fancyzhx/agnews is not allowed; .*did you mean fancyzhx/ag_news"):
        load("fancyzhx/agnews")
