"""Streams: positions that are true, filters that count, batches that are mixed, places that can be gone back to."""

import json
from types import SimpleNamespace

import pytest
import torch
from temposae.engine.config import StreamConfig
from temposae.engine.errors import UserError
from temposae.engine.stream import ActivationStream, Batch
from temposae.engine.stream.model_source import special_tokens
from temposae.engine.stream.token_rows import RowSource, TextRows
from temposae.engine.testbed.language import BOS, HELD_OUT, Language
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")
MODES = ("tokens", "grouped", "sequences")


def batches(stream: ActivationStream, n: int, count: int) -> list[Batch]:
    return [stream.next(n).clone() for _ in range(count)]


def all_of(served: list[Batch]) -> Batch:
    """One flat batch of many."""
    flat = [batch.flat().tensors() for batch in served]
    return Batch.from_tensors({key: torch.cat([one[key] for one in flat]) for key in flat[0]})


def equal(one: Batch, two: Batch) -> bool:
    return all(torch.equal(value, two.tensors()[key]) for key, value in one.tensors().items())


@pytest.fixture
def over(testbed, texts):
    """over(hooks, **settings): a stream over those documents, and a source that reads them from the beginning."""

    def make(hooks=HOOKS, repeat=True, of=texts, **settings) -> tuple[ActivationStream, RowSource]:
        source, again = (TextRows(of, testbed.tokenizer, 64, repeat=repeat, name="texts") for _ in range(2))
        config = {"buffer_tokens": 4096, "rows_per_forward": 16, "context": 64, "repeat": repeat} | settings
        return ActivationStream(StreamConfig(**config), model=testbed, rows=source, hooks=hooks), again

    yield make
    testbed.use(layers=[1])


@pytest.mark.parametrize(
    ("mode", "packing"),
    [("tokens", True), ("sequences", False)]
    + [
        pytest.param(mode, packing, marks=pytest.mark.slow)
        for mode, packing in (("tokens", False), ("grouped", False), ("grouped", True), ("sequences", True))
    ],
)
def test_ten_thousand_activations_are_what_they_say(over, mode, packing):
    """Read the text again, run the model on the stated row: at the stated position are the stated token, of the stated
    document, and that activation at each hook."""
    stream, again = over(packing=packing, mode=mode)
    served = all_of(batches(stream, 1024, 14))
    pick = torch.randperm(len(served), generator=torch.Generator().manual_seed(0))[:10_000]
    assert len(pick) == 10_000
    served = served[pick]
    rows = again.next(1000)
    place = torch.full((int(rows.row.max()) + 1,), -1).scatter_(0, rows.row, torch.arange(1000))[served.row]
    assert int(place.min()) >= 0  # a training row
    pos = served.pos.long()
    assert torch.equal(rows.tokens[place, pos].int(), served.token)
    assert torch.equal(rows.document[place, pos], served.document)
    assert (pos < rows.length[place]).all()
    used = place.unique()
    known = {hook: torch.cat([stream.model.harvest(t)[hook] for t in rows.tokens[used].split(16)]) for hook in HOOKS}
    for hook in HOOKS:
        expected = known[hook][torch.searchsorted(used, place), pos].bfloat16()
        assert torch.allclose(served.acts[hook].float(), expected.float(), rtol=2**-7, atol=1e-3)
        assert (
            served.acts[hook] == expected
        ).float().mean() > 0.99  # but for rounding, another batch being another sum
    assert torch.bincount(pos).gt(0).sum() == 63


@pytest.mark.parametrize("mode", ["tokens", pytest.param("grouped", marks=pytest.mark.slow), "sequences"])
def test_every_token_is_served_once_in_an_epoch(over, mode):
    """A text read once, to its end: its training tokens, no more and no less, and the counts say so."""
    stream, again = over(mode=mode, repeat=False)
    served = []
    while len(batch := stream.next(500)):
        served.append(batch.clone())
    found = all_of(served)
    rows = again.next(10**6)
    assert len((found.row * 64 + found.pos).unique()) == len(found)
    special = torch.isin(rows.tokens, special_tokens(stream.model.tokenizer))
    text = torch.arange(64) < rows.length[:, None]
    assert len(found) == int((text & ~special).sum())
    assert torch.equal(found.token.long().sort().values, rows.tokens[text & ~special].sort().values)
    counts = stream.counts
    assert counts["tokens"] == int(text.sum()) == len(found) + counts["special"]
    assert counts["rows"] == len(rows)
    assert counts["high_norm"] == 0
    assert len(stream.next(500)) == 0


def test_special_tokens_are_left_out_unless_asked_for(over):
    kept, _ = over()
    assert not torch.isin(all_of(batches(kept, 512, 10)).token, special_tokens(kept.model.tokenizer)).any()
    whole, again = over(drop_special=False)
    found = all_of(batches(whole, 512, 10))
    assert (found.token[found.pos == 0] == BOS).all()
    assert (found.pos == 0).any()
    assert whole.counts["special"] == 0
    rows = again.next(64)
    assert torch.equal(whole.read(rows)[1], torch.arange(64) < rows.length[:, None])
    assert not kept.read(rows)[1][:, 0].any()


