"""Files of every kind are read as what they are, or refused by name; never as prose."""

import bz2
import csv
import gzip
import io
import json
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from temposae.engine.config import StreamConfig
from temposae.engine.errors import UserError
from temposae.engine.stream import ActivationStream, array_files, text_files
from temposae.engine.stream.documents import open_documents
from temposae.engine.stream.token_rows import open_text

TEXTS = ['one, "two"\nthree', "", "é漢😀\ttab", "[not json", "1.5", "NA", "plain", "nan"]


def read(path, *args, **options):
    documents = open_documents(str(path), *args, **options)
    found = list(documents.read())
    for start in (1, len(found) - 1, len(found)):
        assert list(documents.read(start)) == found[start:]
    with pytest.raises(UserError, match="has changed"):
        list(documents.read(len(found) + 1))
    return found


def table(path, delimiter):
    with path.open("w", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        rows.writerow(["number", "text", "tokens"])
        rows.writerows([n, text, "1 2"] for n, text in enumerate(TEXTS))


def write(path, kind):
    records = [{"number": n, "text": text} for n, text in enumerate(TEXTS)]
    match kind:
        case "jsonl" | "ndjson" | "lines.json":
            path.write_text("\n\n".join(map(json.dumps, records)))
        case "strings.jsonl" | "strings.json":
            path.write_text("\n".join(map(json.dumps, TEXTS)))
        case "list.json":
            path.write_text("\ufeff " + json.dumps(records, indent=2, ensure_ascii=False))
        case "list of strings.json":
            path.write_text(json.dumps(TEXTS))
        case "csv" | "tsv":
            table(path, "," if kind == "csv" else "\t")
        case "arrow":
            content = pa.table({"text": TEXTS})
            with pa.ipc.new_stream(str(path), content.schema) as out:
                out.write_table(content, 3)


KINDS = ["jsonl", "ndjson", "lines.json", "strings.jsonl", "strings.json", "list.json", "list of strings.json", "csv",
         "tsv", "arrow"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_read_as_what_it_is(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "READ_AHEAD", 7)  # so that items go over the end of what is read at once
    path = tmp_path / f"a.{kind}"
    write(path, kind)
    assert read(path) == TEXTS
    if kind != "arrow":
        for ending, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
            packed = tmp_path / f"a.{kind}{ending}"
            packed.write_bytes(pack(path.read_bytes()))
            assert read(packed) == TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "list.json", "csv", "parquet"])
def test_a_folder_of_each_kind_has_splits(kind, tmp_path):
    for split, texts in (("train", TEXTS), ("test", ["other"])):
        for part in range(2):
            path = tmp_path / f"{split}-{part:05d}.{kind}"
            some = texts[part::2]
            if kind == "parquet":
                pq.write_table(pa.table({"text": pa.array(some, pa.string())}), path)
            elif kind == "csv":
                with path.open("w", newline="") as file:
                    csv.writer(file).writerows([["text", "n"], *([text, 1] for text in some)])
            elif kind == "jsonl":
                path.write_text("\n".join(json.dumps({"text": text}) for text in some) + "\n")
            else:
                path.write_text(json.dumps([{"text": text} for text in some]))
    assert read(tmp_path) == TEXTS[::2] + TEXTS[1::2]
    assert read(tmp_path, split="test") == ["other"]
    with pytest.raises(UserError, match=r"^stream.split: tset is not allowed; .* has train, test$"):
        open_documents(str(tmp_path), split="tset")
    with pytest.raises(UserError, match=r"^stream.subset: en is not allowed; .* has default$"):
        open_documents(str(tmp_path), subset="en")


