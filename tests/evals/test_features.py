"""Feature stores: every counted token once, in order, with the latents that the dictionary gives it; whole or none."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from temposae.engine.config import MaskConfig, SAEConfig, StreamConfig
from temposae.engine.errors import UserError
from temposae.engine.sae import SparseAutoencoder
from temposae.engine.storage.checkpoint import Checkpoint, find, save
from temposae.engine.storage.sealed import write_json
from temposae.engine.stream import ActivationStream
from temposae.engine.stream.token_rows import TextRows, TokenRows
from temposae.engine.testbed.language import Language
from temposae.evals import feature_files, features

D, F, T = 128, 96, 64
PLACE = ["document", "row", "position", "token"]
SAES = {
    "topk": SAEConfig(d_in=D, d_sae=F, k=4),
    "batchtopk": SAEConfig(d_in=D, d_sae=F, k=4, activation="batchtopk"),
    "jumprelu": SAEConfig(d_in=D, d_sae=F, activation="jumprelu"),
    "relu": SAEConfig(d_in=D, d_sae=F, activation="relu"),
    "hard mask": SAEConfig(d_in=D, d_sae=F, k=4, mask=MaskConfig(kind="ranges", positions=T)),
    "soft mask": SAEConfig(d_in=D, d_sae=F, activation="relu", mask=MaskConfig(kind="gaussian", positions=T)),
}


def dictionary(config: SAEConfig) -> SparseAutoencoder:
    """An untrained one; thresholds where some of the activations, which reach about 20, are above them."""
    sae = SparseAutoencoder(config)
    with torch.no_grad():
        sae.b_enc.normal_(generator=torch.Generator().manual_seed(1))
        if config.activation in ("batchtopk", "jumprelu"):
            sae.threshold.fill_(4.0)
    return sae


def saved(config: SAEConfig, place: Path) -> Checkpoint:
    save(dictionary(config), place / "sae")
    return find(place / "sae")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Documents of 1 to 150 tokens, shorter than a row and longer."""
    language = Language()
    words = [" ".join(language.document(2 * i + j).text for j in range(2)).split() for i in range(45)]
    return [" ".join(some[: 1 + 37 * i % 150]) for i, some in enumerate(words)]


@pytest.fixture
def over(testbed, texts):
    """over(packing): a stream over those documents, and all of their rows in order."""

    def make(packing: bool = False) -> tuple[ActivationStream, TokenRows]:
        text, again = (TextRows(texts, testbed.tokenizer, T, repeat=False) for _ in range(2))
        config = StreamConfig(context=T, rows_per_forward=16, buffer_tokens=2048, repeat=False, packing=packing)
        parts = [again.next(10_000), *again.held_out(10_000, 10_000)]
        order = torch.cat([part.row for part in parts]).argsort()
        names = ("tokens", "length", "document", "row")
        rows = TokenRows(*(torch.cat([getattr(part, name) for part in parts])[order] for name in names))
        assert rows.row.tolist() == list(range(len(rows)))
        return ActivationStream(config, model=testbed, rows=text), rows

    return make


def by_hand(stream: ActivationStream, rows: TokenRows, sae: SparseAutoencoder) -> tuple[pd.DataFrame, torch.Tensor]:
    """The place of every counted token, and its dense code [n, F], 16 rows at a time."""
    places, codes = [], []
    for start in range(0, len(rows), 16):
        at = slice(start, start + 16)
        for tokens, length, document, row in zip(
            rows.tokens[at], rows.length[at], rows.document[at], rows.row[at], strict=True
        ):
            for p in range(int(length)):
                if int(tokens[p]) not in stream.model.tokenizer.all_special_ids:
                    places.append((int(document[p]), int(row), p, int(tokens[p])))
        some = [place for place in places if place[1] >= start]
        x = stream.model.activations(rows.tokens[at])
        x = torch.stack([x[row - start, p] for _, row, p, _ in some])
        codes.append(sae.encode(x, torch.tensor([p for _, _, p, _ in some])).detach())
    return pd.DataFrame(places, columns=PLACE), torch.cat(codes)