@pytest.mark.parametrize("max_norm", [5.0, "auto"])
def test_massive_activations_are_left_out_and_counted(over, monkeypatch, max_norm):
    stream, again = over(hooks=HOOKS[:1], max_norm=max_norm)
    real = stream.model.harvest

    def with_sinks(tokens, length=None):
        x = real(tokens, length)[HOOKS[0]].clone()
        x[:, 7] *= 100
        return {HOOKS[0]: x}

    monkeypatch.setattr(stream.model, "harvest", with_sinks)
    found = all_of(batches(stream, 512, 10))
    assert not (found.pos == 7).any()
    assert (found.pos == 8).any()
    assert 0 < stream.counts["high_norm"] < stream.counts["rows"]
    report = stream.norms.report()
    assert report["positions"] == {"7": stream.counts["high_norm"]}
    assert report["share"] == pytest.approx(report["massive"] / (stream.counts["tokens"] - stream.counts["special"]))
    assert report["variance_share"][HOOKS[0]] > 0.99
    kept = stream.read(again.next(64))[1]  # what every eval reads
    assert not kept[:, 7].any()
    assert kept[:, 8].any()
    off, again = over(hooks=HOOKS[:1], max_norm=None)
    assert (all_of(batches(off, 512, 10)).pos == 7).any()
    assert off.read(again.next(64))[1][:, 7].any()
    assert off.norms.report() is None


def test_short_rows_go_through_the_model_together_and_give_what_they_give_alone(over, texts, monkeypatch):
    """With packing: as many tokens of text in a forward pass, hardly any padding, and positions from 0 in each document."""
    shapes = []
    short = [" ".join(text.split()[: 4 + 13 * i % 60]) for i, text in enumerate(texts)]
    for packing in (False, True):
        stream, again = over(packing=packing, max_norm=None, of=short)
        real = stream.model._read

        def noting(tokens, hooks, real=real):
            shapes[-1].append(tokens.shape)
            return real(tokens, hooks)

        monkeypatch.setattr(stream.model, "_read", noting)
        shapes.append([])
        batches(stream, 1024, 14)
        monkeypatch.undo()
        rows = again.next(100)
        acts, kept = stream.read(rows)
        alone = stream.model.harvest(rows.tokens)
        for hook in HOOKS:
            torch.testing.assert_close(acts[hook][kept], alone[hook][kept], rtol=1e-4, atol=1e-4)
    tokens = [sum(rows * length for rows, length in passes) for passes in shapes]
    assert tokens[1] < 0.7 * tokens[0]
    assert stream.next(1000).pos.min() == 1  # where each document's first word is, behind its <bos>
    assert over()[0].config.packing is True  # of text, unless the settings say otherwise


def test_batches_are_mixed_over_documents(stream_of):
    batch = stream_of().next(256)
    assert len(batch.document.unique()) > 20  # of about 35 in the buffer
    assert (batch.pos.diff() == 1).float().mean() < 0.1


def test_pairs_of_a_document_are_no_more_than_in_a_uniform_draw(over):
    """How often two tokens of a batch are of one document, over the chance of it in a uniform draw from the buffer, and
    over that in a shuffle of the whole text."""
    stream, _ = over(hooks=HOOKS[:1])
    n, met, drawn, everything = 256, 0.0, 0.0, []

    def pairs(document: torch.Tensor) -> float:
        count = torch.bincount(document).double()
        return float((count * (count - 1)).sum() / (len(document) * (len(document) - 1)))

    for _ in range(60):
        batch = stream.next(n)
        held = stream.sample().document
        met, drawn = met + pairs(batch.document), drawn + pairs(held)
        everything.append(batch.document.clone())
    assert met / drawn <= 1.2
    assert met / drawn >= 0.8
    full_shuffle = met / (60 * pairs(torch.cat(everything)))
    print(json.dumps({"over_uniform": round(met / drawn, 3), "over_full_shuffle": round(full_shuffle, 2)}))
    assert full_shuffle > 1  # the buffer is smaller than the text


