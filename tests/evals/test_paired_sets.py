"""Texts with a class and a binary attribute, from files and from small copies of the published sets."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from temposae.engine.errors import UserError
from temposae.evals.labelled import load_labelled
from temposae.evals.paired_sets import PAIRED, Paired, has_pairs, load_paired

BIOS, AMAZON = "LabHC/bias_in_bios_class_set1", "canrager/amazon_reviews_mcauley_1and5"


def load(source: object, seed: int = 0) -> Paired:
    return load_paired(str(source), np.random.default_rng(seed))


def write(path: Path, rows: list[tuple[str, str, str]], names: tuple[str, ...] = ("bio", "job", "sex")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return path


def rows(counts: dict[tuple[str, str], int]) -> list[tuple[str, str, str]]:
    return [(f"{job} {sex} {n}", job, sex) for (job, sex), count in counts.items() for n in range(count)]


def cells(paired: Paired) -> Counter[tuple[str, str]]:
    return Counter(zip(paired.labels, paired.attributes, strict=True))


COLUMNS = "?text=bio&label=job&attribute=sex"
EVEN = {(job, sex): 30 for job in ("nurse", "poet") for sex in "fm"}


def test_a_file_has_one_pair_in_alphabetical_order(tmp_path):
    found = load(f"{write(tmp_path / 'a.csv', rows(EVEN))}{COLUMNS}")
    assert (found.name, found.pairs, found.values) == ("a.csv", [("nurse", "poet")], ("f", "m"))
    assert cells(found) == EVEN
    assert [text.split()[:2] for text in found.texts] == list(
        map(list, zip(found.labels, found.attributes, strict=True))
    )
    assert load(f"{tmp_path}/a.csv{COLUMNS}", seed=1).texts != found.texts


def test_texts_where_class_and_attribute_coincide_are_twice_as_many(tmp_path):
    """per_class of them, so that a biased training set can be as large as a balanced one."""
    file = write(tmp_path / "a.csv", rows(EVEN))
    assert cells(load(f"{file}{COLUMNS}&per_class=24")) == {
        ("nurse", "f"): 24, ("poet", "m"): 24, ("nurse", "m"): 12, ("poet", "f"): 12,
    }  # fmt: skip
    swapped = load(f"{file}{COLUMNS}&per_class=24&pair=poet/nurse")
    assert swapped.pairs == [("poet", "nurse")]
    assert cells(swapped)["poet", "f"] == cells(swapped)["nurse", "m"] == 24


def test_pairs_are_named_and_a_class_may_have_a_slash(tmp_path):
    jobs = ("nurse", "poet", "sales/ads", "x")
    file = write(tmp_path / "a.csv", rows({(job, sex): 12 for job in jobs for sex in "fm"}))
    found = load(f"{file}{COLUMNS}&pair=sales/ads/nurse&pair=poet/nurse")
    assert found.pairs == [("sales/ads", "nurse"), ("poet", "nurse")]
    assert set(found.labels) == {"nurse", "poet", "sales/ads"}


def test_a_class_is_balanced_over_the_attribute_for_probing_and_tpp(tmp_path):
    file = write(
        tmp_path / "a.csv", rows({("nurse", "f"): 90, ("nurse", "m"): 10, ("poet", "f"): 5, ("poet", "m"): 50})
    )
    found = load_labelled(f"{file}{COLUMNS}&per_class=16", np.random.default_rng(0))
    kinds = Counter(tuple(text.split()[:2]) for text in found.texts)
    assert kinds == {("nurse", "f"): 8, ("nurse", "m"): 8, ("poet", "f"): 5, ("poet", "m"): 8}
    everything = load_labelled(f"{file}?text=bio&label=job", np.random.default_rng(0))
    assert len(everything.texts) == 155


THREE = {(job, sex): 12 for job in "abc" for sex in "fm"}


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (EVEN, "?text=bio&label=job&attribute=gender", "a.csv line 2 has no 'gender'; it has bio, job, sex$"),
        (EVEN | {("poet", "x"): 1}, COLUMNS, r"a.csv has 3 values of 'sex' \(f, m, x\); an attribute needs two$"),
        (EVEN, "?text=sex&label=job&attribute=bio", r"has 120 values of 'bio' \(nurse f 0, nurse f 1, .*\.\.\.\); an a"),
        ({("poet", "m" * 30): 9}, COLUMNS, rf"1 values of 'sex' \({'m' * 20}\); an attribute needs two$"),
        ({("poet", "m"): 9}, COLUMNS, r"a.csv has 1 values of 'sex' \(m\); an attribute needs two$"),
        (EVEN | {("poet", "m"): 9}, COLUMNS, "a.csv has 9 texts of class poet with m; SCR needs 10 of each$"),
        ({k: v for k, v in EVEN.items() if k != ("nurse", "m")}, COLUMNS, "has 0 texts of class nurse with m; SCR needs 10"),
        (THREE, COLUMNS, "a.csv has 3 classes of 'job'; SCR compares two, so give pair=A/B, or several$"),
        (THREE, f"{COLUMNS}&pair=a/d", "pair=a/d is not allowed; give two classes of a.csv as A/B; it has a, b, c$"),
        (THREE, f"{COLUMNS}&pair=a", "pair=a is not allowed; give two classes"),
        (THREE, "?text=bio&label=job&pair=a/b", "has pairs without an attribute; give attribute=COLUMN$"),
    ],
)  # fmt: skip
def test_what_scr_cannot_use_is_refused_in_one_line(tmp_path, content, options, message):
    file = write(tmp_path / "a.csv", rows(content))
    with pytest.raises(UserError, match=f"^sets: .*{message}") as refused:
        load(f"{file}{options}")
    assert "\n" not in str(refused.value)


def test_a_source_has_pairs_by_its_options_or_its_name():
    assert all(map(has_pairs, ("a.csv?attribute=sex", f"{BIOS}?path=x", AMAZON)))
    assert not any(map(has_pairs, ("a.csv", "attribute.csv?label=attribute", "LabHC/bias_in_bios_class_set2?path=x")))


def put(folder: Path, records: list[dict]) -> None:
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(records), folder / "data/train-00000-of-00001.parquet")


def test_biographies_are_paired_by_profession_and_gender(tmp_path):
    put(tmp_path, [{"hard_text": f"{n}", "profession": n % 28, "gender": n // 28 % 2} for n in range(28 * 60)])
    found = load(f"{BIOS}?path={tmp_path}&per_class=24")
    assert found.pairs == [
        ("professor", "nurse"), ("architect", "journalist"), ("surgeon", "psychologist"), ("attorney", "teacher"),
    ]  # fmt: skip
    assert found.values == ("male", "female")
    ids = {"professor": 21, "nurse": 13, "architect": 1, "journalist": 11, "surgeon": 25, "psychologist": 22, "attorney": 2,
           "teacher": 26}  # fmt: skip
    for text, job, sex in zip(found.texts, found.labels, found.attributes, strict=True):
        assert (int(text) % 28, int(text) // 28 % 2) == (ids[job], int(sex == "female"))
    counts = cells(found)
    assert (counts["professor", "male"], counts["professor", "female"]) == (24, 12)
    assert (counts["nurse", "male"], counts["nurse", "female"]) == (12, 24)


def test_reviews_are_paired_by_product_and_rating(tmp_path):
    put(tmp_path, [{"text": f"{n}", "category": n % 34, "rating": (1.0, 5.0)[n // 34 % 2]} for n in range(34 * 60)])
    found = load(f"{AMAZON}?path={tmp_path}&per_class=20")
    ids = {"Books": 24, "CDs_and_Vinyl": 26, "Software": 30, "Electronics": 6, "Pet_Supplies": 18, "Office_Products": 11,
           "Industrial_and_Scientific": 3, "Toys_and_Games": 1}  # fmt: skip
    assert found.pairs == [tuple(list(ids)[n : n + 2]) for n in range(0, 8, 2)]
    assert {(text, label) for text, label in zip(found.texts, found.labels, strict=True)} == {
        (text, label) for text, label in zip(found.texts, found.labels, strict=True) if int(text) % 34 == ids[label]
    }
    assert cells(found)["Books", "1"] == cells(found)["CDs_and_Vinyl", "5"] == 20
    assert cells(found)["Books", "5"] == 10
    with pytest.raises(UserError, match="has 2 texts of class Books with 1; SCR needs 10 of each"):
        load(f"{AMAZON}?path={tmp_path}&per_class=2")


def test_pairs_are_those_of_saebench():
    config = pytest.importorskip("sae_bench.evals.scr_and_tpp.eval_config", reason="pip install --no-deps sae-bench")
    pairs = {name: [tuple(pair) for pair in paired.pairs] for name, paired in PAIRED.items()}
    assert pairs == config.ScrAndTppEvalConfig().column1_vals_lookup
