"""A person's own activations: every shape that they come in, the same result after a stop, and a line for what is wrong."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from temposae.engine.config import MaskConfig, SAEConfig, StreamConfig, TrainConfig
from temposae.engine.errors import UserError
from temposae.engine.stream import ActivationStream, ArraySource
from temposae.engine.stream.arrays import open_file
from temposae.engine.train import train

from ..stepping import stopped_after

M, R, T, D = 9000, 300, 24, 16
SAE = SAEConfig(d_in=D, d_sae=64, k=4)
SETTINGS = TrainConfig(tokens=12_000, batch=256, log_every_steps=10)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    """[M, D] of few directions, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(24, D, generator=generator)
    on = (torch.rand(M, 24, generator=generator) < 0.1) * torch.rand(M, 24, generator=generator)
    return on @ directions + 0.01 * torch.randn(M, D, generator=generator)


def served(own: ArraySource, count: int = 10**6):
    found = []
    while len(found) < count and (batch := own.next()) is not None:
        found.append(batch)
    return found


def test_an_array_is_read_once_an_epoch_but_for_the_rows_held_out(x):
    own = ArraySource(x, repeat=False, seed=3)
    found = served(own)
    row = torch.cat([batch.row for batch in found])
    assert torch.equal(row.sort().values, torch.arange(M - M // 20))
    assert torch.equal(torch.cat([batch.x for batch in found]), x[row])
    held_out = torch.cat([batch.row for batch in own.held_out()])
    assert torch.equal(held_out, torch.arange(M - M // 20, M))
    assert (torch.cat([batch.pos for batch in found]) == 0).all()
    assert not torch.equal(row, row.sort().values)


def test_rows_have_positions(x):
    own = ArraySource(x[: R * T].view(R, T, D), repeat=False)
    assert own.positions == T
    for batch in served(own):
        assert torch.equal(batch.x, x[(batch.row * T + batch.pos)])
    given = ArraySource(
        {"x": x, "pos": torch.arange(M) % 50, "document": torch.arange(M) // 50, "token": np.arange(M)}, repeat=False
    )
    assert given.positions == 50
    for batch in served(given):
        assert torch.equal(batch.pos.long(), batch.row % 50)
        assert torch.equal(batch.document, batch.row // 50)
        assert torch.equal(batch.token.long(), batch.row)


def test_every_form_gives_the_same_activations(x, tmp_path):
    np.save(tmp_path / "x.npy", x.numpy())
    save_file({"x": x, "pos": torch.zeros(M, dtype=torch.int32)}, tmp_path / "x.safetensors")
    torch.save(x, tmp_path / "x.pt")
    torch.save({"x": x}, tmp_path / "dict.pt")
    forms = [x.numpy(), np.load(tmp_path / "x.npy", mmap_mode="r"), x.double().numpy(), x.numpy().astype(">f4")]
    forms += [open_file(str(tmp_path / name)) for name in ("x.npy", "x.safetensors", "x.pt", "dict.pt")]
    expected = served(ArraySource(x), 5)
    for form in forms:
        found = served(form if isinstance(form, ArraySource) else ArraySource(form), 5)
        assert all(torch.equal(a.x, b.x) and torch.equal(a.row, b.row) for a, b in zip(expected, found, strict=True))


def test_chunks_come_in_their_order(x):
    chunks = [x[:100], (x[100:150], torch.arange(50)), {"x": x[150:400], "token": torch.arange(250)}]
    once = served(ArraySource(iter(chunks), positions=64))
    assert torch.equal(torch.cat([batch.x for batch in once]), x[:400])
    assert torch.equal(once[1].pos, torch.arange(50, dtype=torch.int32))
    assert torch.equal(torch.cat([batch.row for batch in once]), torch.arange(400))
    again = served(ArraySource(chunks, positions=64), 7)
    assert torch.equal(again[3].x, x[:100])


FORMS = {
    "array": lambda x: x,
    "rows": lambda x: x[: R * T].view(R, T, D),
    "list of chunks": lambda x: list(x.split(700)),
    "one pass": lambda x: (part for part in torch.cat([x, x]).split(700)),
}


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, id=name, marks=() if name == "array" else pytest.mark.slow) for name, form in FORMS.items()],
)
def test_a_stopped_run_resumes_to_the_same_weights(x, tmp_path, form):
    whole = train(form(x), SAE, SETTINGS, out=tmp_path / "whole")
    assert whole.metrics[-1]["fvu"] < 0.7 * whole.metrics[0]["fvu"]
    settings = SETTINGS.model_copy(update={"checkpoint_every_steps": 8})
    expected = train(form(x), SAE, settings)
    with stopped_after(20):
        train(form(x), SAE, settings, out=tmp_path / "half")
    found = train(form(x), SAE, settings, out=tmp_path / "half", resume=True)
    for key, value in expected.sae.state_dict().items():
        assert torch.equal(value, found.sae.state_dict()[key]), key


def test_held_out_scores_are_those_of_the_last_rows(x):
    run = train(x, SAE, SETTINGS)
    last = x[-(M // 20) :]
    x_hat = run.sae(last)
    expected = 1 - float((last - x_hat.detach()).square().sum() / (last - last.mean(0)).square().sum())
    assert run.held_out["sae"]["explained_variance"] == pytest.approx(expected, abs=1e-4)
    assert run.held_out["sae"]["tokens"] == M // 20
    assert run.held_out["random"]["explained_variance"] < expected
    assert train(list(x.split(500)), SAE, SETTINGS).held_out is None


def bad(x: torch.Tensor, row: int) -> torch.Tensor:
    x = x.clone()
    x[row, 3] = torch.nan
    return x


WRONG = {
    "ints": (lambda x: x.long(), "activations: x int64 .* floating point"),
    "rank": (lambda x: x[0], r"activations: x \[16\] .* \[M, D\] or \[R, T, D\]"),
    "empty": (lambda x: x[:0], r"activations: x \[0, 16\] .* holds no activations"),
    "one row": (lambda x: x[:1], "1 rows; at least 2"),
    "a string": (lambda x: "x.npy", "activations: a str is not allowed"),
    "nothing": (lambda x: [], "activations: .* is empty"),
    "a chunk of text": (lambda x: ["abc"], "a str as chunk is not allowed"),
    "no x": (lambda x: {"y": x}, "has y; it must have x"),
    "pos of another shape": (lambda x: {"x": x, "pos": torch.arange(5)}, r"pos \[5\] of .*; x needs \[9000\]"),
    "pos of floats": (lambda x: {"x": x, "pos": torch.zeros(M)}, "pos float32 of .* must be integer"),
    "negative pos": (lambda x: {"x": x, "pos": torch.arange(M) - 5}, "position -.* is not allowed"),
    "width of a chunk": (lambda x: [x[:50], x[:50, :5]], "width 5 of a chunk .* is not allowed; the first chunk has 16"),
    "pos of a later chunk": (lambda x: [(x[:5], torch.arange(5)), (x[:9], torch.arange(9))], "position 5 .* 0 to 4"),
    "nan": (lambda x: bad(x, 17), "row 17 of the activations holds NaN"),
    "nan in a chunk": (lambda x: [x[:100], bad(x[:100], 7)], "row 107 of the activations holds NaN"),
    "width": (lambda x: x[:, :8], "sae.d_in: 16 .* width 8"),
}  # fmt: skip


@pytest.mark.parametrize(("form", "words"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(x, form, words):
    with pytest.raises(UserError, match=words) as error:
        train(form(x), SAE, SETTINGS)
    assert len(str(error.value).splitlines()) == 1


def test_a_mask_needs_positions(x):
    masked = SAE.model_copy(update={"mask": MaskConfig(kind="ranges", positions=T)})
    with pytest.raises(UserError, match=r"sae.mask.kind: ranges is not allowed; .* no positions"):
        train(x, masked, SETTINGS)
    train(x[: R * T].view(R, T, D), masked, SETTINGS)


def test_files_that_are_none_are_named(tmp_path, x):
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npy").write_text("the boats")
    (tmp_path / "text.safetensors").write_text("the boats")
    (tmp_path / "text.pt").write_text("the boats")
    (tmp_path / "x.csv").write_text("1,2")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    torch.save({"x": SAE}, tmp_path / "objects.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    save_file({"y": x}, tmp_path / "y.safetensors")
    for name, words in {
        "empty.npy": "is empty", "text.npy": "can't be read",
        "text.safetensors": "can't be read", "text.pt": "can't be read",
        "x.csv": "must end with .npy", "objects.npy": "pickled objects", "objects.pt": "pickled objects",
        "list.pt": "holds a list", "y.safetensors": "must have x", "none.npy": "does not exist",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"activations: .*{words}") as error:
            open_file(str(tmp_path / name))
        assert len(str(error.value).splitlines()) == 1
    np.save(tmp_path / "x.npy", x.numpy())
    with pytest.raises(UserError, match="stream.data: a.txt is not allowed with activations"):
        ActivationStream(StreamConfig(activations=str(tmp_path / "x.npy"), data="a.txt"))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("form", ["npy", "safetensors", "memmap"])
def test_a_file_that_is_cut_while_it_is_read_is_named(x, form, order, tmp_path):
    """And doesn't kill the process, as reading a map of it would."""
    path = tmp_path / f"acts.{'safetensors' if form == 'safetensors' else 'npy'}"
    if form == "safetensors":
        save_file({"x": x, "pos": torch.arange(M) % 7}, path)
    else:
        np.save(path, np.asarray(x.numpy(), order=order))
    own = (
        ArraySource(np.load(path, mmap_mode="r"), repeat=False)
        if form == "memmap"
        else open_file(str(path), repeat=False)
    )
    whole = ArraySource({"x": x, "pos": torch.arange(M) % 7} if form == "safetensors" else x, repeat=False)
    assert torch.equal(own.next().x, whole.next().x)
    assert [torch.equal(a.x, b.x) for a, b in zip(own.held_out(), whole.held_out(), strict=True)]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 5)
    with pytest.raises(UserError, match=r"^activations: .*acts\.\w+ has been cut since it was"):
        list(iter(own.next, None))


@pytest.mark.parametrize("form", ["npy", "array", "rows"])
def test_activations_that_were_edited_are_not_gone_on_with(x, form, tmp_path):
    def opened(values):
        if form == "array":
            return ArraySource(values)
        shaped = values[: R * T].view(R, T, D) if form == "rows" else values
        np.save(tmp_path / "acts.npy", shaped.numpy())
        return open_file(str(tmp_path / "acts.npy"))

    state = opened(x).state()
    opened(x.clone()).load_state(state)
    edited = x.clone()
    edited[0, 3] += 1
    for other in (edited, x[25:]):
        with pytest.raises(UserError, match="has changed; it is not what was read before the stop"):
            opened(other).load_state(state)


def test_headers_that_lie_about_sizes_are_named(x, tmp_path):
    save_file({"x": x}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    larger = content[8 : 8 + length].replace(b"[9000,16]", b"[9999,16]")
    for bad in (
        (2**60).to_bytes(8, "little") + content[8:],
        content[:8] + larger + content[8 + length :],
        content[: len(content) // 2],
    ):
        (tmp_path / "a.safetensors").write_bytes(bad)
        with pytest.raises(UserError, match=r"^activations: .*a.safetensors can't be read.*header says"):
            open_file(str(tmp_path / "a.safetensors"))
    np.save(tmp_path / "a.npy", x.numpy())
    content = (tmp_path / "a.npy").read_bytes()
    for bad in (content.replace(b"(9000, 16)", b"(9000,999)"), content[:-1]):
        (tmp_path / "a.npy").write_bytes(bad)
        with pytest.raises(UserError, match=r"^activations: .*a.npy can't be read; its header says"):
            open_file(str(tmp_path / "a.npy"))


@pytest.mark.parametrize("kind", ["constant", "zero", "a constant that is large"])
def test_activations_that_do_not_vary_are_refused(kind, tmp_path):
    same = {"constant": 0.3, "zero": 0.0, "a constant that is large": 1e9}[kind]
    with pytest.raises(UserError, match=r"^activations: those at x don't vary, all [\d,]+ tokens .* nothing to learn"):
        train(torch.full((2000, D), same), SAE, TrainConfig(tokens=2000, batch=200), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_held_out_rows_that_do_not_vary_have_no_explained_variance(x):
    """One held-out row, or several that are alike, have no variance, whatever is reconstructed."""
    for values in (x[:30], torch.cat([x[:400], torch.full((30, D), 0.7)])):
        run = train(values, SAE, TrainConfig(tokens=2000, batch=100))
        for scores in run.held_out.values():
            assert scores["explained_variance"] is None
            assert scores["fvu"] is None
            assert "don't vary; there is no variance to explain" in scores["warnings"][0]
            assert 0 < scores["l0"] <= 4


@pytest.mark.parametrize("exponent", [-46, 46])
def test_units_of_activations_do_not_matter(x, exponent):
    """By a power of two, to the bit."""
    settings = TrainConfig(tokens=4000, batch=200, log_every_steps=10)
    fvu = [train(values, SAE, settings).metrics[-1]["fvu"] for values in (x, x * 2.0**exponent)]
    assert fvu[0] == pytest.approx(fvu[1], rel=1e-6)


@pytest.mark.parametrize("max_norm", ["auto", None])
@pytest.mark.parametrize("factor", [1e19, 1e25, 1e-20, 1e-25])
def test_norms_that_float32_cannot_square_are_named(x, factor, max_norm):
    stream = ActivationStream(StreamConfig(max_norm=max_norm), tokens=2000, batch=200, own=ArraySource(x * factor))
    with pytest.raises(UserError, match=r"^activations: a typical norm of \S+ at x is not allowed; it must be between"):
        train(stream, SAE, TrainConfig(tokens=2000, batch=200))