@pytest.mark.parametrize(
    ("name", "packing"),
    [
        pytest.param(name, packing, marks=() if packing or name == "jumprelu" else pytest.mark.slow)
        for name, packing in [*((name, False) for name in SAES), ("topk", True)]
    ],
)
def test_a_store_is_the_dense_code(over, tmp_path, monkeypatch, name, packing):
    monkeypatch.setattr(feature_files, "PART", most := 6000 if SAES[name].activation == "relu" else 1000)
    monkeypatch.setattr(feature_files, "GROUP", 500)
    stream, rows = over(packing)
    found = saved(SAES[name], tmp_path)
    about = features.encode(found, stream, tmp_path / "store")
    places, code = by_hand(stream, rows, found.dictionary())
    tokens = pd.read_parquet(tmp_path / "store" / "tokens.parquet")
    assert tokens[PLACE].to_numpy().tolist() == places.to_numpy().tolist()  # each once, in the order of the text
    assert tokens["active"].tolist() == (code > 0).sum(1).tolist()
    owner, latent = code.nonzero(as_tuple=True)
    entries = features.read(tmp_path / "store")
    order = np.lexsort((owner.numpy(), latent.numpy()))
    assert entries["latent"].tolist() == latent[order].tolist()
    assert np.column_stack([entries[c] for c in PLACE]).tolist() == places.to_numpy()[owner[order]].tolist()
    np.testing.assert_allclose(entries["value"], code[owner, latent][order].numpy(), rtol=1e-6, atol=1e-6)
    assert {column: str(values.dtype) for column, values in entries.items()} == {
        "document": "int64", "row": "int64", "position": "int32", "token": "int32", "latent": "int32", "value": "float32",
    }  # fmt: skip
    counts = {"tokens": len(places), "entries": len(latent)}
    counts |= {"rows": places["row"].nunique(), "documents": places["document"].nunique()}
    assert about.items() >= counts.items()
    assert len(about["parts"]) == -(-len(latent) // most) > 1


def test_errors_norms_and_texts_of_tokens(over, tmp_path):
    stream, rows = over()
    found = saved(SAES["topk"], tmp_path)
    features.encode(found, stream, tmp_path / "store")
    tokens = pd.read_parquet(tmp_path / "store" / "tokens.parquet")
    x = torch.cat([stream.model.activations(part) for part in rows.tokens.split(16)])[stream.read(rows)[1]]
    _, code = by_hand(stream, rows, sae := found.dictionary())
    x_hat = (code @ sae.W_dec + sae.b_dec).detach()
    np.testing.assert_allclose(tokens["squared_error"], (x - x_hat).square().sum(1), rtol=1e-4)
    np.testing.assert_allclose(tokens["squared_norm"], x.square().sum(1), rtol=1e-5)
    for token, text in tokens[["token", "text"]].drop_duplicates().itertuples(index=False):
        assert text == stream.model.tokenizer.decode([token])


@pytest.mark.parametrize("latent", [None, 3, [90, 5, 17]])
@pytest.mark.parametrize("document", [None, 7, [30, 2, 40]])
def test_reading_is_what_pandas_reads(over, tmp_path_factory, latent, document, request):
    store = tmp_path_factory.getbasetemp() / "read"
    if not (store / "store.json").exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feature_files, "PART", 20_000)
            place = tmp_path_factory.mktemp("read_sae")
            features.encode(saved(SAES["relu"], place), over()[0], store)
    given = [
        (name, "in", np.atleast_1d(one).tolist())
        for name, one in (("latent", latent), ("document", document))
        if one is not None
    ]
    expected = pd.read_parquet(store / "features", filters=given or None)
    expected = expected.sort_values(["latent", "document", "row", "position"])
    found = features.read(store, latent=latent, document=document)
    assert len(expected) > 0
    for column, values in found.items():
        assert values.tolist() == expected[column].tolist()


def test_parts_are_sorted_so_that_row_groups_can_be_passed_over(over, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "PART", 20_000)
    monkeypatch.setattr(feature_files, "GROUP", 1000)
    about = features.encode(saved(SAES["relu"], tmp_path), over()[0], tmp_path / "store")
    for name in about["parts"]:
        file = pq.ParquetFile(tmp_path / "store" / name)
        columns = [file.metadata.row_group(0).column(i).path_in_schema for i in range(6)]
        groups = [
            file.metadata.row_group(i).column(columns.index("latent")) for i in range(file.metadata.num_row_groups)
        ]
        assert {group.compression for group in groups} == {"ZSTD"}
        spans = [(group.statistics.min, group.statistics.max) for group in groups]
        assert all(low <= high for low, high in spans)
        assert all(one[1] <= two[0] for one, two in pairwise(spans))
        keys = file.read().to_pandas()[["latent", "document", "row", "position"]].to_numpy().tolist()
        assert keys == sorted(keys)


