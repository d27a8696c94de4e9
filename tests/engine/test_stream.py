"""Streams: positions that are true, batches that are mixed, places that can be gone back to."""

import json
from types import SimpleNamespace

import pytest
import torch
from temposae.engine.config import StreamConfig
from temposae.engine.errors import UserError
from temposae.engine.stream import ActivationStream
from temposae.engine.stream.text import TextRows, open_text
from temposae.engine.testbed.language import BOS, HELD_OUT, PAD


def test_every_row_is_the_activation_it_says(stream_of):
    """Read the stated document again: at the stated position stand the stated token and that activation (bf16)."""
    stream = stream_of()
    for _ in range(12):  # past two refills
        batch = stream.next(512)
    for document in batch.document.unique():
        rows = stream.text.rows(int(document), 1)
        x = stream.model.activations(rows.tokens)[0]
        mine = batch[batch.document == document]
        assert torch.equal(mine.token.long(), rows.tokens[0, mine.pos.long()])
        assert torch.equal(mine.x, x[mine.pos.long()].bfloat16())


def test_every_token_is_served_once_and_bos_and_padding_never(stream_of):
    stream = stream_of()
    batches = [stream.next(512) for _ in range(30)]
    place = torch.cat([b.document * 128 + b.pos for b in batches])
    assert len(place.unique()) == len(place) == 30 * 512
    token, pos = torch.cat([b.token for b in batches]), torch.cat([b.pos for b in batches])
    assert int(pos.min()) == 1
    assert BOS not in token
    assert PAD not in token
    with_bos = stream_of(drop_bos=False).next(512)
    assert (with_bos.token[with_bos.pos == 0] == BOS).all()
    assert (with_bos.pos == 0).any()


def test_batches_are_mixed_over_documents(stream_of):
    batch = stream_of().next(256)
    assert len(batch.document.unique()) > 20  # of about 35 in the buffer
    assert (batch.pos.diff() == 1).float().mean() < 0.1


def test_the_same_seed_gives_the_same_batches(stream_of):
    first, second, other = stream_of(seed=1), stream_of(seed=1), stream_of(seed=2)
    for _ in range(6):
        a, b, c = first.next(1000), second.next(1000), other.next(1000)
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.pos, b.pos)
        assert not torch.equal(a.x, c.x)


@pytest.mark.parametrize("served", [0, 1, 5], ids="served{}".format)
def test_a_state_goes_on_where_it_was_taken(stream_of, served):
    stream, fresh = stream_of(), stream_of()
    for _ in range(served):
        stream.next(700)
    state = {key: value.clone() for key, value in stream.state().items()}
    expected = [stream.next(700) for _ in range(6)]
    fresh.next(999)  # it has been elsewhere
    fresh.load_state(state)
    for batch in expected:
        again = fresh.next(700)
        assert all(
            torch.equal(getattr(batch, name), getattr(again, name)) for name in ("x", "pos", "token", "document")
        )


def test_looking_at_the_moments_changes_nothing(stream_of):
    stream, other = stream_of(), stream_of()
    mean, norm = stream.moments()
    x = stream._buffer.contents().x.double()
    assert mean == pytest.approx(x.mean(0).float(), rel=1e-4, abs=1e-4)
    assert norm == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-5)
    assert torch.equal(stream.next(100).x, other.next(100).x)


def test_nan_is_named_with_its_place(stream_of, monkeypatch):
    stream = stream_of()
    real = stream.model.activations

    def broken(tokens):
        x = real(tokens).clone()
        x[2, 5, 7] = torch.nan
        return x

    monkeypatch.setattr(stream.model, "activations", broken)
    with pytest.raises(UserError, match="1 of .* NaN or infinite, the first at position 5 of document 2"):
        stream.next(10)


def test_the_batch_must_fit_the_buffer_and_the_context_the_model(stream_of):
    with pytest.raises(UserError, match=r"stream.buffer_tokens: 4096 is not allowed.*twice"):
        stream_of().next(2049)
    with pytest.raises(UserError, match="stream.context: 256 is not allowed"):
        stream_of(context=256)
    assert int(stream_of(context=20).next(1000).pos.max()) == 19


def test_held_out_rows_are_never_trained_on(stream_of):
    held_out = list(stream_of().held_out(20))
    assert sum(len(rows.tokens) for rows in held_out) == 20
    assert all((rows.document >= HELD_OUT).all() for rows in held_out)


class Letters:
    """A tokenizer of single characters."""

    bos_token_id, pad_token_id = 1, 0

    def encode(self, text, **_):
        return [ord(c) for c in text]


@pytest.mark.parametrize("bos", [1, None])
def test_text_is_cut_into_rows_that_lose_nothing(bos):
    texts = [chr(97 + i) * n for i, n in enumerate((3, 25, 1, 0, 9, 10) * 6)]
    tokenizer = Letters()
    tokenizer.bos_token_id = bos
    rows = TextRows(texts, tokenizer, 10, enough_tokens=10**6, name="letters")
    read = {}
    for held_out, count in ((False, len(rows._train)), (True, len(rows._held_out))):
        part = rows.rows(0, count, held_out=held_out)
        for tokens, length, document in zip(part.tokens, part.length, part.document, strict=True):
            ids = tokens[:length].tolist()
            if bos is not None:
                assert ids.pop(0) == bos
            assert (tokens[length:] == 0).all()
            read[int(document)] = read.get(int(document), 0) + len(ids)
            assert set(ids) == {97 + int(document)}
    assert read == {i: len(text) for i, text in enumerate(texts) if text}
    assert len(rows._held_out) == (len(rows._train) + len(rows._held_out)) // 20
    again = rows.rows(len(rows._train), 3)
    assert torch.equal(again.tokens, rows.rows(0, 3).tokens)


def test_reading_stops_when_there_is_enough():
    def endless():
        while True:
            yield "abcdefghij" * 5

    rows = TextRows(endless(), Letters(), 10, enough_tokens=1000, name="endless")
    assert int(rows._length[rows._train].sum()) >= 1000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", " \n\n ", "is empty"),
        ("short.txt", "one", "at least 2 rows"),
        ("bad.jsonl", '{"text": "a"}\n{"words": "b"}\n', 'line 2 is not a JSON object with a "text" field'),
        ("list.jsonl", "[1]\n", "line 1"),
        ("binary.txt", b"\xff\xfe\x00", "UTF-8"),
        ("binary.jsonl", b'{"text": "\xff"}', "UTF-8"),
    ],
)
def test_text_that_cannot_be_used_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        open_text(str(path), "other", Letters(), 10, 1000, 0)
    assert str(path) in str(error.value)


def test_jsonl_and_dataset_folders_are_read(tmp_path):
    lines = "".join(json.dumps({"text": "abc" * 20 + str(i)}) + "\n" for i in range(30))
    (tmp_path / "part.jsonl").write_text(lines)
    direct = open_text(str(tmp_path / "part.jsonl"), "other", Letters(), 10, 10**4, 0).rows(0, 20)
    folder = open_text(str(tmp_path), "other", Letters(), 10, 10**4, 0).rows(0, 20)
    assert torch.equal(direct.tokens, folder.tokens)


def test_a_model_without_text_asks_for_it(testbed):
    model = SimpleNamespace(**{**vars(testbed), "context": 128, "tokenizer": Letters(), "d_model": 4})
    with pytest.raises(UserError, match="data: gemma needs text"):
        ActivationStream(StreamConfig(model="gemma"), model=model)
