"""The ring buffer: nothing lost or doubled, well mixed, and a place to go back to at any point."""

import pytest
import torch
from temposae.engine.config import SAEConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.stream.buffer import Batch, RingBuffer
from temposae.engine.stream.quantize import narrowed, widen_
from temposae.engine.train import train

WIDTHS = {"a": 3, "b": 5}


def counted(chunk: int = 37, end: int | None = None, context: int | None = None):
    """A source of numbered items: `row` is the number, every activation holds it."""
    at = 0

    def fill() -> Batch | None:
        nonlocal at
        numbers = torch.arange(at, at + chunk if end is None else min(at + chunk, end))
        at += len(numbers)
        if not len(numbers):
            return None
        if context is not None:
            numbers = numbers[:, None].expand(-1, context)
        acts = {hook: numbers[..., None].expand(*numbers.shape, d).float() for hook, d in WIDTHS.items()}
        kept = None if context is None else (torch.arange(context) <= numbers % context)
        return Batch(acts, (numbers % 11).int(), numbers.int(), numbers // 7, numbers, kept)

    return fill


def ring(capacity: int = 100, seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> RingBuffer:
    fill = counted(
        **{key: options.pop(key) for key in ("chunk", "end") if key in options}, context=options.get("context")
    )
    generator = torch.Generator().manual_seed(seed)
    return RingBuffer(capacity, WIDTHS, dtype, torch.device("cpu"), fill, generator, **options)


def served(buffer: RingBuffer, n: int, times: int) -> list[Batch]:
    return [buffer.next(n).clone() for _ in range(times)]


@pytest.mark.parametrize(("n", "chunk"), [(10, 37), (50, 1), (7, 300), (33, 100)])
def test_every_item_is_served_once_with_all_that_belongs_to_it(n, chunk):
    buffer = ring(chunk=chunk)
    batches = served(buffer, n, 60)
    rows = torch.cat([batch.row for batch in batches])
    assert len(rows) == 60 * n
    assert len(rows.unique()) == len(rows)
    assert int(rows.max()) < 60 * n + 100  # no item is passed over for longer than the buffer is deep
    for batch in batches:
        assert list(batch.acts) == ["a", "b"]
        assert all((x == batch.row[:, None]).all() for x in batch.acts.values())
        assert torch.equal(batch.pos.long(), batch.row % 11)
        assert torch.equal(batch.token.long(), batch.row)
        assert torch.equal(batch.document, batch.row // 7)


@pytest.mark.parametrize(("capacity", "n"), [(100, 10), (100, 40), (100, 50), (3000, 10), (3000, 200)])
def test_no_more_is_read_than_is_wanted_and_the_last_items_come_mixed(capacity, n):
    """A buffer larger than the run fills only as far as the run needs; who asks for more gets more."""
    buffer = ring(capacity, chunk=20, item_limit=1000)
    rows = torch.cat([batch.row for batch in served(buffer, n, 1000 // n)])
    assert sorted(rows.tolist()) == list(range(1000))
    assert int(buffer.state()["numbers"][5]) == 1000  # put in
    assert int(rows[-20:].min()) < 980  # not the last chunk by itself
    more = torch.cat([batch.row for batch in served(buffer, n, 30)])
    assert len(torch.cat([rows, more]).unique()) == len(rows) + 30 * n
    resumed = ring(capacity, chunk=20, item_limit=1000)
    resumed.load_state({key: value.clone() for key, value in buffer.state().items()})
    resumed._fill = buffer._fill
    assert len(resumed.next(n).row) == n


def test_a_finite_source_is_served_to_its_end_and_no_further():
    for end in (1, 40, 100, 101, 149, 250, 1000):
        buffer = ring(end=end)
        batches = served(buffer, 10, 120)
        sizes = [len(batch) for batch in batches]
        assert sum(sizes) == end
        assert sizes == sorted(sizes, reverse=True)
        assert len(torch.cat([batch.row for batch in batches]).unique()) == end


@pytest.mark.parametrize(
    "options", [{}, {"end": 333}, {"item_limit": 500}, {"item_limit": 60}, {"context": 6, "item_limit": 500}]
)
def test_what_comes_does_not_depend_on_how_many_items_come_at_a_time(options):
    """Several processes read larger chunks than one does, and are to have its batches."""
    expected = [batch.row.tolist() for batch in served(ring(chunk=1, **options), 13, 60)]
    for chunk in (7, 20, 37, 99, 300):
        assert [batch.row.tolist() for batch in served(ring(chunk=chunk, **options), 13, 60)] == expected, chunk


def test_batches_are_drawn_evenly_from_the_buffer():
    """Of two items of one group in the buffer, a batch holds both as often as a uniform draw does."""
    buffer, n, capacity, pairs, expected = ring(1000), 100, 1000, 0, 0.0
    for _ in range(300):
        batch = buffer.next(n)
        of_group = torch.bincount(batch.document)
        pairs += int((of_group * (of_group - 1) // 2).sum())
        held = torch.bincount(buffer.contents().document)
        expected += float((held * (held - 1) // 2).sum()) * n * (n - 1) / (capacity * (capacity - 1))
    assert pairs == pytest.approx(expected, rel=0.1)
    in_order = next(iter(served(ring(1000, chunk=1000), 100, 1)))
    assert not torch.equal(in_order.row.sort().values, in_order.row)


@pytest.mark.parametrize(
    "options",
    [{}, {"grouped": True}, {"context": 6}, {"dtype": torch.int8}, {"dtype": torch.float8_e4m3fn, "context": 6}],
    ids=["tokens", "grouped", "sequences", "int8", "fp8"],
)
@pytest.mark.parametrize("end", [None, 333])
def test_a_state_goes_on_where_it_was_taken(options, end):
    """At every point: the buffer's own state, with the source put where it was."""
    for before in range(0, 30, 3):
        buffer = ring(end=end, **options)
        served(buffer, 13, before)
        state = {key: value.clone() for key, value in buffer.state().items()}
        random = buffer._generator.get_state()
        other = ring(seed=9, end=end, **options)
        served(other, 20, 3)
        other.load_state(state)
        other._generator.set_state(random)
        other._fill = buffer._fill  # the source goes on for whoever asks
        resumed = served(other, 13, 25)
        again = ring(end=end, **options)
        expected = served(again, 13, before + 25)[before:]
        for one, two in zip(resumed, expected, strict=True):
            assert all(torch.equal(value, two.tensors()[key]) for key, value in one.tensors().items())


def test_grouped_batches_are_the_same_in_order_of_position():
    plain, grouped = served(ring(), 20, 12), served(ring(grouped=True), 20, 12)
    for one, two in zip(plain, grouped, strict=True):
        assert (two.pos.diff() >= 0).all()
        assert torch.equal(one.row.sort().values, two.row.sort().values)
        assert all((x == two.row[:, None]).all() for x in two.acts.values())
        assert (one.pos.diff() < 0).any()


def test_sequences_stay_whole_and_say_which_tokens_count():
    for batch in served(ring(context=6), 10, 12):
        assert batch.x.shape == (10, 6, 3)
        assert (batch.x == batch.row[:, :1, None]).all()
        flat = batch.flat()
        assert len(flat) == int((batch.row[:, 0] % 6 + 1).sum())
        assert flat.x.shape == (len(flat), 3)
        assert (flat.x == flat.row[:, None]).all()
        assert flat.kept is None


def test_memory_is_taken_once_and_batches_are_overwritten():
    buffer = ring()
    first = buffer.next(20)
    places = [value.data_ptr() for value in first.tensors().values()]
    kept = first.clone()
    for _ in range(20):
        batch = buffer.next(20)
        assert [value.data_ptr() for value in batch.tensors().values()] == places
        assert buffer.contents().x.data_ptr() == buffer._slots.x.data_ptr()
    assert not torch.equal(kept.row, first.row)


def test_slots_are_filled_while_others_are_served():
    """Not all at once: after each batch, at most one filling is outstanding."""
    calls: list[int] = []
    buffer = ring(1000, chunk=50)
    inner = buffer._fill
    buffer._fill = lambda: calls.append(1) or inner()
    buffer.next(10)
    per_batch = []
    for _ in range(200):
        before = len(calls)
        buffer.next(10)
        per_batch.append(len(calls) - before)
    assert max(per_batch) <= 2
    assert sum(per_batch) == pytest.approx(200 * 10 / 50, abs=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("context", [None, 6])
def test_what_is_not_finite_is_named_before_it_is_served(value, context, dtype):
    inner = counted(context=context)

    def broken() -> Batch:
        batch = inner()
        assert batch is not None
        batch = batch.clone()
        bad = batch.row == 60
        batch.acts["b"][bad] = value
        return batch

    buffer = ring(context=context, dtype=dtype)
    buffer._fill = broken
    with pytest.raises(
        UserError,
        match=r"activations: (1 of 100|6 of 600) at b are NaN or infinite, the first at position 5 of document 8",
    ):
        buffer.next(10)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_one_byte_is_as_near_as_the_format_allows(dtype):
    """int8: half a step of max |x| / 127. e4m3: 2^-4 of the value, or half its least step, 2^-10 of scale."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 40, generator=draw) * torch.logspace(-3, 4, 500)[:, None]
    x[7] = 0
    codes, scale = narrowed(x, dtype)
    assert codes.dtype == dtype
    error = (widen_(torch.empty_like(x), codes, scale).double() - x.double()).abs()
    step = x.double().abs().amax(1, keepdim=True) / (127 if dtype == torch.int8 else 448)
    allowed = step / 2 if dtype == torch.int8 else torch.maximum(x.double().abs() * 2**-4, step * 2**-10)
    assert (error <= allowed * (1 + 1e-6)).all()
    assert torch.equal(error[7], torch.zeros(40).double())
    assert (codes.float().abs().amax(1)[x.abs().amax(1) > 0] == (127 if dtype == torch.int8 else 448)).all()


@pytest.mark.parametrize("dtype", [pytest.param("int8", marks=pytest.mark.slow), "fp8"])
def test_a_buffer_of_one_byte_tells_its_error_and_trains_nearly_as_well(stream_of, dtype):
    exact, stream = stream_of(buffer_dtype="float32"), stream_of(buffer_dtype=dtype)
    held = sum(value.nbytes for value in stream._buffer._slots.acts.values())
    assert held == 4096 * 128
    one, two = exact.next(1024).clone(), stream.next(1024)
    assert two.x.dtype == torch.bfloat16
    assert torch.equal(one.row, two.row)
    error = float((one.x - two.x.float()).square().sum() / one.x.square().sum())
    assert stream.buffer_error == pytest.approx(error, rel=0.3)
    assert 0 < stream.buffer_error < 1e-3
    assert exact.buffer_error is None
    sae, settings = SAEConfig(d_in=128, d_sae=96, k=4), TrainConfig(tokens=6000, batch=256, lr=2.6e-3, control=False)
    fvu = [train(stream_of(buffer_dtype=kind), sae, settings).metrics[-1] for kind in ("float32", dtype)]
    assert fvu[1]["fvu"] == pytest.approx(fvu[0]["fvu"], rel=0.02)
    assert 0 < fvu[1]["buffer_error"] < 1e-3
    assert "buffer_error" not in fvu[0]