def test_a_threshold_leaves_out_what_is_not_above_it(over, tmp_path):
    found = saved(SAES["relu"], tmp_path)
    features.encode(found, over()[0], tmp_path / "all")
    about = features.encode(found, over()[0], tmp_path / "some", min_activation=2.5)
    every, some = features.read(tmp_path / "all"), features.read(tmp_path / "some")
    above = every["value"] > 2.5
    assert 0 < above.sum() < len(above)
    for column, values in some.items():
        assert values.tolist() == every[column][above].tolist()
    assert about["entries"] == above.sum()
    tables = [pd.read_parquet(tmp_path / name / "tokens.parquet") for name in ("all", "some")]
    pd.testing.assert_frame_equal(*tables)  # the active ones are those of the dictionary


@pytest.mark.parametrize("tokens", [1, 100, 1500])
def test_so_many_tokens_and_no_more(over, tmp_path, tokens):
    found = saved(SAES["topk"], tmp_path)
    about = features.encode(found, over()[0], tmp_path / "all")
    assert features.encode(found, over()[0], tmp_path / "some", tokens=tokens)["tokens"] == tokens < about["tokens"]
    every, some = (pd.read_parquet(tmp_path / name / "tokens.parquet") for name in ("all", "some"))
    pd.testing.assert_frame_equal(some[PLACE], every[PLACE][:tokens])


def test_a_text_that_ends_before_says_so(over, tmp_path, capsys):
    about = features.encode(saved(SAES["topk"], tmp_path), over()[0], tmp_path / "store", tokens=10**9)
    assert f"ended after {about['tokens']:,} of 1,000,000,000 tokens" in capsys.readouterr().err


def test_a_dictionary_that_never_fires(over, tmp_path):
    sae = dictionary(SAES["topk"])
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    save(sae, tmp_path / "sae")
    about = features.encode(find(tmp_path / "sae"), over()[0], tmp_path / "store")
    assert (about["entries"], about["parts"]) == (0, ["features/part-00000.parquet"])
    assert [len(values) for values in features.read(tmp_path / "store", latent=0).values()] == [0] * 6
    assert len(pd.read_parquet(tmp_path / "store" / "features")) == 0


def test_what_a_store_says_about_itself(over, tmp_path):
    found = saved(SAES["batchtopk"], tmp_path)
    stream, _ = over()
    about = features.encode(found, stream, tmp_path / "store", tokens=500)
    held = json.loads((tmp_path / "store" / "store.json").read_text())
    del held["sha256"]
    assert about == held == features.info(tmp_path / "store")
    import hashlib

    digest = hashlib.sha256((found.folder / "sae.safetensors").read_bytes()).hexdigest()
    assert about["dictionary"]["sha256"] == digest
    assert SAEConfig(**about["dictionary"]["settings"]) == SAES["batchtopk"]
    assert (about["model"], about["hook"], about["data"]) == ("testbed", "blocks.1.hook_resid_post", "the text")
    assert about["speed"].keys() == {
        "sparse_tokens_per_s", "dense_tokens_per_s", "sparse_over_dense", "tokens_per_s", "seconds",
    }  # fmt: skip
    speed = about["speed"]
    assert speed["sparse_tokens_per_s"] / speed["dense_tokens_per_s"] == pytest.approx(
        speed["sparse_over_dense"], abs=1e-3
    )
    assert speed["tokens_per_s"] < speed["sparse_tokens_per_s"]