def test_a_folder_with_subsets_has_them_named(tmp_path):
    configs = []
    for name in ("en", "fr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.jsonl").write_text(json.dumps({"text": name}) + "\n" + json.dumps({"text": "x"}))
        configs.append(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n")
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    assert read(tmp_path, subset="fr") == ["fr", "x"]
    with pytest.raises(UserError, match=r"^stream.subset: needed for .*; it must be one of en, fr$"):
        open_documents(str(tmp_path))
    with pytest.raises(UserError, match=r"^stream.subset: de is not allowed; .* has en, fr$"):
        open_documents(str(tmp_path), subset="de")


def test_what_a_dataset_saves_to_disk_is_read(tmp_path):
    data = Dataset.from_dict({"text": TEXTS, "messages": [[{"content": t}, {"content": "b"}] for t in TEXTS]})
    data.save_to_disk(tmp_path / "one", num_shards=3)
    assert read(tmp_path / "one") == TEXTS
    assert read(tmp_path / "one", "messages.content")[4] == "1.5\nb"
    DatasetDict(train=data, test=data.select([0, 4])).save_to_disk(tmp_path / "several")
    assert read(tmp_path / "several") == TEXTS
    assert read(tmp_path / "several", split="test") == [TEXTS[0], TEXTS[4]]
    with pytest.raises(UserError, match=r"^stream.split: dev is not allowed; .* has train, test$"):
        open_documents(str(tmp_path / "several"), split="dev")
    with pytest.raises(UserError, match=r"^stream.split: train is not allowed; .* without splits$"):
        open_documents(str(tmp_path / "one"), split="train")
    DatasetDict(test=data).save_to_disk(tmp_path / "none")
    with pytest.raises(UserError, match=r"^stream.split: needed, since there is no train; .* has test$"):
        open_documents(str(tmp_path / "none"))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_a_path_leads_into_structs_and_lists(kind, tmp_path):
    records = [{"meta": {"body": "a"}, "messages": [{"content": "q"}, {"content": None}, {"content": "r"}], "a.b": "dot"},
               {"meta": None, "messages": [], "a.b": "c"}]  # fmt: skip
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    elif kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        content = pa.Table.from_pylist(records)
        with pa.ipc.new_file(str(path), content.schema) as out:
            out.write_table(content)
    assert read(path, "meta.body") == ["a", ""]
    assert read(path, "messages.content") == ["q\nr", ""]
    assert read(path, "a.b") == ["dot", "c"]
    for field, has in (("meta", "body"), ("messages", "content")):
        with pytest.raises(
            UserError, match=rf"holds (dict|list) .*; it must hold text or token ids \(its fields are {has};"
        ):
            read(path, field)
    with pytest.raises(UserError, match=r"^stream.text_field: meta.boby is not allowed; .* has body"):
        read(path, "meta.boby")


def test_a_field_that_is_named_must_be_there(tmp_path):
    records = {"content": ["a", "b"], "tokens": [[1], [2]]}
    rows = [dict(zip(records, row, strict=True)) for row in zip(*records.values(), strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.table(records), tmp_path / "a.parquet")
    Dataset.from_dict(records).save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    for name in ("a.jsonl", "a.json", "a.parquet", "saved", "folder"):
        for wrong in ("contnet", "text"):
            with pytest.raises(UserError, match=rf"^stream.text_field: {wrong} is not allowed; .* has content, tokens"):
                read(tmp_path / name, wrong)
        assert read(tmp_path / name, "content") == ["a", "b"]
        assert [ids.tolist() for ids in open_documents(str(tmp_path / name)).read()] == [[1], [2]]
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    np.save(tmp_path / "a.npy", np.ones((3, 4), int))
    for name in ("a.txt", "a.npy"):
        with pytest.raises(UserError, match=r"^stream.text_field: content is not allowed; .* has no fields"):
            open_documents(str(tmp_path / name), "content")
    with pytest.raises(UserError, match=r"^stream.text_field: contnet is not allowed; .* item 0 has content"):
        read(tmp_path / "a.json", "contnet")


def header(shape):
    """The header of a .npy file of that shape."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return out.getvalue()


REFUSED = {
    "a.md5x": (b"PK\x03\x04\0\0binary", "not plain text, nor of a kind that is read; give .txt, .jsonl, .json, .csv"),
    "a.pkl": (b"\x80\x04\x95\xff\xfe.", "not plain text"),
    "utf16": ("text".encode("utf-16"), "not plain text"),
    "a.dat": (b'\n {"text": "a"}\n{"text": "b"}', "holds JSON, not plain text; give"),
    "list.dat": (b'[\n  {"text": "a"}]', "holds JSON, not plain text"),
    "a.txt": (b'{"text": "a"}\n', "holds JSON, not plain text"),
    "a.html": (b"<!DOCTYPE html><p>a", "holds markup, not plain text"),
    "a.xml": (b"<?xml version='1.0'?><a/>", "holds markup, not plain text"),
    "cut.json": (b'[{"text": "a"}, {"text": "b"', "item 1 is not JSON, or cut"),
    "comma.json": (b'[{"text": "a"},]', "item 1 is not JSON, or cut"),
    "two.json": (b'[{"text": "a"}]\n[{"text": "b"}]', "holds more than one JSON list"),
    "numbers.json": (b"[1, 2]", 'item 0 is not a JSON object with a "text" field'),
    "pretty.json": (b'{\n "text": "a"\n}', "line 1 is not a JSON object"),
    "columns.json": (b'{"data": [{"text": "a"}]}', 'it has data'),
    "deep.json": (b"[" * 100_000, "item 0 is not JSON"),
    "latin.json": ('["é"]'.encode("latin-1"), "is not UTF-8"),
    "empty.json": (b"[ ]", "is empty; it must hold text"),
    "wrong.csv": (b"body,id\na,1\n", "no 'text' column"),
    "ids.csv": (b"tokens,id\n1 2 3,1\n", "no 'text' column"),
    "ragged.csv": (b"id,text\n1,a\n2,b,c\n", "line 3 has 3 fields; its first line names 2"),
    "short.csv": (b"id,text\n1\n", "line 2 has 1 fields"),
    "quote.csv": (b'id,text\n1,"a\n2,b\n', "is not a table row"),
    "twice.csv": (b"text,text\n1,2\n", "columns of the same name"),
    "semicolon.csv": (b"id;text\n1;a\n", "it has id;text"),
    "head.csv": (b"text\n", "is empty; it must hold text"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 9)[:-12], "can't be read"),
    "not.jsonl.gz": (b'{"text": "a"}', "can't be read"),
    "a.parquet.gz": (b"PAR1", "must not be compressed"),
    "bad.arrow": (b"ARROW1 no", "can't be read"),
    "lies.npy": (header((10**9, 9)), "its header says 72000000128 bytes, but it has 128"),
}  # fmt: skip


def open_rows(path):
    return open_text(StreamConfig(model="other", data=str(path), context=10), Letters(), seed=0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_by_name(name, tmp_path):
    content, message = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_rows(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


class Letters:
    """A tokenizer of single characters."""

    bos_token_id = pad_token_id = unk_token_id = None

    def __len__(self):
        return 0x110000

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def test_text_of_other_endings_is_text(tmp_path):
    for name in ("corpus", "a.md", "a.text", "a.PY"):
        (tmp_path / name).write_text("One.\n\nTwo {x}.")
        assert read(tmp_path / name) == ["One.", "Two {x}."]
    (tmp_path / "a.JSONL").write_text('{"text": "a"}\n{"text": "b"}')
    assert read(tmp_path / "a.JSONL") == ["a", "b"]


@pytest.mark.parametrize("setting", ["split", "subset"])
def test_files_have_neither_splits_nor_subsets(setting, tmp_path, testbed):
    (tmp_path / "a.txt").write_text("a b\n\nc d")
    with pytest.raises(UserError, match=rf"^stream.{setting}: train is not allowed; .*a.txt is a file"):
        ActivationStream(StreamConfig(data=str(tmp_path / "a.txt"), **{setting: "train"}), model=testbed)
    with pytest.raises(UserError, match=rf"^stream.{setting}: train is not allowed without data"):
        ActivationStream(StreamConfig(**{setting: "train"}), model=testbed)


def test_folders_that_name_files_elsewhere_are_refused(tmp_path):
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n' * 3)
    for number, target in enumerate(("../secret.jsonl", str(tmp_path / "secret.jsonl"))):
        folder = tmp_path / f"data{number}"
        folder.mkdir()
        (folder / "a.jsonl").write_text('{"text": "own"}\n' * 3)
        (folder / "README.md").write_text(f'---\nconfigs:\n- config_name: default\n  data_files: "{target}"\n---\n')
        with pytest.raises(UserError, match=r"secret.jsonl, which lies outside of it"):
            open_documents(str(folder))
    Dataset.from_dict({"text": ["secret"]}).save_to_disk(tmp_path / "theirs")
    Dataset.from_dict({"text": ["own"]}).save_to_disk(tmp_path / "saved")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    file = state["_data_files"][0]["filename"]
    for target in (f"../theirs/{file}", str(tmp_path / "theirs" / file), ".."):
        state["_data_files"][0]["filename"] = target
        (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
        with pytest.raises(UserError, match="lies outside of it"):
            open_documents(str(tmp_path / "saved"))
    DatasetDict(train=Dataset.from_dict({"text": ["own"]})).save_to_disk(tmp_path / "dict")
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["../theirs"]}')
    with pytest.raises(UserError, match="lies outside of it"):
        open_documents(str(tmp_path / "dict"), split="../theirs")


def test_a_script_in_a_folder_is_not_run(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "a.jsonl").write_text('{"text": "own"}\n' * 3)
    with pytest.raises(UserError, match="can't be loaded"):
        open_documents(str(folder))
    assert not (tmp_path / "ran").exists()


def test_documents_in_hand_are_a_source(testbed, tmp_path):
    words = testbed.tokenizer.decode(range(20, 60)).split()
    texts = [" ".join(words[n % 7 : n % 7 + 20]) for n in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"story": text}) for text in texts))
    settings = {"buffer_tokens": 256, "context": 16, "text_field": "story"}
    of_file = ActivationStream(StreamConfig(data=str(path), **settings), model=testbed)

    def stories():
        for text in texts:
            yield {"story": text}

    of_function = ActivationStream(StreamConfig(**settings), model=testbed, documents=stories)
    of_list = ActivationStream(StreamConfig(**settings), model=testbed, documents=texts)
    for _ in range(5):
        batch = of_file.next(64)
        for other in (of_function.next(64), of_list.next(64)):
            assert (batch.x == other.x).all()
            assert (batch.token == other.token).all()
    state = {name: value.clone() for name, value in of_function.state().items()}
    wanted = of_function.next(64).token.clone()
    again = ActivationStream(StreamConfig(**settings), model=testbed, documents=stories)
    again.load_state(state)
    assert (again.next(64).token == wanted).all()
    changed = ActivationStream(StreamConfig(**settings), model=testbed, documents=["other", *texts[1:]])
    with pytest.raises(UserError, match="has changed"):
        changed.load_state(state)
    with pytest.raises(UserError, match=r"^documents: a generator is not allowed, since it can be read only once"):
        ActivationStream(StreamConfig(**settings), model=testbed, documents=stories())
    with pytest.raises(UserError, match=r"^documents: not allowed beside data"):
        ActivationStream(StreamConfig(data=str(path), **settings), model=testbed, documents=stories)
    with pytest.raises(UserError, match=r"^stream.text_field: story is not allowed; .* document 1 has body"):
        ActivationStream(StreamConfig(**settings), model=testbed, documents=[{"story": "a"}, {"body": "b"}])
    # the run says what it was, and never takes another text for it
    with pytest.raises(
        UserError, match=r"^data: the documents given in Python are not kept with a run; give them again"
    ):
        ActivationStream(of_function.config, model=testbed)


@pytest.mark.parametrize("size", [10, 3 * 2**16])
def test_any_edit_of_a_text_is_noticed(size, tmp_path, monkeypatch):
    monkeypatch.setattr(array_files, "WHOLE", 2**16)
    monkeypatch.setattr(array_files, "PIECES", 4)
    path = tmp_path / "a.txt"
    content = bytearray(b"ab cd\n\n" * size)
    path.write_bytes(content)
    state = open_rows(path).state()
    open_rows(path).load_state(state)
    for at in (0, len(content) - 3):
        edited = bytearray(content)
        edited[at] = ord("z")
        path.write_bytes(edited)
        with pytest.raises(UserError, match=r"a.txt has changed: it is not the text that was read before the stop"):
            open_rows(path).load_state(state)
