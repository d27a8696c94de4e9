"""Text as rows: nothing lost or doubled, gone back to exactly, read no further than is needed, and refused in one line."""

import json
import random
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from temposae.engine.config import StreamConfig
from temposae.engine.errors import UserError
from temposae.engine.stream import text_files
from temposae.engine.stream.documents import open_documents
from temposae.engine.stream.token_rows import TestbedRows as EmbeddedRows
from temposae.engine.stream.token_rows import TextRows, open_text
from temposae.engine.testbed.language import BOS, HELD_OUT, PAD, Language

T = 10
FIELDS = ("tokens", "length", "document", "row")


class Letters:
    """A tokenizer of single characters."""

    def __init__(self, bos=1):
        self.bos_token_id, self.pad_token_id = bos, 0
        self.seen = 0

    def __len__(self):
        return 0x110000

    def __call__(self, texts, **_):
        self.seen += sum(map(len, texts))
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def some_documents(count=70, seed=0):
    rng = random.Random(seed)
    documents = [chr(97 + i % 26) + "".join(rng.choices("ab\u2028é漢😀", k=rng.randrange(45))) for i in range(count)]
    for at in (0, 7, 8, count - 1):
        documents[at] = ""
    documents[3] = "q" * (3 * T)  # ends where a row does, whether or not rows begin with <bos>
    documents[4] = "r" * (3 * (T - 1))
    documents[5] = "line\nby\nline"
    return documents


def ids_of(documents):
    return [[ord(c) for c in document] for document in documents]


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=9)