def test_the_same_seed_gives_the_same_batches(stream_of):
    first, second, other = stream_of(seed=1), stream_of(seed=1), stream_of(seed=2)
    for _ in range(6):
        a, b, c = first.next(1000), second.next(1000), other.next(1000)
        assert equal(a, b)
        assert not torch.equal(a.x, c.x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "served", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_state_goes_on_where_it_was_taken(over, mode, served):
    stream, fresh = over(mode=mode)[0], over(mode=mode)[0]
    batches(stream, 700, served)
    state = {key: value.clone() for key, value in stream.state().items()}
    expected = batches(stream, 700, 6)
    fresh.next(999)  # it has been elsewhere
    fresh.load_state(state)
    assert all(equal(batch, fresh.next(700)) for batch in expected)
    assert fresh.counts == stream.counts


def test_looking_at_a_sample_changes_nothing(stream_of):
    stream, other = stream_of(), stream_of()
    assert len(stream.sample()) == 4096
    assert torch.equal(stream.next(100).x, other.next(100).x)


@pytest.mark.parametrize("mode", MODES)
def test_nan_is_named_with_its_place(over, monkeypatch, mode):
    stream, _ = over(mode=mode)
    real = stream.model.harvest

    def broken(tokens, length=None):
        found = {hook: x.clone() for hook, x in real(tokens, length).items()}
        found[HOOKS[1]][3, 5, 7] = torch.nan
        return found

    monkeypatch.setattr(stream.model, "harvest", broken)
    with pytest.raises(
        UserError, match=rf"of .* at {HOOKS[1]} are NaN or infinite, the first at position 5 of document"
    ):
        stream.next(10)


def test_what_does_not_fit_is_named(stream_of):
    with pytest.raises(UserError, match=r"stream.buffer_tokens: 4096 is not allowed.*twice"):
        stream_of().next(2049)
    with pytest.raises(UserError, match="stream.context: 256 is not allowed"):
        stream_of(context=256)
    with pytest.raises(UserError, match=r"stream.buffer_tokens: 100 is not allowed.*256"):
        stream_of(mode="sequences", buffer_tokens=100)
    with pytest.raises(UserError, match=r"buffer_gb: 0.001 is not allowed with buffer_tokens"):
        stream_of(buffer_gb=0.001)
    assert int(stream_of(context=20).next(1000).pos.max()) == 19


def test_memory_can_be_given_in_bytes(stream_of):
    stream = stream_of(buffer_tokens=None, buffer_gb=0.001)
    assert stream.buffer_tokens == int(1e6) // (128 * 2 + 24)
    held = sum(value.nbytes for value in stream._buffer._slots.tensors().values())
    assert held <= 1e6
    assert stream.config.buffer_tokens == stream.buffer_tokens


def test_held_out_rows_are_never_trained_on(stream_of):
    held_out = list(stream_of().held_out(20))
    assert sum(len(rows.tokens) for rows in held_out) == 20
    assert all((rows.document[rows.document >= 0] >= HELD_OUT).all() for rows in held_out)


def test_rows_without_a_token_to_train_on_are_passed_over(testbed, tmp_path):
    """However many there are between two that have one; in sequences as well."""
    path = tmp_path / "texts.txt"
    texts = [" ".join(Language().document(i).text.split()[:4]) for i in range(2)]
    path.write_text("\n\n".join(["<eos> " * 10] * 100 + texts + ["<pad> " * 5] * 50))
    for mode in ("tokens", "sequences"):
        config = StreamConfig(data=str(path), context=16, rows_per_forward=8, buffer_tokens=64, mode=mode, repeat=False)
        stream = ActivationStream(config, model=testbed)
        served = []
        while len(batch := stream.next(32)):
            served.append(batch.clone().flat())
        found = all_of(served)
        words = testbed.tokenizer.convert_ids_to_tokens(found.token.tolist())
        assert sorted(words) == sorted(testbed.tokenizer.tokenize(" ".join(texts)))
        assert stream.counts["special"] == stream.counts["tokens"] - len(words)


@pytest.mark.parametrize("repeat", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_text_without_a_token_to_train_on_is_named(over, repeat):
    stream, _ = over(max_norm=1.5, repeat=repeat)
    stream.source.special = torch.arange(10**5)
    with pytest.raises(
        UserError, match=r"^data: .*texts.* has no token to train on; all [0-9,]+ that were read are left out \(see"
    ):
        stream.next(10)
    assert stream.source.counts["epoch"] == 2 * repeat


@pytest.mark.parametrize(
    ("unknown", "expected"), [("<unk>", [1, 2]), ("<eos>", [1, 2]), ("<bos>", [1, 2]), (None, [1, 2])]
)
def test_unknown_words_are_text(unknown, expected):
    """Unless what stands for them has another meaning too, as GPT-2's <|endoftext|> has."""
    core = Tokenizer(WordLevel({"<unk>": 0, "<bos>": 1, "<eos>": 2, "word": 3}, unk_token=unknown or "<eos>"))
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", unk_token=unknown)
    assert special_tokens(made).tolist() == expected


def test_a_model_without_text_asks_for_it(testbed):
    model = SimpleNamespace(**{**vars(testbed), "context": 128, "tokenizer": None, "vocabulary": 9, "d_model": 4})
    with pytest.raises(UserError, match="data: gemma needs text"):
        ActivationStream(StreamConfig(model="gemma"), model=model)