@pytest.mark.parametrize("name", SAES)
def test_the_dense_encode_it_is_compared_with_finds_the_same(over, tmp_path, name):
    stream, rows = over()
    sae = dictionary(SAES[name])
    x = stream.model.activations(rows.tokens[:16])[stream.read(rows)[1][:16]]
    pos = torch.arange(T).expand(16, T)[stream.read(rows)[1][:16]]
    code = sae.encode(x, pos)
    found = features._EncodeTimer(sae)._densely(x, pos)
    dense = torch.zeros_like(code)
    if name in ("topk", "hard mask"):
        dense.scatter_(1, found.indices, found.values)
    else:
        dense[found[0]] = found[1]
    torch.testing.assert_close(dense, code, rtol=1e-4, atol=1e-4)


def test_what_fails_leaves_no_store(over, tmp_path, monkeypatch):
    stream, _ = over()
    calls = iter(range(10))
    read = stream.model.harvest

    def breaks(tokens, length):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return read(tokens, length)

    monkeypatch.setattr(stream.model, "harvest", breaks)
    found = saved(SAES["topk"], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        features.encode(found, stream, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    calls = iter([3])
    with pytest.raises(KeyboardInterrupt):
        features.encode(found, over()[0], tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_store_without_its_end_is_refused(over, tmp_path):
    features.encode(saved(SAES["topk"], tmp_path), over()[0], store := tmp_path / "store", tokens=300)
    with pytest.raises(UserError, match="latent: 96 is not allowed; the dictionary has 0 to 95"):
        features.read(store, latent=F)
    (store / "features" / "part-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="store: .* is damaged"):
        features.read(store, latent=0)
    (store / "store.json").rename(store / ".store.json")
    with pytest.raises(UserError, match=r"has no store\.json; the store is incomplete"):
        features.read(store)
    with pytest.raises(UserError, match=r"has no store\.json; `temposae features` makes a store"):
        features.read(tmp_path / "nowhere")
    (store / "store.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="format 'other'; this version reads temposae-features/1"):
        features.read(store)
    (store / "store.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        features.read(store)


def test_a_damaged_row_group_is_named_where_it_is_read_and_a_store_of_before_is_read(over, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "GROUP", 64)
    about = features.encode(saved(SAES["topk"], tmp_path), over()[0], store := tmp_path / "store", tokens=300)
    part = store / about["parts"][0]
    latents = features.read(store)["latent"]
    lowest, highest = int(latents.min()), int(latents.max())
    first, last = features.read(store, latent=lowest), features.read(store, latent=highest)
    whole = part.read_bytes()
    part.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with pytest.raises(UserError, match=r"part-00000.parquet is damaged in row group 0; the store must be made again"):
        features.read(store, latent=lowest)
    found = features.read(store, latent=highest)  # of another row group
    assert all(np.array_equal(found[name], last[name]) for name in last)
    part.write_bytes(whole)
    write_json(store / "store.json", {key: value for key, value in about.items() if key != "checks"})
    found = features.read(store, latent=lowest)
    assert all(np.array_equal(found[name], first[name]) for name in first)
    write_json(store / "store.json", about | {"parts": ["../../elsewhere.parquet"]})
    with pytest.raises(UserError, match=r"store.json is damaged \(file: '../../elsewhere.parquet/' is not allowed"):
        features.read(store)


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "find_spec", lambda name: None)
    for call in (lambda: features.check(tmp_path, None, 0.0), lambda: features.read(tmp_path)):
        with pytest.raises(UserError, match="features: pyarrow, .*, is missing; pip install pyarrow"):
            call()


def test_the_embedded_language_needs_a_number_of_tokens(stream_of, tmp_path):
    found = saved(SAES["topk"], tmp_path)
    with pytest.raises(UserError, match="tokens: needed; the embedded language has no end"):
        features.encode(found, stream_of(), tmp_path / "store")
    assert features.encode(found, stream_of(), tmp_path / "store", tokens=777)["tokens"] == 777


def test_a_text_without_tokens_that_count(testbed, tmp_path):
    bos = testbed.tokenizer.eos_token_id
    text = TextRows([np.array([bos, bos])] * 30, testbed.tokenizer, 8, repeat=False)
    config = StreamConfig(context=8, buffer_tokens=64, repeat=False)
    with pytest.raises(UserError, match="data: the text has no token to encode"):
        features.encode(
            saved(SAES["topk"], tmp_path), ActivationStream(config, model=testbed, rows=text), tmp_path / "s"
        )
    assert not (tmp_path / "s").exists()