def write(kind, folder, documents):
    """The documents in a file or folder of that kind: its path, and what the documents are there."""
    path = folder / f"text.{kind.split()[0]}"
    halves = (documents[: len(documents) // 2], documents[len(documents) // 2 :])
    if kind.startswith("folder"):
        path.mkdir()
    match kind:
        case "txt":
            documents = [d for d in documents if d]
            path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
        case "jsonl":
            path.write_text("".join(json.dumps({"text": d}) + "\n\n" for d in documents))
        case "jsonl of ids":
            path.write_text("".join(json.dumps({"tokens": d}) + "\n" for d in ids_of(documents)))
        case "parquet":
            parquet(path, number=list(range(len(documents))), text=documents)
        case "parquet of ids":
            parquet(path, input_ids=pa.array(ids_of(documents), pa.list_(pa.int32())))
        case "npy":
            documents = [d[:23].ljust(23, "x") for d in documents]
            np.save(path, np.array(ids_of(documents), np.uint32))
        case "npy in one":
            documents = ["".join(documents)]
            np.save(path, np.array(ids_of(documents)[0]))
        case "folder of txt":
            documents = [d for d in documents if d]
            (path / "README.md").write_text("No part of the text.")
            for number, half in enumerate(halves):
                (path / f"{number}.txt").write_text("\n\n".join(filter(None, half)), encoding="utf-8")
        case "folder of jsonl":
            for number, half in enumerate(halves):
                (path / f"{number}.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in half))
        case "folder of parquet":
            for number, half in enumerate(halves):
                parquet(path / f"{number}.parquet", tokens=ids_of(half))
    return str(path), documents


FILES = ["txt", "jsonl", "jsonl of ids", "parquet", "parquet of ids", "npy", "npy in one"]
KINDS = [*FILES, "folder of txt", "folder of jsonl", "folder of parquet"]


def layout(documents, bos):
    """All rows of the text as [(token, document)], written token by token."""
    rows, row = [], []
    for number, ids in enumerate(ids_of(documents)):
        if row:
            rows, row = [*rows, row], []
        for at, token in enumerate(ids):
            for piece in [bos, token] if bos is not None and at == 0 else [token]:
                if len(row) == T:
                    rows, row = [*rows, row], []
                if bos is not None and not row and piece != bos:
                    row = [(bos, number)]
                row.append((piece, number))
    return [*rows, row] if row else rows


def listed(*parts):
    """Row number -> [(token, document)] of rows, which are checked to be whole."""
    found = {}
    for part in parts:
        assert part.tokens.shape == part.document.shape == (len(part), T)
        assert all(getattr(part, name).dtype == torch.long for name in FIELDS)
        for tokens, length, document, row in zip(*(getattr(part, name).tolist() for name in FIELDS), strict=True):
            assert tokens[length:] == [0] * (T - length)
            assert document[length:] == [-1] * (T - length)
            assert row not in found
            found[row] = list(zip(tokens[:length], document[:length], strict=True))
    return found


def same(first, second):
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in FIELDS)


def open_rows(path, tokenizer, context, **settings):
    return open_text(StreamConfig(model="other", data=str(path), context=context, **settings), tokenizer, seed=0)


def opened(path, bos=1, **settings):
    return open_rows(path, Letters(bos), T, **settings)


@pytest.mark.parametrize("bos", [1, None])
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_cut_into_rows_that_lose_and_double_nothing(kind, bos, tmp_path):
    path, documents = write(kind, tmp_path, some_documents())
    source = opened(path, bos, repeat=False)
    train = [source.next(13) for _ in range(30)]
    assert len(train[-1]) == 0
    train = [part for part in train if len(part)]
    assert all(len(part) == 13 for part in train[:-1])
    rows, held_out = listed(*train), listed(*source.held_out(10**6, 4))
    assert sorted(rows) == list(rows)
    expected = layout(documents, bos)
    assert {**rows, **held_out} == dict(enumerate(expected))
    assert sorted(held_out) == list(range(19, len(expected), 20))
    assert not set(held_out) & set(rows)
    assert source.epoch == 0
    assert source.name == path
    assert source.counts == {
        "documents": sum(map(bool, documents)),
        "empty_documents": len(documents) - sum(map(bool, documents)),
        "rows": len(rows),
        "tokens": sum(map(len, rows.values())),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_on_exactly_where_it_was_taken(kind, tmp_path):
    rng = random.Random(kind)
    path, _ = write(kind, tmp_path, some_documents())
    source = opened(path)
    states, parts, ends = [], [], []
    while source.epoch < 2 or len(parts) < 20:
        states.append({name: value.clone() for name, value in source.state().items()})
        parts.append(source.next(rng.randrange(1, 16)))
        ends.append((source.epoch, dict(source.counts)))
    assert max(value.numel() for value in states[-1].values()) < 10
    for start in [0, *rng.sample(range(1, len(parts)), 4 if kind.startswith("folder") else 12)]:
        fresh = opened(path)
        fresh.next(rng.randrange(7))  # it has been elsewhere
        fresh.load_state(states[start])
        for part, (epoch, counts) in list(zip(parts, ends, strict=True))[start : start + 12]:
            assert same(fresh.next(len(part)), part)
            assert (fresh.epoch, fresh.counts) == (epoch, counts)


def test_a_state_can_be_taken_at_every_row():
    documents = some_documents(30)
    source = TextRows(documents, Letters(), T)
    rows = [(source.state(), source.next(1)) for _ in range(2 * len(layout(documents, 1)) + 3)]
    assert source.epoch == 2
    for (state, row), (_, after) in pairwise(rows):
        fresh = TextRows(documents, Letters(), T)
        fresh.load_state(state)
        assert same(fresh.next(1), row)
        assert same(fresh.next(1), after)


def test_a_setting_says_whether_bos_is_put_in_front():
    documents = some_documents(30)
    for bos, given in ((None, 1), (True, 1), (False, None)):
        rows = listed(TextRows(documents, Letters(), T, bos=bos, repeat=False).next(1000))
        expected = layout(documents, given)
        assert {number: expected[number] for number in rows} == rows
    assert TextRows(documents, Letters(None), T).bos is None
    with pytest.raises(UserError, match=r"^stream.bos: true is not allowed; the tokenizer has no <bos> token$"):
        TextRows(documents, Letters(None), T, bos=True)


def test_a_text_begins_again_with_the_same_rows():
    source = TextRows(some_documents(), Letters(), T)
    trained = len([row for row in range(len(layout(some_documents(), 1))) if row % 20 != 19])
    first = source.next(trained)
    assert source.epoch == 0
    assert same(source.next(trained), first)
    assert source.epoch == 1
    across = source.next(2 * trained + 5)
    assert torch.equal(across.row[-5:], first.row[:5])
    assert source.epoch == 4


def test_held_out_rows_are_stable_and_disturb_nothing():
    source, other = (TextRows(some_documents(), Letters(), T) for _ in range(2))
    rows = listed(*source.held_out(100, 3))
    assert len(rows) > 6
    for count in (2, 5):
        parts = list(source.held_out(count, 3))
        assert [len(part) for part in parts] == {2: [2], 5: [3, 2]}[count]
        assert listed(*parts) == dict(list(rows.items())[:count])
        running = source.held_out(4, 1)
        for _ in range(4):
            next(running)
            assert same(source.next(9), other.next(9))
    assert source.counts == other.counts
    assert list(source.held_out(0, 3)) == []
    trained = listed(TextRows(some_documents(), Letters(), T, repeat=False).next(10**4))
    assert not trained.keys() & rows.keys()


@pytest.mark.parametrize("rows", [2, 3, 19, 20, 21, 40])
def test_a_short_text_keeps_its_last_row(rows):
    source = TextRows(["abc"] * rows, Letters(), T, repeat=False)
    held_out = list(listed(*source.held_out(100, 8)))
    assert held_out == {2: [1], 3: [2], 19: [18], 40: [19, 39]}.get(rows, [19])
    assert list(listed(source.next(100))) == [row for row in range(rows) if row not in held_out]


def test_no_more_is_read_than_is_needed():
    read = 0

    class Endless:
        def __iter__(self):
            nonlocal read
            while True:
                read += 1
                yield "abcdefghij" * 5

    source = TextRows(Endless(), Letters(), T)
    source.next(100)
    assert 18 <= read <= 150
    source.next(1000)
    assert read <= 400


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_large_file_is_read_piece_by_piece(kind, tmp_path):
    """Behind the first of 50 MB stand bytes that would be refused, and a place far behind is reached without parsing."""
    line = "a" * 1000
    part = (line + "\n\n" if kind == "txt" else json.dumps({"text": line}) + "\n").encode()
    bad = part.replace(b"aaaa", b"\xff\xfe\xff\xfe")
    path = tmp_path / f"large.{kind}"
    path.write_bytes(part * 1000 + bad * 49_000)
    source = open_rows(path, Letters(), 501)
    assert source.tokenizer.seen < 100_000
    source.next(100)
    far = source.state()
    with pytest.raises(UserError, match=f"line {2001 if kind == 'txt' else 1001} is not UTF-8"):
        source.next(10**6)
    path.write_bytes(part * 100 + bad * 10_000 + part * 100)
    again = open_rows(path, Letters(), 501)
    far["place"][0], far["place"][1] = 10_100, 0
    del far["fingerprint"]  # of the text as it was
    again.load_state(far)
    assert again.next(50).document.unique().tolist() == list(range(10_100, 10_126))  # 52 rows, of which 2 are held out


def test_memory_does_not_grow_with_the_text(tmp_path):
    """What Python holds at most, over 2 MB and over 6 MB of text in 64 KiB documents."""
    import tracemalloc

    peaks = []
    for megabytes in (2, 6):
        path = tmp_path / f"{megabytes}.jsonl"
        path.write_bytes((json.dumps({"text": "a" * 2**16}) + "\n").encode() * (16 * megabytes))
        source = open_rows(path, Letters(), 2048, repeat=False)
        tracemalloc.start()
        while len(source.next(8)):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_long_lines_and_any_unicode_come_through(tmp_path):
    rng = random.Random(5)
    exotic = (
        "".join(chr(c) for c in chain(range(0x20, 0xD800, 97), range(0xE000, 0x110000, 4099))) + "\x0b\x0c\x85\u2029\0"
    )
    long = "".join(rng.choices("abc é漢😀", k=2**19))
    for kind in ("txt", "jsonl", "parquet"):
        folder = tmp_path / kind
        folder.mkdir()
        path, _ = write(kind, folder, [exotic, long, "end"])
        source = open_rows(path, Letters(), 4096, repeat=False)
        parts = [source.next(10**4), *source.held_out(100, 10)]
        rows = sorted(chain.from_iterable(zip(p.row.tolist(), p.tokens, p.document, strict=True) for p in parts))
        tokens, document = (torch.cat([row[at] for row in rows]) for at in (1, 2))
        for number, text in enumerate((exotic, long, "end")):
            kept = tokens[(document == number) & (tokens != 1)].tolist()
            assert kept == [ord(c) for c in text]


def test_halves_of_surrogate_pairs_become_replacement_characters(tmp_path):
    path = tmp_path / "halves.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n{"text": "x"}\n')
    source = opened(str(path), None)
    assert source.next(2).tokens[:, :3].tolist() == [[97, 0xFFFD, 98], [0x1F600, 0, 0]]


def test_plain_text_is_parted_by_blank_lines_of_any_kind(tmp_path, monkeypatch):
    path = tmp_path / "mixed.txt"
    path.write_bytes(b"\xef\xbb\xbf\r\n\r\none\r\nmore\r\n \t\r\n\r\n\ntwo\n\nthree")
    assert list(open_documents(str(path)).read()) == ["one\nmore", "two", "three"]
    assert [list(open_documents(str(path)).read(start)) for start in (2, 3)] == [["three"], []]
    monkeypatch.setattr(text_files, "LONGEST", 8)
    path.write_text("abc\nabc\nabc\n\nab\n\nabcdefghi\nabc")  # 4 bytes to a line: cut behind the second
    cut = ["abc\nabc", "abc", "ab", "abcdefghi", "abc"]
    assert [list(open_documents(str(path)).read(start)) for start in range(6)] == [cut[start:] for start in range(6)]


@pytest.mark.parametrize("kind", FILES)
def test_a_document_by_number_is_the_same_from_everywhere(kind, tmp_path):
    path, documents = write(kind, tmp_path, some_documents())
    every = [list(map(ord, d)) if isinstance(d, str) else list(d) for d in open_documents(path).read()]
    assert every == ids_of(documents)
    for start in (1, len(every) // 3, len(every) - 1, len(every)):
        found = [list(map(ord, d)) if isinstance(d, str) else list(d) for d in open_documents(path).read(start)]
        assert found == every[start:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_has_shrunk_is_refused(kind, tmp_path):
    documents = some_documents()
    path, _ = write(kind, tmp_path, documents)
    source = opened(path)
    source.next(100)
    state = source.state()
    for place in [tmp_path / path, *((tmp_path / path).iterdir() if kind.startswith("folder") else ())]:
        if place.is_file():
            place.unlink()
    if kind.startswith("folder"):
        (tmp_path / path).rmdir()
    write(kind, tmp_path, documents[1 : 6 if kind == "npy in one" else 30])
    shrunk = opened(path)
    with pytest.raises(UserError, match="has changed: it is not the text that was read before the stop") as error:
        shrunk.load_state(state)
    assert path in str(error.value)
    del state["fingerprint"]  # as in states of earlier versions
    shrunk.load_state(state)
    with pytest.raises(UserError, match="has changed: it holds|has changed: document") as error:
        shrunk.next(1)
    assert path in str(error.value)


def test_token_ids_are_used_as_they_are_and_bos_is_not_doubled(tmp_path):
    path = tmp_path / "ids.jsonl"
    lines = [[1, 5, 6], [5, 1, 6], [1], [], [1, 1, 7], list(range(1, 20)), [9]]
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in lines))
    source = opened(str(path), repeat=False)
    rows = listed(source.next(100))
    tokens = [[token for token, _ in row] for row in rows.values()]
    assert tokens == [[1, 5, 6], [1, 5, 1, 6], [1, 1, 7], list(range(1, 11)), [1, *range(11, 20)]]
    assert source.counts == {"documents": 5, "empty_documents": 2, "rows": 5, "tokens": 30}
    none = opened(str(path), None, repeat=False)
    assert [len(row) for row in listed(none.next(100)).values()] == [3, 3, 1, 3, 10, 9]


@pytest.mark.parametrize("wrong", [-1, 0x110000, 2**40])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "npy", "npy in one", "folder"])
def test_token_ids_that_the_tokenizer_lacks_are_refused(kind, wrong, tmp_path):
    ids = np.full((30, 12), 7)
    ids[4, 3] = wrong
    path = tmp_path / f"ids.{kind.split()[0]}"
    match kind:
        case "jsonl":
            path.write_text("".join(json.dumps({"tokens": row}) + "\n" for row in ids.tolist()))
        case "parquet":
            parquet(path, tokens=ids.tolist())
        case "folder":
            path.mkdir()
            parquet(path / "part.parquet", tokens=ids.tolist())
        case _:
            np.save(path, ids if kind == "npy" else ids.ravel())
    number = 0 if kind == "npy in one" else 4
    with pytest.raises(UserError) as error:
        opened(str(path)).next(100)
    assert f"{path} document {number} holds token {wrong}, which is not allowed" in str(error.value)
    assert f"tokens 0 to {0x110000 - 1}" in str(error.value)


BAD = {
    "empty.txt": (b"", "is empty; it must hold text"),
    "blank.txt": (b" \n\n \n", "is empty; it must hold text"),
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n \n", "is empty"),
    "empty.parquet": (b"", "is empty"),
    "empty.npy": (b"", "is empty"),
    "short.txt": (b"one", "gives 4 tokens in 1 rows; at least 2 rows of text are needed"),
    "void.jsonl": (b'{"text": ""}\n{"text": null}\n', "gives 0 tokens in 0 rows; at least 2"),
    "lacking.jsonl": (
        b'{"text": "a"}\n{"words": "b", "id": 3}\n',
        'line 2 is not a JSON object with a "text" field, or one of tokens or input_ids; it has words, id',
    ),
    "list.jsonl": (b"[1]\n", 'line 1 is not a JSON object with a "text" field'),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": "b\n', "line 3 is not a JSON object"),
    "deep.jsonl": (b"[" * 200_000, "line 1 is not a JSON object"),
    "number.jsonl": (b'{"text": 5}\n', "line 1, field text, holds int 5; it must hold text or token ids"),
    "nested.jsonl": (b'{"text": "a"}\n{"tokens": [[1], [2, 3]]}\n', "line 2, field tokens, holds list"),
    "floats.jsonl": (b'{"tokens": [1.5, 2]}\n', r"line 1, field tokens, holds list \[1.5, 2\]; it must hold text or"),
    "words.jsonl": (b'{"tokens": ["EU", "rejects"]}\n', "line 1, field tokens, holds list"),
    "truths.jsonl": (b'{"tokens": [true]}\n', "line 1, field tokens, holds list"),
    "huge.jsonl": (b'{"tokens": [99999999999999999999999]}\n', "line 1, field tokens, holds list"),
    "binary.txt": (b"fine\nstill\n\xff\xfe\x00", "line 3 is not UTF-8"),
    "binary.jsonl": (b'{"text": "a"}\n{"text": "\xff"}', "line 2 is not UTF-8"),
    "not.parquet": (b"PAR? no", "can't be read"),
    "not.npy": (b"\x93NUMPX no", "can't be read"),
}


def refused(path, *words, **options):
    with pytest.raises(UserError) as error:
        opened(str(path), **options).next(100)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("name", BAD)
def test_text_that_cannot_be_used_is_named(name, tmp_path):
    content, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        opened(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_arrays_and_tables_that_cannot_be_used_are_named(tmp_path):
    for name, array in (("floats", np.ones((30, 4))), ("cube", np.ones((3, 4, 5), np.int32)), ("scalar", np.array(3))):
        np.save(tmp_path / f"{name}.npy", array)
        refused(tmp_path / f"{name}.npy", f"holds {array.dtype} with {array.ndim} dimensions; it must hold integers")
    np.save(tmp_path / "objects.npy", np.array([{}, []], object))
    refused(tmp_path / "objects.npy", "can't be read")
    np.save(tmp_path / "none.npy", np.ones((0, 4), int))
    refused(tmp_path / "none.npy", "is empty")
    np.save(tmp_path / "cut.npy", np.ones((3000, 4), int))
    parquet(tmp_path / "cut.parquet", text=some_documents())
    for name in ("cut.npy", "cut.parquet"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        refused(tmp_path / name, "can't be read")
    parquet(tmp_path / "other.parquet", body=["a"] * 30, id=[1] * 30)
    refused(tmp_path / "other.parquet", "no 'text' column", "tokens or input_ids", "it has body, id")
    parquet(tmp_path / "numbers.parquet", text=[4] * 30)
    refused(tmp_path / "numbers.parquet", "document 0, column text, holds int 4")
    parquet(tmp_path / "gaps.parquet", tokens=[[3, 4], [3, None]])
    refused(tmp_path / "gaps.parquet", "document 1, column tokens, holds ndarray")
    parquet(tmp_path / "spoilt.parquet", text=[f"{n} {'é' * 200}" for n in range(2000)])
    whole = bytearray((tmp_path / "spoilt.parquet").read_bytes())
    whole[20:2000] = b"\xa5" * 1980
    (tmp_path / "spoilt.parquet").write_bytes(whole)
    refused(tmp_path / "spoilt.parquet", "can't be read")


def test_folders_and_names_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "corpus.txt").write_text("abc\n\nabc")
    refused(tmp_path / "corpse.txt", "does not exist; did you mean corpus.txt?")
    refused("corpse.jsonl", "does not exist")
    refused("some/corpse.jsonl", "does not exist")
    refused("someone/stories", "can't be loaded")
    (tmp_path / "void").mkdir()
    refused(tmp_path / "void", "can't be loaded")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jsonl").write_text('{"body": "a"}\n' * 3)
    refused(tmp_path / "other", 'a.jsonl line 1 is not a JSON object with a "text" field', "it has body")
    (tmp_path / "spoilt").mkdir()
    (tmp_path / "spoilt" / "a.txt").write_bytes(b"ab\n\n\xff\n")
    refused(tmp_path / "spoilt", "a.txt line 3 is not UTF-8")


def test_a_field_of_text_may_have_any_name(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text('{"story": "abc", "tokens": [5]}\n{"story": "q", "tokens": [6]}\n{"story": "de"}\n')
    rows = listed(*opened(str(path), None, text_field="story").held_out(1, 1))
    assert rows == {2: [(ord("d"), 2), (ord("e"), 2)]}
    train = listed(opened(str(path), None, text_field="story", repeat=False).next(9))
    assert train == {0: [(ord(c), 0) for c in "abc"], 1: [(ord("q"), 1)]}
    refused(path, "stream.text_field: storey is not allowed", "line 1 has story, tokens (did you", text_field="storey")


def test_a_real_tokenizer_meets_special_tokens_in_text_and_long_texts(recwarn, capfd):
    from temposae.engine.stream.model_loading import TESTBED
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(TESTBED)
    language = Language()
    texts = [language.document(number, labelled=False).text for number in range(40)]
    source = TextRows([*texts, "<bos> hey <pad> <eos> <unk>", "the " * 5000], tokenizer, 128, repeat=False)
    rows = source.next(30)
    expected = torch.from_numpy(language.tokens(0, 32)[0])[rows.row]
    expected[torch.arange(30), (expected != PAD).sum(1) - 1] = PAD  # texts have no <eos>
    assert torch.equal(rows.tokens, expected)
    while len(last := source.next(10)):
        if 40 in last.document:
            assert last.tokens[last.document == 40].tolist() == [1, *tokenizer.convert_tokens_to_ids(["hey"]), 0, 2, 3]
    assert not recwarn.list
    assert capfd.readouterr().err == ""


def test_documents_of_the_embedded_language_are_rows():
    source = open_text(StreamConfig(), None, seed=3)
    assert isinstance(source, EmbeddedRows)
    language = Language(seed=3)
    first, second = source.next(5), source.next(7)
    tokens = torch.cat([first.tokens, second.tokens])
    assert torch.equal(tokens, torch.from_numpy(language.tokens(0, 12)[0]))
    assert torch.cat([first.row, second.row]).tolist() == list(range(12))
    for rows in (first, second, *source.held_out(5, 2)):
        for row in range(len(rows)):
            length = int(rows.length[row])
            assert rows.tokens[row, 0] == BOS
            assert PAD not in rows.tokens[row, :length]
            assert rows.document[row].tolist() == [int(rows.row[row])] * length + [-1] * (128 - length)
    assert source.counts == {"documents": 12, "empty_documents": 0, "rows": 12, "tokens": int((tokens != PAD).sum())}
    held_out = list(source.held_out(5, 2))
    assert [rows.row.tolist() for rows in held_out] == [
        [HELD_OUT, HELD_OUT + 1],
        [HELD_OUT + 2, HELD_OUT + 3],
        [HELD_OUT + 4],
    ]
    fresh = EmbeddedRows(128, seed=3)
    fresh.load_state(source.state())
    assert same(fresh.next(4), source.next(4))
    assert (fresh.counts, fresh.epoch) == (source.counts, 0)
    short = EmbeddedRows(20).next(2)
    assert short.tokens.shape == (2, 20)
    assert short.length.tolist() == [20, 20]


def test_what_the_embedded_language_lacks_is_refused():
    with pytest.raises(UserError, match="stream.context: 129 is not allowed; the embedded language has at most 128"):
        open_text(StreamConfig(context=129), None, seed=0)
    with pytest.raises(UserError, match="stream.bos: false is not allowed without data"):
        open_text(StreamConfig(bos=False), None, seed=0)
    with pytest.raises(UserError, match="data: gemma needs text"):
        open_text(StreamConfig(model="gemma"), None, seed=0)
